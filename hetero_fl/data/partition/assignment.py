"""Assign training rows to clients by a partition of any kind.

If the data identifies patients, all rows of a patient go to the same client. The result depends
only on the rows, the sizes of the clients in order, the configuration and the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import PARTITION_KINDS, DataConfig, PartitionConfig
from hetero_fl.config.describe import describe_error
from hetero_fl.core.images import dtype_name
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import PATIENTS, Dataset, PatientTerm
from hetero_fl.data.partition.groups import (
    all_groups,
    check_patients_in_one_group,
    match_groups,
)
from hetero_fl.data.partition.kinds import WHERE, Partitioner, register_partition
from hetero_fl.data.partition.units import NamedColumns, Units, named_columns, row_strata
from hetero_fl.data.splits import MIN_TRAIN_ROWS, RowSelection
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.seeding import stream_key
from hetero_fl.utils.text import format_list, pluralize
from model_zoo.generators import keyed_generators


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
        notes: List to which remarks are appended, on groups and clients with different names and on
            rows that are moved or left out.

    Returns:
        Rows of each client, keyed by client id.

    Raises:
        UserError: If `partition_rows` or `match_groups` fails or, in a natural partition, a group
            has no training rows left or a patient is in two groups.
    """
    train = dataset.train
    group = None if train.group is None else train.group[rows]
    if group is not None and train.group_names:
        present = [train.group_names[g] for g in group.unique().tolist()]
        if config.partition.kind == "natural":
            _check_groups(dataset, present, names, config, notes)
        if set(present) == set(names):
            group = torch.tensor([names.index(n) if n in names else -1 for n in train.group_names])[
                group
            ]
    if len(names) < 2:
        return {name: RowSelection(train, rows) for name in names}
    task = dataset.task
    classes = task.names if task.kind == "multiclass" else ()
    is_own = config.partition.kind not in PARTITION_KINDS
    parts = partition_rows(
        train.labels[rows],
        group,
        config.partition,
        [clients[name].size for name in names],
        task,
        seed=seed,
        patient=None if train.patient is None else train.patient[rows],
        term=train.patient_term,
        columns=named_columns(train, rows, dataset.columns, classes) if is_own else None,
        clients=names,
        notes=notes,
    )
    return {name: RowSelection(train, rows[part]) for name, part in zip(names, parts, strict=True)}


def _check_groups(
    dataset: Dataset, present: list[str], names: list[str], config: DataConfig, notes: list[str]
) -> None:
    """Check that the groups of a natural partition match the clients and have rows left."""
    groups = all_groups(dataset)
    notes += match_groups(groups, names, dataset.name)
    if len(names) > 1 and (empty := natural_order(set(groups) - set(present))):
        advice = ""
        if config.proxy.source is None and config.proxy.size:
            term = dataset.train.patient_term
            reason = (
                f" (by whole {term.noun}s: {term.rule})"
                if dataset.train.patient is not None
                else ""
            )
            advice = (
                f"{reason}; choose a smaller number than data.proxy.size={config.proxy.size}, or "
                "set data.proxy.source to other data"
            )
        raise UserError(
            f"{WHERE}.kind=natural: group {format_list(empty, quote=True)} of {dataset.name} has "
            "no training rows left; all are validation, test or proxy rows, or excluded by "
            f"data.train_limit{advice}"
        )
    check_patients_in_one_group(dataset)


