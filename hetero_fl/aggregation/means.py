"""Weighted means over the owners of each tensor, accumulated as uploads arrive.

The owners of a tensor are the clients whose models contain it. The means need memory for one
upload, not for all uploads of a round. The module also discounts stale uploads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from hetero_fl.core.model_spec import Owner, Tensors, owners_of
from hetero_fl.core.payload import Item, Payload

# Kinds of items whose values are sums already; their weight is the divisor of the mean.
SUMS = ("class_sums", "counts")


class RunningMean:
    """The weighted mean of tensors of one shape, with scalar weights.

    The mean starts as the first term and is interpolated towards each further term by the term's
    share of the total weight so far. The mean is therefore bit-identical to its terms if they are
    all equal or if there is only one. As long as all weights are zero, it is the unweighted mean.

    Attributes:
        weight: Sum of the weights.
        count: Number of terms.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.count = 0
        self._weightless = 0
        self._value: Tensor | None = None
        # Whether the value was created here and not yet returned, and may be changed in place.
        self._is_owned = False

    @classmethod
    def from_mean(cls, value: Tensor, weight: float, count: int) -> RunningMean:
        """Create a running mean with a given state.

        Args:
            value: The mean.
            weight: Sum of the weights.
            count: Number of terms.
        """
        running_mean = cls()
        running_mean._value = value
        running_mean.weight = weight
        running_mean.count = count
        return running_mean

    @property
    def value(self) -> Tensor | None:
        """The mean so far, or None without terms; adding terms does not change this tensor."""
        self._is_owned = False
        return self._value

    def add(self, value: Tensor, weight: float) -> None:
        """Add a term to the mean; `value` is not changed in place."""
        self.count += 1
        if weight == 0 and self.weight > 0:
            return
        if weight == 0:
            self._weightless += 1
            share = 1 / self._weightless
        else:
            # 1 for the first term with a positive weight: it replaces all terms of weight zero.
            share = weight / (self.weight + weight)
            self.weight += weight
        if self._value is None or share == 1:
            self._value = value
            self._is_owned = False
        elif self._is_owned:
            self._value.lerp_(value, share)
        else:
            self._value = torch.lerp(self._value, value, share)
            self._is_owned = True


class ItemSum:
    """The mean and the totals of single-tensor items with the same name.

    Scalar weights are accumulated in a running mean. If a weight is a tensor, or the values are
    sums already (`class_sums`, `counts`), the sums of values and weights are accumulated instead.
    """

    def __init__(self) -> None:
        self._mean: RunningMean | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, item: Item) -> None:
        """Add an item.

        Raises:
            TypeError: If the item consists of named tensors.
        """
        if not isinstance(item.values, Tensor):
            raise TypeError("item: expected a single tensor, got named tensors; use mean_by_group")
        is_sum = item.kind in SUMS
        if self._sums is None and not is_sum and not isinstance(item.weight, Tensor):
            self._mean = self._mean or RunningMean()
            return self._mean.add(item.values, item.weight)
        weight = torch.as_tensor(item.weight, dtype=item.values.dtype, device=item.values.device)
        term = item.values if is_sum else item.values * weight
        # Earlier items of this name had scalar weights.
        if self._sums is None and self._mean is not None:
            self._sums = self.total
        self._sums = (
            (term, weight) if self._sums is None else (self._sums[0] + term, self._sums[1] + weight)
        )
        return None

    @classmethod
    def from_total(cls, total: Tensor, weight: Tensor) -> ItemSum:
        """Create a sum from the totals of weighted values and of weights."""
        item_sum = cls()
        item_sum._sums = (total, weight)
        return item_sum

    @property
    def mean(self) -> Tensor:
        """The elementwise mean Σ w v / Σ w; zero for elements without weight."""
        if self._sums is None:
            assert self._mean is not None and self._mean.value is not None
            return self._mean.value
        total, weight = self._sums
        return total / torch.where(weight > 0, weight, torch.ones_like(weight))

    @property
    def total(self) -> tuple[Tensor, Tensor]:
        """The totals Σ w v and Σ w."""
        if self._sums is not None:
            return self._sums
        assert self._mean is not None and self._mean.value is not None
        weight = self._mean.value.new_tensor(self._mean.weight)
        return self._mean.value * weight, weight


def mean_of_items(items: Sequence[Item]) -> Tensor:
    """Return the mean of single-tensor items, added in the given order (see `ItemSum`)."""
    item_sum = ItemSum()
    for item in items:
        item_sum.add(item)
    return item_sum.mean


