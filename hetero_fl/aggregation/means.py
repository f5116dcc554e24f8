"""Weighted means over the owners of each tensor, accumulated as uploads arrive.

Includes discounts for stale uploads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from hetero_fl.core.model_spec import Owner, Tensors, owners_of
from hetero_fl.core.payload import Item, Payload

# Weighted means and sums taken as uploads arrive: the memory of one, not of the cohort.
#
# A mean starts as its first term, untouched, and then moves towards each further one by that one's
# share of the weight so far: weights are normalised before they multiply, a tensor with one owner
# passes through to the bit, and so do equal tensors.


class RunningMean:
    """Σ w·v / Σ w of tensors of one shape, for weights that are numbers; the plain mean while all weights are nought."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.count = 0
        self._weightless = 0
        self._value: Tensor | None = None
        self._own = False  # nobody else has seen the value: it may be changed in place

    @classmethod
    def from_mean(cls, value: Tensor, weight: float, count: int) -> RunningMean:
        """Return the mean of so many terms with this mean and this sum of weights."""
        made = cls()
        made._value = value
        made.weight = weight
        made.count = count
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
            # 1 for the first with any weight: it replaces the weightless
            share = weight / (self.weight + weight)
            self.weight += weight
        if self._value is None or share == 1:
            self._value = value
            self._own = False
        elif self._own:
            self._value.lerp_(value, share)
        else:
            self._value = torch.lerp(self._value, value, share)
            self._own = True


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
        weight = torch.as_tensor(item.weight, dtype=item.values.dtype, device=item.values.device)
        term = item.values if ready else item.values * weight
        if self._sums is None and self._mean is not None:
            self._sums = self.total  # weights of both kinds under one name
        self._sums = (
            (term, weight) if self._sums is None else (self._sums[0] + term, self._sums[1] + weight)
        )
        return None

    @classmethod
    def from_total(cls, total: Tensor, weight: Tensor) -> ItemSum:
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
        weight = self._mean.value.new_tensor(self._mean.weight)
        return self._mean.value * weight, weight


def mean_of_items(items: Sequence[Item]) -> Tensor:
    """The mean of single-tensor items in the order given (see `ItemSum`)."""
    held = ItemSum()
    for item in items:
        held.add(item)
    return held.mean


# Averaging named tensors over their owners: by architecture, and across architectures where a
# common part is declared.


class OwnerMeans:
    """The mean of each tensor over its owners, folded as models arrive.

    Tensors whose names start with a prefix in `common` are averaged with those of equal name and shape of every group;
    others only within their group: equal shapes never mix by accident.
    """

    def __init__(self, common: Sequence[str] = ()) -> None:
        self._common = tuple(common)
        self._means: dict[Owner, RunningMean] = {}
        self._groups: dict[str, dict[str, Owner]] = {}

    def add(self, group: str, tensors: Mapping[str, Tensor], weight: float) -> None:
        """One more model, or part of one."""
        for name, owner in self._owners(group, tensors).items():
            self._means.setdefault(owner, RunningMean()).add(tensors[name], weight)

    def set_mean(self, group: str, name: str, mean: Tensor, weight: float) -> None:
        """Set the mean of a tensor over all its owners, with the sum of their weights; once for each owner."""
        owner = self._owners(group, {name: mean})[name]
        count = self._means[owner].count + 1 if owner in self._means else 1
        self._means[owner] = RunningMean.from_mean(mean, weight, count)

    def _owners(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Owner]:
        owners = owners_of(tensors, group, self._common)
        self._groups.setdefault(group, {}).update(owners)
        return owners

    def by_group(self) -> dict[str, Tensors]:
        """For each group the means of the tensors that its members sent; what nobody sent is left out."""
        return {
            group: {
                name: mean
                for name, owner in wanted.items()
                if (mean := self._means[owner].value) is not None
            }
            for group, wanted in self._groups.items()
        }

    def weights_by_group(self) -> dict[str, dict[str, float]]:
        """The sum of the weights behind each of these means."""
        return {
            group: {name: self._means[owner].weight for name, owner in wanted.items()}
            for group, wanted in self._groups.items()
        }

    def counts_by_group(self) -> dict[str, dict[str, int]]:
        """How many sent each of these tensors."""
        return {
            group: {name: self._means[owner].count for name, owner in wanted.items()}
            for group, wanted in self._groups.items()
        }


