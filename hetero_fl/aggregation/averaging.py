"""Averaging named tensors over their owners: by architecture, and across architectures where a common part is declared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from hetero_fl.aggregation.sums import RunningMean
from hetero_fl.architecture import Tensors

Owner = tuple[str, tuple[int, ...], str]  # (tensor name, shape, group or "" for common ones)


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
        self._groups.setdefault(group, {})
        for name, tensor in tensors.items():
            self._means.setdefault(self._owner(group, name, tensor), RunningMean()).add(tensor, weight)

    def put(self, group: str, name: str, mean: Tensor, weight: float) -> None:
        """A tensor of that group whose mean over all its owners is known already, with the sum of their weights."""
        self._means[self._owner(group, name, mean)] = RunningMean.of(mean, weight)

    def _owner(self, group: str, name: str, tensor: Tensor) -> Owner:
        shared = bool(self._common) and name.startswith(self._common)
        owner = (name, tuple(tensor.shape), "" if shared else group)
        self._groups.setdefault(group, {})[name] = owner
        return owner

    def by_group(self) -> dict[str, Tensors]:
        """For each group the means of the tensors that its members sent; what nobody sent is left out."""
        return {
            group: {name: mean for name, owner in wanted.items() if (mean := self._means[owner].value) is not None}
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


def tie(
    models: dict[str, Tensors], common: Sequence[str], moved: Mapping[str, Iterable[str]] = MappingProxyType({})
) -> None:
    """What groups have in common becomes one tensor: one that `moved` (names by group), else the first group's.

    For methods that add changes: means of models meet by themselves, sums of changes only where they begin equal.
    """
    first: dict[tuple[str, torch.Size], Tensor] = {}
    for group, names in [*moved.items(), *models.items()]:
        for name in names if common else ():
            if name.startswith(tuple(common)):
                first.setdefault((name, models[group][name].shape), models[group][name])
    for group, model in models.items():
        models[group] = {name: first.get((name, tensor.shape), tensor) for name, tensor in model.items()}


def corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Its leading slice of that shape, a view."""
    return tensor[tuple(slice(0, size) for size in shape)]


def corner_means(current: Tensors, members: Iterable[tuple[Tensors, float]]) -> Tensors:
    """The weighted mean of each element over its owners, where members hold leading slices of the current tensors.

    Elements that nobody owns stay as they are; tensors that nobody sent are left out.
    """
    means: Tensors = {}
    held: dict[str, Tensor] = {}
    for tensors, weight in members:
        for name, tensor in tensors.items():
            if name not in means:
                means[name], held[name] = current[name].clone(), torch.zeros_like(current[name])
            mean, owned = corner(means[name], tensor.shape), corner(held[name], tensor.shape)
            owned += weight
            share = torch.where(
                owned > 0, weight / owned, 0.0
            )  # 1 for the first owner, whose value is taken to the bit
            mean.copy_(torch.lerp(mean, tensor, share))
    return means


def step(current: Tensors, mean: Tensors, rate: float, parameters: Iterable[str]) -> Tensors:
    """current + rate·(mean − current) for parameters; buffers (BatchNorm statistics) take the mean as it is.

    A rate of one takes the mean to the bit. Extrapolating a running variance could make it negative.
    """
    trainable = set(parameters)
    moved = {n: m if rate == 1 or n not in trainable else current[n] + rate * (m - current[n]) for n, m in mean.items()}
    return {**current, **moved}


def add(
    current: Tensors, mean: Tensors, owners: Mapping[str, float], factor: float, parameters: Iterable[str]
) -> Tensors:
    """current + factor·Σ_k(θ_k − current), which is a step of factor·K towards the mean of the K owners of each tensor.

    Buffers move by the same rule, though not beyond the mean: a running variance that is extrapolated could be negative.
    """
    trainable, moved = set(parameters), {}
    for name, tensor in mean.items():
        rate = factor * owners[name] if name in trainable else min(1.0, factor * owners[name])
        moved[name] = tensor if rate == 1 else current[name] + rate * (tensor - current[name])
    return {**current, **moved}
