"""Assign the training rows of a data set to clients, with groups matched by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import PARTITION_KINDS, DataConfig
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.partition.context import PartitionColumns
from hetero_fl.data.partition.groups import (
    WHERE,
    all_groups,
    check_patients_in_one_group,
    match_groups,
)
from hetero_fl.data.partition.registry import partition_rows
from hetero_fl.data.splits import RowSelection
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import format_list


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
    patient = None if train.patient is None else train.patient[rows]
    group = None if train.group is None else train.group[rows]
    if group is not None and train.group_names:
        present = [train.group_names[g] for g in group.unique().tolist()]
        if config.partition.kind == "natural":
            groups = all_groups(dataset)
            advice = _advice_on_groups()
            notes += match_groups(groups, names, dataset.name, advice=advice)
            if len(names) > 1 and (empty := natural_order(set(groups) - set(present))):
                raise UserError(
                    f"{WHERE}.kind=natural: group {format_list(empty, quote=True)} of "
                    f"{dataset.name} has no training rows left; all are validation, test or proxy "
                    f"rows, or excluded by data.train_limit{_advice_on_proxy(dataset, config)}"
                )
            check_patients_in_one_group(dataset)
        if set(present) == set(names):
            group = torch.tensor([names.index(n) if n in names else -1 for n in train.group_names])[
                group
            ]
    if len(names) < 2:
        return {name: RowSelection(train, rows) for name in names}
    sizes = [clients[name].size for name in names]
    task = dataset.task
    classes = task.names if task.kind == "multiclass" else ()
    parts = partition_rows(
        train.labels[rows],
        group,
        config.partition,
        sizes,
        task,
        seed=seed,
        patient=patient,
        columns=PartitionColumns(train, rows, dataset.columns, classes),
        clients=names,
        notes=notes,
    )
    return {name: RowSelection(train, rows[part]) for name, part in zip(names, parts, strict=True)}


def _advice_on_groups() -> str:
    """Return what to change if the groups of a natural partition do not match the clients."""
    others = [kind for kind in PARTITION_KINDS if kind not in ("natural", "drawn")]
    return f"; have one client per group, or set {WHERE}.kind to {format_list(others)}"


def _advice_on_proxy(dataset: Dataset, config: DataConfig) -> str:
    """Return what to change if a proxy set that is held out leaves a group without rows."""
    if config.proxy.source is not None or config.proxy.size == 0:
        return ""
    train = dataset.train
    term = train.patient_term
    reason = "" if train.patient is None else f" (by whole {term.noun}s: {term.rule})"
    return (
        f"{reason}; choose a smaller number than data.proxy.size={config.proxy.size}, or set "
        "data.proxy.source to other data"
    )
