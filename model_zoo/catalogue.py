"""The table of this package's own models, and the checks of their options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import cnn, columns, convolution, multimodal, published, resnet, sequence, simple, text, vit
from .errors import InputError, ModelError
from .external import external_backbone
from .shapes import KINDS, Kind, Shape, whole
from .split import Body

IMAGE: tuple[Kind, ...] = ("image",)
SEQUENCE: tuple[Kind, ...] = ("series", "image")
TOKENS: tuple[Kind, ...] = ("tokens",)
NAMES: dict[Kind, str] = {"table": "table rows", "series": "series", "image": "images", "tokens": "tokens"}


@dataclass(frozen=True)
class Entry:
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
        keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "pretrained"}
        return {name: default for name, default in keywords.items() if name not in self.fixed}

    @property
    def has_weights(self) -> bool:
        return "pretrained" in inspect.signature(self.build).parameters

    def check_shape(self, shape: Shape) -> None:
        if shape.kind not in self.kinds:
            takes = " or ".join(NAMES[k] for k in self.kinds)
            raise InputError(f"takes {takes}, found {shape}")
        if shape.kind == "image" and min(shape.size) < self.smallest:
            raise InputError(f"needs at least {self.smallest}x{self.smallest} pixels, found {shape}")

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The values of ``given``, each checked against its option's default; lists become tuples."""
        hints = typing.get_type_hints(self.build)
        return {name: check_value(name, value, self.options[name], hints[name]) for name, value in given.items()}


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
            raise ModelError(f"option {name}: found {value!r}, a number from 0 to below 1 is needed")
        return float(value)
    if isinstance(default, tuple):
        several = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if not several or not all(whole(v) for v in several):
            raise ModelError(f"option {name}: found {value!r}, a list of whole numbers of at least 1 is needed")
        return tuple(int(v) for v in several)
    if not whole(value):
        raise ModelError(f"option {name}: found {value!r}, a whole number of at least 1 is needed")
    return int(value)


def _resnet18(shape: Shape, *, pretrained: bool = False) -> Body:
    return external_backbone("torchvision", "resnet18", shape, pretrained=pretrained)


def _cnn(norm: str, width: int, size: str) -> Entry:
    text = f"the three-block CNN, {size}: {width}-{2 * width}-{4 * width} channels, {norm.capitalize()}Norm"
    return Entry(text, cnn.cnn, IMAGE, 4, {"width": width, "norm": norm})


def _imagenet_resnet(widths: tuple[int, ...]) -> Entry:
    text = f"ImageNet stem, one block a stage ({'-'.join(map(str, widths))}), as in HtFLlib"
    fixed = {"widths": widths, "blocks": (1,) * len(widths), "stem": "imagenet"}
    return Entry(text, resnet.resnet, IMAGE, fixed=fixed)


_SMALL = {"widths": (16, 32, 64), "stem": "small"}

MODELS: dict[str, Entry] = {
    "linear": Entry("logistic regression on the flattened input", simple.linear),
    "mlp": Entry("multi-layer perceptron with ReLU", simple.mlp),
    "tabular": Entry("residual network for table rows (Gorishniy et al., 2021)", simple.tabular, ("table",)),
    "wide_deep": Entry(
        "linear on crossed columns beside a perceptron (Cheng et al., 2016)", columns.wide_deep, ("table",)
    ),
    "ft_transformer": Entry("transformer over columns (Gorishniy et al., 2021)", columns.ft_transformer, ("table",)),
    "lenet": Entry("LeNet-5 with ReLU and max pooling (LeCun et al., 1998)", cnn.lenet, IMAGE, 12),
    "fedavg_cnn": Entry("two 5x5 convolutions and 512 units (McMahan et al., 2017)", cnn.fedavg_cnn, IMAGE, 4),
    "niid_cnn": Entry("LeNet without padding, of NIID-Bench (Li et al., 2022)", published.niid_cnn, IMAGE, 16),
    "fedproto_cnn": Entry(
        "two 5x5 convolutions with dropout, and 50 units (Tan et al., 2022)", published.fedproto_cnn, IMAGE, 16
    ),
    "fedgen_cnn": Entry("two strided 3x3 convolutions, 32 features (Zhu et al., 2021)", published.fedgen_cnn, IMAGE),
    "cnn": Entry("three 3x3 convolutions of any width, with BatchNorm, GroupNorm or none", cnn.cnn, IMAGE, 4),
    "cnn_bn_small": _cnn("batch", 8, "small"),
    "cnn_bn_medium": _cnn("batch", 16, "medium"),
    "cnn_bn_large": _cnn("batch", 32, "large"),
    "cnn_gn_small": _cnn("group", 8, "small"),
    "cnn_gn_medium": _cnn("group", 16, "medium"),
    "cnn_gn_large": _cnn("group", 32, "large"),
    "resnet": Entry("a residual network of any widths and blocks (He et al., 2016)", resnet.resnet, IMAGE),
    "resnet8": Entry(
        "16-32-64 channels, one block a stage (FedDF's)", resnet.resnet, IMAGE, fixed={**_SMALL, "blocks": (1, 1, 1)}
    ),
    "resnet20": Entry(
        "16-32-64 channels, three blocks a stage (CIFAR form of He et al., 2016; option B shortcuts)",
        resnet.resnet,
        IMAGE,
        fixed={**_SMALL, "blocks": (3, 3, 3)},
    ),
    "resnet18_small": Entry(
        "ResNet-18 with a 3x3 stem and no pooling, for small images",
        resnet.resnet,
        IMAGE,
        fixed={"widths": (64, 128, 256, 512), "blocks": (2, 2, 2, 2), "stem": "small"},
    ),
    "resnet18": Entry("torchvision's ResNet-18, with its ImageNet stem", _resnet18, IMAGE),
    "resnet4_imagenet": _imagenet_resnet((64,)),
    "resnet6_imagenet": _imagenet_resnet((64, 128)),
    "resnet8_imagenet": _imagenet_resnet((64, 128, 256)),
    "resnet10_imagenet": _imagenet_resnet((64, 128, 256, 512)),
    "gru": Entry("gated recurrent units; images row by row", sequence.gru, SEQUENCE),
    "lstm": Entry("long short-term memory; images row by row", sequence.lstm, SEQUENCE),
    "transformer": Entry("small transformer encoder; images row by row", sequence.transformer, SEQUENCE),
    "cnn1d": Entry("dilated residual convolutions along a series; images row by row", convolution.cnn1d, SEQUENCE),
    "multimodal": Entry(
        "a branch for each block of a row, and a fusion that knows which are there", multimodal.multimodal
    ),
    "vit": Entry("small vision transformer (Dosovitskiy et al., 2021)", vit.vit, IMAGE),
    "text_gru": Entry("embedded words under gated recurrent units", text.text_gru, TOKENS),
    "text_cnn": Entry("embedded words under causal convolutions (Bai et al., 2018)", text.text_cnn, TOKENS),
    "text_transformer": Entry("embedded words under a small transformer", text.text_transformer, TOKENS),
}