class OwnerMeans:
    """The mean of each named tensor over its owners, accumulated as models arrive.

    A tensor is averaged within its architecture group. If its name starts with a prefix in
    `common`, it is averaged with the tensors of the same name and shape in all groups.

    Args:
        common: Prefixes of the names of tensors that are averaged across groups.
    """

    def __init__(self, common: Sequence[str] = ()) -> None:
        self._common = tuple(common)
        self._means: dict[Owner, RunningMean] = {}
        self._groups: dict[str, dict[str, Owner]] = {}

    def add(self, group: str, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Add a model, or a part of a model, to the means.

        Args:
            group: Architecture group of the model.
            tensors: The tensors by name.
            weight: Weight in the mean.
        """
        for name, owner in self._owners(group, tensors).items():
            self._means.setdefault(owner, RunningMean()).add(tensors[name], weight)

    def set_mean(self, group: str, name: str, mean: Tensor, weight: float) -> None:
        """Set the mean of a tensor over all of its owners.

        Call this method once for each group that has the tensor.

        Args:
            group: Architecture group.
            name: Name of the tensor.
            mean: The mean.
            weight: Sum of the weights.
        """
        owner = self._owners(group, {name: mean})[name]
        count = self._means[owner].count + 1 if owner in self._means else 1
        self._means[owner] = RunningMean.from_mean(mean, weight, count)

    def _owners(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Owner]:
        owners = owners_of(tensors, group, self._common)
        self._groups.setdefault(group, {}).update(owners)
        return owners

    def by_group(self) -> dict[str, Tensors]:
        """Return the means of the tensors that each group sent, by group and tensor name."""
        return {
            group: {
                name: mean
                for name, owner in owners.items()
                if (mean := self._means[owner].value) is not None
            }
            for group, owners in self._groups.items()
        }

    def weights_by_group(self) -> dict[str, dict[str, float]]:
        """Return the sum of the weights in each mean, by group and tensor name."""
        return {
            group: {name: self._means[owner].weight for name, owner in owners.items()}
            for group, owners in self._groups.items()
        }

    def counts_by_group(self) -> dict[str, dict[str, int]]:
        """Return the number of uploads in each mean, by group and tensor name."""
        return {
            group: {name: self._means[owner].count for name, owner in owners.items()}
            for group, owners in self._groups.items()
        }


def tie_common_tensors(
    models: dict[str, Tensors],
    common: Sequence[str],
    updated: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> None:
    """Make tensors that several groups share equal in all of these groups, in place.

    Tensors are shared if they have the same name and shape. Methods that add updates to a model
    need this function: means of models are equal in all groups, but sums of updates are equal only
    if the groups start from equal tensors.

    Args:
        models: Tensors by group.
        common: Prefixes of the names of common tensors.
        updated: Names of updated tensors by group. All groups receive the first updated tensor, or
            the tensor of the first group if none was updated.
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
    """Return a view of the leading slice of a tensor, such as its first channels."""
    return tensor[tuple(slice(0, size) for size in shape)]


def leading_slice_means(current: Tensors, members: Iterable[tuple[Tensors, float]]) -> Tensors:
    """Return the weighted mean of each element over the members whose tensors contain it.

    Args:
        current: The current tensors by name.
        members: Tensors and weight of each member. Each tensor is a leading slice of the current
            tensor with the same name.

    Returns:
        The means of the tensors that at least one member sent. Elements that no member sent keep
        their current value.
    """
    means: Tensors = {}
    weights: dict[str, Tensor] = {}
    for tensors, weight in members:
        for name, tensor in tensors.items():
            if name not in means:
                means[name] = current[name].clone()
                weights[name] = torch.zeros_like(current[name])
            mean = leading_slice(means[name], tensor.shape)
            owned = leading_slice(weights[name], tensor.shape)
            owned += weight
            # 1 for the first owner, so that a single value is not rounded.
            share = torch.where(owned > 0, weight / owned, 0.0)
            mean.copy_(torch.lerp(mean, tensor, share))
    return means


def interpolate_model(
    current: Tensors, mean: Tensors, rate: float, parameters: Iterable[str]
) -> Tensors:
    """Move a model towards a mean: `current + rate * (mean - current)` for parameters.

    Buffers such as BatchNorm statistics are set to the mean, because a rate above 1 could make a
    running variance negative.

    Args:
        current: The current tensors by name.
        mean: Means of some or all tensors.
        rate: Server learning rate; with 1, the result is the mean without rounding.
        parameters: Names of the parameters; all other tensors are buffers.
    """
    trainable = set(parameters)
    updated = {
        n: m if rate == 1 or n not in trainable else current[n] + rate * (m - current[n])
        for n, m in mean.items()
    }
    return {**current, **updated}


def add_updates(
    current: Tensors,
    mean: Tensors,
    owners: Mapping[str, float],
    factor: float,
    parameters: Iterable[str],
) -> Tensors:
    """Add the sum of the owners' updates: `current + factor * sum(θ_k - current)`.

    This is a step of `factor * K` towards the mean of the K owners of each tensor. Buffers follow
    the same rule but do not move beyond the mean, because extrapolation could make a running
    variance negative.

    Args:
        current: The current tensors by name.
        mean: Means of some or all tensors over their owners.
        owners: Number of owners K of each tensor.
        factor: Factor of the updates.
        parameters: Names of the parameters; all other tensors are buffers.
    """
    trainable = set(parameters)
    updated = {}
    for name, tensor in mean.items():
        rate = factor * owners[name] if name in trainable else min(1.0, factor * owners[name])
        updated[name] = tensor if rate == 1 else current[name] + rate * (tensor - current[name])
    return {**current, **updated}


def discount_upload(payload: Payload, factor: float) -> Payload:
    """Return an upload with all weights, and all values that are sums, multiplied by a factor."""
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
