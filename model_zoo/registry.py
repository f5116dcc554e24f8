"""Models by name: the table of models, their options, groups, and `create_model`."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from model_zoo import external, user_models
from model_zoo.backbones import cnn, multimodal, resnet, sequence, tabular, text, transformer
from model_zoo.errors import InputError, ModelError, nearest
from model_zoo.external import external_backbone
from model_zoo.shapes import KINDS, Kind, Shape, is_integer, make_shape
from model_zoo.split_model import Body, SplitModel, assemble

# The table of this package's own models, and the checks of their options.

IMAGE: tuple[Kind, ...] = ("image",)
SEQUENCE: tuple[Kind, ...] = ("series", "image")
TOKENS: tuple[Kind, ...] = ("tokens",)
NAMES: dict[Kind, str] = {
    "table": "table rows",
    "series": "series",
    "image": "images",
    "tokens": "tokens",
}


@dataclass(frozen=True)
class CatalogueEntry:
    """One model: its builder, what kinds of example it takes, and the options that its name settles.

    ``build(shape, *, option=default, …)`` gives the backbone and its width. ``smallest`` is the least height and width
    of an image in pixels. A builder with an argument ``pretrained`` has pretrained weights.
    """

    summary: str
    build: Callable[..., Body]
    kinds: tuple[Kind, ...] = KINDS
    smallest: int = 1
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """What remains to be chosen, with the defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        keywords = {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name != "pretrained"
        }
        return {name: default for name, default in keywords.items() if name not in self.fixed}

    @property
    def has_weights(self) -> bool:
        return "pretrained" in inspect.signature(self.build).parameters

    def check_shape(self, shape: Shape) -> None:
        if shape.kind not in self.kinds:
            takes = " or ".join(NAMES[k] for k in self.kinds)
            raise InputError(f"takes {takes}, found {shape}")
        if shape.kind == "image" and min(shape.size) < self.smallest:
            raise InputError(
                f"needs at least {self.smallest}x{self.smallest} pixels, found {shape}"
            )

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The values of ``options``, each checked against its option's default; lists become tuples."""
        hints = typing.get_type_hints(self.build)
        return {
            name: check_value(name, value, self.options[name], hints[name])
            for name, value in options.items()
        }


def check_value(name: str, value: Any, default: Any, hint: Any = None) -> Any:
    """``value``, if it fits: whole numbers, dropout rates (the only fractions), lists of whole numbers, choices."""
    if hint == multimodal.Blocks:
        return multimodal.checked_blocks(value)
    if isinstance(default, str):
        if value not in (choices := typing.get_args(hint)):
            raise ModelError(f"option {name}: found {value!r}, it is one of {', '.join(choices)}")
        return value
    if isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ModelError(
                f"option {name}: found {value!r}, a number from 0 to below 1 is needed"
            )
        return float(value)
    if isinstance(default, tuple):
        several = (
            list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        )
        if not several or not all(is_integer(v) for v in several):
            raise ModelError(
                f"option {name}: found {value!r}, a list of whole numbers of at least 1 is needed"
            )
        return tuple(int(v) for v in several)
    if not is_integer(value):
        raise ModelError(f"option {name}: found {value!r}, a whole number of at least 1 is needed")
    return int(value)


def _resnet18(shape: Shape, *, pretrained: bool = False) -> Body:
    return external_backbone("torchvision", "resnet18", shape, pretrained=pretrained)


def _cnn(norm: str, width: int, size: str) -> CatalogueEntry:
    text = f"the three-block CNN, {size}: {width}-{2 * width}-{4 * width} channels, {norm.capitalize()}Norm"
    return CatalogueEntry(text, cnn.cnn, IMAGE, 4, {"width": width, "norm": norm})


def _imagenet_resnet(widths: tuple[int, ...]) -> CatalogueEntry:
    text = f"ImageNet stem, one block a stage ({'-'.join(map(str, widths))}), as in HtFLlib"
    fixed = {"widths": widths, "blocks": (1,) * len(widths), "stem": "imagenet"}
    return CatalogueEntry(text, resnet.resnet, IMAGE, fixed=fixed)