def tie_common_tensors(
    models: dict[str, Tensors],
    common: Sequence[str],
    updated: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> None:
    """What groups have in common becomes one tensor: one that `updated` (names by group), else the first group's.

    For methods that add changes: means of models meet by themselves, sums of changes only where they begin equal.
    """
    first: dict[tuple[str, torch.Size], Tensor] = {}
    for group, names in [*updated.items(), *models.items()]:
        for name in names if common else ():
            if name.startswith(tuple(common)):
                first.setdefault((name, models[group][name].shape), models[group][name])
    for group, model in models.items():
        models[group] = {
            name: first.get((name, tensor.shape), tensor) for name, tensor in model.items()
        }


def leading_slice(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Its leading slice of that shape, a view."""
    return tensor[tuple(slice(0, size) for size in shape)]


def leading_slice_means(current: Tensors, members: Iterable[tuple[Tensors, float]]) -> Tensors:
    """The weighted mean of each element over its owners, where members hold leading slices of the current tensors.

    Elements that nobody owns stay as they are; tensors that nobody sent are left out.
    """
    means: Tensors = {}
    held: dict[str, Tensor] = {}
    for tensors, weight in members:
        for name, tensor in tensors.items():
            if name not in means:
                means[name], held[name] = current[name].clone(), torch.zeros_like(current[name])
            mean = leading_slice(means[name], tensor.shape)
            owned = leading_slice(held[name], tensor.shape)
            owned += weight
            share = torch.where(
                owned > 0, weight / owned, 0.0
            )  # 1 for the first owner, whose value is taken to the bit
            mean.copy_(torch.lerp(mean, tensor, share))
    return means


def interpolate_model(
    current: Tensors, mean: Tensors, rate: float, parameters: Iterable[str]
) -> Tensors:
    """current + rate·(mean − current) for parameters; buffers (BatchNorm statistics) take the mean as it is.

    A rate of one takes the mean to the bit. Extrapolating a running variance could make it negative.
    """
    trainable = set(parameters)
    moved = {
        n: m if rate == 1 or n not in trainable else current[n] + rate * (m - current[n])
        for n, m in mean.items()
    }
    return {**current, **moved}


def add_updates(
    current: Tensors,
    mean: Tensors,
    owners: Mapping[str, float],
    factor: float,
    parameters: Iterable[str],
) -> Tensors:
    """current + factor·Σ_k(θ_k − current), which is a step of factor·K towards the mean of the K owners of each tensor.

    Buffers move by the same rule, though not beyond the mean: a running variance that is extrapolated could be negative.
    """
    trainable = set(parameters)
    moved = {}
    for name, tensor in mean.items():
        rate = factor * owners[name] if name in trainable else min(1.0, factor * owners[name])
        moved[name] = tensor if rate == 1 else current[name] + rate * (tensor - current[name])
    return {**current, **moved}


# Uploads that were made from an older version of the server count for less.

# their values are sums already: the weight is what they are divided by
SUMS = ("class_sums", "counts")


def discount_upload(payload: Payload, factor: float) -> Payload:
    """The upload with the weight of every item multiplied by the factor, and the values with it where they are sums."""
    if factor == 1:
        return payload
    return Payload(
        {name: _discount_item(payload.item(name), factor) for name in payload}, payload.report
    )


def _discount_item(item: Item, factor: float) -> Item:
    if item.kind not in SUMS:
        return replace(item, weight=item.weight * factor)
    scaled = item.with_tensors({name: t * factor for name, t in item.tensors.items()})
    return replace(scaled, weight=item.weight * factor)
