"""Registry of models, their options and groups, and `create_model`, which builds a model."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from model_zoo.backbones import images, multimodal, sequence, tabular, tokens, transformer
from model_zoo.errors import InputError, ModelError, suggest_names
from model_zoo.external import LIBRARIES, model_names, torchvision_backbone
from model_zoo.options import check_option, is_integer
from model_zoo.plugins import PluginError, Registry
from model_zoo.shapes import KINDS, Kind, Shape, make_shape
from model_zoo.split_model import Body, SplitModel, assemble
from model_zoo.user_models import ModelFactory, UserModel, check_factory, load_factory

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
class CatalogModel:
    """A model of this package, timm or torchvision.

    Attributes:
        summary: One-line description of the architecture.
        build: Function `build(shape, *, option=default, …)` that returns the backbone, the width of
            the features and, optionally, the dropout rate between the features and the head. The
            type hints of the options tell which values are valid (see `model_zoo.options`). If
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
    accepts_any = False

    @cached_property
    def _keywords(self) -> dict[str, Any]:
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def has_weights(self) -> bool:
        """Whether pretrained weights exist."""
        return "pretrained" in self._keywords

    @property
    def options(self) -> dict[str, Any]:
        """Options that the user may set, with their defaults."""
        hidden = {*self.fixed, "pretrained"}
        return {name: value for name, value in self._keywords.items() if name not in hidden}

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with lists converted to tuples.

        Raises:
            ModelError: If a value is not valid.
        """
        hints = typing.get_type_hints(self.build, include_extras=True)
        return {name: check_option(name, value, hints[name]) for name, value in options.items()}

    def create(
        self,
        shape: Shape,
        num_classes: int,
        feature_dim: int | None,
        pretrained: bool,
        options: Mapping[str, Any],
    ) -> SplitModel:
        """Create the model.

        Args:
            shape: Shape of an example.
            num_classes: Number of outputs.
            feature_dim: Width of the features, or None for the width of the backbone.
            pretrained: Whether to load published weights.
            options: Valid options.

        Raises:
            ModelError: If the model does not accept the examples, or has no published weights.
        """
        if shape.kind not in self.kinds:
            expected = " or ".join(KIND_NAMES[kind] for kind in self.kinds)
            raise InputError(f"expected {expected}, got {shape}")
        if shape.kind == "image" and min(shape.size) < self.min_size:
            raise InputError(
                f"expected at least {self.min_size}x{self.min_size} pixels, got {shape}"
            )
        if pretrained and not self.has_weights:
            names = ", ".join(name for name, model in MODELS.items() if model.has_weights)
            raise ModelError(
                f"pretrained: the model has no published weights; choose {names} or a model of "
                "torchvision or timm"
            )
        weights = {"pretrained": pretrained} if self.has_weights else {}
        return assemble(
            self.build(shape, **self.fixed, **options, **weights), num_classes, feature_dim
        )


def _cnn(norm: str, width: int, size: str) -> CatalogModel:
    channels = f"{width}-{2 * width}-{4 * width} channels"
    text = f"three-block CNN, {size}: {channels}, {norm.capitalize()}Norm"
    return CatalogModel(text, images.cnn, IMAGE, 4, {"width": width, "norm": norm})


def _imagenet_resnet(widths: tuple[int, ...]) -> CatalogModel:
    text = f"ImageNet stem, one block per stage ({'-'.join(map(str, widths))}), as in HtFLlib"
    fixed = {"widths": widths, "blocks": (1,) * len(widths), "stem": "imagenet"}
    return CatalogModel(text, images.resnet, IMAGE, fixed=fixed)


_SMALL = {"widths": (16, 32, 64), "stem": "small"}

MODELS: dict[str, CatalogModel] = {
    "linear": CatalogModel("logistic regression on the flattened input", tabular.linear),
    "mlp": CatalogModel("multi-layer perceptron with ReLU", tabular.mlp),
    "tabular": CatalogModel(
        "residual network for table rows (Gorishniy et al., 2021)", tabular.tabular, ("table",)
    ),
    "wide_deep": CatalogModel(
        "linear model on crossed columns and perceptron (Cheng et al., 2016)",
        tabular.wide_deep,
        ("table",),
    ),
    "ft_transformer": CatalogModel(
        "transformer over columns (Gorishniy et al., 2021)", tabular.ft_transformer, ("table",)
    ),
    "lenet": CatalogModel(
        "LeNet-5 with ReLU and max pooling (LeCun et al., 1998)",
        images.lenet,
        IMAGE,
        12,
        {"padding": 2},
    ),
    "fedavg_cnn": CatalogModel(
        "two 5x5 convolutions and 512 units (McMahan et al., 2017)", images.fedavg_cnn, IMAGE, 4
    ),
    "niid_cnn": CatalogModel(
        "LeNet without padding, as in NIID-Bench (Li et al., 2022)",
        images.lenet,
        IMAGE,
        16,
        {"padding": 0},
    ),
    "fedproto_cnn": CatalogModel(
        "two 5x5 convolutions with dropout, and 50 units (Tan et al., 2022)",
        images.fedproto_cnn,
        IMAGE,
        16,
    ),
    "fedgen_cnn": CatalogModel(
        "two strided 3x3 convolutions, 32 features (Zhu et al., 2021)", images.fedgen_cnn, IMAGE
    ),
    "cnn": CatalogModel(
        "three 3x3 convolutions of any width, with BatchNorm, GroupNorm or none",
        images.cnn,
        IMAGE,
        4,
    ),
    "cnn_bn_small": _cnn("batch", 8, "small"),
    "cnn_bn_medium": _cnn("batch", 16, "medium"),
    "cnn_bn_large": _cnn("batch", 32, "large"),
    "cnn_gn_small": _cnn("group", 8, "small"),
    "cnn_gn_medium": _cnn("group", 16, "medium"),
    "cnn_gn_large": _cnn("group", 32, "large"),
    "resnet": CatalogModel(
        "residual network of any widths and depths (He et al., 2016)", images.resnet, IMAGE
    ),
    "resnet8": CatalogModel(
        "16-32-64 channels, one block per stage, as in FedDF",
        images.resnet,
        IMAGE,
        fixed={**_SMALL, "blocks": (1, 1, 1)},
    ),
    "resnet20": CatalogModel(
        "16-32-64 channels, three blocks per stage (He et al., 2016, for CIFAR; B shortcuts)",
        images.resnet,
        IMAGE,
        fixed={**_SMALL, "blocks": (3, 3, 3)},
    ),
    "resnet18_small": CatalogModel(
        "ResNet-18 with a 3x3 stem and no pooling, for small images",
        images.resnet,
        IMAGE,
        fixed={"widths": (64, 128, 256, 512), "blocks": (2, 2, 2, 2), "stem": "small"},
    ),
    "resnet18": CatalogModel(
        "ResNet-18 of torchvision with the ImageNet stem",
        torchvision_backbone,
        IMAGE,
        fixed={"name": "resnet18", "dropout": None},
    ),
    "resnet4_imagenet": _imagenet_resnet((64,)),
    "resnet6_imagenet": _imagenet_resnet((64, 128)),
    "resnet8_imagenet": _imagenet_resnet((64, 128, 256)),
    "resnet10_imagenet": _imagenet_resnet((64, 128, 256, 512)),
    "gru": CatalogModel("gated recurrent units; images row by row", sequence.gru, SEQUENCE),
    "lstm": CatalogModel("long short-term memory; images row by row", sequence.lstm, SEQUENCE),
    "transformer": CatalogModel(
        "small transformer encoder; images row by row", sequence.transformer, SEQUENCE
    ),
    "cnn1d": CatalogModel(
        "dilated residual convolutions along a series; images row by row", sequence.cnn1d, SEQUENCE
    ),
    "multimodal": CatalogModel(
        "one branch per block of a row, and a fusion that handles missing blocks",
        multimodal.multimodal,
    ),
    "vit": CatalogModel(
        "small vision transformer (Dosovitskiy et al., 2021)", transformer.vit, IMAGE
    ),
    "text_gru": CatalogModel("embedded words under gated recurrent units", tokens.text_gru, TOKENS),
    "text_cnn": CatalogModel(
        "embedded words under causal convolutions (Bai et al., 2018)", tokens.text_cnn, TOKENS
    ),
    "text_transformer": CatalogModel(
        "embedded words under a small transformer", tokens.text_transformer, TOKENS
    ),
    "matrix_factorization": CatalogModel(
        "vectors of a user and of the last items (Koren, 2008)",
        tokens.matrix_factorization,
        TOKENS,
    ),
    "neural_filtering": CatalogModel(
        "perceptron on a user and the last items (He et al., 2017)",
        tokens.neural_filtering,
        TOKENS,
    ),
    "gru4rec": CatalogModel(
        "gated recurrent units over the last items (Hidasi et al., 2016)",
        tokens.gru4rec,
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


# What to use instead of the models of earlier versions, keyed by former name.
REMOVED = {"pilotnet": "cnn"}
# Models that programs register and installed packages provide.
register_model: Registry[CatalogModel | ModelFactory] = Registry(
    "model", "model_zoo", check_factory, "hetero_fl.models"
)
for _name, _model in MODELS.items():
    register_model(_name)(_model)

Model = CatalogModel | UserModel
# A model, or a name that `create_model` accepts.
ModelName = str | UserModel


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names of the models that match a pattern, including registered models.

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
    prefix, colon, _ = pattern.partition(":")
    if colon and prefix not in LIBRARIES:
        raise ModelError(
            f"pattern {pattern}: unknown prefix '{prefix}'; choose from {', '.join(LIBRARIES)}"
        )
    names: Iterable[str] = register_model
    if colon:
        names = [f"{prefix}:{name}" for name in model_names(prefix)]
    return sorted(name for name in names if fnmatchcase(name, pattern))


def find_model(name: ModelName) -> Model:
    """Return the model with a name.

    Raises:
        ModelError: If there is no such model.
    """
    if isinstance(name, UserModel):
        return name
    if not isinstance(name, str):
        raise ModelError("expected a name")
    prefix, colon, rest = name.partition(":")
    if prefix in LIBRARIES and colon:
        return _find_library_model(prefix, rest)
    if prefix == "python" and colon:
        return UserModel(load_factory(rest), f"user-defined {rest}")
    if colon:
        prefixes = (*LIBRARIES, "python")
        hint = suggest_names(prefix, prefixes) or f"; choose from {', '.join(prefixes)}"
        raise ModelError(f"unknown prefix '{prefix}'{hint}")
    try:
        found = register_model.find(name)
    except PluginError as error:
        raise ModelError(error) from error
    if found is None and name in REMOVED:
        raise ModelError(f"was removed; use {REMOVED[name]}")
    if found is None:
        hint = suggest_names(name, list_models()) or "; choose from model_zoo.list_models()"
        raise ModelError(f"unknown model{hint}")
    if isinstance(found, CatalogModel):
        return found
    return UserModel(found, f"from {register_model.origin(name)}")


def _find_library_model(library: str, name: str) -> CatalogModel:
    known = model_names(library)
    # Names of timm models may end with the tag of their weights (`resnet18.a1_in1k`).
    listed = name.partition(".")[0] if library == "timm" else name
    if listed not in known:
        hint = suggest_names(name, known, f"{library}:")
        raise ModelError(f"unknown image classifier of {library}{hint}")
    summary = f"{name} from {library}"
    return CatalogModel(summary, LIBRARIES[library], IMAGE, fixed={"name": name})


def is_user_defined(name: ModelName) -> bool:
    """Return whether a model is neither built in nor from timm or torchvision.

    Such a model is a class or function: `python:package.module:Name`, or a registered model. The
    code is not imported.

    Example:
        >>> from model_zoo.registry import is_user_defined
        >>> is_user_defined("python:my_models:TwoPools"), is_user_defined("resnet8")
        (True, False)
    """
    if isinstance(name, UserModel) or name.startswith("python:"):
        return True
    return ":" not in name and name not in MODELS and name in register_model


def model_options(name: ModelName) -> dict[str, Any]:
    """Return the options of a model, which `create_model` accepts as keywords, with their defaults.

    For `timm:` and `torchvision:` models, None stands for the library's default. For user-defined
    models, None stands for a required option without a default.

    Raises:
        ModelError: If the model does not exist.

    Example:
        >>> from model_zoo import model_options
        >>> model_options("transformer")
        {'width': 64, 'depth': 2, 'heads': 4, 'dropout': 0.0}
    """
    with _prefix_errors(name):
        return find_model(name).options


def check_options(name: ModelName, options: Mapping[str, Any]) -> None:
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
        _validate_options(find_model(name), options)


def create_model(
    name: ModelName,
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
            `python:package.module:Name` for a class or function of a user.
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
        model = find_model(name)
        valid_options = _validate_options(model, options)
        if not is_integer(num_classes):
            raise ModelError(f"num_classes: expected an integer >= 1, got {num_classes!r}")
        if feature_dim is not None and not is_integer(feature_dim):
            raise ModelError(f"feature_dim: expected an integer >= 1, got {feature_dim!r}")
        return model.create(shape, num_classes, feature_dim, pretrained, valid_options)


@contextmanager
def _prefix_errors(name: ModelName) -> Iterator[None]:
    """Prepend the model's name to the messages of errors."""
    try:
        yield
    except ModelError as error:
        raise type(error)(f"model {name}: {error}") from error.__cause__


def _validate_options(model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    known = model.options
    for option in options:
        if option not in known and not model.accepts_any:
            choices = f"choose from {', '.join(known)}" if known else "the model has no options"
            hint = suggest_names(option, known) or f"; {choices}"
            raise ModelError(f"unknown option '{option}'{hint}")
    return model.check_options(options)
