"""Models that recommend the next item of a user from the items before it.

An example is a row of tokens, int64 `[B, 1 + T]`. The first token is the number of the user, or 0
for an unknown user. The other tokens are the last T items, with padding 0 on the left. The features
describe the user, and the weights of the head are the vectors of the items: the score of item i is
`q_i . features + b_i`. Models of equal width therefore have heads, and tables `backbone.items`, of
equal shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from model_zoo.backbones.text import PADDING, Embedding
from model_zoo.options import Count, Rate
from model_zoo.shapes import Shape
from model_zoo.split_model import Body


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
        features: Tensor = user + items.sum(1) * count.to(items.dtype).rsqrt()
        return features


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
        features: Tensor = self.network(torch.cat([user, items.sum(1) / count], 1))
        return features


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
        features: Tensor = user + outputs[:, -1]
        return features


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
