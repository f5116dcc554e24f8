"""Weighted means over the owners of each tensor, accumulated as uploads arrive.

The owners of a tensor are the clients whose models contain the tensor. Only the means and the
current upload are in memory. An item is an entry of an upload (see `hetero_fl.core.payload.Item`).
The module also discounts stale uploads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.payload import SUM_KINDS, Item, Payload


@dataclass(frozen=True)
class Mean:
    """Mean of a tensor over clients.

    Attributes:
        value: The mean.
        weight: Sum of the weights.
        count: Number of uploads in the mean, or the expected number under client-level privacy.
        total: The sum Σ w v. If None, the sum is computed from the mean.
    """

    value: Tensor
    weight: float | Tensor
    count: float
    total: Tensor | None = None

    @classmethod
    def from_total(cls, total: Tensor, weight: Tensor, count: float) -> Mean:
        """Create a mean from the totals Σ w v and Σ w.

        Where the sum of the weights is zero, the mean is the sum Σ w v.
        """
        divisor = torch.where(weight > 0, weight, torch.ones_like(weight))
        return cls(total / divisor, weight, count, total)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return the totals Σ w v and Σ w."""
        like = self.value
        weight = torch.as_tensor(self.weight, dtype=like.dtype, device=like.device)
        return (like * weight if self.total is None else self.total), weight


class RunningMean:
    """Running weighted mean of tensors of the same shape.

    While all weights are scalars, the mean starts at the first term and is interpolated toward each
    further term by the term's share of the total weight so far. If all terms are equal, the mean is
    therefore bit-identical to the terms. While all weights are zero, the mean is unweighted. After
    a positive weight, terms of weight zero have no effect.

    If a weight is a tensor, or terms are already sums, totals are accumulated instead.

    Attributes:
        weight: Sum of the weights.
        count: Number of terms.
    """

    def __init__(self) -> None:
        self.weight: float | Tensor = 0.0
        self.count = 0
        # The mean or, once the weight is a tensor, the total.
        self._value: Tensor | None = None
        # Whether `_value` may be modified in place: it was created by `add` and not yet returned.
        self._is_owned = False

    def result(self) -> Mean:
        """Return the mean of the terms so far. There must be at least one term.

        Later calls of `add` do not modify the returned tensors in place.
        """
        assert self._value is not None
        self._is_owned = False
        if isinstance(self.weight, Tensor):
            return Mean.from_total(self._value, self.weight, self.count)
        return Mean(self._value, self.weight, self.count)

    def add(self, value: Tensor, weight: float | Tensor, is_sum: bool = False) -> None:
        """Add a term to the mean without modifying `value` in place.

        Args:
            value: The term.
            weight: Weight of the term. A tensor is broadcast against the term.
            is_sum: Whether the term is a sum that is already multiplied by the weight.
        """
        self.count += 1
        if is_sum or isinstance(weight, Tensor) or isinstance(self.weight, Tensor):
            self._add_total(value, weight, is_sum)
            return
        if weight == 0 and self.weight > 0:
            return
        self.weight += weight
        # 1 for the first term with a positive weight: it replaces all terms of weight zero.
        share = weight / self.weight if self.weight > 0 else 1 / self.count
        if self._value is None or share == 1:
            self._value = value
            self._is_owned = False
        elif self._is_owned:
            self._value.lerp_(value, share)
        else:
            self._value = torch.lerp(self._value, value, share)
            self._is_owned = True

    def _add_total(self, value: Tensor, weight: float | Tensor, is_sum: bool) -> None:
        weight = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
        total = value if is_sum else value * weight
        if self._value is not None:
            earlier_total, earlier_weight = self.result().totals()
            total = earlier_total + total
            weight = earlier_weight + weight
        self._value = total
        self.weight = weight


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
    return _move(current, mean, {name: rate if name in trainable else 1.0 for name in mean})


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
    rates = {name: factor * total_weights[name] for name in mean}
    limits = {name: math.inf if name in trainable else 1.0 for name in mean}
    return _move(current, mean, {name: min(limits[name], rate) for name, rate in rates.items()})


def _move(current: Tensors, mean: Tensors, rates: Mapping[str, float]) -> Tensors:
    """Move each tensor toward its mean by a factor. With the factor 1, the result is the mean."""
    moved = {
        n: m if rates[n] == 1 else current[n] + rates[n] * (m - current[n]) for n, m in mean.items()
    }
    return {**current, **moved}


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
