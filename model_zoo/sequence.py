"""Models that read a sequence: GRU, LSTM, and a small transformer. Images are read row by row, from the top."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from .attention import Encoder
from .shapes import Shape
from .split import Body


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


def transformer(shape: Shape, *, width: int = 64, depth: int = 2, heads: int = 4, dropout: float = 0.0) -> Body:
    """A small pre-norm transformer encoder (Vaswani et al., 2017), the mean over the steps as features."""
    steps, step_width = shape.steps
    return SequenceTransformer(Encoder(steps, step_width, width, depth, heads, dropout)), width
