"""Registry of models, their options and groups, and `create_model`, which builds a model."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import nn

from model_zoo import external, user_models
from model_zoo.backbones import (
    cnn,
    multimodal,
    recommendation,
    resnet,
    sequence,
    tabular,
    text,
    transformer,
)
from model_zoo.errors import InputError, ModelError, suggest_names
from model_zoo.external import external_backbone
from model_zoo.plugins import PluginError, Plugins
from model_zoo.shapes import KINDS, Kind, Shape, is_integer, make_shape
from model_zoo.split_model import Body, SplitModel, assemble

IMAGE: tuple[Kind, ...] = ("image",)
SEQUENCE: tuple[Kind, ...] = ("series", "image")
TOKENS: tuple[Kind, ...] = ("tokens",)
KIND_NAMES: dict[Kind, str] = {
    "table": "table rows",
    "series": "series",
    "image": "images",
    "tokens": "tokens",
}


@dataclass(frozen=True)
class CatalogEntry:
    """The registry's entry for a model of this package.

    Attributes:
        summary: One-line description of the architecture.
        build: Function `build(shape, *, option=default, …)` that returns the backbone, the width of
            the features and, optionally, the dropout rate between the features and the head. If
            pretrained weights exist, the function has an argument `pretrained`.
        kinds: Kinds of examples that the model accepts.
        min_size: Minimum height and width of an image in pixels.
        fixed: Options that the name of the model determines.
    """

    summary: str
    build: Callable[..., Body]
    kinds: tuple[Kind, ...] = KINDS
    min_size: int = 1
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Options that the user may set, with their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        keywords = {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name != "pretrained"
        }
        return {name: default for name, default in keywords.items() if name not in self.fixed}

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.build)

    @property
    def has_weights(self) -> bool:
        """Whether pretrained weights exist."""
        return "pretrained" in inspect.signature(self.build).parameters

    def check_shape(self, shape: Shape) -> None:
        """Check that the model accepts examples of a shape.

        Raises:
            InputError: If the kind of example is not accepted, or an image is too small.
        """
        if shape.kind not in self.kinds:
            expected = " or ".join(KIND_NAMES[k] for k in self.kinds)
            raise InputError(f"expected {expected}, got {shape}")
        if shape.kind == "image" and min(shape.size) < self.min_size:
            raise InputError(
                f"expected at least {self.min_size}x{self.min_size} pixels, got {shape}"
            )

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Check options and return them with lists converted to tuples.

        Raises:
            ModelError: If a value is not valid.
        """
        return {
            name: check_value(name, value, self.options[name], self._hints[name])
            for name, value in options.items()
        }


def check_value(name: str, value: Any, default: Any, hint: Any = None) -> Any:
    """Check the value of an option and return it.

    The default of the option determines which values are valid. The default is an integer for
    integers of at least 1, a tuple for such an integer or a sequence of them, a float for numbers
    in [0, 1), and a string for one of several names. Blocks of the multimodal model are recognized
    by the type hint.

    Args:
        name: Name of the option, for the error message.
        value: The value to check.
        default: Default of the option.
        hint: Type hint of the option, which lists the valid names.

    Returns:
        The value, converted to the type of the default.

    Raises:
        ModelError: If the value is not valid.
    """
    if hint == multimodal.Blocks:
        return multimodal.validate_blocks(value)
    if isinstance(default, str):
        if value not in (choices := typing.get_args(hint)):
            if isinstance(value, str) and value in REMOVED:
                raise ModelError(f"option {name}: {value} was removed; use {REMOVED[value]}")
            raise ModelError(f"option {name}: expected one of {', '.join(choices)}, got {value!r}")
        return value
    if isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ModelError(f"option {name}: expected a number in [0, 1), got {value!r}")
        return float(value)
    if isinstance(default, tuple):
        return _check_integers(name, value)
    if not is_integer(value):
        raise ModelError(f"option {name}: expected an integer >= 1, got {value!r}")
    return int(value)


def _check_integers(name: str, value: Any) -> tuple[int, ...]:
    integers = (
        list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    )
    if not integers or not all(is_integer(v) for v in integers):
        raise ModelError(f"option {name}: expected a list of integers >= 1, got {value!r}")
    return tuple(int(v) for v in integers)


def _resnet18(shape: Shape, *, pretrained: bool = False) -> Body:
    return external_backbone("torchvision", "resnet18", shape, pretrained=pretrained)


