"""Teachers by noisy majority (PATE with Gaussian noise: Papernot et al. 2018, GNMax): each client has one vote a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.payload import Item

SURE = 0.9  # the elected class's probability; the others share the rest


def voted(item: Item, norm: float) -> Item:
    """Predictions `[D, C]` as votes, of so large a norm together: who has most is the same at any scale."""
    assert isinstance(item.values, Tensor)
    votes = F.one_hot(item.values.argmax(-1), item.values.shape[-1]).to(item.values.dtype)
    return Item(votes * (norm / max(1, len(votes)) ** 0.5), 1.0, item.kind)


def elected(votes: Tensor, says: str) -> Tensor:
    """What a teacher says of the rows whose noised votes these are, `[D, C]`: logits or probabilities."""
    classes = votes.shape[-1]
    p = torch.full_like(votes, (1 - SURE) / max(1, classes - 1))
    p.scatter_(-1, votes.argmax(-1, keepdim=True), SURE)
    return p if says == "probabilities" else p.log()
