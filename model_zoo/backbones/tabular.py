"""Models of table rows: linear, perceptron, residual, wide and deep, transformer over columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from model_zoo.backbones.transformer import SelfAttention
from model_zoo.shapes import Shape
from model_zoo.split_model import Body, scale_outputs

# Models of table rows that treat columns one by one: wide and deep parts side by side, and a
# transformer over columns.


class _WideDeep(nn.Module):
    """[B, columns] to the columns, their products and what the perceptron makes of them, side by side."""

    def __init__(self, columns: int, deep: nn.Module, crosses: bool) -> None:
        super().__init__()
        self.deep = deep
        pairs = (
            torch.triu_indices(columns, columns, 1)
            if crosses
            else torch.empty(2, 0, dtype=torch.int64)
        )
        self.first: list[int] = pairs[0].tolist()
        self.second: list[int] = pairs[1].tolist()

    def forward(self, x: Tensor) -> Tensor:
        bounded = x.tanh()  # a product of two outliers would drown all else
        crossed = bounded[:, self.first] * bounded[:, self.second]
        return torch.cat([x, crossed, self.deep(x)], 1)


def wide_deep(
    shape: Shape,
    *,
    hidden: Sequence[int] = (64, 32),
    crosses: Literal["pairs", "none"] = "pairs",
    dropout: float = 0.0,
) -> Body:
    """A linear model on columns and crossed columns (wide) beside a perceptron (deep), trained jointly.

    Cheng et al., "Wide & Deep Learning for Recommender Systems" (2016), section 3: the head, a linear layer on both parts, is
    eq. 3. The paper crosses binary columns by AND; ours, which are numbers, by the product of each pair, tanh of either.
    """
    layers: list[nn.Module] = []
    width = shape.channels
    for wider in hidden:
        layers += [
            nn.Linear(width, wider),
            nn.ReLU(),
            *([nn.Dropout(dropout)] if dropout > 0 else []),
        ]
        width = wider
    crossed = shape.channels * (shape.channels - 1) // 2 if crosses == "pairs" else 0
    return _WideDeep(
        shape.channels, nn.Sequential(*layers), crosses == "pairs"
    ), shape.channels + crossed + width


class _ColumnBlock(nn.Module):
    """x + attention(norm(x)), then x + ReGLU perceptron(norm(x)); the first block's attention has no norm before it."""

    def __init__(self, width: int, heads: int, dropout: float, first: bool) -> None:
        super().__init__()
        inner = 4 * width // 3
        self.norm1 = nn.Identity() if first else nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * inner)
        self.down = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        value, gate = self.up(self.norm2(x)).chunk(2, -1)
        out: Tensor = x + self.dropout(self.down(value * gate.relu()))
        return out


class _ColumnTransformer(nn.Module):
    """[B, columns] to features [B, width]: a token for each column, one more that is read."""

    def __init__(self, columns: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        # The bound of the authors' tokeniser: uniform within ±1/√width.
        self.scale = nn.Parameter((2 * torch.rand(columns, width) - 1) * width**-0.5)
        self.shift = nn.Parameter((2 * torch.rand(columns, width) - 1) * width**-0.5)
        self.read = nn.Parameter((2 * torch.rand(1, 1, width) - 1) * width**-0.5)
        self.blocks = nn.Sequential(
            *(_ColumnBlock(width, heads, dropout, b == 0) for b in range(depth))
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(-1) * self.scale + self.shift
        steps = self.blocks(torch.cat([tokens, self.read.expand(x.shape[0], -1, -1)], 1))
        features: Tensor = self.norm(steps[:, -1]).relu()
        return features


def ft_transformer(
    shape: Shape, *, width: int = 32, depth: int = 2, heads: int = 4, dropout: float = 0.0
) -> Body:
    """A small transformer over columns: column j with value x becomes the token x·w_j + b_j.

    Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data" (NeurIPS 2021), section 3.3: pre-norm blocks, ReGLU
    of 4/3 of the width, and the last token read by LayerNorm and ReLU. All tensors but ``scale`` and ``shift`` have the same
    shapes whatever the columns, so that clients with different columns can share them.
    """
    return _ColumnTransformer(shape.channels, width, depth, heads, dropout), width


# Models without convolutions: a linear classifier, a multi-layer perceptron, and a residual network
# for tables.


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

    ``scaler`` is that of :func:`model_zoo.split_model.scale_outputs`, here and below.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = shape.numbers
    for wider in hidden:
        between = [nn.BatchNorm1d(wider)] if norm == "batch" else []
        layers += [nn.Linear(width, wider), *between, nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        width = wider
    return scale_outputs(nn.Sequential(*layers), scaler), width


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


def tabular(
    shape: Shape, *, width: int = 64, blocks: int = 2, dropout: float = 0.0, scaler: float = 0.0
) -> Body:
    """A residual network for table rows [B, columns].

    Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data" (NeurIPS 2021), section 3.2.
    """
    layers = [_TableBlock(width, dropout) for _ in range(blocks)]
    backbone = nn.Sequential(
        nn.Linear(shape.channels, width), *layers, nn.BatchNorm1d(width), nn.ReLU()
    )
    return scale_outputs(backbone, scaler), width
