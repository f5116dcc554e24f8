"""The partition kinds of the package, and the registry of all kinds.

A partition is a pydantic class whose fields are the keys of `data.partition`, or a function.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, create_model
from torch import Tensor

from hetero_fl.config.data import registered_partition_kinds
from hetero_fl.data.partition.apportion import (
    apportion,
    apportion_nonzero,
    assign_classes,
    cut_below,
    cut_proportions,
)
from hetero_fl.data.partition.units import Units
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.registry import Registry
from hetero_fl.utils.text import pluralize

WHERE = "data.partition"
MAX_ATTEMPTS = 1000
"""Maximum number of random partitions that are tried until every client has enough units."""
MAX_PROPORTIONS = 10_000_000
"""Maximum number of proportions, classes times clients, that all attempts sample."""
MAX_CONCENTRATION = 1e300
"""Concentration above which the parameters of the Dirichlet distribution could overflow."""


class Partitioner(BaseModel):
    """Base class of partitions, whose fields are keys of `data.partition`.

    Example:
        >>> import numpy as np
        >>> from hetero_fl.data import Partitioner, register_partition
        >>> @register_partition("by_column")
        ... class ByColumn(Partitioner):
        ...     column: str
        ...
        ...     def assign(self, units):
        ...         order = np.argsort(units.columns[self.column], kind="stable")
        ...         return np.array_split(order, len(units.clients))
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    moves_patients: ClassVar[bool] = False
    """Whether whole patients may move to clients that get too few rows."""

    @abstractmethod
    def assign(self, units: Units) -> Sequence[Any]:
        """Return the indices of the units of each client, in the order of `units.clients`."""


def partition_of_function(function: Callable[..., Any]) -> type[Partitioner]:
    """Return the class of a partition that is a function of `Units` and of its settings."""
    settings = list(inspect.signature(function).parameters.values())[1:]
    fields: dict[str, Any] = {
        each.name: (Any, ... if each.default is each.empty else each.default)
        for each in settings
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }
    takes_any = any(each.kind is each.VAR_KEYWORD for each in settings)

    class FunctionPartition(Partitioner):
        model_config = ConfigDict(extra="allow" if takes_any else "forbid")

        def assign(self, units: Units) -> Sequence[Any]:
            parts: Sequence[Any] = function(units, **dict(self))
            return parts

    name = getattr(function, "__name__", "partition")
    return create_model(
        name, __base__=FunctionPartition, __module__=str(function.__module__), **fields
    )


register_partition: Registry[type[Partitioner]] = Registry(
    "partition",
    lambda: Partitioner,
    plugins="hetero_fl.partitions",
    adapter=partition_of_function,
    takes="units",
    names=registered_partition_kinds,
)
"""Register a partition under a name for `data.partition.kind`.

The partition is a subclass of `Partitioner`, or a function of `Units` and of keyword arguments.
"""


@register_partition("iid")
class IIDPartition(Partitioner):
    """Assign units at random, in proportion to the client sizes."""

    moves_patients = True

    def assign(self, units: Units) -> Sequence[Tensor]:
        """Return the indices of the units of each client."""
        counts = apportion(len(units), units.share, units.min_size)
        return units.shuffled(torch.arange(len(units)), "iid").split(counts.tolist())


@register_partition("in_order")
class InOrderPartition(Partitioner):
    """Assign consecutive slices of the units, in proportion to the client sizes."""

    moves_patients = True

    def assign(self, units: Units) -> Sequence[Tensor]:
        """Return the indices of the units of each client."""
        counts = apportion(len(units), units.share, units.min_size)
        return torch.arange(len(units)).split(counts.tolist())


@register_partition("quantity")
class QuantityPartition(Partitioner):
    """Assign units at random, with client shares sampled from a Dirichlet distribution.

    The concentration parameter of a client is `alpha * K * share`, where K is the number of clients
    and `share` is the client's share of the total size. If all sizes are equal, the parameter is
    `alpha`, and this is the quantity skew of Li et al. (ICDE 2022).
    """

    moves_patients = True
    alpha: float = 0.5

    def assign(self, units: Units) -> Sequence[Tensor]:
        """Return the indices of the units of each client."""
        share = units.rng("quantity").dirichlet(_concentration(units, self.alpha))
        counts = apportion(len(units), share, units.min_size)
        return units.shuffled(torch.arange(len(units)), "quantity").split(counts.tolist())


@register_partition("dirichlet")
class DirichletPartition(Partitioner):
    """Divide each class among clients in proportions sampled from a Dirichlet distribution.

    The concentration parameter of a client is `alpha * K * share`, where K is the number of clients
    and `share` is the client's share of the total size. If the sizes are equal, this is the
    partition of Yurochkin et al. (ICML 2019, section 4), which Li et al. (ICDE 2022) call
    distribution-based label imbalance.

    Proportions are sampled again until every client has enough units, at most `MAX_ATTEMPTS` times
    and fewer times for large numbers of classes and clients (`MAX_PROPORTIONS`). After that, random
    units of the largest clients move to clients with too few units, and `units.notes` states how
    many.

    If `cap` is set, a client that has `cap` times its share of the units gets no further classes.
    With `cap=1`, the partition matches the code of Li et al.
    """

    moves_patients = True
    alpha: float = 0.5
    cap: float | None = None

    def assign(self, units: Units) -> Sequence[Tensor]:
        """Return the indices of the units of each client."""
        classes, counts = np.unique(units.strata.numpy(), return_counts=True)
        concentration = _concentration(units, self.alpha)
        most = MAX_PROPORTIONS // (len(classes) * len(units.clients))
        for attempt in range(max(1, min(MAX_ATTEMPTS, most))):
            proportions = units.rng("dirichlet", attempt).dirichlet(concentration, len(classes))
            if self.cap is None:
                class_counts = cut_proportions(proportions, counts)
            else:
                largest_share = np.minimum(self.cap * units.share, 1.0)
                class_counts = cut_below(proportions, counts, largest_share * len(units))
            if class_counts.sum(0).min() >= units.min_size:
                break
        return _fill_short_clients(units, _sample_classes(units, classes, class_counts))


