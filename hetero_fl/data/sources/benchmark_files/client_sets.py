"""Data sets from the separate rows of natural clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames, first_true
from hetero_fl.data.dataset import Dataset, Examples, concatenate_examples, index_names
from hetero_fl.data.labels import read_labels
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.text import format_list, pluralize, prefix_note

SPLITS = ("train", "test")
"""Splits of the rows of each client, which are also names of folders."""
MAX_CLASSES = 10_000
"""Maximum number of classes. Larger class numbers are probably not class numbers."""
CONFIGURED = ExampleNames(in_config=True)


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
    notes = tuple(prefix_note(name, note) for note in (*notes, *_note_empty_clients(rows, noun)))
    if len(test) == 0:
        return Dataset(name, task, train, notes=notes, **other)
    common = replace(test, group=None, group_names=())
    local = {"test": test} if set(test.group_names) & set(train.group_names) else {}
    return Dataset(name, task, train, test=common, local_sets=local, notes=notes, **other)


def read_classes(
    parts: Mapping[str, Examples], where: str, names: ExampleNames = CONFIGURED
) -> tuple[Task, dict[str, Examples], list[str]]:
    """Return the task of class numbers, the parts with their targets, and notes.

    Args:
        parts: Rows, keyed by their name in messages.
        where: Name of all rows in messages.
        names: Names of x, y and rows in messages.

    Raises:
        UserError: If a label is not a number from 0 to `MAX_CLASSES` - 1.
    """
    for place, part in parts.items():
        if (row := first_true((part.labels < 0) | (part.labels >= MAX_CLASSES))) is not None:
            raise UserError(
                f"{place}: {names.y}: {names.row(row)}: label {int(part.labels[row])} is out of "
                f"range 0 to {MAX_CLASSES - 1}"
            )
    labels = {place: part.labels for place, part in parts.items()}
    task, targets, notes = read_labels(labels, where, task="multiclass", names=names)
    return task, {place: replace(part, y=targets[place]) for place, part in parts.items()}, notes
