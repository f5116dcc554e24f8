"""A convolutional network for series, with dilated residual blocks. Images are read row by row, from the top."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .cnn import Norm, norm_2d
from .sequence import to_steps
from .shapes import Shape
from .split import Body

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
        self, step_width: int, width: int, blocks: int, kernel: int, norm: Norm, pool: Pool, dropout: float
    ) -> None:
        super().__init__()
        self.stem = nn.Conv1d(step_width, width, 1)
        self.blocks = nn.Sequential(*(_DilatedBlock(width, kernel, 2**b, norm, dropout) for b in range(blocks)))
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