def _cnn(norm: str, width: int, size: str) -> CatalogEntry:
    channels = f"{width}-{2 * width}-{4 * width} channels"
    text = f"three-block CNN, {size}: {channels}, {norm.capitalize()}Norm"
    return CatalogEntry(text, cnn.cnn, IMAGE, 4, {"width": width, "norm": norm})


def _imagenet_resnet(widths: tuple[int, ...]) -> CatalogEntry:
    text = f"ImageNet stem, one block per stage ({'-'.join(map(str, widths))}), as in HtFLlib"
    fixed = {"widths": widths, "blocks": (1,) * len(widths), "stem": "imagenet"}
    return CatalogEntry(text, resnet.resnet, IMAGE, fixed=fixed)


_SMALL = {"widths": (16, 32, 64), "stem": "small"}

MODELS: dict[str, CatalogEntry] = {
    "linear": CatalogEntry("logistic regression on the flattened input", tabular.linear),
    "mlp": CatalogEntry("multi-layer perceptron with ReLU", tabular.mlp),
    "tabular": CatalogEntry(
        "residual network for table rows (Gorishniy et al., 2021)", tabular.tabular, ("table",)
    ),
    "wide_deep": CatalogEntry(
        "linear model on crossed columns and perceptron (Cheng et al., 2016)",
        tabular.wide_deep,
        ("table",),
    ),
    "ft_transformer": CatalogEntry(
        "transformer over columns (Gorishniy et al., 2021)", tabular.ft_transformer, ("table",)
    ),
    "lenet": CatalogEntry(
        "LeNet-5 with ReLU and max pooling (LeCun et al., 1998)", cnn.lenet, IMAGE, 12
    ),
    "fedavg_cnn": CatalogEntry(
        "two 5x5 convolutions and 512 units (McMahan et al., 2017)", cnn.fedavg_cnn, IMAGE, 4
    ),
    "niid_cnn": CatalogEntry(
        "LeNet without padding, as in NIID-Bench (Li et al., 2022)", cnn.niid_cnn, IMAGE, 16
    ),
    "fedproto_cnn": CatalogEntry(
        "two 5x5 convolutions with dropout, and 50 units (Tan et al., 2022)",
        cnn.fedproto_cnn,
        IMAGE,
        16,
    ),
    "fedgen_cnn": CatalogEntry(
        "two strided 3x3 convolutions, 32 features (Zhu et al., 2021)", cnn.fedgen_cnn, IMAGE
    ),
    "cnn": CatalogEntry(
        "three 3x3 convolutions of any width, with BatchNorm, GroupNorm or none", cnn.cnn, IMAGE, 4
    ),
    "cnn_bn_small": _cnn("batch", 8, "small"),
    "cnn_bn_medium": _cnn("batch", 16, "medium"),
    "cnn_bn_large": _cnn("batch", 32, "large"),
    "cnn_gn_small": _cnn("group", 8, "small"),
    "cnn_gn_medium": _cnn("group", 16, "medium"),
    "cnn_gn_large": _cnn("group", 32, "large"),
    "resnet": CatalogEntry(
        "residual network of any widths and depths (He et al., 2016)", resnet.resnet, IMAGE
    ),
    "resnet8": CatalogEntry(
        "16-32-64 channels, one block per stage, as in FedDF",
        resnet.resnet,
        IMAGE,
        fixed={**_SMALL, "blocks": (1, 1, 1)},
    ),
    "resnet20": CatalogEntry(
        "16-32-64 channels, three blocks per stage (He et al., 2016, for CIFAR; B shortcuts)",
        resnet.resnet,
        IMAGE,
        fixed={**_SMALL, "blocks": (3, 3, 3)},
    ),
    "resnet18_small": CatalogEntry(
        "ResNet-18 with a 3x3 stem and no pooling, for small images",
        resnet.resnet,
        IMAGE,
        fixed={"widths": (64, 128, 256, 512), "blocks": (2, 2, 2, 2), "stem": "small"},
    ),
    "resnet18": CatalogEntry("ResNet-18 of torchvision with the ImageNet stem", _resnet18, IMAGE),
    "resnet4_imagenet": _imagenet_resnet((64,)),
    "resnet6_imagenet": _imagenet_resnet((64, 128)),
    "resnet8_imagenet": _imagenet_resnet((64, 128, 256)),
    "resnet10_imagenet": _imagenet_resnet((64, 128, 256, 512)),
    "gru": CatalogEntry("gated recurrent units; images row by row", sequence.gru, SEQUENCE),
    "lstm": CatalogEntry("long short-term memory; images row by row", sequence.lstm, SEQUENCE),
    "transformer": CatalogEntry(
        "small transformer encoder; images row by row", sequence.transformer, SEQUENCE
    ),
    "cnn1d": CatalogEntry(
        "dilated residual convolutions along a series; images row by row", sequence.cnn1d, SEQUENCE
    ),
    "multimodal": CatalogEntry(
        "one branch per block of a row, and a fusion that handles missing blocks",
        multimodal.multimodal,
    ),
    "vit": CatalogEntry(
        "small vision transformer (Dosovitskiy et al., 2021)", transformer.vit, IMAGE
    ),
    "text_gru": CatalogEntry("embedded words under gated recurrent units", text.text_gru, TOKENS),
    "text_cnn": CatalogEntry(
        "embedded words under causal convolutions (Bai et al., 2018)", text.text_cnn, TOKENS
    ),
    "text_transformer": CatalogEntry(
        "embedded words under a small transformer", text.text_transformer, TOKENS
    ),
    "matrix_factorization": CatalogEntry(
        "vectors of a user and of the last items (Koren, 2008)",
        recommendation.matrix_factorization,
        TOKENS,
    ),
    "neural_filtering": CatalogEntry(
        "perceptron on a user and the last items (He et al., 2017)",
        recommendation.neural_filtering,
        TOKENS,
    ),
    "gru4rec": CatalogEntry(
        "gated recurrent units over the last items (Hidasi et al., 2016)",
        recommendation.gru4rec,
        TOKENS,
    ),
}


