"""Models for tables: linear, perceptron, residual network, wide & deep, and column transformer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from model_zoo.backbones.transformer import SelfAttention
from model_zoo.options import Count, Counts, Rate
from model_zoo.shapes import Shape
from model_zoo.split_model import Body, scale_outputs


class _WideDeep(nn.Module):
    """A backbone that concatenates columns, products of pairs of columns, and a perceptron."""

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

    @override
    def forward(self, x: Tensor) -> Tensor:
        # The products of unbounded outliers would dominate the features.
        bounded = x.tanh()
        crossed = bounded[:, self.first] * bounded[:, self.second]
        return torch.cat([x, crossed, self.deep(x)], 1)


def wide_deep(
    shape: Shape,
    *,
    hidden: Counts = (64, 32),
    crosses: Literal["pairs", "none"] = "pairs",
    dropout: Rate = 0.0,
) -> Body:
    """Build a linear model on columns and crossed columns (wide) and a perceptron (deep).

    Both parts have a common linear head and are trained jointly (Cheng et al., "Wide & Deep
    Learning for Recommender Systems", 2016, section 3, eq. 3). The paper crosses binary columns
    with AND. Here, columns are numeric, and the cross of two columns is the product of their tanh
    values.

    Args:
        shape: Shape of a table row.
        hidden: Widths of the perceptron's layers.
        crosses: `pairs` adds the products of all pairs of columns, `none` adds no products.
        dropout: Dropout rate of the perceptron.

    Returns:
        The backbone and the width of the features.
    """
    layers: list[nn.Module] = []
    width = shape.channels
    for hidden_width in hidden:
        layers += [
            nn.Linear(width, hidden_width),
            nn.ReLU(),
            *([nn.Dropout(dropout)] if dropout > 0 else []),
        ]
        width = hidden_width
    crossed = shape.channels * (shape.channels - 1) // 2 if crosses == "pairs" else 0
    return _WideDeep(
        shape.channels, nn.Sequential(*layers), crosses == "pairs"
    ), shape.channels + crossed + width


class _ColumnBlock(nn.Module):
    """A transformer block with a ReGLU perceptron.

    If `first` is set, the attention is not preceded by a norm.
    """

    def __init__(self, width: int, heads: int, dropout: float, first: bool) -> None:
        super().__init__()
        inner = 4 * width // 3
        self.norm1 = nn.Identity() if first else nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * inner)
        self.down = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        value, gate = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.dropout(self.down(value * gate.relu()))


class _ColumnTransformer(nn.Module):
    """A transformer over one token per column and a readout token."""

    def __init__(self, columns: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        # Uniform in ±1/√width, as in the authors' tokenizer.
        self.scale = nn.Parameter((2 * torch.rand(columns, width) - 1) * width**-0.5)
        self.shift = nn.Parameter((2 * torch.rand(columns, width) - 1) * width**-0.5)
        self.read = nn.Parameter((2 * torch.rand(1, 1, width) - 1) * width**-0.5)
        self.blocks = nn.Sequential(
            *(_ColumnBlock(width, heads, dropout, b == 0) for b in range(depth))
        )
        self.norm = nn.LayerNorm(width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(-1) * self.scale + self.shift
        steps = self.blocks(torch.cat([tokens, self.read.expand(x.shape[0], -1, -1)], 1))
        return self.norm(steps[:, -1]).relu()


def ft_transformer(
    shape: Shape, *, width: Count = 32, depth: Count = 2, heads: Count = 4, dropout: Rate = 0.0
) -> Body:
    """Build a small transformer over the columns of a table.

    The value x of column j becomes the token `x * scale[j] + shift[j]`. Transformer blocks are
    pre-norm and have a ReGLU perceptron of 4/3 of the width. The features are the last token, a
    learned readout token, after LayerNorm and ReLU (Gorishniy et al., "Revisiting Deep Learning
    Models for Tabular Data", NeurIPS 2021, section 3.3). Only the shapes of `scale` and `shift`
    depend on the columns, so clients with different columns can share all other tensors.

    Args:
        shape: Shape of a table row.
        width: Width of the tokens and of the features.
        depth: Number of transformer blocks.
        heads: Number of attention heads.
        dropout: Dropout rate.

    Returns:
        The backbone and the width of the features.
    """
    return _ColumnTransformer(shape.channels, width, depth, heads, dropout), width


def linear(shape: Shape) -> Body:
    """Build the backbone of logistic regression, whose features are the flattened input."""
    return nn.Flatten(), shape.num_values


def mlp(
    shape: Shape,
    *,
    hidden: Counts = (128,),
    dropout: Rate = 0.0,
    norm: Literal["none", "batch"] = "none",
    scaler: Rate = 0.0,
) -> Body:
    """Build a multi-layer perceptron on the flattened input.

    Args:
        shape: Shape of an example.
        hidden: Widths of the hidden layers, each followed by ReLU.
        dropout: Dropout rate after each ReLU.
        norm: `batch` adds BatchNorm before each ReLU, `none` adds no normalization.
        scaler: Divisor of the outputs of all layers in a narrow copy (see
            `model_zoo.split_model.scale_outputs`). If 0, outputs are not divided.

    Returns:
        The backbone and the width of the features.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = shape.num_values
    for hidden_width in hidden:
        batch_norm = [nn.BatchNorm1d(hidden_width)] if norm == "batch" else []
        layers += [nn.Linear(width, hidden_width), *batch_norm, nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        width = hidden_width
    return scale_outputs(nn.Sequential(*layers), scaler), width


class _TableBlock(nn.Module):
    """A residual block `x + linear(ReLU(linear(norm(x))))` with dropout after both layers."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(self.up(self.norm(x)).relu())
        return x + self.dropout(self.down(inner))


def tabular(
    shape: Shape, *, width: Count = 64, blocks: Count = 2, dropout: Rate = 0.0, scaler: Rate = 0.0
) -> Body:
    """Build a residual network for table rows `[B, columns]`.

    The network consists of a linear layer, residual blocks, BatchNorm and ReLU (Gorishniy et al.,
    "Revisiting Deep Learning Models for Tabular Data", NeurIPS 2021, section 3.2).

    Args:
        shape: Shape of a table row.
        width: Width of the features.
        blocks: Number of residual blocks.
        dropout: Dropout rate.
        scaler: Divisor of the outputs of all layers in a narrow copy (see
            `model_zoo.split_model.scale_outputs`). If 0, outputs are not divided.

    Returns:
        The backbone and the width of the features.
    """
    layers = [_TableBlock(width, dropout) for _ in range(blocks)]
    backbone = nn.Sequential(
        nn.Linear(shape.channels, width), *layers, nn.BatchNorm1d(width), nn.ReLU()
    )
    return scale_outputs(backbone, scaler), width