_SMALL = {"widths": (16, 32, 64), "stem": "small"}

MODELS: dict[str, CatalogueEntry] = {
    "linear": CatalogueEntry("logistic regression on the flattened input", tabular.linear),
    "mlp": CatalogueEntry("multi-layer perceptron with ReLU", tabular.mlp),
    "tabular": CatalogueEntry(
        "residual network for table rows (Gorishniy et al., 2021)", tabular.tabular, ("table",)
    ),
    "wide_deep": CatalogueEntry(
        "linear on crossed columns beside a perceptron (Cheng et al., 2016)",
        tabular.wide_deep,
        ("table",),
    ),
    "ft_transformer": CatalogueEntry(
        "transformer over columns (Gorishniy et al., 2021)", tabular.ft_transformer, ("table",)
    ),
    "lenet": CatalogueEntry(
        "LeNet-5 with ReLU and max pooling (LeCun et al., 1998)", cnn.lenet, IMAGE, 12
    ),
    "fedavg_cnn": CatalogueEntry(
        "two 5x5 convolutions and 512 units (McMahan et al., 2017)", cnn.fedavg_cnn, IMAGE, 4
    ),
    "niid_cnn": CatalogueEntry(
        "LeNet without padding, of NIID-Bench (Li et al., 2022)", cnn.niid_cnn, IMAGE, 16
    ),
    "fedproto_cnn": CatalogueEntry(
        "two 5x5 convolutions with dropout, and 50 units (Tan et al., 2022)",
        cnn.fedproto_cnn,
        IMAGE,
        16,
    ),
    "fedgen_cnn": CatalogueEntry(
        "two strided 3x3 convolutions, 32 features (Zhu et al., 2021)", cnn.fedgen_cnn, IMAGE
    ),
    "cnn": CatalogueEntry(
        "three 3x3 convolutions of any width, with BatchNorm, GroupNorm or none", cnn.cnn, IMAGE, 4
    ),
    "cnn_bn_small": _cnn("batch", 8, "small"),
    "cnn_bn_medium": _cnn("batch", 16, "medium"),
    "cnn_bn_large": _cnn("batch", 32, "large"),
    "cnn_gn_small": _cnn("group", 8, "small"),
    "cnn_gn_medium": _cnn("group", 16, "medium"),
    "cnn_gn_large": _cnn("group", 32, "large"),
    "resnet": CatalogueEntry(
        "a residual network of any widths and blocks (He et al., 2016)", resnet.resnet, IMAGE
    ),
    "resnet8": CatalogueEntry(
        "16-32-64 channels, one block a stage (FedDF's)",
        resnet.resnet,
        IMAGE,
        fixed={**_SMALL, "blocks": (1, 1, 1)},
    ),
    "resnet20": CatalogueEntry(
        "16-32-64 channels, three blocks a stage (CIFAR form of He et al., 2016; option B shortcuts)",
        resnet.resnet,
        IMAGE,
        fixed={**_SMALL, "blocks": (3, 3, 3)},
    ),
    "resnet18_small": CatalogueEntry(
        "ResNet-18 with a 3x3 stem and no pooling, for small images",
        resnet.resnet,
        IMAGE,
        fixed={"widths": (64, 128, 256, 512), "blocks": (2, 2, 2, 2), "stem": "small"},
    ),
    "resnet18": CatalogueEntry("torchvision's ResNet-18, with its ImageNet stem", _resnet18, IMAGE),
    "resnet4_imagenet": _imagenet_resnet((64,)),
    "resnet6_imagenet": _imagenet_resnet((64, 128)),
    "resnet8_imagenet": _imagenet_resnet((64, 128, 256)),
    "resnet10_imagenet": _imagenet_resnet((64, 128, 256, 512)),
    "gru": CatalogueEntry("gated recurrent units; images row by row", sequence.gru, SEQUENCE),
    "lstm": CatalogueEntry("long short-term memory; images row by row", sequence.lstm, SEQUENCE),
    "transformer": CatalogueEntry(
        "small transformer encoder; images row by row", sequence.transformer, SEQUENCE
    ),
    "cnn1d": CatalogueEntry(
        "dilated residual convolutions along a series; images row by row", sequence.cnn1d, SEQUENCE
    ),
    "multimodal": CatalogueEntry(
        "a branch for each block of a row, and a fusion that knows which are there",
        multimodal.multimodal,
    ),
    "vit": CatalogueEntry(
        "small vision transformer (Dosovitskiy et al., 2021)", transformer.vit, IMAGE
    ),
    "text_gru": CatalogueEntry("embedded words under gated recurrent units", text.text_gru, TOKENS),
    "text_cnn": CatalogueEntry(
        "embedded words under causal convolutions (Bai et al., 2018)", text.text_cnn, TOKENS
    ),
    "text_transformer": CatalogueEntry(
        "embedded words under a small transformer", text.text_transformer, TOKENS
    ),
}


