"""Means of which no single client can be read: noise once on the sum of bounded uploads, over a fixed denominator.

With clipped updates Δ_k of weight one, μ the plain mean of what arrived and Σw how many that were,

    ref + (μ − ref)·Σw / expected + N(0, deviation²) / expected  =  ref + (ΣΔ_k + N(0, deviation²)) / expected

(McMahan et al. 2018, Algorithm 1, the estimator with a fixed denominator): a function of the mean, the weight and the
reference, so that it is the same after a plain and after a secure sum. How many came decides nothing but the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hetero_fl.aggregation.averaging import Owner
from hetero_fl.architecture import Tensors
from hetero_fl.payload import Item

Normal = Callable[..., Tensor]  # (like, standard deviation, *what for)


@dataclass
class Owned:
    """One tensor that several clients may send: where their updates start, and how many are expected to."""

    reference: Tensor
    expected: float = 0.0


@dataclass
class SumNoise:
    """The noise of one round, and what its sums are divided by. The same question has the same answer.

    `deviation(item)`: of the noise on every number of the item's sum; `normal`: keyed draws of it; `made_of(item, mean)`: what a
    noised mean becomes.
    """

    deviation: Callable[[str], float]
    normal: Normal
    made_of: Callable[[str, Tensor], Tensor] = lambda name, mean: mean
    _singles: dict[str, Owned] = field(default_factory=dict)
    _weights: dict[str, Tensor] = field(default_factory=dict)  # of class sums: their shape
    _owned: dict[str, dict[Owner, Owned]] = field(default_factory=dict)
    _groups: dict[str, dict[str, dict[str, Owner]]] = field(default_factory=dict)

    def expect(
        self, name: str, like: Item, received: Item | None, count: float, group: str, common: tuple[str, ...] = ()
    ) -> None:
        """So many more clients of a group may send an item of this form, having received another of that name."""
        if isinstance(like.values, Tensor):
            one = self._singles.setdefault(name, Owned(torch.zeros_like(like.values)))
            one.expected += count
            if isinstance(like.weight, Tensor):
                self._weights[name] = torch.zeros_like(like.weight)
            return
        known = received.values if received is not None and isinstance(received.values, Mapping) else {}
        known = known if like.kind == "params" else {}
        for tensor, t in like.values.items():
            owner = (tensor, tuple(t.shape), "" if common and tensor.startswith(common) else group)
            start = known[tensor] if tensor in known and known[tensor].shape == t.shape else torch.zeros_like(t)
            self._owned.setdefault(name, {}).setdefault(owner, Owned(start)).expected += count
            self._groups.setdefault(name, {}).setdefault(group, {})[tensor] = owner

    # Single tensors ------------------------------------------------------------------------------------------------
    def sends(self, name: str) -> bool:
        """Whether anybody may send single tensors of that name."""
        return name in self._singles

    def total(self, name: str, found: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(Σ values·weight + noise, Σ weight): the expected number in place of the weights, but of class sums, whose weights
        are counts of rows and noised as well. `found`: the plain totals; None if nobody sent any."""
        one = self._singles[name]
        values = one.reference if found is None else found[0]
        values = values + self.normal(values, self.deviation(name), name, "values")
        if name not in self._weights:
            return values, torch.tensor(one.expected, dtype=values.dtype)
        weight = self._weights[name] if found is None else found[1]
        return values, (weight + self.normal(weight, self.deviation(name), name, "weight")).clamp(min=0)

    def mean(self, name: str, found: tuple[Tensor, Tensor] | None) -> Tensor:
        """The noised total over its weight; nought where that is."""
        values, weight = self.total(name, found)
        return self.made_of(name, values / torch.where(weight > 0, weight, torch.ones_like(weight)))

    # Named tensors -------------------------------------------------------------------------------------------------
    def by_group(
        self, name: str, means: Mapping[str, Tensors], weights: Mapping[str, Mapping[str, float]]
    ) -> dict[str, Tensors]:
        """For every group that could have sent something, whether or not it did, its noised means."""
        made: dict[Owner, Tensor] = {}
        for group, tensors in self._groups.get(name, {}).items():
            for tensor, owner in tensors.items():
                if owner not in made or tensor in means.get(group, {}):
                    mean, weight = means.get(group, {}).get(tensor), weights.get(group, {}).get(tensor, 0.0)
                    made[owner] = self._noised(name, owner, mean, weight)
        return {
            g: {t: made[owner] for t, owner in tensors.items()} for g, tensors in self._groups.get(name, {}).items()
        }

    def _noised(self, name: str, owner: Owner, mean: Tensor | None, weight: float) -> Tensor:
        one = self._owned[name][owner]
        moved = torch.zeros_like(one.reference) if mean is None else (mean - one.reference) * (weight / one.expected)
        noise = self.normal(one.reference, self.deviation(name) / one.expected, name, *map(str, owner))
        return one.reference + moved + noise

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """How many clients are expected behind each of these means."""
        owned = self._owned.get(name, {})
        groups = self._groups.get(name, {})
        return {g: {t: owned[owner].expected for t, owner in tensors.items()} for g, tensors in groups.items()}
