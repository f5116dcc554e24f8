"""What a model costs: parameters, features, and arithmetic."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model_zoo.external import Enlarge
from model_zoo.registry import MODELS, create_model
from model_zoo.shapes import make_shape
from model_zoo.split_model import is_batch_norm


@dataclass(frozen=True)
class ModelDescription:
    """``forward_flops`` are the floating-point operations of one example's forward pass, a multiply-add being two;
    ``convolution_flops`` those of them in convolutions."""

    name: str
    parameters: int
    backbone_parameters: int
    head_parameters: int
    feature_dim: int
    forward_flops: int
    convolution_flops: int
    has_batch_norm: bool
    summary: str

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.name}: {self.summary}",
                f"  parameters     {self.parameters:,} "
                f"(backbone {self.backbone_parameters:,}, head {self.head_parameters:,})",
                f"  features       {self.feature_dim}",
                f"  forward pass   {format_count(self.forward_flops)}FLOP an example",
                f"  BatchNorm      {'yes' if self.has_batch_norm else 'no'}",
            )
        )


def format_count(number: int) -> str:
    """1234567 to ``"1.23 M"``."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g} {letter}"
    return f"{number} "


def summary_of(name: str) -> str:
    """One line about a model."""
    prefix, colon, rest = name.partition(":")
    if not colon:
        return MODELS[name].summary
    return f"your own {rest}" if prefix == "python" else f"{rest} of {prefix}"


def _is_enlarged(model: nn.Module) -> str:
    sizes = [module.size for module in model.modules() if isinstance(module, Enlarge)]
    return f", images enlarged to {'x'.join(map(str, sizes[0]))}" if sizes else ""  # type: ignore[arg-type]


def describe(
    name: str,
    num_classes: int = 10,
    in_channels: int = 1,
    input_size: int | Sequence[int] = 28,
    feature_dim: int | None = None,
    *,
    vocabulary: int | None = None,
    **options: Any,
) -> ModelDescription:
    """Builds the model once, in memory, and measures it; arguments and errors as :func:`create_model`'s.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        sizes = (num_classes, in_channels, input_size, feature_dim)
        model = create_model(name, *sizes, vocabulary=vocabulary, **options).eval()
    enlarged = _is_enlarged(model)
    # Tensors of the zoo's own models need no numbers, and so no memory, for operations to be counted.
    device = "cpu" if ":" in name else "meta"
    with torch.device(device):
        example = make_shape(in_channels, input_size, vocabulary).blank(1)
    flops, convolutions = _flops(model.to(device), example)
    return ModelDescription(
        name=name,
        parameters=num_parameters(model),
        backbone_parameters=num_parameters(model.backbone),
        head_parameters=num_parameters(model.head),
        feature_dim=model.feature_dim,
        forward_flops=flops,
        convolution_flops=convolutions,
        has_batch_norm=any(is_batch_norm(module) for module in model.modules()),
        summary=summary_of(name) + enlarged,
    )


def num_parameters(module: nn.Module) -> int:
    """How many numbers the parameters hold; shared ones count once."""
    return sum(math.prod(p.shape) for p in module.parameters())


def _flops(model: nn.Module, example: torch.Tensor) -> tuple[int, int]:
    # oneDNN runs an LSTM as one kernel that the counter does not know; its switch may warn about TF32 on CPUs.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            torch.no_grad(),
            torch.backends.mkldnn.flags(enabled=False),
            FlopCounterMode(display=False) as counter,
        ):
            model(example)
    by_kind = counter.get_flop_counts()["Global"]
    convolutions = sum(int(n) for kind, n in by_kind.items() if "convolution" in str(kind))
    return int(counter.get_total_flops()), convolutions
