"""Data sets from the separate rows of natural clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples, concatenate_examples, index_names
from hetero_fl.utils.errors import one_line
from hetero_fl.utils.text import format_list, pluralize

SPLITS = ("train", "test")
"""Splits of the rows of each client, which are also names of folders."""
MAX_CLASSES = 10_000
"""Maximum number of classes. Larger class numbers are probably not class numbers."""


def _join_clients(rows: Mapping[str, Examples]) -> Examples:
    """Concatenate the rows of clients, whose names become groups.

    Args:
        rows: Rows of each client, keyed by client. Clients without rows are skipped.

    Returns:
        The rows of all clients, or examples without rows if no client has rows.
    """
    present = {name: part for name, part in rows.items() if len(part)}
    if not present:
        return Examples(torch.empty(0), torch.empty(0, dtype=torch.int64))
    joined = concatenate_examples(list(present.values()))
    owners = [name for name, part in present.items() for _ in range(len(part))]
    group, names = index_names(owners)
    return replace(joined, group=group, group_names=names)


def _note_empty_clients(rows: Mapping[str, Mapping[str, Examples]], noun: str) -> list[str]:
    """Return a remark for each split with clients without rows.

    Args:
        rows: Rows, keyed by split and client.
        noun: What the remark calls a client, such as "user".
    """
    notes = []
    for split, clients in rows.items():
        empty = [one_line(name, 80) for name, part in clients.items() if not len(part)]
        if empty:
            count = pluralize(len(empty), noun)
            notes.append(f"{split}: {count} without rows: {format_list(empty, quote=True)}")
    return notes


def client_dataset(
    name: str,
    task: Task,
    rows: Mapping[str, Mapping[str, Examples]],
    *,
    noun: str,
    notes: Sequence[str] = (),
    **other: Any,
) -> Dataset:
    """Return a data set in which clients have training and test rows of their own.

    All test rows are the global test set. The local set of a client consists of its test rows. A
    client without training rows contributes to the global test set only. The data set has no test
    set if there are no test rows.

    Args:
        name: Name of the data set.
        task: Learning task.
        rows: Rows, keyed by split and client. The clients become groups.
        noun: What remarks call a client, such as "user".
        notes: Remarks on how the data was read. A remark on clients without rows is added.
        other: Further arguments of `Dataset`.
    """
    train, test = (_join_clients(rows[split]) for split in SPLITS)
    notes = tuple(f"{name}: {note}" for note in (*notes, *_note_empty_clients(rows, noun)))
    if len(test) == 0:
        return Dataset(name, task, train, notes=notes, **other)
    common = replace(test, group=None, group_names=())
    local = {"test": test} if set(test.group_names) & set(train.group_names) else {}
    return Dataset(name, task, train, test=common, local_sets=local, notes=notes, **other)


def number_of_classes(labels: Sequence[Tensor]) -> int:
    """Return the number of classes that are numbered from 0, one more than the largest label.

    The number is at most `MAX_CLASSES`, so that larger labels are rejected as out of range.
    """
    return min(MAX_CLASSES, 1 + max((int(y.max()) for y in labels if len(y)), default=0))
