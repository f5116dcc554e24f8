"""Models for sequences: GRU, LSTM, a small transformer and dilated convolutions.

The steps of a sequence are the points of a series, or the rows of an image from top to bottom.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from typing_extensions import override

from model_zoo.backbones.images import Norm, norm_2d
from model_zoo.backbones.transformer import Encoder
from model_zoo.options import Count, Rate
from model_zoo.shapes import Kind, Shape
from model_zoo.split_model import Body


def steps_pattern(kind: Kind) -> str:
    """Return how images `[B, C, H, W]` or series `[B, C, L]` are rearranged to steps."""
    return "b c h w -> b h (c w)" if kind == "image" else "b c l -> b l c"


def to_steps(x: Tensor) -> Tensor:
    """Convert images `[B, C, H, W]` to `[B, H, C * W]`, or series `[B, C, L]` to `[B, L, C]`."""
    return rearrange(x, steps_pattern("image" if x.ndim == 4 else "series"))


Pool = Literal["both", "mean", "last"]


def pool_steps(steps: Tensor, pool: Pool) -> Tensor:
    """Pool features `[B, width, steps]` over the steps.

    Args:
        steps: Features of each step.
        pool: `mean` for the mean over the steps, `last` for the last step, `both` for the
            concatenation of the mean and the last step.
    """
    pooled = {"mean": [steps.mean(-1)], "last": [steps[..., -1]]}
    return torch.cat(pooled.get(pool, [*pooled["mean"], *pooled["last"]]), dim=1)


def pooled_width(width: int, pool: Pool) -> int:
    """Return the width of features that `pool_steps` has pooled."""
    return 2 * width if pool == "both" else width


class Recurrent(nn.Module):
    """A recurrent network that returns its outputs, pooled over the steps.

    Args:
        network: The recurrent layers.
        pool: Pooling over the steps (see `pool_steps`).
    """

    def __init__(self, network: nn.GRU | nn.LSTM, pool: Pool = "last") -> None:
        super().__init__()
        self.network = network
        self.pool = pool

    @override
    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.network(to_steps(x))
        return pool_steps(outputs.transpose(1, 2), self.pool)


def gru(shape: Shape, *, hidden: Count = 64, layers: Count = 1, pool: Pool = "last") -> Body:
    """Build a network of gated recurrent units (GRU; Cho et al., 2014).

    The network does not support `torch.vmap`.

    Args:
        shape: Shape of an example.
        hidden: Width of the hidden state.
        layers: Number of layers.
        pool: Pooling of the outputs over the steps. `last` is the last step, for forecasts. `mean`
            is the mean over the steps, for patterns at any position. `both` concatenates the mean
            and the last step, so that the features have width `2 * hidden`.

    Returns:
        The backbone and the width of the features.
    """
    network = nn.GRU(shape.steps[1], hidden, layers, batch_first=True)
    return Recurrent(network, pool), pooled_width(hidden, pool)


def lstm(shape: Shape, *, hidden: Count = 64, layers: Count = 1, pool: Pool = "last") -> Body:
    """Build a long short-term memory network (LSTM; Hochreiter & Schmidhuber, 1997).

    The network does not support `torch.vmap`.

    Args:
        shape: Shape of an example.
        hidden: Width of the hidden state.
        layers: Number of layers.
        pool: Pooling of the outputs over the steps. `last` is the last step, for forecasts. `mean`
            is the mean over the steps, for patterns at any position. `both` concatenates the mean
            and the last step, so that the features have width `2 * hidden`.

    Returns:
        The backbone and the width of the features.
    """
    network = nn.LSTM(shape.steps[1], hidden, layers, batch_first=True)
    return Recurrent(network, pool), pooled_width(hidden, pool)


def transformer(
    shape: Shape, *, width: Count = 64, depth: Count = 2, heads: Count = 4, dropout: Rate = 0.0
) -> Body:
    """Build a small pre-norm transformer encoder (Vaswani et al., 2017).

    The features are the mean over the steps.

    Args:
        shape: Shape of an example.
        width: Width of the features.
        depth: Number of transformer blocks.
        heads: Number of attention heads.
        dropout: Dropout rate.

    Returns:
        The backbone and the width of the features.
    """
    steps, step_width = shape.steps
    encoder = Encoder(steps, step_width, width, depth=depth, heads=heads, dropout=dropout)
    rows = Rearrange(steps_pattern(shape.kind))
    return nn.Sequential(OrderedDict(steps=rows, encoder=encoder)), width


def _norm(norm: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm1d(channels) if norm == "batch" else norm_2d(norm, channels)


class _DilatedBlock(nn.Module):
    """A residual block `x + conv1x1(ReLU(norm(dilated_conv(x))))` on `[B, width, steps]`."""

    def __init__(self, width: int, kernel: int, dilation: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        padding = dilation * (kernel - 1)
        self.pad = nn.ConstantPad1d((padding - padding // 2, padding // 2), 0.0)
        self.dilated = nn.Conv1d(width, width, kernel, dilation=dilation)
        self.norm = _norm(norm, width)
        self.mix = nn.Conv1d(width, width, 1)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.mix(self.norm(self.dilated(self.pad(x))).relu()))


class DilatedCNN(nn.Module):
    """A network of dilated convolutions along a sequence.

    The network consists of a convolution of kernel size 1, residual blocks with dilation 1, 2, 4, …
    and pooling over the steps.

    Args:
        step_width: Width of a step.
        width: Channels of the convolutions.
        blocks: Number of blocks.
        kernel: Kernel size of the dilated convolutions.
        norm: Normalization layer, which is `batch`, `group` or `none`.
        pool: Pooling over the steps. `mean` is the mean over the steps, `last` is the last step,
            and `both` concatenates the mean and the last step.
        dropout: Dropout rate of the blocks.
    """

    def __init__(
        self,
        step_width: int,
        *,
        width: int,
        blocks: int,
        kernel: int,
        norm: Norm,
        pool: Pool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv1d(step_width, width, 1)
        self.blocks = nn.Sequential(
            *(_DilatedBlock(width, kernel, 2**b, norm, dropout) for b in range(blocks))
        )
        self.pool = pool

    @override
    def forward(self, x: Tensor) -> Tensor:
        steps = self.blocks(self.stem(to_steps(x).transpose(1, 2))).relu()
        return pool_steps(steps, self.pool)


def cnn1d(
    shape: Shape,
    *,
    width: Count = 32,
    blocks: Count = 3,
    kernel: Count = 3,
    norm: Norm = "group",
    pool: Pool = "both",
    dropout: Rate = 0.0,
) -> Body:
    """Build a network of residual blocks with dilated convolutions along the steps.

    Block b has dilation 2^b, so an output depends on (kernel - 1) * (2^blocks - 1) / 2 steps on
    each side. The architecture follows Bai et al., "An Empirical Evaluation of Generic
    Convolutional and Recurrent Networks for Sequence Modeling" (2018, section 3), but the
    convolutions are not causal, because all steps are known.

    Args:
        shape: Shape of an example.
        width: Channels of the convolutions.
        blocks: Number of residual blocks.
        kernel: Kernel size of the dilated convolutions.
        norm: Normalization layer, which is `batch`, `group` or `none`.
        pool: Pooling over the steps. `mean` is the mean over the steps, for patterns at any
            position. `last` is the last step, for forecasts. `both` concatenates the mean and the
            last step, so that the features have width `2 * width`.
        dropout: Dropout rate of the blocks.

    Returns:
        The backbone and the width of the features.
    """
    network = DilatedCNN(
        shape.steps[1],
        width=width,
        blocks=blocks,
        kernel=kernel,
        norm=norm,
        pool=pool,
        dropout=dropout,
    )
    return network, pooled_width(width, pool)
