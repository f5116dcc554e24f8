"""Data sets from the separate rows of natural clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetero_fl.core.task import Task
from hetero_fl.data.checks import first_true
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.labels import class_numbers
from hetero_fl.data.table import Table, build
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.text import format_list, pluralize, prefix_note

SPLITS = ("train", "test")
"""Splits of the rows of each client, which are also names of folders."""
MAX_CLASSES = 10_000
"""Maximum number of classes. Larger class numbers are probably not class numbers."""


def build_clients(
    name: str,
    tables: Sequence[Table],
    task: Task | None,
    path: object,
    *,
    noun: str,
    notes: Sequence[str] = (),
    **options: Any,
) -> Dataset:
    """Return a data set in which clients have training and test rows of their own.

    All test rows are the global test set. The local set of a client consists of its test rows. A
    client without training rows contributes to the global test set only.

    Args:
        name: Name of the data set.
        tables: Rows and class numbers of each client and split, whose name is the group. There may
            be no rows.
        task: Learning task. If None, the classes are the distinct labels.
        path: Folder, for error messages.
        noun: What remarks call a client, such as "user".
        notes: Remarks on how the data was read. A remark on clients without rows is added.
        options: Further arguments of `build`.

    Raises:
        UserError: If a label is not a class number, or the rows do not match.
    """
    remarks = list(notes)
    for split in SPLITS:
        empty = [t.group for t in tables if t.split == split and not len(t.y)]
        if empty:
            listed = format_list((one_line(client, 80) for client in empty), quote=True)
            remarks.append(f"{split}: {pluralize(len(empty), noun)} without rows: {listed}")
    present = []
    for table in tables:
        y = class_numbers(table.y, table.y_place)
        out_of_range = (y < 0) | (y >= MAX_CLASSES)
        if task is None and (row := first_true(out_of_range)) is not None:
            raise UserError(
                f"{table.y_place}: row {row}: label {int(y[row])} is out of range 0 to "
                f"{MAX_CLASSES - 1}"
            )
        if len(y):
            table.y = y
            table.group = [table.group] * len(y)
            present.append(table)
    if not any(table.split == "train" for table in present):
        raise UserError(f"path: {path}: no {noun} in train has rows")
    return build(
        present,
        task or "multiclass",
        f"path: {path}",
        name=name,
        local=True,
        notes=[prefix_note(name, note) for note in remarks],
        **options,
    )
