"""Narrow copies of a model: the same layers with a share of the channels.

Each tensor of a copy has the name of a tensor of the wide model and the shape of a leading slice of
this tensor. Copies require layers in which every output channel is one row of a weight. Models with
fused gates (gru, lstm) or fused queries, keys and values (transformer, vit) cannot be narrowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from model_zoo.backbones import images, tabular, tokens
from model_zoo.errors import ModelError
from model_zoo.registry import MODELS

# Name of the general model and of the option that sets the width, for each builder.
_WIDTH_OPTIONS = {
    images.cnn: ("cnn", "width"),
    images.resnet: ("resnet", "widths"),
    tabular.mlp: ("mlp", "hidden"),
    tabular.tabular: ("tabular", "width"),
    tokens.text_cnn: ("text_cnn", "width"),
}


def can_narrow(name: str) -> bool:
    """Return whether narrow copies of a model can be created.

    Example:
        >>> from model_zoo import can_narrow
        >>> can_narrow("resnet20"), can_narrow("gru")
        (True, False)
    """
    return name in MODELS and MODELS[name].build in _WIDTH_OPTIONS


def resolve_general_model(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of the general model that `name` configures, and all options of the model.

    For example, `cnn_bn_small` is the general model `cnn` with `width=8` and `norm="batch"`.

    Args:
        name: Name of the model.
        options: Options of the model. Other options have their defaults.

    Raises:
        ModelError: If the model has no narrow copies, or an option is not valid.
    """
    if not can_narrow(name):
        supported = ", ".join(n for n in MODELS if can_narrow(n))
        raise ModelError(f"model {name}: cannot be narrowed; choose from {supported}")
    entry = MODELS[name]
    general_name, _ = _WIDTH_OPTIONS[entry.build]
    return general_name, {
        **MODELS[general_name].options,
        **entry.fixed,
        **entry.check_options(options),
    }


def narrow_options(
    name: str, options: Mapping[str, Any], share: float, scaler: bool = False
) -> tuple[str, dict[str, Any]]:
    """Return the name and options of a narrow copy with a share of every width, rounded up.

    Args:
        name: Name of the wide model.
        options: Options of the wide model.
        share: Share of the channels, greater than 0 and at most 1.
        scaler: Whether the outputs of the copy's layers are divided by `share` (Diao et al.,
            HeteroFL, ICLR 2021, section 3).

    Returns:
        The name of the general model, such as `cnn`, and all options of the copy.

    Raises:
        ModelError: If the model has no narrow copies, or an option is not valid.

    Example:
        >>> from model_zoo import narrow_options
        >>> name, options = narrow_options("cnn_bn_large", {}, share=0.5)
        >>> name, options["width"]
        ('cnn', 16)
    """
    general_name, all_options = resolve_general_model(name, options)
    key = _WIDTH_OPTIONS[MODELS[general_name].build][1]
    wide = all_options[key]
    narrow = (
        tuple(_part(width, share) for width in wide)
        if isinstance(wide, tuple)
        else _part(wide, share)
    )
    return general_name, {
        **all_options,
        key: narrow,
        "scaler": share if scaler and share < 1 else 0.0,
    }


def share_of(
    name: str, options: Mapping[str, Any], wide: str, wide_options: Mapping[str, Any]
) -> float | None:
    """Return the width of a narrow model as a share of the width of a wide model.

    Args:
        name: Name of the narrow model.
        options: Options of the narrow model.
        wide: Name of the wide model.
        wide_options: Options of the wide model.

    Returns:
        The share, which is 1 for equal models. If the first model is not a narrow copy of the
        second, None is returned.

    Example:
        >>> from model_zoo import share_of
        >>> share_of("cnn_bn_small", {}, "cnn_bn_large", {})
        0.25
    """
    if not can_narrow(name) or not can_narrow(wide):
        return None
    resolved = resolve_general_model(name, options)
    resolved_wide = resolve_general_model(wide, wide_options)
    if resolved[0] != resolved_wide[0]:
        return None
    key = _WIDTH_OPTIONS[MODELS[resolved[0]].build][1]
    first_widths = [
        model_options[key][0] if isinstance(model_options[key], tuple) else model_options[key]
        for _, model_options in (resolved, resolved_wide)
    ]
    share = first_widths[0] / first_widths[1]
    return share if share <= 1 and narrow_options(wide, wide_options, share) == resolved else None


def _part(width: int, share: float) -> int:
    # Rounding errors of the product must not add a channel.
    return max(1, math.ceil(width * share - 1e-9))
