"""Partition training rows among clients: label skew, quantity skew, groups, user functions.

`partition_rows` looks up the partition kind in a registry. If the data identifies patients, all
rows of a patient go to the same client. Partitions depend only on the rows, the sizes of the
clients in order, the configuration and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, PartitionConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.groups import (
    WHERE,
    all_groups,
    check_patients_in_one_group,
    match_groups,
    partition_patients,
    split_patient_rows,
    too_few_rows_error,
)
from hetero_fl.data.splits import RowSelection
from hetero_fl.utils.code_permission import CODE_PREFIX
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.registry import call_reference
from hetero_fl.utils.seeding import keyed_generator, keyed_numpy_generator
from hetero_fl.utils.text import format_list

MAX_ATTEMPTS = 1000
USER_ARGUMENTS = "y, group, config, sizes, task, seed"
"""Arguments of a user-defined partition function."""


def row_strata(y: Tensor, task: Task) -> Tensor:
    """Return the stratum of each row, which partitions use as the label of the row.

    For multiclass tasks, the stratum is the class. For multilabel tasks, the stratum is one plus
    the index of the rarest positive label, or 0 if no label is positive. For regression tasks, the
    stratum is the decile of the first target.

    Args:
        y: Targets as defined by `Task`.
        task: Learning task.

    Returns:
        Strata, int64 `[N]`.

    Example:
        >>> import torch
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import row_strata
        >>> y = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
        >>> row_strata(y, Task("multilabel", 2))
        tensor([1, 2, 0])
    """
    if task.kind == "multiclass":
        return y
    if task.kind == "multilabel":
        # Rarest label first: argmax returns the first positive one.
        order = y.sum(0).argsort(stable=True)
        first = (y[:, order] > 0).to(torch.uint8).argmax(1)
        return torch.where((y > 0).any(1), order[first] + 1, 0)
    inner = torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1]
    target = y[:, 0].double().contiguous()
    edges = torch.from_numpy(np.quantile(target.numpy(), inner.numpy()))
    return torch.searchsorted(edges, target, right=True)


def apportion(total: int, share: np.ndarray, at_least: int = 0) -> np.ndarray:
    """Divide a total into integers in proportion to shares (largest remainder method).

    Args:
        total: Sum of the integers.
        share: Shares, float `[K]`, which need not sum to one.
        at_least: Minimum of each integer. `K * at_least` must not exceed `total`.

    Returns:
        Integers, int64 `[K]`.

    Example:
        >>> import numpy as np
        >>> from hetero_fl.data.partition import apportion
        >>> apportion(10, np.array([0.32, 0.25, 0.43])).tolist()
        [3, 3, 4]
    """
    exact = share / share.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    # Terminates because the total suffices and each step moves a part of the largest integer to the
    # smallest one.
    while (counts < at_least).any():
        low = counts.argmin()
        high = counts.argmax()
        moved = min(at_least - counts[low], counts[high] - at_least)
        counts[low] += moved
        counts[high] -= moved
    return counts


def apportion_nonzero(rows: int, share: np.ndarray) -> np.ndarray:
    """Divide rows in proportion to shares, so that clients with a share of zero get no rows.

    If all shares are zero, no client gets any rows.
    """
    counts = np.zeros(len(share), dtype=np.int64)
    if (share > 0).any():
        counts[share > 0] = apportion(rows, share[share > 0])
    return counts


def cut_proportions(proportions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Divide the rows of each class among clients in given proportions.

    Args:
        proportions: Proportion of each class per client, float `[classes, clients]`.
        counts: Number of rows of each class, int64 `[classes]`.

    Returns:
        Number of rows of each class per client, int64 `[classes, clients]`.
    """
    cuts = np.rint(proportions.cumsum(1) * counts[:, None]).astype(np.int64)
    cuts[:, -1] = counts
    return np.diff(cuts, axis=1, prepend=0)