@register_partition("classes")
class ClassesPartition(Partitioner):
    """Assign a few classes to each client.

    Each client gets `classes` classes, plus or minus up to `classes_spread`. The units of a class
    are divided among the clients with this class in proportion to the client sizes. This is the
    quantity-based label imbalance of Li et al. (ICDE 2022), except that all classes have similar
    numbers of clients. McMahan et al. (2017, section 3) instead assign equal shards of rows sorted
    by class, so clients have at most a few classes.

    If `shots` is set, a client with a class instead gets `shots` units of the class, multiplied by
    the relative client size, and the remaining units are left out (Tan et al., AAAI 2022). Classes
    without a client are left out. The assignment is sampled again until every client has enough
    units.
    """

    classes: int = 2
    classes_spread: int = 0
    shots: int | None = None

    def assign(self, units: Units) -> Sequence[Tensor]:
        """Return the indices of the units of each client.

        Raises:
            UserError: If there are fewer than `classes` classes, or no valid assignment is found in
                `MAX_ATTEMPTS` samples.
        """
        classes, counts = np.unique(units.strata.numpy(), return_counts=True)
        clients = len(units.clients)
        if self.classes > len(classes):
            raise UserError(
                f"classes: must be <= {len(classes)}, the number of classes of the training rows, "
                f"got {self.classes}"
            )
        min_classes = max(min(2, self.classes), self.classes - self.classes_spread)
        max_classes = min(len(classes), self.classes + self.classes_spread)
        for attempt in range(MAX_ATTEMPTS):
            rng = units.rng("classes", attempt)
            if min_classes == max_classes:
                classes_per_client = np.full(clients, self.classes)
            else:
                classes_per_client = rng.integers(min_classes, max_classes + 1, clients)
            has_class = assign_classes(rng, classes_per_client, len(classes))
            if self.shots is None:
                class_counts = np.stack(
                    [
                        apportion_nonzero(count, units.share * owners)
                        for count, owners in zip(counts, has_class.T, strict=True)
                    ]
                )
            else:
                shots = np.rint(self.shots * units.share * clients).astype(np.int64)
                class_counts = (has_class * shots[:, None]).T
            excess = class_counts.sum(1) - counts
            if excess.max() <= 0 and class_counts.sum(0).min() >= units.min_size:
                return _sample_classes(units, classes, class_counts)
        if excess.max() > 0:
            worst = excess.argmax()
            raise UserError(
                f"shots: class {classes[worst]} has only {counts[worst]} rows for "
                f"{has_class[:, worst].sum()} clients, got {self.shots}; choose a smaller number"
            )
        raise UserError(
            f"min_size: with {self.classes} classes per client some clients get fewer than "
            f"{pluralize(units.min_size, units.noun)}; choose a smaller number"
        )


@register_partition("natural")
class NaturalPartition(Partitioner):
    """Assign each group of rows to one client, in the order of the group numbers."""

    def assign(self, units: Units) -> Sequence[Tensor]:
        """Return the indices of the rows of each client.

        Raises:
            UserError: If there are no groups, or the numbers of groups and clients differ.
        """
        if units.group is None:
            raise UserError(
                "kind=natural needs groups; name their column in data.group, or choose another kind"
            )
        present = units.group.unique()
        if len(present) != len(units.clients):
            raise UserError(
                f"kind=natural: expected one group per client, got {len(present)} groups for "
                f"{len(units.clients)} clients"
            )
        return [torch.nonzero(units.group == group).squeeze(1) for group in present]


def _concentration(units: Units, alpha: float) -> np.ndarray:
    """Return the parameters of the Dirichlet distribution over clients, float64 `[K]`."""
    return np.minimum(alpha * len(units.share) * units.share, MAX_CONCENTRATION)


def _sample_classes(units: Units, classes: np.ndarray, counts: np.ndarray) -> list[Tensor]:
    """Sample the units of each client. `counts` has shape `[classes, clients]`."""
    per_class: list[Sequence[Tensor]] = []
    for c, count in zip(classes, counts, strict=True):
        of_class = units.shuffled(torch.nonzero(units.strata == c).squeeze(1), "rows", int(c))
        per_class.append(of_class[: count.sum()].split(count.tolist()))
    return [torch.cat(parts) for parts in zip(*per_class, strict=True)]


def _fill_short_clients(units: Units, parts: list[Tensor]) -> list[Tensor]:
    """Move random units from the largest client to clients that have too few units."""
    sizes = np.array([len(part) for part in parts])
    short = int((sizes < units.min_size).sum())
    turn = 0
    total = 0
    # Terminates because every step fills up a client, or leaves the largest one at the minimum.
    while sizes.min() < units.min_size:
        low = int(sizes.argmin())
        high = int(sizes.argmax())
        moved = int(min(units.min_size - sizes[low], sizes[high] - units.min_size))
        shuffled = units.shuffled(parts[high].sort().values, "top_up", turn)
        parts[low] = torch.cat([parts[low], shuffled[:moved]])
        parts[high] = shuffled[moved:]
        sizes[low] += moved
        sizes[high] -= moved
        total += moved
        turn += 1
    if short:
        units.notes.append(
            f"{WHERE}.min_size: moved {pluralize(total, units.noun)} to "
            f"{pluralize(short, 'client')} that had fewer than {units.min_size}"
        )
    return parts
