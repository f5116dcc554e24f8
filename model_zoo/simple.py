"""Models without convolutions: a linear classifier, a multi-layer perceptron, and a residual network for tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from .shapes import Shape
from .split import Body, scaled


def linear(shape: Shape) -> Body:
    """Logistic regression: the features are the flattened input itself."""
    return nn.Flatten(), shape.numbers


def mlp(
    shape: Shape,
    *,
    hidden: Sequence[int] = (128,),
    dropout: float = 0.0,
    norm: Literal["none", "batch"] = "none",
    scaler: float = 0.0,
) -> Body:
    """Flatten, then Linear and ReLU for each width in ``hidden`` (BatchNorm between, dropout after, where asked for).

    ``scaler`` is that of :func:`model_zoo.split.scaled`, here and below.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = shape.numbers
    for wider in hidden:
        between = [nn.BatchNorm1d(wider)] if norm == "batch" else []
        layers += [nn.Linear(width, wider), *between, nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        width = wider
    return scaled(nn.Sequential(*layers), scaler), width


class _TableBlock(nn.Module):
    """x + Linear(ReLU(Linear(BatchNorm(x)))), with dropout after the ReLU and at the end."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(self.up(self.norm(x)).relu())
        out: Tensor = x + self.dropout(self.down(inner))
        return out


def tabular(shape: Shape, *, width: int = 64, blocks: int = 2, dropout: float = 0.0, scaler: float = 0.0) -> Body:
    """A residual network for table rows [B, columns].

    Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data" (NeurIPS 2021), section 3.2.
    """
    layers = [_TableBlock(width, dropout) for _ in range(blocks)]
    backbone = nn.Sequential(nn.Linear(shape.channels, width), *layers, nn.BatchNorm1d(width), nn.ReLU())
    return scaled(backbone, scaler), width