def cut_below(proportions: np.ndarray, counts: np.ndarray, max_rows: np.ndarray) -> np.ndarray:
    """Divide the rows of each class in given proportions among the clients that are not full.

    Classes are divided one after the other. A client that has reached its maximum number of rows
    gets no rows of the following classes, which are divided among the other clients. A client may
    exceed its maximum by the rows of the last class that it gets.

    Args:
        proportions: Proportion of each class per client, float `[classes, clients]`.
        counts: Number of rows of each class, int64 `[classes]`.
        max_rows: Maximum number of rows per client, float `[clients]`. The sum must be at least the
            number of rows.

    Returns:
        Number of rows of each class per client, int64 `[classes, clients]`.
    """
    assigned = np.zeros(proportions.shape, dtype=np.int64)
    for c in range(len(counts)):
        below = assigned.sum(0) < max_rows
        share = np.where(below, proportions[c], 0.0)
        share = share if share.sum() > 0 else below.astype(float)
        assigned[c] = cut_proportions(share[None] / share.sum(), counts[c : c + 1])[0]
    return assigned


def assign_classes(
    rng: np.random.Generator, classes_per_client: np.ndarray, num_classes: int
) -> np.ndarray:
    """Assign classes to clients such that all classes have similar numbers of clients.

    Each client, in random order, gets the classes that the fewest clients have so far. Ties are
    broken at random.

    Args:
        rng: Random generator.
        classes_per_client: Number of classes of each client, int64 `[clients]`.
        num_classes: Number of classes.

    Returns:
        Mask of the classes of each client, bool `[clients, classes]`.
    """
    has_class = np.zeros((len(classes_per_client), num_classes), dtype=bool)
    clients_per_class = np.zeros(num_classes)
    for client in rng.permutation(len(classes_per_client)):
        order = np.lexsort((rng.random(num_classes), clients_per_class))
        chosen = order[: classes_per_client[client]]
        has_class[client, chosen] = True
        clients_per_class[chosen] += 1
    return has_class


def user_partition(
    config: PartitionConfig,
    arguments: tuple[Any, ...],
    rows: int,
    clients: int,
    patient: Tensor | None,
) -> list[Tensor]:
    """Call a user-defined partition function and check its result.

    Args:
        config: Partition settings, whose `kind` is the reference to the function.
        arguments: Arguments of the function, in the order of `USER_ARGUMENTS`.
        rows: Number of rows.
        clients: Number of clients.
        patient: Patient of each row, int64 `[N]`. If None, the data does not identify patients.

    Returns:
        Sorted row indices of each client.

    Raises:
        UserError: If the function raises an error, returns an invalid partition, or divides the
            rows of a patient.
    """
    parts = _check_parts(
        call_reference(config.kind, f"{WHERE}.kind", USER_ARGUMENTS, arguments),
        config,
        rows,
        clients,
    )
    if patient is not None and (pair := split_patient_rows(parts, patient)) is not None:
        raise UserError(
            f"{WHERE}.kind: {config.kind}: assigns rows {pair[0]} and {pair[1]} of the same "
            "patient (data.patient) to different clients"
        )
    return parts


def _check_parts(parts: object, config: PartitionConfig, rows: int, clients: int) -> list[Tensor]:
    """Check the result of a user-defined function and return the sorted rows of each client."""
    where = f"{WHERE}.kind: {config.kind}"
    if not isinstance(parts, list | tuple) or len(parts) != clients:
        found = f"{len(parts)} parts" if isinstance(parts, list | tuple) else type(parts).__name__
        raise UserError(
            f"{where}: expected a list with the rows of each of {clients} clients, got {found}"
        )
    try:
        tensors = [
            torch.as_tensor(part, dtype=torch.int64).reshape(-1).sort().values for part in parts
        ]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: expected row indices as integers: {error}") from error
    all_rows = torch.cat(tensors)
    if len(all_rows) and (all_rows.min() < 0 or all_rows.max() >= rows):
        raise UserError(
            f"{where}: expected row indices from 0 to {rows - 1}, got {all_rows.min()} to "
            f"{all_rows.max()}"
        )
    if len(all_rows.unique()) < len(all_rows):
        raise UserError(f"{where}: expected each row at most once, got a row twice")
    if (smallest := min(map(len, tensors))) < config.min_size:
        raise UserError(
            f"{where}: assigns only {smallest} rows to a client; {WHERE}.min_size is "
            f"{config.min_size}"
        )
    return tensors


