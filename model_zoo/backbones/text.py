"""Models that read tokens: an embedding under gated recurrent units, a causal CNN, or a small transformer.

Tokens are whole numbers [B, T] below the size of the vocabulary. Number 0 is no word: shorter texts are filled up with it
from the left, so that the last step is always the newest word, from which all three read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.backbones.transformer import TransformerBlock
from model_zoo.shapes import Shape
from model_zoo.split_model import Body, scale_outputs

EMPTY = 0
DEEPEST = 6  # layers of the causal CNN that double their reach; it is then over a hundred words


class Embedding(nn.Module):
    """Tokens [B, T] to vectors [B, T, width], nought where there is no word."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight) * (x != EMPTY).unsqueeze(-1)


class _Recurrent(nn.Module):
    def __init__(self, embedding: Embedding, network: nn.GRU) -> None:
        super().__init__()
        self.embedding = embedding
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.network(self.embedding(x))
        last: Tensor = outputs[:, -1]
        return last


def text_gru(shape: Shape, *, embedding: int = 32, hidden: int = 64, layers: int = 1) -> Body:
    """Gated recurrent units over embedded words (Hard et al., "Federated Learning for Mobile Keyboard Prediction", 2018, have
    a relative of it on phones); the last step as features. Not for ``vmap``, which has no rule for it."""
    network = nn.GRU(embedding, hidden, layers, batch_first=True)
    return _Recurrent(Embedding(shape.words, embedding), network), hidden


class _CausalLayer(nn.Module):
    """x + ReLU(norm(convolution(x))) on [B, width, T]; a step sees itself and earlier ones."""

    def __init__(self, width: int, kernel: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.before = (kernel - 1) * dilation
        self.convolution = nn.Conv1d(width, width, kernel, dilation=dilation)
        # of each step by itself: a norm over all steps would look ahead
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.convolution(F.pad(x, (self.before, 0))).transpose(1, 2)
        out: Tensor = x + self.dropout(self.norm(inner).relu()).transpose(1, 2)
        return out


class _CausalCNN(nn.Module):
    def __init__(self, embedding: Embedding, layers: nn.Sequential) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        steps = self.layers(self.embedding(x).transpose(1, 2))
        # Side by side for each channel, so that the features of a narrower copy are the leading ones.
        return torch.stack([steps[..., -1], steps.amax(-1)], -1).flatten(1)


def text_cnn(
    shape: Shape,
    *,
    width: int = 64,
    layers: int = 3,
    kernel: int = 3,
    dropout: float = 0.0,
    scaler: float = 0.0,
) -> Body:
    """Causal convolutions over embedded words, each layer reaching twice as far back (Bai et al., "An Empirical Evaluation of
    Generic Convolutional and Recurrent Networks for Sequence Modeling", 2018).

    Features are the last step, which is the newest word and what came before it, and the largest value over all steps
    (Kim, 2014), which finds a telling phrase anywhere in a text. ``scaler`` is that of :func:`model_zoo.split_model.scale_outputs`.
    """
    stack = [_CausalLayer(width, kernel, 2 ** min(i, DEEPEST), dropout) for i in range(layers)]
    return scale_outputs(
        _CausalCNN(Embedding(shape.words, width), nn.Sequential(*stack)), scaler
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

    def forward(self, x: Tensor) -> Tensor:
        steps = self.embedding(x) + self.positions
        for block in self.blocks:
            steps = block(steps, x == EMPTY)
        features: Tensor = self.norm(steps[:, -1])
        return features


def text_transformer(
    shape: Shape, *, width: int = 64, depth: int = 2, heads: int = 4, dropout: float = 0.0
) -> Body:
    """A small pre-norm transformer encoder (Vaswani et al., 2017) over embedded words; the last step, which looks at all the
    others but the empty ones, as features."""
    blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(depth))
    return _TextTransformer(Embedding(shape.words, width), shape.size[0], blocks, width), width