def partition_rows(
    y: Tensor,
    group: Tensor | None,
    config: PartitionConfig,
    sizes: Sequence[float],
    task: Task,
    *,
    seed: int,
    patient: Tensor | None = None,
    term: PatientTerm = PATIENTS,
    columns: Mapping[str, np.ndarray] | None = None,
    clients: Sequence[str] = (),
    notes: list[str] | None = None,
) -> list[Tensor]:
    """Partition rows among clients.

    Each row goes to at most one client. With the kind `classes`, rows are left out if `shots` is
    set or a class has no client. User-defined partitions may also leave rows out.

    Args:
        y: Targets, `[N]` or `[N, L]`.
        group: Group of each row, int64 `[N]`, or None. The kind `natural` requires groups.
        config: Partition settings.
        sizes: Relative size of each client.
        task: Learning task.
        seed: Seed of the run.
        patient: Patient of each row, int64 `[N]`, or None. All rows of a patient go to the same
            client.
        term: What a patient is, for messages.
        columns: Columns of the rows for user-defined partitions. If None, the only column is the
            label.
        clients: Client ids. If empty, the clients are numbered from 0.
        notes: List to which remarks for the log are appended. If None, there are no remarks.

    Returns:
        Sorted, disjoint row indices (int64) of each client, at least `config.min_size` each.

    Raises:
        UserError: If the kind or a setting is unknown, there are too few rows or patients, the
            groups do not match the clients, or a user-defined partition is invalid.

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
    # The smallest group limits a natural partition.
    if config.min_size * len(sizes) > len(y) and config.kind != "natural":
        raise _too_few_rows(len(y), len(sizes), config)
    partition = _create(config)
    share = np.asarray(sizes, dtype=np.float64)
    units = Units(
        row_strata(y, task),
        y,
        tuple(clients) or tuple(map(str, range(len(sizes)))),
        share / share.sum(),
        config.min_size,
        task,
        seed,
        group,
        NamedColumns(label=y.numpy()) if columns is None else columns,
        notes=[] if notes is None else notes,
    )
    # A user's function may draw from global generators.
    with keyed_generators(stream_key("data", seed, "partition", config.kind)):
        if patient is None or config.kind == "natural":
            parts = _assign(partition, units, config)
        else:
            parts = _assign_patients(partition, units, config, patient, term)
    smallest = min(map(len, parts))
    if smallest < config.min_size:
        raise UserError(
            f"{WHERE}.min_size: kind={config.kind} assigns only {pluralize(smallest, 'row')} to a "
            f"client, got {config.min_size}; choose a smaller number"
        )
    left = len(y) - sum(map(len, parts))
    if left and config.kind not in PARTITION_KINDS:
        units.notes.append(
            f"{WHERE}.kind: {config.kind}: no client gets {left:,} of {len(y):,} training rows"
        )
    return parts


def _too_few_rows(rows: int, clients: int, config: PartitionConfig) -> UserError:
    most = rows // clients
    if most < MIN_TRAIN_ROWS:
        return UserError(
            f"{WHERE}: {rows} training rows are too few for {clients} clients; use fewer clients, "
            f"or {WHERE}.kind=drawn, with which clients may share rows"
        )
    return UserError(
        f"{WHERE}.min_size: must be <= {most} for {rows} training rows and {clients} clients, got "
        f"{config.min_size}; with {WHERE}.kind=drawn clients may share rows"
    )


def _create(config: PartitionConfig) -> Partitioner:
    """Create the partition that a configuration describes."""
    try:
        found = register_partition[config.kind]
    except UserError as error:
        raise UserError(f"{WHERE}.kind: {str(error).removeprefix('partition: ')}") from error
    settings = config.arguments or {}
    if config.kind in PARTITION_KINDS:
        settings = {name: getattr(config, name) for name in found.model_fields}
    try:
        return found.model_validate(settings)
    except ValidationError as error:
        problem = describe_error(error, settings, found, ["data", "partition"])
        raise UserError(f"{problem} (kind={config.kind})") from None


def _assign(partition: Partitioner, units: Units, config: PartitionConfig) -> list[Tensor]:
    """Return the sorted indices of the units of each client, after a check."""
    where = f"{WHERE}.kind: {config.kind}"
    try:
        parts = partition.assign(units)
    except UserError as error:
        is_own = config.kind not in PARTITION_KINDS
        raise UserError(f"{where}: {error}" if is_own else f"{WHERE}.{error}") from error
    # A user's function may raise any exception, or call sys.exit.
    except (Exception, SystemExit) as error:
        # The text of a KeyError is the repr of its argument.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"{where} raised {type(error).__name__}: {one_line(text)}") from error
    clients = len(units.clients)
    if not isinstance(parts, list | tuple) or len(parts) != clients:
        found = f"{len(parts)} parts" if isinstance(parts, list | tuple) else type(parts).__name__
        raise UserError(
            f"{where}: expected a list with the rows of each of {clients} clients, got {found}"
        )
    tensors = [_indices(part, where).sort().values for part in parts]
    assigned = torch.cat(tensors)
    if len(assigned) and (assigned.min() < 0 or assigned.max() >= len(units)):
        raise UserError(
            f"{where}: expected row indices from 0 to {len(units) - 1}, got {assigned.min()} to "
            f"{assigned.max()}"
        )
    if len(assigned.unique()) < len(assigned):
        raise UserError(f"{where}: expected each row at most once, got a row twice")
    return tensors


def _indices(part: Any, where: str) -> Tensor:
    try:
        indices = torch.as_tensor(part)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: expected row indices as integers: {one_line(error)}") from error
    is_integer = not (indices.is_floating_point() or indices.is_complex())
    if indices.numel() and (not is_integer or indices.dtype == torch.bool):
        raise UserError(f"{where}: expected row indices as integers, got {dtype_name(indices)}")
    return indices.reshape(-1).to(torch.int64)


def _assign_patients(
    partition: Partitioner,
    units: Units,
    config: PartitionConfig,
    patient: Tensor,
    term: PatientTerm,
) -> list[Tensor]:
    """Return the rows of each client if whole patients are assigned.

    Patients of the largest clients then move to clients with too few rows, except with the kind
    `classes`, as they could have classes that are not assigned to the client, and with user-defined
    kinds.
    """
    index, sizes = patient.unique(return_inverse=True, return_counts=True)[1:]
    clients = len(units.clients)
    if len(sizes) < clients:
        raise UserError(
            f"{term.rule}: expected at least one {term.noun} per client, got {len(sizes)} "
            f"{term.noun}s for {clients} clients"
        )
    # The number of patients that have min_size rows on average.
    average = -(-config.min_size * len(sizes) // len(patient))
    least = max(1, min(average, len(sizes) // clients))
    parts = _assign(partition, units.merge_patients(index, term.noun, least), config)
    owner = torch.full((len(sizes),), -1)
    for client, patients in enumerate(parts):
        owner[patients] = client
    if partition.moves_patients:
        order = units.shuffled(torch.arange(len(sizes)), "patients")
        filled = fill_short_clients(owner, sizes, clients, config.min_size, order)
        if moved := int((filled != owner).sum()):
            units.notes.append(
                f"{WHERE}.min_size: moved {pluralize(moved, term.noun)} to clients that had fewer "
                f"than {config.min_size} rows"
            )
        owner = filled
    return [torch.nonzero(owner[index] == client).squeeze(1) for client in range(clients)]


def fill_short_clients(
    owner: Tensor, size: Tensor, clients: int, min_size: int, order: Tensor
) -> Tensor:
    """Move whole patients from the largest clients to clients with too few rows.

    Args:
        owner: Client of each patient, or -1 for patients without a client, int64 `[P]`.
        size: Number of rows of each patient, int64 `[P]`.
        clients: Number of clients.
        min_size: Minimum number of rows per client.
        order: Permutation of the patients, int64 `[P]`. Patients that come first are moved first.

    Returns:
        New client of each patient, int64 `[P]`.

    Raises:
        UserError: If no client can spare a patient.
    """
    owner = owner.clone()
    assigned = owner >= 0
    rows = torch.zeros(clients, dtype=torch.int64).index_add(0, owner[assigned], size[assigned])
    # Terminates because the smallest client grows and no donor falls below the minimum.
    while int(rows.min()) < min_size:
        low = int(rows.argmin())
        movable = order[(owner[order] >= 0) & (size[order] <= (rows - min_size)[owner[order]])]
        if len(movable) == 0:
            raise UserError(
                f"{WHERE}.min_size: if no patient is divided, a client gets only "
                f"{int(rows[low])} rows, got {min_size}; choose a smaller number"
            )
        donor = owner[movable][rows[owner[movable]].argmax()]
        moved = movable[owner[movable] == donor][0]
        rows[donor] -= size[moved]
        rows[low] += size[moved]
        owner[moved] = low
    return owner
