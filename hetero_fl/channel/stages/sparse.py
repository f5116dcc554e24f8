"""Few of the numbers of a change: the largest, or some drawn by a key; the others are nought at the receiver."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.channel.bits import read_indices, write_indices
from hetero_fl.channel.reader import Reader
from hetero_fl.channel.stages.base import Draw, Layout, Stage, count


@dataclass(frozen=True)
class Sparse(Stage):
    """`amount`: a share of the numbers below 1, or how many of them; at least one, over all tensors of an item together."""

    amount: float

    sorts = frozenset({"change"})

    def kept(self, total: int) -> int:
        """How many numbers of so many are sent."""
        return max(1, ceil(self.amount * total)) if self.amount < 1 else min(int(self.amount), total)

    def reduces(self, layout: Layout) -> bool:
        return self.kept(count(layout)) < count(layout)


@dataclass(frozen=True)
class TopK(Sparse):
    """The k largest in size, with their indices (Stich et al. 2018). `entropy`: these coded, where that is shorter."""

    entropy: bool = False

    biased = True

    def dearest(self) -> TopK:
        return TopK(self.amount)

    def reduce(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        k = self.kept(len(numbers))
        indices = largest(numbers, k)
        return numbers[indices], ((k,),), write_indices(indices.numpy(), len(numbers), self.entropy)

    def read(self, source: Reader, layout: Layout, draw: Draw) -> tuple[Layout, Any]:
        k = self.kept(count(layout))
        return ((k,),), torch.from_numpy(read_indices(source, k, count(layout)))

    def restore(self, numbers: Tensor, layout: Layout, told: Any) -> Tensor:
        return scattered(numbers, told, layout)


@dataclass(frozen=True)
class RandomK(Sparse):
    """k at random, divided by the rate k/n at which a number is kept, so that the mean over draws is the vector itself. Both
    ends draw which, so that no index travels."""

    biased = False

    def _drawn(self, total: int, draw: Draw) -> Tensor:
        seed = int(torch.randint(2**63 - 1, (1,), generator=draw("randk")))
        chosen = np.random.default_rng(seed).choice(total, self.kept(total), replace=False, shuffle=False)
        chosen.sort()
        return torch.from_numpy(chosen)

    def reduce(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        indices = self._drawn(len(numbers), draw)
        return numbers[indices] * (len(numbers) / len(indices)), ((len(indices),),), b""

    def read(self, source: Reader, layout: Layout, draw: Draw) -> tuple[Layout, Any]:
        return ((self.kept(count(layout)),),), self._drawn(count(layout), draw)

    def restore(self, numbers: Tensor, layout: Layout, told: Any) -> Tensor:
        return scattered(numbers, told, layout)


def largest(numbers: Tensor, k: int) -> Tensor:
    """Ascending indices of the k numbers of largest size, int64. Of equal ones any, but always the same."""
    size = numbers.abs().numpy()
    indices = np.argpartition(size, len(size) - k)[len(size) - k :]
    indices.sort()
    return torch.from_numpy(indices)


def scattered(numbers: Tensor, indices: Tensor, layout: Layout) -> Tensor:
    """A vector that is nought but for these numbers at these places."""
    return numbers.new_zeros(count(layout)).scatter_(0, indices, numbers)
