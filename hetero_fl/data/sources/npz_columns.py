"""Data sets from `.npz` files with an array for each column of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames
from hetero_fl.data.dataset import Dataset, Examples
from hetero_fl.data.sources.npz_files import LABELS, NAMES, ArraySpec, first_gap, read_arrays
from hetero_fl.data.table import Table, build
from hetero_fl.utils.arrays import index_names, owner_list
from hetero_fl.utils.errors import UserError, check_names

INPUTS = {
    "x": ArraySpec(("N T F", "N F"), gaps=2),
    "columns": ArraySpec(("F",), NAMES, required=False),
}


def read_columns(
    path: Path,
    name: str,
    label: str = "y",
    group: str = "group",
    *,
    needs_group: bool = False,
    task: Task | None = None,
    labeled: bool = True,
) -> Dataset:
    """Read a `.npz` file with an array for each column of a table.

    The file contains `x`, series `[N, T, F]` or a table `[N, F]`, and classes, as names or numbers
    `[N]` or one-hot rows `[N, L]`, which are read as by `from_arrays`. It may also contain the
    group of each row `[N]`, `split` `[N]` with the values `train`, `validation` and `test`
    (otherwise, all rows are training rows), and `columns`, the names of the F channels or columns.
    Only training rows keep their groups.

    Args:
        path: File to read.
        name: Name of the data set.
        label: Array of the classes.
        group: Array of the groups.
        needs_group: Whether the array of the groups must exist.
        task: Task whose class numbers the file contains. If None, the classes are those of the
            file.
        labeled: Whether to read labels, groups and splits. If False, all rows are training rows.

    Raises:
        UserError: If the file is malformed. The message names the array and the row.
    """
    where = f"path: {path}"
    specs = INPUTS
    if labeled:
        specs = {
            **INPUTS,
            group: ArraySpec(("N",), NAMES, "x", required=needs_group),
            "split": ArraySpec(("N",), NAMES, "x", required=False),
            label: ArraySpec(LABELS, None, "x"),
        }
    arrays = read_arrays(path, specs)
    x = torch.from_numpy(arrays["x"].astype(np.float32))
    columns = tuple(map(str, arrays.get("columns", ())))
    if columns and len(columns) != x.shape[-1]:
        raise UserError(f"{where}: columns: expected {x.shape[-1]} names, got {len(columns)}")
    names = ExampleNames("x", label, in_config=True)
    split = arrays.get("split", "train")
    table = Table(x, arrays.get(label), split, where, names, arrays.get(group))
    dataset = build(
        [table],
        task or "multiclass",
        where,
        name=name,
        about=f"{len(x):,} rows of {path.name}",
        columns=columns,
        first_missing=first_gap(x, table.x_place),
    )
    if labeled:
        check_classes(dataset.task, path)
    return dataset


def check_classes(task: Task, path: Path) -> None:
    """Check that a file has at least two classes.

    Raises:
        UserError: If there is only one class.
    """
    if task.outputs < 2:
        raise UserError(
            f"label: expected at least two classes in {path}, got {task.output_names[0]} only"
        )


def split_examples(
    rows: Examples,
    arrays: Mapping[str, np.ndarray],
    splits: Sequence[str],
    group: str,
    where: str,
) -> dict[str, Examples]:
    """Divide the rows of a file by the array `split`, and name the groups of the training rows.

    Args:
        rows: All rows.
        arrays: Arrays of the file. Without `split`, all rows are training rows.
        splits: Possible splits, the first of which is for training and must have rows.
        group: Name of the array of the groups, which may not exist.
        where: Place of the file, for error messages.

    Returns:
        The rows of the splits that exist, keyed by split.

    Raises:
        UserError: If a split is unknown, no row is for training, or a group is missing.
    """
    found = arrays.get("split", np.full(len(rows), splits[0])).astype(str)
    check_names(np.unique(found).tolist(), splits, f"{where}: split: unknown value")
    if splits[0] not in found:
        raise UserError(f"{where}: split: expected rows of '{splits[0]}', got none")
    index = {name: np.flatnonzero(found == name) for name in splits if name in found}
    parts = {name: rows.select_rows(torch.from_numpy(own)) for name, own in index.items()}
    if group in arrays:
        owners = owner_list(arrays[group], len(rows), f"{where}: {group}")
        train = parts[splits[0]]
        train.group, train.group_names = index_names(owners[row] for row in index[splits[0]])
    return parts
