"""Registry of partition kinds, and `partition_rows`, which partitions rows by any kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import (
    PARTITION_KINDS,
    PartitionConfig,
    registered_partition_kinds,
)
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Examples
from hetero_fl.data.partition.context import (
    PartitionColumns,
    PartitionContext,
    Partitioner,
    row_strata,
)
from hetero_fl.data.partition.custom import (
    UserPartition,
    call_partition,
    check_min_size,
)
from hetero_fl.data.partition.groups import WHERE, partition_patients
from hetero_fl.data.splits import MIN_TRAIN_ROWS
from hetero_fl.utils.code_permission import CODE_PREFIX
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.registry import import_reference
from hetero_fl.utils.seeding import stream_key
from model_zoo.generators import keyed_generators

PartitionFunction = Callable[[PartitionContext], list[Tensor]]
Registered = TypeVar("Registered", bound=UserPartition)
_partitions: dict[str, UserPartition] = {}


def register_partition(name: str) -> Callable[[Registered], Registered]:
    """Register a partition function or class for `data.partition.kind`.

    A function accepts a `PartitionContext`, and keyword arguments, which are further keys of
    `data.partition`. It returns the row indices of each client. A class is a subclass of
    `Partitioner`, whose constructor accepts the keyword arguments.

    Args:
        name: Name of the partition kind.

    Returns:
        A decorator that registers the function or class and returns it unchanged.

    Raises:
        ValueError: If the name is already registered.
        TypeError: If a class is not a subclass of `Partitioner`.

    Example:
        >>> import torch
        >>> from hetero_fl.data import register_partition
        >>> @register_partition("round_robin")
        ... def partition_round_robin(context, start=0):
        ...     num_clients = len(context.clients)
        ...     rows = torch.arange(start, context.num_rows)
        ...     return [rows[k::num_clients] for k in range(num_clients)]
    """

    def register(partition: Registered) -> Registered:
        if name in _partitions:
            raise ValueError(f"register_partition: '{name}' already exists; choose another name")
        if isinstance(partition, type) and not issubclass(partition, Partitioner):
            raise TypeError(
                f"register_partition: expected a function or a subclass of Partitioner, got the "
                f"class {partition.__name__}"
            )
        _partitions[name] = partition
        if name not in PARTITION_KINDS:
            registered_partition_kinds.add(name)
        return partition

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
    columns: PartitionColumns | None = None,
    clients: Sequence[str] = (),
    notes: list[str] | None = None,
) -> list[Tensor]:
    """Partition rows among clients.

    Each row goes to at most one client. With the kind `classes`, rows are left out if `shots` is
    set or a class has no client. User-defined partitions (`python:` references and names of
    `register_partition`) may also leave rows out.

    Args:
        y: Targets, `[N]` or `[N, L]`.
        group: Group of each row, int64 `[N]`, or None. The kind `natural` requires groups.
        config: Partition settings.
        sizes: Relative size of each client.
        task: Learning task.
        seed: Seed of the run.
        patient: Patient of each row, int64 `[N]`, or None. All rows of a patient go to the same
            client.
        columns: Columns of the rows for user-defined partitions. If None, the columns are `y`,
            `group` and `patient`.
        clients: Client ids. If empty, the clients are numbered from 0.
        notes: List to which remarks for the log are appended. If None, there are no remarks.

    Returns:
        Sorted, disjoint row indices (int64) of each client, at least `config.min_size` each.

    Raises:
        UserError: If the kind or an argument is unknown, there are too few rows or patients, the
            groups do not match the clients, a patient is in two groups, or a user-defined partition
            is invalid.

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
    # The smallest group limits a natural partition, which names it.
    if config.min_size * len(sizes) > len(y) and config.kind != "natural":
        most = len(y) // len(sizes)
        if most < MIN_TRAIN_ROWS:
            raise UserError(
                f"{WHERE}: {len(y)} training rows are too few for {len(sizes)} clients; use fewer "
                f"clients, or {WHERE}.kind=drawn, with which clients may share rows"
            )
        raise UserError(
            f"{WHERE}.min_size: must be <= {most} for {len(y)} training rows and {len(sizes)} "
            f"clients, got {config.min_size}; with {WHERE}.kind=drawn clients may share rows"
        )
    if columns is None:
        plain = Examples(torch.empty(len(y), 0), y, group, patient=patient)
        classes = task.names if task.kind == "multiclass" else ()
        columns = PartitionColumns(plain, torch.arange(len(y)), classes=classes)
    share = np.asarray(sizes, dtype=np.float64)
    context = PartitionContext(
        row_strata(y, task),
        group,
        config,
        share / share.sum(),
        seed,
        config.min_size,
        labels=y,
        columns=columns,
        clients=tuple(clients) or tuple(map(str, range(len(sizes)))),
        task=task,
        notes=[] if notes is None else notes,
    )
    if config.kind in PARTITION_KINDS and config.kind in _partitions:
        parts = _partition(_partitions[config.kind], context, patient)
        return [part.sort().values for part in parts]
    # A user's function may draw from global generators.
    with keyed_generators(stream_key("data", seed, "partition", config.kind)):
        partition = partial(call_partition, _find_user_partition(config.kind))
        parts = _partition(partition, context, patient)
    check_min_size(parts, config)
    if left := len(y) - sum(map(len, parts)):
        context.notes.append(
            f"{WHERE}.kind: {config.kind}: no client gets {left:,} of {len(y):,} training rows"
        )
    return parts


def _find_user_partition(kind: str) -> UserPartition:
    """Return the user-defined partition function or class that a kind names."""
    if kind.startswith((CODE_PREFIX, OBJECT_PREFIX)):
        found: UserPartition = import_reference(kind, f"{WHERE}.kind", Partitioner, "context")
        return found
    if kind not in _partitions:
        raise UserError(
            f"{WHERE}.kind: unknown partition '{kind}'{suggest_or_list(kind, _partitions)}"
        )
    return _partitions[kind]


def _partition(
    partition: PartitionFunction, context: PartitionContext, patient: Tensor | None
) -> list[Tensor]:
    """Call a partition function, for whole patients if there are any."""
    if patient is None:
        return partition(context)
    return partition_patients(partition, context, patient)