@dataclass(frozen=True)
class PartitionContext:
    """The inputs of a partition function.

    If the data identifies patients, all kinds except `natural` partition patients instead of rows.
    An entry of `strata` is then the most common stratum of the rows of a patient.

    Attributes:
        strata: Stratum of each row, int64 `[N]` (see `row_strata`).
        group: Group of each row, int64 `[N]`. If None, the data has no groups.
        config: Partition settings.
        share: Share of the rows per client, float64 `[K]`, proportional to the client sizes and
            summing to one.
        seed: Seed of the run.
        min_rows: Minimum number of rows per client.
    """

    strata: Tensor
    group: Tensor | None
    config: PartitionConfig
    share: np.ndarray
    seed: int
    min_rows: int

    @property
    def alpha(self) -> float:
        """Concentration parameter of the Dirichlet distribution."""
        # The configuration fills in a default for all kinds that use it.
        assert self.config.alpha is not None
        return self.config.alpha

    @property
    def num_rows(self) -> int:
        """Number of rows to partition."""
        return len(self.strata)

    def rng(self, *use: str | int) -> np.random.Generator:
        """Return a NumPy generator that is seeded with the seed of the run and with `use`."""
        return keyed_numpy_generator("data", self.seed, "partition", *use)

    def shuffled(self, rows: Tensor, *use: str | int) -> Tensor:
        """Return the rows in a random order that depends on the seed of the run and on `use`."""
        generator = keyed_generator("data", self.seed, "partition", *use)
        return rows[torch.randperm(len(rows), generator=generator)]


PartitionFunction = Callable[[PartitionContext], list[Tensor]]
_partitions: dict[str, PartitionFunction] = {}


def register_partition(name: str) -> Callable[[PartitionFunction], PartitionFunction]:
    """Register a partition function for `data.partition.kind`.

    The function accepts a `PartitionContext` and returns the row indices of each client. A function
    that is already registered under this name is replaced.

    Args:
        name: Name of the partition kind.

    Returns:
        A decorator that registers the function and returns it unchanged.

    Example:
        >>> import torch
        >>> from hetero_fl.data import register_partition
        >>> @register_partition("round_robin")
        ... def partition_round_robin(context):
        ...     num_clients = len(context.share)
        ...     return [torch.arange(k, context.num_rows, num_clients) for k in range(num_clients)]
    """

    def register(function: PartitionFunction) -> PartitionFunction:
        _partitions[name] = function
        return function

    return register


def partition_rows(
    y: Tensor,
    group: Tensor | None,
    config: PartitionConfig,
    sizes: Sequence[float],
    task: Task,
    *,
    seed: int,
    patient: Tensor | None = None,
) -> list[Tensor]:
    """Partition rows among clients.

    Each row goes to at most one client. With the kind `classes`, rows are left out if `shots` is
    set or a class has no client. User-defined partitions (`python:` references to functions of y,
    group, config, sizes, task and seed) may also leave rows out.

    Args:
        y: Targets, `[N]` or `[N, L]`.
        group: Group of each row, int64 `[N]`, or None. The kind `natural` requires groups.
        config: Partition settings.
        sizes: Relative size of each client.
        task: Learning task.
        seed: Seed of the run.
        patient: Patient of each row, int64 `[N]`, or None. All rows of a patient go to the same
            client.

    Returns:
        Sorted, disjoint row indices (int64) of each client, at least `config.min_size` each.

    Raises:
        UserError: If the kind is unknown, there are too few rows or patients, the groups do not
            match the clients, a patient is in two groups, or a user-defined partition is invalid.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.arange(100) % 4
        >>> config = PartitionConfig(kind="iid", min_size=10)
        >>> parts = partition_rows(y, None, config, [1, 3], Task("multiclass", 4), seed=0)
        >>> [len(part) for part in parts]
        [25, 75]
    """
    if config.min_size * len(sizes) > len(y):
        raise UserError(
            f"{WHERE}.min_size: must be <= {len(y) // len(sizes)} for {len(y)} training rows and "
            f"{len(sizes)} clients, got {config.min_size}; with {WHERE}.kind=drawn clients may "
            "share rows"
        )
    if config.kind.startswith(CODE_PREFIX):
        return user_partition(
            config, (y, group, config, sizes, task, seed), len(y), len(sizes), patient
        )
    if config.kind not in _partitions:
        raise UserError(
            f"{WHERE}.kind: unknown partition '{config.kind}'"
            f"{suggest_or_list(config.kind, _partitions)}"
        )
    share = np.asarray(sizes, dtype=np.float64)
    context = PartitionContext(
        row_strata(y, task), group, config, share / share.sum(), seed, config.min_size
    )
    if patient is None:
        parts = _partitions[config.kind](context)
    else:
        parts = partition_patients(_partitions[context.config.kind], context, patient)
    return [part.sort().values for part in parts]


