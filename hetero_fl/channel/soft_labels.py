"""Soft labels in a few bits: the constrained quantiser of CFD (Sattler et al. 2020), packed end to end.

A distribution becomes the nearest one (in L1) whose probabilities are multiples of 1 / (2^b − 1). With one bit that is a vote
for the most probable class.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantised(p: Tensor, bits: int, sums_to_one: bool = True) -> Tensor:
    """Probabilities `[N, C]` as levels of 0 … 2^bits − 1, uint8 `[N, C]`; probability = level / (2^bits − 1).

    `sums_to_one`: so does each row, before and after: every level is rounded down, and what is missing goes to the largest
    remainders, the first of equals. Else each is rounded by itself (labels that do not exclude one another).
    """
    top = 2**bits - 1
    if not sums_to_one:
        return (p * top).round().to(torch.uint8)
    down = (p * top).floor()
    missing = (top - down.sum(-1, keepdim=True)).round()
    order = (p * top - down).sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(p.shape[-1]).expand_as(order).contiguous())
    return (down + (place < missing)).to(torch.uint8)


def pack(levels: Tensor, bits: int) -> Tensor:
    """Levels `[N, C]` of so many bits end to end, uint8 `[N, ceil(C·bits / 8)]`."""
    singles = (levels[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    flat = singles.flatten(1)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, classes: int) -> Tensor:
    """The reverse of `pack`: levels, uint8 `[N, classes]`."""
    singles = ((packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)[:, : classes * bits]
    return (singles.unflatten(1, (classes, bits)) << torch.arange(bits, dtype=torch.uint8)).sum(-1).to(torch.uint8)