# Named groups of models, to be dealt out to clients in turn.
#
# HtFLlib's groups (github.com/TsingZ0/HtFLlib, ``system/main.py``: HtFE2 … HtFE9 and HtM10, there
# also called HtFE-img-2 …; Zhang et al., FedTGP, AAAI 2024) are given with this package's models.
# Three differences: ``fedavg_cnn`` pads its convolutions (McMahan et al., 2017), HtFLlib's does
# not; ``mobilenet_v2`` is torchvision's; and a common feature width is a projection here
# (``feature_dim=512``) where HtFLlib pools the features to it. HtM10's vision transformers need
# images whose sides are multiples of 32, as in HtFLlib.

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
    """Names of all groups."""
    return list(GROUPS)


def group_models(name: str) -> list[str]:
    """The models of a group, in order. Raises :class:`ModelError` with the nearest name where there is none."""
    if name not in GROUPS:
        raise ModelError(f"group {name}: no such group{nearest(str(name), GROUPS)}")
    return list(GROUPS[name])


# Models by name: what there is, what options each takes, and :func:`create_model`.

EXTERNAL = tuple(external.OPTIONS)
PREFIXES = (*EXTERNAL, "python")


def list_models(pattern: str = "*") -> list[str]:
    """Names that match ``pattern`` (``*``, ``?``, ``[…]``), sorted.

    This package's own models; for a pattern that begins with ``timm:`` or ``torchvision:``, that library's, with
    the prefix. Every name listed can be given to :func:`create_model`.
    """
    prefix, colon, rest = pattern.partition(":")
    if not colon:
        return sorted(name for name in MODELS if fnmatchcase(name, pattern))
    if prefix not in EXTERNAL:
        raise ModelError(
            f"pattern {pattern}: models can be listed for {' and '.join(EXTERNAL)}, not for {prefix}"
        )
    return sorted(
        f"{prefix}:{name}" for name in external.model_names(prefix) if fnmatchcase(name, rest)
    )


