"""Weighted means over the owners of each tensor, accumulated as uploads arrive.

The owners of a tensor are the clients whose models contain the tensor. Only the means and the
current upload are in memory. An item is an entry of an upload (see `hetero_fl.core.payload.Item`).
The module also discounts stale uploads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from hetero_fl.core.model_spec import Owner, Tensors, owners_of
from hetero_fl.core.payload import SUM_KINDS, Item, Payload


class RunningMean:
    """Running weighted mean of tensors of the same shape, with scalar weights.

    The mean starts at the first term and is interpolated toward each further term by the term's
    share of the total weight so far. If all terms are equal, the mean is therefore bit-identical to
    the terms. While all weights are zero, the mean is unweighted. After a positive weight, terms of
    weight zero have no effect.

    Attributes:
        weight: Sum of the weights.
        count: Number of terms.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.count = 0
        self._weightless = 0
        self._value: Tensor | None = None
        # Whether `_value` may be modified in place: it was created by `add` and not yet returned.
        self._is_owned = False

    @classmethod
    def from_mean(cls, value: Tensor, weight: float, count: int) -> RunningMean:
        """Create a running mean that continues from a given mean.

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
        """The mean of the terms so far, or None if there are no terms.

        Later calls of `add` do not modify the returned tensor in place.
        """
        self._is_owned = False
        return self._value

    def add(self, value: Tensor, weight: float) -> None:
        """Add a term to the mean without modifying `value` in place."""
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
    """Accumulator of the mean and the totals of single-tensor items with the same name.

    Items with scalar weights are accumulated in a `RunningMean`. If a weight is a tensor, or the
    values are already sums (kinds `class_sums` and `counts`), the sums of values and weights are
    accumulated instead.
    """

    def __init__(self) -> None:
        self._mean: RunningMean | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, item: Item) -> None:
        """Add an item to the mean and the totals.

        Raises:
            TypeError: If the values of the item are named tensors.
        """
        if not isinstance(item.values, Tensor):
            raise TypeError("item: expected a single tensor, got named tensors; use mean_by_group")
        is_sum = item.kind in SUM_KINDS
        if self._sums is None and not is_sum and not isinstance(item.weight, Tensor):
            self._mean = self._mean or RunningMean()
            self._mean.add(item.values, item.weight)
            return
        weight = torch.as_tensor(item.weight, dtype=item.values.dtype, device=item.values.device)
        term = item.values if is_sum else item.values * weight
        # Earlier items of this name had scalar weights.
        if self._sums is None and self._mean is not None:
            self._sums = self.total
        self._sums = (
            (term, weight) if self._sums is None else (self._sums[0] + term, self._sums[1] + weight)
        )

    @classmethod
    def from_total(cls, total: Tensor, weight: Tensor) -> ItemSum:
        """Create an accumulator from the sum of weighted values and the sum of weights."""
        item_sum = cls()
        item_sum._sums = (total, weight)
        return item_sum

    @property
    def mean(self) -> Tensor:
        """The elementwise mean Σ w v / Σ w, or Σ v / Σ w for values that are already sums.

        Where the sum of tensor weights is zero, the numerator is returned. If all weights are
        scalars and zero, the mean is unweighted.
        """
        if self._sums is None:
            assert self._mean is not None and self._mean.value is not None
            return self._mean.value
        total, weight = self._sums
        return total / torch.where(weight > 0, weight, torch.ones_like(weight))

    @property
    def total(self) -> tuple[Tensor, Tensor]:
        """The pair Σ w v and Σ w, or Σ v and Σ w for values that are already sums."""
        if self._sums is not None:
            return self._sums
        assert self._mean is not None and self._mean.value is not None
        weight = self._mean.value.new_tensor(self._mean.weight)
        return self._mean.value * weight, weight


def mean_of_items(items: Sequence[Item]) -> Tensor:
    """Return the mean of one or more single-tensor items (see `ItemSum`).

    The order of the items affects the rounding of the mean.
    """
    item_sum = ItemSum()
    for item in items:
        item_sum.add(item)
    return item_sum.mean


class OwnerMeans:
    """Weighted mean of each named tensor over the owners of the tensor.

    Models are added one at a time. Tensors are averaged within the architecture groups of the
    clients. Tensors whose name starts with a prefix in `common` are averaged over all groups with
    the same name and shape.

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
            tensors: The tensors, keyed by name.
            weight: Weight of the model in the means.
        """
        for name, owner in self._owners(group, tensors).items():
            self._means.setdefault(owner, RunningMean()).add(tensors[name], weight)

    def set_mean(self, group: str, name: str, mean: Tensor, weight: float) -> None:
        """Set the mean of a tensor to a value that was computed elsewhere.

        The new mean replaces the previous one. Call this method once for each owner, because each
        call adds 1 to the number of uploads in the mean.

        Args:
            group: Architecture group of the owner.
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
        """Return the mean of each tensor that a group sent, keyed by group and tensor name."""
        return {
            group: {
                name: mean
                for name, owner in owners.items()
                if (mean := self._means[owner].value) is not None
            }
            for group, owners in self._groups.items()
        }

    def weights_by_group(self) -> dict[str, dict[str, float]]:
        """Return the total weight of each mean, keyed by group and tensor name."""
        return {
            group: {name: self._means[owner].weight for name, owner in owners.items()}
            for group, owners in self._groups.items()
        }

    def counts_by_group(self) -> dict[str, dict[str, int]]:
        """Return the number of uploads in each mean, keyed by group and tensor name."""
        return {
            group: {name: self._means[owner].count for name, owner in owners.items()}
            for group, owners in self._groups.items()
        }


