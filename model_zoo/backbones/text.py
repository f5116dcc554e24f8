"""Models for text: an embedding followed by a GRU, a causal CNN or a small transformer.

Tokens are int64 `[B, T]` in `[0, vocabulary)`. Token 0 is the padding, which precedes the words of
texts with fewer than T words, so the last position is always the last word.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from model_zoo.backbones.transformer import TransformerBlock
from model_zoo.options import Count, Rate
from model_zoo.shapes import Shape
from model_zoo.split_model import Body, scale_outputs

PADDING = 0
# Maximum number of times that the dilation of the causal CNN doubles. The receptive field is then
# more than a hundred words.
MAX_DOUBLINGS = 6


class Embedding(nn.Module):
    """An embedding of tokens `[B, T]` as vectors `[B, T, width]`, in which padding is zero.

    Args:
        vocabulary: Number of different tokens.
        width: Width of the vectors.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, width) * width**-0.5)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight) * (x != PADDING).unsqueeze(-1)


class _Recurrent(nn.Module):
    def __init__(self, embedding: Embedding, network: nn.GRU) -> None:
        super().__init__()
        self.embedding = embedding
        self.network = network

    @override
    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.network(self.embedding(x))
        last: Tensor = outputs[:, -1]
        return last


def text_gru(shape: Shape, *, embedding: Count = 32, hidden: Count = 64, layers: Count = 1) -> Body:
    """Build a network of gated recurrent units (GRU) over embedded words.

    The features are the output at the last word. Hard et al. ("Federated Learning for Mobile
    Keyboard Prediction", 2018) use a related network on phones. The network does not support
    `torch.vmap`.

    Args:
        shape: Shape of an example.
        embedding: Width of the embedding.
        hidden: Width of the hidden state and of the features.
        layers: Number of layers.

    Returns:
        The backbone and the width of the features.
    """
    network = nn.GRU(embedding, hidden, layers, batch_first=True)
    return _Recurrent(Embedding(shape.vocabulary_size, embedding), network), hidden


class _CausalLayer(nn.Module):
    """A residual causal convolution `x + ReLU(norm(conv(x)))` on `[B, width, T]`."""

    def __init__(self, width: int, kernel: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.before = (kernel - 1) * dilation
        self.convolution = nn.Conv1d(width, width, kernel, dilation=dilation)
        # Normalization over all positions would not be causal.
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        inner = self.convolution(F.pad(x, (self.before, 0))).transpose(1, 2)
        out: Tensor = x + self.dropout(self.norm(inner).relu()).transpose(1, 2)
        return out


class _CausalCNN(nn.Module):
    def __init__(self, embedding: Embedding, layers: nn.Sequential) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = layers

    @override
    def forward(self, x: Tensor) -> Tensor:
        steps = self.layers(self.embedding(x).transpose(1, 2))
        # Both values are interleaved by channel, so that the features of a narrow copy are a
        # leading slice.
        return torch.stack([steps[..., -1], steps.amax(-1)], -1).flatten(1)


def text_cnn(
    shape: Shape,
    *,
    width: Count = 64,
    layers: Count = 3,
    kernel: Count = 3,
    dropout: Rate = 0.0,
    scaler: Rate = 0.0,
) -> Body:
    """Build a CNN of causal convolutions over embedded words.

    The dilation doubles from layer to layer, up to 64. The features are the output at the last word
    and the maximum over all positions, shape `[B, 2 * width]` (Bai et al., "An Empirical Evaluation
    of Generic Convolutional and Recurrent Networks for Sequence Modeling", 2018; Kim,
    "Convolutional Neural Networks for Sentence Classification", 2014).

    Args:
        shape: Shape of an example.
        width: Width of the embedding and channels of the convolutions.
        layers: Number of convolutions.
        kernel: Kernel size.
        dropout: Dropout rate.
        scaler: Divisor of the outputs of all layers in a narrow copy (see
            `model_zoo.split_model.scale_outputs`). If 0, outputs are not divided.

    Returns:
        The backbone and the width of the features.
    """
    stack = [
        _CausalLayer(width, kernel, 2 ** min(i, MAX_DOUBLINGS), dropout) for i in range(layers)
    ]
    return scale_outputs(
        _CausalCNN(Embedding(shape.vocabulary_size, width), nn.Sequential(*stack)), scaler
    ), 2 * width


class _TextTransformer(nn.Module):
    def __init__(
        self, embedding: Embedding, positions: int, blocks: nn.ModuleList, width: int
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.positions = nn.Parameter(torch.randn(1, positions, width) * 0.02)
        self.blocks = blocks
        self.norm = nn.LayerNorm(width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        steps = self.embedding(x) + self.positions
        for block in self.blocks:
            steps = block(steps, x == PADDING)
        features: Tensor = self.norm(steps[:, -1])
        return features


def text_transformer(
    shape: Shape, *, width: Count = 64, depth: Count = 2, heads: Count = 4, dropout: Rate = 0.0
) -> Body:
    """Build a small pre-norm transformer encoder over embedded words (Vaswani et al., 2017).

    The features are the output at the last word, which attends to all words and ignores padding.

    Args:
        shape: Shape of an example.
        width: Width of the features.
        depth: Number of transformer blocks.
        heads: Number of attention heads.
        dropout: Dropout rate.

    Returns:
        The backbone and the width of the features.
    """
    blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(depth))
    return _TextTransformer(
        Embedding(shape.vocabulary_size, width), shape.size[0], blocks, width
    ), width
