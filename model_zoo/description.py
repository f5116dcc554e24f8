"""Size and computational cost of a model."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from typing_extensions import override

from model_zoo.external import Enlarge
from model_zoo.generators import keyed_generators
from model_zoo.registry import MODELS, ModelName, create_model, find_model
from model_zoo.shapes import make_shape
from model_zoo.split_model import is_batch_norm

MAX_VALUES = {0: 1_000, 1: 1_000, 2: 100_000}
"""Number of values in an example above which operations are counted without memory, by the number
of dimensions of a row, a series or an image. Attention takes memory for each pair of values of a
row or series."""


@dataclass(frozen=True)
class ModelDescription:
    """Size and cost of a model, as returned by `describe`.

    Attributes:
        name: Name of the model.
        parameters: Number of parameters.
        backbone_parameters: Number of parameters of the backbone.
        head_parameters: Number of parameters of the head.
        feature_dim: Width of the features.
        forward_flops: Floating-point operations of the forward pass of one example. A multiply-add
            counts as two operations.
        convolution_flops: The part of `forward_flops` that is due to convolutions.
        has_batch_norm: Whether the model contains BatchNorm layers.
        summary: One-line description of the architecture.

    Example:
        >>> from model_zoo import describe
        >>> print(describe("lenet"))
        lenet: LeNet-5 with ReLU and max pooling (LeCun et al., 1998)
          parameters     61,706 (backbone 60,856, head 850)
          features       84
          forward pass   833 kFLOP per example
          BatchNorm      no
    """

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
                f"  forward pass   {format_count(self.forward_flops)}FLOP per example",
                f"  BatchNorm      {'yes' if self.has_batch_norm else 'no'}",
            )
        )


def format_count(number: int) -> str:
    """Return a number with three significant digits and a metric prefix, such as `1.23 M`.

    Numbers below 1,000 are returned in full, followed by a space.
    """
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g} {letter}"
    return f"{number} "


def _describe_enlargement(model: nn.Module) -> str:
    sizes = [module.size for module in model.modules() if isinstance(module, Enlarge)]
    return f", images enlarged to {'x'.join(map(str, sizes[0]))}" if sizes else ""  # type: ignore[arg-type]


def describe(
    name: ModelName,
    num_classes: int = 10,
    in_channels: int = 1,
    input_size: int | Sequence[int] = 28,
    feature_dim: int | None = None,
    *,
    vocabulary: int | None = None,
    **options: Any,
) -> ModelDescription:
    """Build a model once and measure its size and cost.

    The state of the global random number generator does not change.

    Args:
        name: Name of the model, see `create_model`.
        num_classes: Number of outputs.
        in_channels: Channels of an image or series, or columns of a table row.
        input_size: Size of an example, see `create_model`.
        feature_dim: Width of the features. If None, the backbone's width is kept.
        vocabulary: Number of different tokens, for text models. If None, examples are numeric.
        **options: Options of the model, see `model_options`.

    Returns:
        The size and the cost of the model.

    Raises:
        ModelError: If the model cannot be created.

    Example:
        >>> from model_zoo import describe
        >>> small = describe("resnet8", num_classes=10, in_channels=3, input_size=32)
        >>> small.parameters, small.feature_dim, small.has_batch_norm
        (78042, 64, True)
    """
    with keyed_generators(0):
        sizes = (num_classes, in_channels, input_size, feature_dim)
        model = create_model(name, *sizes, vocabulary=vocabulary, **options).eval()
    enlargement = _describe_enlargement(model)
    shape = make_shape(in_channels, input_size, vocabulary)
    is_own = name in MODELS
    # Operations on meta tensors need no memory, but layer norms on them import `torch._dynamo`.
    # Models of other libraries and of users may not support meta tensors.
    device = "meta" if is_own and shape.num_values > MAX_VALUES[len(shape.size)] else "cpu"
    with torch.device(device), keyed_generators(0):
        # Models with batch statistics need at least two examples.
        flops, convolutions = _count_flops(model.to(device), shape.zeros(2), is_own)
    return ModelDescription(
        name=str(name),
        parameters=num_parameters(model),
        backbone_parameters=num_parameters(model.backbone),
        head_parameters=num_parameters(model.head),
        feature_dim=model.num_features,
        forward_flops=flops,
        convolution_flops=convolutions,
        has_batch_norm=any(is_batch_norm(module) for module in model.modules()),
        summary=find_model(name).summary + enlargement,
    )


def num_parameters(module: nn.Module) -> int:
    """Return the number of parameters. Shared parameters count once."""
    return sum(math.prod(p.shape) for p in module.parameters())


def _count_flops(model: nn.Module, examples: torch.Tensor, is_own: bool) -> tuple[int, int]:
    """Return the operations per example, and the part of them that is due to convolutions.

    Args:
        model: The model.
        examples: The examples.
        is_own: Whether the model is one of this package.
    """
    counter = OperationCounter() if is_own else FlopCounterMode(display=False)
    is_fast = torch.backends.mha.get_fastpath_enabled()
    # With oneDNN, an LSTM is a single kernel that the counters do not support, as is attention on
    # the fast path or in a fused kernel. Disabling oneDNN may emit a warning about TF32 on CPUs.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with (
                torch.no_grad(),
                torch.backends.mkldnn.flags(enabled=False),
                sdpa_kernel(SDPBackend.MATH),
                counter,
            ):
                model(examples)
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
    counts = counter.flop_counts["Global"]
    convolutions = sum(n for operator, n in counts.items() if "convolution" in str(operator))
    return sum(counts.values()) // len(examples), convolutions // len(examples)


class OperationCounter(TorchDispatchMode):
    """Counts operations as `torch.utils.flop_counter.FlopCounterMode` does.

    That class imports `torch._dynamo` when it is used, which takes as long as importing torch. This
    one is for models of this package, which contain no higher-order operators.

    Attributes:
        flop_counts: Number of floating-point operations, keyed by "Global" and operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop_counts: dict[str, Counter[Any]] = {"Global": Counter()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func.overloadpacket
        if operator not in flop_registry:
            # In inference mode, operators arrive before they are decomposed.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if operator in flop_registry:
            count = flop_registry[operator](*args, **kwargs, out_val=result)
            self.flop_counts["Global"][operator] += count
        return result