def tie_common_tensors(
    models: dict[str, Tensors],
    common: Sequence[str],
    updated: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> None:
    """Replace each tensor that several groups share by a single tensor, in place.

    Groups share a tensor if the name starts with a prefix in `common` and the shapes are equal.
    Methods that add updates to models call this function, because the results differ between groups
    that start from different tensors. Means of models are equal in all groups.

    Args:
        models: The models, keyed by group and tensor name.
        common: Prefixes of the names of common tensors.
        updated: Names of the updated tensors, keyed by group. All groups receive the first updated
            tensor. If no tensor was updated, all groups receive the tensor of the first group.
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
    """Return a view of the first `shape[i]` elements of a tensor along each dimension i."""
    return tensor[tuple(slice(0, size) for size in shape)]


def leading_slice_means(current: Tensors, members: Iterable[tuple[Tensors, float]]) -> Tensors:
    """Return the weighted mean of each element over the members that contain the element.

    Args:
        current: The current tensors, keyed by name.
        members: Tensors, keyed by name, and weight of each member. Each tensor is a leading slice
            of the current tensor with the same name.

    Returns:
        The means of the tensors that at least one member sent. Elements that no member sent do not
        change.
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
    """Move a model toward a mean: `current + rate * (mean - current)` for parameters.

    Buffers such as BatchNorm statistics are set to the mean, because a rate above 1 could make a
    running variance negative.

    Args:
        current: The current tensors, keyed by name.
        mean: Means of some or all tensors.
        rate: Server learning rate. If 1, the result is exactly the mean.
        parameters: Names of the parameters. All other tensors are buffers.

    Returns:
        The new tensors, keyed by name. Tensors without a mean do not change.
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
    total_weights: Mapping[str, float],
    factor: float,
    parameters: Iterable[str],
) -> Tensors:
    """Add the weighted sum of the clients' updates: `current + factor * Σ s_k (θ_k - current)`.

    The sum is computed as `factor * S * (mean - current)` with the total weight S = Σ s_k. If no
    upload is stale, all weights s_k are 1 and S is the number of clients that own the tensor. For
    buffers, `factor * S` is limited to 1, because extrapolation beyond the mean could make a
    running variance negative.

    Args:
        current: The current tensors, keyed by name.
        mean: Weighted means of some or all tensors over their owners.
        total_weights: Total weight S of each mean, keyed by tensor name.
        factor: Factor of the updates.
        parameters: Names of the parameters. All other tensors are buffers.

    Returns:
        The new tensors, keyed by name. Tensors without a mean do not change.
    """
    trainable = set(parameters)
    updated = {}
    for name, tensor in mean.items():
        rate = factor * total_weights[name]
        if name not in trainable:
            rate = min(1.0, rate)
        updated[name] = tensor if rate == 1 else current[name] + rate * (tensor - current[name])
    return {**current, **updated}


def discount_upload(payload: Payload, factor: float) -> Payload:
    """Multiply the weights of an upload, and the values that are already sums, by a factor.

    Returns:
        A new payload, or `payload` itself if the factor is 1.
    """
    if factor == 1:
        return payload
    return Payload(
        {name: _discount_item(payload.item(name), factor) for name in payload}, payload.report
    )


def _discount_item(item: Item, factor: float) -> Item:
    if item.kind not in SUM_KINDS:
        return replace(item, weight=item.weight * factor)
    scaled = item.with_tensors({name: t * factor for name, t in item.tensors.items()})
    return replace(scaled, weight=item.weight * factor)