@register_partition("iid")
def partition_iid(context: PartitionContext) -> list[Tensor]:
    """Assign rows at random, in proportion to the client sizes.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.arange(60) % 3
        >>> config = PartitionConfig(kind="iid", min_size=10)
        >>> parts = partition_rows(y, None, config, [1, 2], Task("multiclass", 3), seed=0)
        >>> [len(part) for part in parts]
        [20, 40]
    """
    counts = apportion(context.num_rows, context.share, context.min_rows)
    return list(context.shuffled(torch.arange(context.num_rows), "iid").split(counts.tolist()))


@register_partition("in_order")
def partition_in_order(context: PartitionContext) -> list[Tensor]:
    """Assign consecutive slices of the rows, in proportion to the client sizes.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.zeros(5, dtype=torch.int64)
        >>> config = PartitionConfig(kind="in_order", min_size=1)
        >>> partition_rows(y, None, config, [2, 3], Task("multiclass", 2), seed=0)
        [tensor([0, 1]), tensor([2, 3, 4])]
    """
    counts = apportion(context.num_rows, context.share, context.min_rows)
    return list(torch.arange(context.num_rows).split(counts.tolist()))


@register_partition("quantity")
def partition_by_quantity(context: PartitionContext) -> list[Tensor]:
    """Assign rows at random, with client shares sampled from a Dirichlet distribution.

    The concentration parameter of a client is `alpha * K * share`, where K is the number of clients
    and `share` is the client's share of the total size. If all sizes are equal, the parameter is
    `alpha`.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.arange(300) % 3
        >>> config = PartitionConfig(kind="quantity", alpha=0.2, min_size=10)
        >>> parts = partition_rows(y, None, config, [1] * 4, Task("multiclass", 3), seed=0)
        >>> sizes = sorted(len(part) for part in parts)
        >>> sum(sizes), sizes[0] < 75 < sizes[-1]
        (300, True)
    """
    share = context.rng("quantity").dirichlet(context.alpha * len(context.share) * context.share)
    counts = apportion(context.num_rows, share, context.min_rows)
    return list(context.shuffled(torch.arange(context.num_rows), "quantity").split(counts.tolist()))


@register_partition("dirichlet")
def partition_dirichlet(context: PartitionContext) -> list[Tensor]:
    """Divide each class among clients in proportions sampled from a Dirichlet distribution.

    The concentration parameter of a client is `alpha * K * share`, where K is the number of clients
    and `share` is the client's share of the total size. Proportions are sampled again until every
    client has enough rows. If the sizes are equal, this is the partition of Yurochkin et al. (ICML
    2019) and Li et al. (ICDE 2022). After `MAX_ATTEMPTS` samples, small clients get random rows of
    the largest client.

    If `config.cap` is set, a client that has `cap` times its share of the rows gets no further
    classes. With `cap=1`, the partition matches the code of Li et al.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.arange(400) % 2
        >>> config = PartitionConfig(kind="dirichlet", alpha=0.1, min_size=10)
        >>> parts = partition_rows(y, None, config, [1] * 4, Task("multiclass", 2), seed=0)
        >>> shares = [y[part].double().mean().item() for part in parts]
        >>> min(shares) < 0.1 and max(shares) > 0.9
        True
    """
    classes, counts = np.unique(context.strata.numpy(), return_counts=True)
    for attempt in range(MAX_ATTEMPTS):
        proportions = context.rng("dirichlet", attempt).dirichlet(
            context.alpha * len(context.share) * context.share, size=len(classes)
        )
        if context.config.cap is None:
            class_counts = cut_proportions(proportions, counts)
        else:
            class_counts = cut_below(
                proportions, counts, context.config.cap * context.share * context.num_rows
            )
        if class_counts.sum(0).min() >= context.min_rows:
            break
    parts = _partition_classes(context, classes, class_counts)
    return _fill_short_clients(context, parts)


