"""Models of sequences: GRU, LSTM, a small transformer, dilated convolutions."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from model_zoo.backbones.cnn import Norm, norm_2d
from model_zoo.backbones.transformer import Encoder
from model_zoo.shapes import Shape
from model_zoo.split_model import Body

# Models that read a sequence: GRU, LSTM, and a small transformer. Images are read row by row, from
# the top.


def to_steps(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H, C·W], a row a step; [B, C, L] to [B, L, C], a point a step."""
    if x.ndim == 4:
        return rearrange(x, "b c h w -> b h (c w)")
    return rearrange(x, "b c l -> b l c")


class Recurrent(nn.Module):
    """The last step's output of a recurrent network: [B, hidden]."""

    def __init__(self, network: nn.GRU | nn.LSTM) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.network(to_steps(x))
        last: Tensor = outputs[:, -1]
        return last


def gru(shape: Shape, *, hidden: int = 64, layers: int = 1) -> Body:
    """Gated recurrent units (Cho et al., 2014), ``layers`` deep. Not for ``vmap``, which has no rule for it."""
    return Recurrent(nn.GRU(shape.steps[1], hidden, layers, batch_first=True)), hidden


def lstm(shape: Shape, *, hidden: int = 64, layers: int = 1) -> Body:
    """Long short-term memory (Hochreiter & Schmidhuber, 1997), ``layers`` deep. Not for ``vmap``."""
    return Recurrent(nn.LSTM(shape.steps[1], hidden, layers, batch_first=True)), hidden


class SequenceTransformer(nn.Module):
    """The encoder over an image's rows or a series' points."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(to_steps(x))
        return features


def transformer(
    shape: Shape, *, width: int = 64, depth: int = 2, heads: int = 4, dropout: float = 0.0
) -> Body:
    """A small pre-norm transformer encoder (Vaswani et al., 2017), the mean over the steps as features."""
    steps, step_width = shape.steps
    return SequenceTransformer(Encoder(steps, step_width, width, depth, heads, dropout)), width


# A convolutional network for series, with dilated residual blocks. Images are read row by row, from
# the top.

Pool = Literal["both", "mean", "last"]


def _norm(norm: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm1d(channels) if norm == "batch" else norm_2d(norm, channels)


class _DilatedBlock(nn.Module):
    """x + Conv(ReLU(Norm(Conv(x)))) on [B, width, steps]: the first convolution dilated, the second of one step."""

    def __init__(self, width: int, kernel: int, dilation: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        reach = dilation * (kernel - 1)
        self.pad = nn.ConstantPad1d((reach - reach // 2, reach // 2), 0.0)
        self.dilated = nn.Conv1d(width, width, kernel, dilation=dilation)
        self.norm = _norm(norm, width)
        self.mix = nn.Conv1d(width, width, 1)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dropout(self.mix(self.norm(self.dilated(self.pad(x))).relu()))
        return out


class DilatedCNN(nn.Module):
    """A stem of one step's width, blocks with dilation 1, 2, 4 …, and the mean over the steps beside the last one."""

    def __init__(
        self,
        step_width: int,
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

    def forward(self, x: Tensor) -> Tensor:
        steps = self.blocks(self.stem(to_steps(x).transpose(1, 2))).relu()
        found = {"mean": [steps.mean(-1)], "last": [steps[..., -1]]}
        return torch.cat(found.get(self.pool, [*found["mean"], *found["last"]]), dim=1)


def cnn1d(
    shape: Shape,
    *,
    width: int = 32,
    blocks: int = 3,
    kernel: int = 3,
    norm: Norm = "group",
    pool: Pool = "both",
    dropout: float = 0.0,
) -> Body:
    """Residual blocks of dilated convolutions along the steps, after Bai et al., "An Empirical Evaluation of Generic
    Convolutional and Recurrent Networks for Sequence Modeling" (2018), section 3; not causal, as the whole window is
    known when it is read.

    Block b has dilation 2^b, so the last step sees (kernel − 1)·(2^blocks − 1)/2 steps to each side. ``pool`` gives the
    features: the mean over the steps (what a sensor window contains, wherever), the last step (where a forecast
    begins), or both side by side, of width 2·``width``.
    """
    network = DilatedCNN(shape.steps[1], width, blocks, kernel, norm, pool, dropout)
    return network, 2 * width if pool == "both" else width