# Groups of models for federations with heterogeneous clients.
#
# The HtFE and HtM groups follow HtFLlib (github.com/TsingZ0/HtFLlib, `system/main.py`, there also
# named HtFE-img-2 …; Zhang et al., FedTGP, AAAI 2024) with three differences: `fedavg_cnn` pads its
# convolutions (McMahan et al., 2017), `mobilenet_v2` comes from torchvision, and a common feature
# width is obtained by a projection (`feature_dim=512`) instead of pooling. As in HtFLlib, the
# vision transformers of HtM10 need images whose sides are multiples of 32.

_DEEP = [f"torchvision:resnet{depth}" for depth in (18, 34, 50, 101, 152)]
_HTFE8 = ["fedavg_cnn", "torchvision:googlenet", "torchvision:mobilenet_v2", *_DEEP]

GROUPS: dict[str, list[str]] = {
    "cnn_pair": ["cnn_bn_small", "cnn_bn_medium"],
    "cnn_trio": ["cnn_bn_small", "cnn_bn_medium", "cnn_bn_large"],
    "resnet_family": ["resnet8", "resnet20", "resnet18_small"],
    "small_mixed": ["cnn_bn_small", "resnet8", "mlp"],
    "HtFE2": ["fedavg_cnn", "torchvision:resnet18"],
    "HtFE3": ["resnet10_imagenet", "torchvision:resnet18", "torchvision:resnet34"],
    "HtFE4": [
        "fedavg_cnn",
        "torchvision:googlenet",
        "torchvision:mobilenet_v2",
        "torchvision:resnet18",
    ],
    "HtFE5": ["torchvision:googlenet", "torchvision:mobilenet_v2", *_DEEP[:3]],
    "HtFE8": _HTFE8,
    "HtFE9": [f"resnet{depth}_imagenet" for depth in (4, 6, 8, 10)] + _DEEP,
    "HtM10": [*_HTFE8, "torchvision:vit_b_16", "torchvision:vit_b_32"],
}


def list_groups() -> list[str]:
    """Return the names of all groups of models.

    Example:
        >>> from model_zoo import list_groups
        >>> list_groups()[:3]
        ['cnn_pair', 'cnn_trio', 'resnet_family']
    """
    return list(GROUPS)


def group_models(name: str) -> list[str]:
    """Return the names of the models of a group.

    Raises:
        ModelError: If there is no group of this name.

    Example:
        >>> from model_zoo import group_models
        >>> group_models("resnet_family")
        ['resnet8', 'resnet20', 'resnet18_small']
    """
    if name not in GROUPS:
        raise ModelError(f"group {name}: unknown group{suggest_names(str(name), GROUPS)}")
    return list(GROUPS[name])