@register_partition("classes")
def partition_by_classes(context: PartitionContext) -> list[Tensor]:
    """Assign a few classes to each client.

    Each client gets `config.classes` classes (McMahan et al. 2017), plus or minus up to
    `config.classes_spread`. The rows of a class are divided among the clients with this class in
    proportion to the client sizes. If `config.shots` is set, a client with this class instead gets
    `config.shots` rows, multiplied by the relative client size, and the remaining rows are left out
    (Tan et al. 2022). Classes without a client are left out. The assignment is sampled again until
    every client has enough rows.

    Raises:
        UserError: If there are fewer than `config.classes` classes, or no valid assignment is found
            in `MAX_ATTEMPTS` samples.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.arange(400) % 10
        >>> config = PartitionConfig(kind="classes", classes=2)
        >>> parts = partition_rows(y, None, config, [1] * 5, Task("multiclass", 10), seed=0)
        >>> [len(y[part].unique()) for part in parts]
        [2, 2, 2, 2, 2]
    """
    classes, counts = np.unique(context.strata.numpy(), return_counts=True)
    clients = len(context.share)
    each = context.config.classes
    if each > len(classes):
        raise UserError(
            f"{WHERE}.classes: must be <= {len(classes)}, the number of classes of the training "
            f"rows, got {each}"
        )
    min_classes = max(min(2, each), each - context.config.classes_spread)
    max_classes = min(len(classes), each + context.config.classes_spread)
    shots = (
        None
        if context.config.shots is None
        else np.rint(context.config.shots * context.share * clients).astype(np.int64)
    )
    for attempt in range(MAX_ATTEMPTS):
        rng = context.rng("classes", attempt)
        if min_classes == max_classes:
            classes_per_client = np.full(clients, each)
        else:
            classes_per_client = rng.integers(min_classes, max_classes + 1, clients)
        has_class = assign_classes(rng, classes_per_client, len(classes))
        if shots is None:
            class_counts = np.stack(
                [
                    apportion_nonzero(n, context.share * has_class[:, c])
                    for c, n in enumerate(counts)
                ]
            )
        else:
            class_counts = (has_class * shots[:, None]).T
        enough = class_counts.sum(0).min() >= context.min_rows
        if (class_counts.sum(1) <= counts).all() and enough:
            return _partition_classes(context, classes, class_counts)
    if shots is not None and (excess := class_counts.sum(1) - counts).max() > 0:
        c = excess.argmax()
        raise UserError(
            f"{WHERE}.shots: class {classes[c]} has only {counts[c]} rows for "
            f"{has_class[:, c].sum()} clients, got {context.config.shots}; choose a smaller number"
        )
    raise too_few_rows_error(context)


