"""Rules for predictions on proxy rows. They see them as the clients sent them (logits, log p, probabilities), each row less its
mean over the classes where classes exclude one another: a constant added to a row of logits says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hetero_fl.aggregation.rules.base import PredictionRule, middle, prediction_rule

RATE = 2.0  # of the weight's decay: a client that stands twice as far out as the middle one loses e^-2 a round
TINY = 1e-12


@prediction_rule("median")
class MedianOpinion(PredictionRule):
    """The median of each coordinate, over the clients."""

    def combine(self, said: Tensor, liars: int, clients: Sequence[str], memory: dict[str, Any]) -> Tensor:
        return middle(said)


@prediction_rule("spectral")
class Spectral(PredictionRule):
    """The mean of the n − f clients that are left when, f times, the one that stands out most along the direction in which
    they differ most is dropped: the filter of Cronus (Chang et al. 2019, after Diakonikolas et al. 2017), on all rows at once.
    """

    def combine(self, said: Tensor, liars: int, clients: Sequence[str], memory: dict[str, Any]) -> Tensor:
        kept = torch.arange(len(said))
        for _ in range(liars):
            flat = said[kept].double().flatten(1)
            flat = flat - flat.mean(0)
            # The first left singular vector, times its value, is how far each client lies along the first direction.
            _, vectors = torch.linalg.eigh(flat @ flat.T)
            out = int(vectors[:, -1].abs().argmax())
            kept = torch.cat([kept[:out], kept[out + 1 :]])
        return said[kept].mean(0)


@prediction_rule("down_weight")
class DownWeight(PredictionRule):
    """The mean with weights exp(−η·s), s what a client has been outlying in all rounds so far: exponential weights, as ExpGuard
    has them (Roux et al. 2025).

    In a round that is max(0, d/d̃ − 1), d the mean distance of its rows to the clients' coordinate-wise median, d̃ the median
    of all d.
    """

    def combine(self, said: Tensor, liars: int, clients: Sequence[str], memory: dict[str, Any]) -> Tensor:
        far = (said - middle(said)).double().flatten(2 if said.ndim > 2 else 1).norm(dim=-1)
        far = far.mean(1) if far.ndim > 1 else far
        outlying = (far / middle(far).clamp(min=TINY) - 1).clamp(min=0)
        for client, more in zip(clients, outlying.tolist(), strict=True):
            memory[client] = memory.get(client, 0.0) + more
        weights = torch.tensor([-RATE * memory[c] for c in clients], dtype=torch.float64).softmax(0)
        return torch.einsum("n,n...->...", weights.to(said.dtype), said)


@prediction_rule("agreement")
class Agreement(PredictionRule):
    """Row by row, a client's weight is the number of others whose first class is its own, nought if these are fewer than f:
    liars alone cannot agree that much. Nobody speaks louder (in norm) than the median client. A row without any
    agreement takes the median of each coordinate.
    """

    exclusive = True

    def combine(self, said: Tensor, liars: int, clients: Sequence[str], memory: dict[str, Any]) -> Tensor:
        first = said.argmax(-1)  # [n, N]
        agree = (first[:, None] == first).sum(1) - 1
        weight = torch.where(agree >= max(1, liars), agree, 0).to(said.dtype)[..., None]
        loud = said.norm(dim=-1, keepdim=True)
        heard = said * (middle(loud) / loud.clamp(min=TINY)).clamp(max=1.0)
        total = weight.sum(0)
        return torch.where(total > 0, (weight * heard).sum(0) / total.clamp(min=1), middle(said))