def model_options(name: str) -> dict[str, Any]:
    """The options that ``create_model(name, …)`` takes as keywords, with their defaults.

    For a ``timm:`` or ``torchvision:`` model None stands for the model's own default, for a user's own for a value
    that must be given. Raises :class:`ModelError` for an unknown name.
    """
    with _prefix_errors(name):
        return _known_options(name)[0]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises :class:`ModelError`, in one line, where ``name`` or an option is unknown or a value is out of range."""
    with _prefix_errors(name):
        _checked_options(name, options)


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
    """Makes a model that is a backbone under a head.

    Args:
        name: one of :func:`list_models`; or ``torchvision:NAME``, ``timm:NAME``, or ``python:package.module:Class`` for
            one's own.
        num_classes: width of the logits, at least 1.
        in_channels: channels of an image or series, columns of a table row.
        input_size: S for images of S x S pixels, (H, W) for images, (L,) for series of length L, () for table rows.
            The model then takes x of shape [B, in_channels, *input_size].
        feature_dim: the common width of the features. Where the backbone has another width, a projection
            (Linear, then ReLU) ends it; None leaves the backbone's own width.
        pretrained: start from the library's published weights (torchvision's, timm's, and ``resnet18``).
        vocabulary: how many different tokens there are, for models of text. ``input_size`` is then (L,), and the model takes
            x of whole numbers [B, L] from 0 (no word: shorter texts are filled up with it from the left) to below it.
        options: the model's own, see :func:`model_options`.

    The initial weights come from torch's global generator, as every module's do: for weights that depend on a seed
    alone, call it under ``torch.random.fork_rng()`` and ``torch.manual_seed(seed)``.

    Raises:
        ModelError: one line, for anything that cannot be made as asked.
    """
    with _prefix_errors(name):
        shape = make_shape(in_channels, input_size, vocabulary)
        return _create(name, num_classes, shape, feature_dim, pretrained, options)


@contextmanager
def _prefix_errors(name: str) -> Iterator[None]:
    """Puts the model's name before the message."""
    try:
        yield
    except ModelError as error:
        raise type(error)(f"model {name}: {error}") from error.__cause__


def _create(
    name: str,
    num_classes: int,
    shape: Shape,
    feature_dim: int | None,
    pretrained: bool,
    options: Mapping[str, Any],
) -> SplitModel:
    given = _checked_options(name, options)
    for argument, value in (("num_classes", num_classes), ("feature_dim", feature_dim)):
        if not is_integer(value) and not (argument == "feature_dim" and value is None):
            raise ModelError(f"{argument}: found {value!r}, a whole number of at least 1 is needed")
    prefix, _, rest = name.partition(":")
    if prefix == "python":
        return user_models.build(rest, shape, num_classes, feature_dim, pretrained, given)
    if prefix in EXTERNAL:
        if shape.kind != "image":
            raise InputError(f"takes images, found {shape}")
        body = external.external_backbone(prefix, rest, shape, pretrained=pretrained, **given)
        return assemble(body, num_classes, feature_dim)
    entry = MODELS[name]
    entry.check_shape(shape)
    if pretrained and not entry.has_weights:
        having = [model for model, e in MODELS.items() if e.has_weights]
        raise ModelError(
            f"pretrained: it has no published weights; {', '.join(having)}, torchvision: and timm: have"
        )
    if entry.has_weights:
        given["pretrained"] = pretrained
    return assemble(entry.build(shape, **entry.fixed, **given), num_classes, feature_dim)


def _known_options(name: str) -> tuple[dict[str, Any], bool]:
    """The options of ``name``, and whether it takes any others too. Raises :class:`ModelError` for no such model."""
    if not isinstance(name, str):
        raise ModelError("a name is needed")
    prefix, colon, rest = name.partition(":")
    if prefix == "python" and colon:
        return user_models.options(user_models.load(rest))
    if prefix in EXTERNAL and colon:
        if not external.is_known(prefix, rest):
            near = nearest(rest, external.model_names(prefix), f"{prefix}:")
            raise ModelError(f"{prefix} has no such image classifier{near}")
        return dict(external.OPTIONS[prefix]), False
    if colon:
        raise ModelError(
            f"no such prefix{nearest(prefix, PREFIXES)}; there are {', '.join(PREFIXES)}"
        )
    if name not in MODELS:
        raise ModelError(f"no such model{nearest(name, MODELS)}")
    return MODELS[name].options, False


def _checked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    known, takes_any = _known_options(name)
    for option in options:
        if option not in known and not takes_any:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ModelError(f"unknown option {option}{nearest(option, known)}; {takes}")
    if name in MODELS:
        return MODELS[name].check_options(options)
    if name.startswith("python:"):
        return dict(options)
    return {
        option: check_value(option, value, 0.0)
        for option, value in options.items()
        if value is not None
    }
