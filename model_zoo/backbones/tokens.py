"""Networks for tokens: words of a text, or the items of a user.

Texts are int64 `[B, T]` in `[0, vocabulary)`. Token 0 is the padding, which precedes the words of
texts with fewer than T words, so the last position is always the last word.

Histories of users are int64 `[B, 1 + T]`. The first token is the number of the user, or 0 for an
unknown user. The other tokens are the last T items, with padding on the left. The features describe
the user, and the weights of the head are the vectors of the items: the score of item i is
`q_i . features + b_i`. Models of equal width therefore have heads, and tables `backbone.items`, of
equal shapes.
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
        return outputs[:, -1]


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
        return x + self.dropout(self.norm(inner).relu()).transpose(1, 2)


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
        return self.norm(steps[:, -1])


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


class _UserModel(nn.Module):
    """The tables of items and users, and a network that combines them.

    The table of users has a row for each token, as the number of users is not known. The vector of
    an unknown user is zero.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.items = Embedding(vocabulary, width)
        self.users = Embedding(vocabulary, width)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the vectors of the users `[B, width]`, the items `[B, T, width]`, and T `[B, 1]`.

        T is the number of items of each row without padding, at least 1.
        """
        history = x[:, 1:]
        count = (history != PADDING).sum(1, keepdim=True).clamp(min=1)
        return self.users(x[:, 0]), self.items(history), count


class _MatrixFactorization(_UserModel):
    @override
    def forward(self, x: Tensor) -> Tensor:
        user, items, count = self.embed(x)
        return user + items.sum(1) * count.to(items.dtype).rsqrt()


def matrix_factorization(shape: Shape, *, width: Count = 32) -> Body:
    """Build a matrix factorization that takes the items of a user into account (SVD++).

    The score of item i for user u with items N is `b_i + q_i . (p_u + |N|**-0.5 * sum_j y_j)` with
    j in N (Koren, "Factorization Meets the Neighborhood", KDD 2008, equation 15, without the terms
    of ratings, which do not change the order of items).

    Args:
        shape: Shape of an example.
        width: Width of the vectors and of the features.

    Returns:
        The backbone and the width of the features.
    """
    return _MatrixFactorization(shape.vocabulary_size, width), width


class _NeuralFiltering(_UserModel):
    def __init__(self, vocabulary: int, width: int, hidden: int, dropout: float) -> None:
        super().__init__(vocabulary, width)
        self.network = nn.Sequential(
            nn.Linear(2 * width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout) if dropout > 0 else nn.Identity(),
            nn.Linear(hidden, width),
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        user, items, count = self.embed(x)
        return self.network(torch.cat([user, items.sum(1) / count], 1))


def neural_filtering(
    shape: Shape, *, width: Count = 32, hidden: Count = 64, dropout: Rate = 0.0
) -> Body:
    """Build a neural collaborative filtering, a perceptron on the user and the items.

    The features are `W_2 ReLU(W_1 [p_u; mean_j y_j] + c_1) + c_2`. He et al. ("Neural Collaborative
    Filtering", WWW 2017, equation 10) pass the vector of the scored item through the perceptron as
    well, which needs one pass for each item. Here, it is multiplied by the output, so that one pass
    scores all items.

    Args:
        shape: Shape of an example.
        width: Width of the vectors and of the features.
        hidden: Units of the hidden layer.
        dropout: Dropout rate of the hidden layer.

    Returns:
        The backbone and the width of the features.
    """
    return _NeuralFiltering(shape.vocabulary_size, width, hidden, dropout), width


class _RecurrentFiltering(_UserModel):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__(vocabulary, width)
        self.network = nn.GRU(width, width, batch_first=True)

    @override
    def forward(self, x: Tensor) -> Tensor:
        user, items, _ = self.embed(x)
        outputs, _ = self.network(items)
        return user + outputs[:, -1]


def gru4rec(shape: Shape, *, width: Count = 32) -> Body:
    """Build a network of gated recurrent units over the items of a user (GRU4Rec).

    The features are `p_u + h_T`. The hidden state `h_t = GRU(y_t, h_(t-1))` of item t is that of
    Hidasi et al. ("Session-based Recommendations with Recurrent Neural Networks", ICLR 2016,
    equations 2 to 5), whose users are anonymous. Differences from the paper: the unit is that of
    `torch.nn.GRU`, which applies the reset gate after the matrix product; the network also reads
    the padding before the first item; and the loss is the cross-entropy over all items. The network
    does not support `torch.vmap`.

    Args:
        shape: Shape of an example.
        width: Width of the vectors, of the hidden state and of the features.

    Returns:
        The backbone and the width of the features.
    """
    return _RecurrentFiltering(shape.vocabulary_size, width), width
