"""Means of which no single client can be read: noise once on the sum of bounded uploads, over a fixed denominator.

With clipped updates Δ_k of weight one, μ the plain mean of what arrived, Σw how many that were and ref their mean reference,

    ref + (μ − ref)·Σw / expected + N(0, deviation²) / expected  =  ref + (ΣΔ_k + N(0, deviation²)) / expected

(McMahan et al. 2018, Algorithm 1, the estimator with a fixed denominator): a function of the mean, the weight and the
references, so that it is the same after a plain and after a secure sum. How many came decides nothing but the sum. Clients that
own a tensor in common may have received different ones (models of several architectures begin so): each group's moves from its
own by the same noised update, for of what a client sends only the update is bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hetero_fl.aggregation.averaging import Owner
from hetero_fl.architecture import Tensors
from hetero_fl.payload import Item
from hetero_fl.state import Card

Normal = Callable[..., Tensor]  # (what it is put on, standard deviation, *what for)


@dataclass
class Owned:
    """One tensor that several clients may send: where the updates of each kind of them start, and how many are expected."""

    starts: dict[str, Tensor] = field(default_factory=dict)
    expected: float = 0.0

    @property
    def first(self) -> Tensor:
        """A tensor of its form."""
        return next(iter(self.starts.values()))

    def centre(self, there: Mapping[str, int]) -> Tensor:
        """The mean of where the updates of those who sent it started. `there`: how many of each kind sent the item."""
        if all(start is self.first or torch.equal(start, self.first) for start in self.starts.values()):
            return self.first
        count = sum(there.get(kind, 0) for kind in self.starts)
        return torch.stack([start * (there.get(kind, 0) / count) for kind, start in self.starts.items()]).sum(0)


@dataclass
class SumNoise:
    """The noise of one round, and what its sums are divided by. The same question has the same answer.

    `deviation(item)`: of the noise on every number of the item's sum; `normal`: keyed draws of it; `kind(card)`: of a client, by
    name; `made_of(item, mean)`: what a noised mean becomes.
    """

    deviation: Callable[[str], float]
    normal: Normal
    kind: Callable[[Card], str]
    made_of: Callable[[str, Tensor], Tensor] = lambda name, mean: mean
    _singles: dict[str, Owned] = field(default_factory=dict)
    _weights: dict[str, Tensor] = field(default_factory=dict)  # of class sums: their shape
    _owned: dict[str, dict[Owner, Owned]] = field(default_factory=dict)
    _groups: dict[str, dict[str, dict[str, tuple[Owner, str]]]] = field(default_factory=dict)

    def expect(
        self,
        name: str,
        like: Item,
        received: Item | None,
        count: float,
        card: Card,
        group: str,
        common: tuple[str, ...],
    ) -> None:
        """So many more clients like this one, of a group, may send an item of this form, having received another of that name."""
        kind = self.kind(card)
        if isinstance(like.values, Tensor):
            one = self._singles.setdefault(name, Owned({kind: torch.zeros_like(like.values)}))
            one.expected += count
            if isinstance(like.weight, Tensor):
                self._weights[name] = torch.zeros_like(like.weight)
            return
        known = received.values if received is not None and isinstance(received.values, Mapping) else {}
        known = known if like.kind == "params" else {}
        for tensor, t in like.values.items():
            owner = (tensor, tuple(t.shape), "" if common and tensor.startswith(common) else group)
            start = known[tensor] if tensor in known and known[tensor].shape == t.shape else torch.zeros_like(t)
            owned = self._owned.setdefault(name, {}).setdefault(owner, Owned())
            owned.starts[kind] = start
            owned.expected += count
            self._groups.setdefault(name, {}).setdefault(group, {}).setdefault(tensor, (owner, kind))

    # Single tensors ------------------------------------------------------------------------------------------------
    def sends(self, name: str) -> bool:
        """Whether anybody may send single tensors of that name."""
        return name in self._singles

    def total(self, name: str, found: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(Σ values·weight + noise, Σ weight): the expected number in place of the weights, but of class sums, whose weights
        are counts of rows and noised as well. `found`: the plain totals; None if nobody sent any."""
        one = self._singles[name]
        values = one.first if found is None else found[0]
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
        self,
        name: str,
        means: Mapping[str, Tensors],
        weights: Mapping[str, Mapping[str, float]],
        senders: Sequence[Card],
    ) -> dict[str, Tensors]:
        """For every group that could have sent something, whether or not it did, its noised means."""
        moved: dict[Owner, Tensor] = {}
        there = Counter(self.kind(card) for card in senders)
        groups = self._groups.get(name, {})
        for group, tensors in groups.items():
            for tensor, (owner, _) in tensors.items():
                if owner not in moved and tensor in means.get(group, {}):
                    one = self._owned[name][owner]
                    share = weights[group][tensor] / one.expected
                    moved[owner] = (means[group][tensor] - one.centre(there)) * share
        owners = {owner for tensors in groups.values() for owner, _ in tensors.values()}
        noise = {owner: self._noise(name, owner, moved.get(owner)) for owner in owners}
        return {
            group: {
                tensor: self._from(self._owned[name][owner].starts[kind], moved.get(owner)) + noise[owner]
                for tensor, (owner, kind) in tensors.items()
            }
            for group, tensors in groups.items()
        }

    def _noise(self, name: str, owner: Owner, moved: Tensor | None) -> Tensor:
        """On the mean update, nought if nobody sent any."""
        one = self._owned[name][owner]
        like = torch.zeros_like(one.first) if moved is None else moved.to(one.first.dtype)
        return self.normal(like, self.deviation(name) / one.expected, name, *map(str, owner))

    @staticmethod
    def _from(start: Tensor, moved: Tensor | None) -> Tensor:
        return start if moved is None else start + moved

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """How many clients are expected behind each of these means."""
        owned = self._owned.get(name, {})
        groups = self._groups.get(name, {})
        return {g: {t: owned[owner].expected for t, (owner, _) in tensors.items()} for g, tensors in groups.items()}
