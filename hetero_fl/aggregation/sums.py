"""Weighted means and sums taken as uploads arrive: the memory of one, not of the cohort.

A mean starts as its first term, untouched, and then moves towards each further one by that one's share of the weight so far:
weights are normalised before they multiply, a tensor with one owner passes through to the bit, and so do equal tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hetero_fl.payload import Item


class RunningMean:
    """Σ w·v / Σ w of tensors of one shape, for weights that are numbers; the plain mean while all weights are nought."""

    def __init__(self) -> None:
        self.weight, self.count = 0.0, 0
        self._weightless = 0
        self._value: Tensor | None = None
        self._own = False  # nobody else has seen the value: it may be changed in place

    @classmethod
    def of(cls, value: Tensor, weight: float) -> RunningMean:
        """As if terms with this mean and this sum of weights had been added."""
        made = cls()
        made._value, made.weight = value, weight
        return made

    @property
    def value(self) -> Tensor | None:
        """The mean so far; further terms do not change this tensor."""
        self._own = False
        return self._value

    def add(self, value: Tensor, weight: float) -> None:
        """One more term. Terms are never changed in place, so the first may be somebody's own tensor."""
        self.count += 1
        if weight == 0 and self.weight > 0:
            return
        if weight == 0:
            self._weightless += 1
            share = 1 / self._weightless
        else:
            share = weight / (self.weight + weight)  # 1 for the first with any weight: it replaces the weightless
            self.weight += weight
        if self._value is None or share == 1:
            self._value, self._own = value, False
        elif self._own:
            self._value.lerp_(value, share)
        else:
            self._value, self._own = torch.lerp(self._value, value, share), True


class ItemSum:
    """Items of one name, each a tensor: their mean over whoever has a say in an element, and their totals.

    `class_sums` and `counts` are sums already. Where a weight is a tensor, or values are sums, Σ values and Σ weights are
    kept; else a running mean.
    """

    def __init__(self) -> None:
        self._mean: RunningMean | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, item: Item) -> None:
        """One more item."""
        if not isinstance(item.values, Tensor):
            raise TypeError("named tensors are averaged by their owners: Uploads.mean_by_group")
        ready = item.kind in ("class_sums", "counts")
        if self._sums is None and not ready and not isinstance(item.weight, Tensor):
            self._mean = self._mean or RunningMean()
            return self._mean.add(item.values, item.weight)
        weight = torch.as_tensor(item.weight, dtype=item.values.dtype)
        term = item.values if ready else item.values * weight
        if self._sums is None and self._mean is not None:
            self._sums = self.total  # weights of both kinds under one name
        self._sums = (term, weight) if self._sums is None else (self._sums[0] + term, self._sums[1] + weight)
        return None

    @classmethod
    def of(cls, total: Tensor, weight: Tensor) -> ItemSum:
        """As if whatever has these totals had been added."""
        made = cls()
        made._sums = total, weight
        return made

    @property
    def mean(self) -> Tensor:
        """Σ w·v / Σ w, element by element; nought where nobody has weight."""
        if self._sums is None:
            assert self._mean is not None and self._mean.value is not None
            return self._mean.value
        total, weight = self._sums
        return total / torch.where(weight > 0, weight, torch.ones_like(weight))

    @property
    def total(self) -> tuple[Tensor, Tensor]:
        """(Σ values·weight, Σ weight)."""
        if self._sums is not None:
            return self._sums
        assert self._mean is not None and self._mean.value is not None
        weight = torch.tensor(self._mean.weight, dtype=self._mean.value.dtype)
        return self._mean.value * weight, weight


def mean_of(items: Sequence[Item]) -> Tensor:
    """The mean of single-tensor items in the order given (see `ItemSum`)."""
    held = ItemSum()
    for item in items:
        held.add(item)
    return held.mean