EXTERNAL = tuple(external.OPTIONS)
PREFIXES = (*EXTERNAL, "python")
REMOVED = {"pilotnet": "cnn"}
"""What to use instead of the models of earlier versions, keyed by former name."""


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names of the models that match a pattern, including those of plug-ins.

    Args:
        pattern: Shell-style pattern (`*`, `?`, `[…]`). A pattern that begins with `timm:` or
            `torchvision:` lists the models of that library, with the prefix.

    Raises:
        ModelError: If the pattern begins with an unknown prefix or the library is not installed.

    Example:
        >>> from model_zoo import list_models
        >>> list_models("resnet18*")
        ['resnet18', 'resnet18_small']
    """
    prefix, colon, rest = pattern.partition(":")
    if not colon:
        names = [*MODELS, *PLUGINS.load_all()]
        return sorted(name for name in names if fnmatchcase(name, pattern))
    if prefix not in EXTERNAL:
        raise ModelError(
            f"pattern {pattern}: unknown prefix '{prefix}'; choose from {', '.join(EXTERNAL)}"
        )
    return sorted(
        f"{prefix}:{name}" for name in external.model_names(prefix) if fnmatchcase(name, rest)
    )


def model_options(name: str) -> dict[str, Any]:
    """Return the options of a model, which `create_model` accepts as keywords, with their defaults.

    For `timm:` and `torchvision:` models, None stands for the library's default. For `python:`
    models, None stands for a required option without a default.

    Raises:
        ModelError: If the model does not exist.

    Example:
        >>> from model_zoo import model_options
        >>> model_options("transformer")
        {'width': 64, 'depth': 2, 'heads': 4, 'dropout': 0.0}
    """
    with _prefix_errors(name):
        return _find_options(name)[0]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check the name and the options of a model without creating it.

    Raises:
        ModelError: If the name or an option is unknown, or a value is not valid.

    Example:
        >>> from model_zoo import check_options
        >>> check_options("cnn", {"width": 8, "norm": "group"})
        >>> check_options("cnn", {"width": 0})
        Traceback (most recent call last):
        model_zoo.errors.ModelError: model cnn: option width: expected an integer >= 1, got 0
    """
    with _prefix_errors(name):
        _validate_options(name, options)


def create_model(
    name: str,
    num_classes: int,
    in_channels: int = 1,
    input_size: int | Sequence[int] = 28,
    feature_dim: int | None = None,
    *,
    pretrained: bool = False,
    vocabulary: int | None = None,
    **options: Any,
) -> SplitModel:
    """Create a model that consists of a backbone and a head.

    The initial weights are drawn from PyTorch's global random number generator.

    Args:
        name: A name returned by `list_models`, `torchvision:NAME`, `timm:NAME`, or
            `python:package.module:Class` for a user-defined model.
        num_classes: Number of outputs, at least 1.
        in_channels: Channels of an image or series, or columns of a table row.
        input_size: `S` for images of S x S pixels, `(H, W)` for images, `(L,)` for series of
            length L, `()` for table rows. The model accepts inputs of shape
            `[B, in_channels, *input_size]`.
        feature_dim: Width of the features. If the backbone has another width, a projection (linear
            layer and ReLU) to this width is appended. If None, the backbone's width is kept.
        pretrained: Whether to load published weights, which exist for `resnet18` and for models of
            torchvision and timm.
        vocabulary: Number of different tokens, for text models. If set, `input_size` must be
            `(L,)`, and the model accepts int64 inputs of shape `[B, L]` in `[0, vocabulary)`. Token
            0 is the padding, which precedes texts that are shorter than L.
        **options: Options of the model, see `model_options`.

    Raises:
        ModelError: If the model cannot be created.

    Example:
        >>> import torch
        >>> from model_zoo import create_model
        >>> model = create_model("resnet8", num_classes=10, in_channels=3, input_size=32)
        >>> model(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 10])
        >>> model = create_model("mlp", num_classes=2, in_channels=7, input_size=(), hidden=[32])
        >>> model.num_features
        32
    """
    with _prefix_errors(name):
        shape = make_shape(in_channels, input_size, vocabulary)
        return _create(
            name, num_classes, shape, feature_dim, pretrained=pretrained, options=options
        )


@contextmanager
def _prefix_errors(name: str) -> Iterator[None]:
    """Refuse a former name, and prepend the model's name to the messages of errors."""
    if str(name) in REMOVED and name not in PLUGINS:
        raise ModelError(f"model {name} was removed; use {REMOVED[name]}")
    try:
        yield
    except ModelError as error:
        title = str(name).removeprefix("object:")
        raise type(error)(f"model {title}: {error}") from error.__cause__