@register_partition("natural")
def partition_natural(context: PartitionContext) -> list[Tensor]:
    """Assign each group of rows to one client, in the order of the group numbers.

    Raises:
        UserError: If there are no groups, the numbers of groups and clients differ, or a group is
            too small.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.tensor([0, 1, 0, 1])
        >>> group = torch.tensor([1, 0, 0, 1])
        >>> config = PartitionConfig(kind="natural", min_size=1)
        >>> partition_rows(y, group, config, [1, 1], Task("multiclass", 2), seed=0)
        [tensor([1, 2]), tensor([0, 3])]
    """
    if context.group is None:
        raise UserError(
            f"{WHERE}.kind=natural needs groups; name their column in data.group, or choose "
            "another kind"
        )
    present = context.group.unique()
    if len(present) != len(context.share):
        raise UserError(
            f"{WHERE}.kind=natural: expected one group per client, got {len(present)} groups for "
            f"{len(context.share)} clients"
        )
    parts = [torch.nonzero(context.group == g).squeeze(1) for g in present]
    if (smallest := min(map(len, parts))) < context.config.min_size:
        raise UserError(
            f"{WHERE}.min_size: must be <= {smallest}, the number of rows of the smallest "
            f"group or client, got {context.config.min_size}"
        )
    return parts


def _partition_classes(
    context: PartitionContext, classes: np.ndarray, counts: np.ndarray
) -> list[Tensor]:
    """Sample the rows of each client. `counts` has shape `[classes, clients]`."""
    per_class = [
        context.shuffled(torch.nonzero(context.strata == c).squeeze(1), "rows", int(c))[
            : n.sum()
        ].split(n.tolist())
        for c, n in zip(classes, counts, strict=True)
    ]
    return [torch.cat(parts) for parts in zip(*per_class, strict=True)]


def _fill_short_clients(context: PartitionContext, parts: list[Tensor]) -> list[Tensor]:
    """Move random rows from the largest client to clients that have too few rows."""
    turn = 0
    while min(map(len, parts)) < context.min_rows:
        low = min(range(len(parts)), key=lambda k: len(parts[k]))
        high = max(range(len(parts)), key=lambda k: len(parts[k]))
        moved = min(context.min_rows - len(parts[low]), len(parts[high]) - context.min_rows)
        rows = context.shuffled(parts[high].sort().values, "top_up", turn)
        parts[low] = torch.cat([parts[low], rows[:moved]])
        parts[high] = rows[moved:]
        turn += 1
    return parts


def assign_rows(
    dataset: Dataset,
    rows: Tensor,
    names: list[str],
    *,
    config: DataConfig,
    clients: Mapping[str, ClientSettings],
    seed: int,
    notes: list[str],
) -> dict[str, RowSelection]:
    """Partition training rows among clients, with groups and clients matched by name.

    A single client gets all rows.

    Args:
        dataset: Data set.
        rows: Training rows to assign, int64 `[M]`.
        names: Client ids, in order.
        config: Data configuration.
        clients: Client settings, keyed by client id.
        seed: Seed of the run.
        notes: List to which a remark is appended if groups and clients have different names.

    Returns:
        Rows of each client, keyed by client id.

    Raises:
        UserError: If `partition_rows` or `match_groups` fails or, in a natural partition, a group
            has no training rows left or a patient is in two groups.
    """
    train = dataset.train
    patient = None if train.patient is None else train.patient[rows]
    group = None if train.group is None else train.group[rows]
    if group is not None and train.group_names:
        present = [train.group_names[g] for g in group.unique().tolist()]
        if config.partition.kind == "natural":
            groups = all_groups(dataset)
            notes += match_groups(groups, names, dataset.name)
            if len(names) > 1 and (empty := natural_order(set(groups) - set(present))):
                raise UserError(
                    f"{WHERE}.kind=natural: group {format_list(empty, quote=True)} of "
                    f"{dataset.name} has no training rows left; all are validation, test or proxy "
                    "rows, or excluded by data.train_limit"
                )
            check_patients_in_one_group(dataset)
        if set(present) == set(names):
            group = torch.tensor([names.index(n) if n in names else -1 for n in train.group_names])[
                group
            ]
    if len(names) < 2:
        return {name: RowSelection(train, rows) for name in names}
    sizes = [clients[name].size for name in names]
    parts = partition_rows(
        train.labels[rows],
        group,
        config.partition,
        sizes,
        dataset.task,
        seed=seed,
        patient=patient,
    )
    return {name: RowSelection(train, rows[part]) for name, part in zip(names, parts, strict=True)}
