"""Narrower copies of a model: the same layers with a share of the channels.

Their tensors have the names of the wide model's and are no longer in any dimension, so that each can be a leading slice of it.
That holds for stacks of layers in which every output channel is one row of a weight: not for fused gates (gru, lstm) or
fused queries, keys and values (transformer, vit).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from model_zoo.backbones import cnn, resnet, tabular, text
from model_zoo.errors import ModelError
from model_zoo.registry import MODELS

_BUILDERS = {
    cnn.cnn: ("cnn", "width"),
    resnet.resnet: ("resnet", "widths"),
    tabular.mlp: ("mlp", "hidden"),
    tabular.tabular: ("tabular", "width"),
    text.text_cnn: ("text_cnn", "width"),
}


def can_narrow(name: str) -> bool:
    """Whether the model has narrower copies."""
    return name in MODELS and MODELS[name].build in _BUILDERS


def general_name(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model by the name under which its width is an option, with every option: ``cnn_bn_small`` is ``cnn`` with
    ``width=8, norm="batch"``. Raises :class:`ModelError` where it has no narrower copies."""
    if not can_narrow(name):
        able = ", ".join(n for n in MODELS if can_narrow(n))
        raise ModelError(f"model {name}: has no narrower copies; {able} have")
    entry = MODELS[name]
    kind, _ = _BUILDERS[entry.build]
    return kind, {**MODELS[kind].options, **entry.fixed, **entry.check_options(options)}


def narrow_options(
    name: str, options: Mapping[str, Any], share: float, scaler: bool = False
) -> tuple[str, dict[str, Any]]:
    """Name and options of the copy with this share of every width, rounded up.

    Args:
        share: above 0, at most 1.
        scaler: divide what its layers give by the share (Diao et al., HeteroFL, ICLR 2021, section 3).

    Raises :class:`ModelError` as :func:`general_name` does.
    """
    kind, full = general_name(name, options)
    width = _BUILDERS[MODELS[kind].build][1]
    wide = full[width]
    less = tuple(_part(w, share) for w in wide) if isinstance(wide, tuple) else _part(wide, share)
    return kind, {**full, width: less, "scaler": share if scaler and share < 1 else 0.0}


def share_of(
    name: str, options: Mapping[str, Any], wide: str, wide_options: Mapping[str, Any]
) -> float | None:
    """Which share of the wide model's widths a model has; None if it is no narrower copy of it, nor itself."""
    if not can_narrow(name) or not can_narrow(wide):
        return None
    kind, own = general_name(name, options)
    other, full = general_name(wide, wide_options)
    if kind != other:
        return None
    width = _BUILDERS[MODELS[kind].build][1]
    first = [o[width][0] if isinstance(o[width], tuple) else o[width] for o in (own, full)]
    share = first[0] / first[1]
    return (
        share if share <= 1 and narrow_options(wide, wide_options, share) == (kind, own) else None
    )


def _part(width: int, share: float) -> int:
    return max(1, math.ceil(width * share - 1e-9))