def _create(
    name: str,
    num_classes: int,
    shape: Shape,
    feature_dim: int | None,
    *,
    pretrained: bool,
    options: Mapping[str, Any],
) -> SplitModel:
    valid_options = _validate_options(name, options)
    for argument, value in (("num_classes", num_classes), ("feature_dim", feature_dim)):
        if not is_integer(value) and not (argument == "feature_dim" and value is None):
            raise ModelError(f"{argument}: expected an integer >= 1, got {value!r}")
    prefix, _, rest = name.partition(":")
    if is_user_defined(name):
        target, head = _find_factory(name)
        return user_models.build(
            target,
            head,
            shape,
            num_classes,
            feature_dim,
            pretrained=pretrained,
            options=valid_options,
        )
    if prefix in EXTERNAL:
        if shape.kind != "image":
            raise InputError(f"expected images, got {shape}")
        body = external.external_backbone(
            prefix, rest, shape, pretrained=pretrained, **valid_options
        )
        return assemble(body, num_classes, feature_dim)
    entry = MODELS[name]
    entry.check_shape(shape)
    if pretrained and not entry.has_weights:
        pretrained_models = [model for model, e in MODELS.items() if e.has_weights]
        raise ModelError(
            "pretrained: the model has no published weights; choose "
            f"{', '.join(pretrained_models)} or a model of torchvision or timm"
        )
    if entry.has_weights:
        valid_options["pretrained"] = pretrained
    return assemble(entry.build(shape, **entry.fixed, **valid_options), num_classes, feature_dim)


def is_user_defined(name: str) -> bool:
    """Return whether a model is neither built in nor from timm or torchvision.

    Such a model is a class (`python:package.module:Class`), an object (`object:NAME`) or the model
    of a plug-in.

    Example:
        >>> from model_zoo.registry import is_user_defined
        >>> is_user_defined("python:my_models:TwoPools"), is_user_defined("resnet8")
        (True, False)
    """
    return name.startswith(("python:", "object:")) or (name not in MODELS and name in PLUGINS)


def _find_factory(name: str) -> tuple[Callable[..., nn.Module], str | None]:
    """Return the class or function that creates a user-defined model, and the path of its head."""
    if name not in PLUGINS:
        return user_models.find_factory(name)
    try:
        return PLUGINS.load(name), None
    except PluginError as error:
        raise ModelError(error) from error


def _check_plugin(found: object) -> str:
    is_class = isinstance(found, type)
    if is_class and not issubclass(found, nn.Module):  # type: ignore[arg-type]
        return "expected a subclass of torch.nn.Module, or a function that returns a module"
    return "" if callable(found) else "expected a class or a function"


# Models that installed packages provide.
PLUGINS = Plugins("hetero_fl.models", "model", lambda: MODELS, _check_plugin)


def _find_options(name: str) -> tuple[dict[str, Any], bool]:
    """Return the options of a model, and whether the model accepts further options."""
    if not isinstance(name, str):
        raise ModelError("expected a name")
    prefix, colon, rest = name.partition(":")
    if is_user_defined(name):
        return user_models.inspect_options(_find_factory(name)[0])
    if prefix in EXTERNAL and colon:
        if not external.is_known(prefix, rest):
            hint = suggest_names(rest, external.model_names(prefix), f"{prefix}:")
            raise ModelError(f"unknown image classifier of {prefix}{hint}")
        return dict(external.OPTIONS[prefix]), False
    if colon:
        hint = suggest_names(prefix, PREFIXES) or f"; choose from {', '.join(PREFIXES)}"
        raise ModelError(f"unknown prefix '{prefix}'{hint}")
    if name not in MODELS:
        hint = suggest_names(name, list_models()) or "; choose from model_zoo.list_models()"
        raise ModelError(f"unknown model{hint}")
    return dict(MODELS[name].options), False


def _validate_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    known, accepts_any = _find_options(name)
    for option in options:
        if option not in known and not accepts_any:
            choices = f"choose from {', '.join(known)}" if known else "the model has no options"
            hint = suggest_names(option, known) or f"; {choices}"
            raise ModelError(f"unknown option '{option}'{hint}")
    if name in MODELS:
        return MODELS[name].check_options(options)
    if is_user_defined(name):
        return dict(options)
    return {
        option: check_value(option, value, 0.0)
        for option, value in options.items()
        if value is not None
    }
