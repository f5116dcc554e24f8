"""Data sets from `.npz` files with an array for each column of a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.base import Settings
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples, index_names
from hetero_fl.data.sources.npz_files import read_npz_arrays
from hetero_fl.utils.errors import UserError, check_names

SPLITS = ("train", "validation", "test")
"""Values of the array `split`."""


def read_columns(
    path: Path,
    name: str,
    label: str = "y",
    group: str = "group",
    *,
    needs_group: bool = False,
    task: Task | None = None,
) -> Dataset:
    """Read a `.npz` file with an array for each column of a table.

    The file contains `x`, series `[N, T, F]` or a table `[N, F]`, and classes `[N]`, as names or
    numbers. It may also contain the group of each row `[N]`, `split` `[N]` with the values of
    `SPLITS` (otherwise, all rows are training rows), and `columns`, the names of the F channels or
    columns. Only training rows keep their groups.

    Args:
        path: File to read.
        name: Name of the data set.
        label: Array of the classes.
        group: Array of the groups.
        needs_group: Whether the array of the groups must exist.
        task: Task whose class numbers the file contains. If None, the classes are those of the
            file, in natural order.

    Raises:
        UserError: If the file is malformed. The message names the array and the row.
    """
    where = f"path: {path}"
    others = (label, group, "split")
    arrays, names = read_npz_arrays(
        path, ("x", "columns", *others), [("x", other) for other in others]
    )
    x, columns = _inputs(arrays, names, where)
    check_names([label, *([group] if needs_group else [])], names, f"{where}: array", " not found")
    for other in others:
        if other in arrays and arrays[other].shape != (len(x),):
            raise UserError(
                f"{where}: {other}: expected shape {(len(x),)}, one entry per row of x, "
                f"got {arrays[other].shape}"
            )
    if task is None:
        y, classes = index_names(arrays[label].tolist())
        task = class_task(classes, path)
    else:
        y = torch.from_numpy(arrays[label].astype(np.int64))
    rows = split_rows(arrays.get("split", np.full(len(x), "train")), SPLITS, where)
    splits = {split: Examples(x[index], y[index]) for split, index in rows.items()}
    train = splits["train"]
    if group in arrays:
        owners = arrays[group][rows["train"].numpy()]
        train.group, train.group_names = index_names(owners.tolist())
    return Dataset(
        name,
        task,
        train,
        splits.get("validation"),
        splits.get("test"),
        about=f"{len(x):,} rows of {path.name}",
        columns=columns,
    )


def class_task(classes: tuple[str, ...], path: Path) -> Task:
    """Return the task of predicting the classes of a file.

    Raises:
        UserError: If there is only one class.
    """
    if len(classes) < 2:
        raise UserError(
            f"label: expected at least two classes in {path}, got {', '.join(classes)} only"
        )
    return Task("multiclass", len(classes), classes)


def read_inputs(path: Path) -> tuple[Tensor, tuple[str, ...]]:
    """Read the inputs of a file as in `read_columns`, which needs no other arrays.

    Returns:
        The inputs, float32 `[N, T, F]` or `[N, F]`, and the names of the channels or columns, which
        are empty if the file has none.

    Raises:
        UserError: If the file is malformed.
    """
    return _inputs(*read_npz_arrays(path, ("x", "columns")), f"path: {path}")


def refuse_folder_keys(section: str, settings: Settings, used: Collection[str] = ()) -> None:
    """Check that settings which describe the files of a folder have their default values.

    Args:
        section: Section of the settings, for error messages.
        settings: Settings of a source that reads a `.npz` file.
        used: Settings that also apply to a `.npz` file.

    Raises:
        UserError: If another setting has not its default value.
    """
    for key, field in type(settings).model_fields.items():
        if key not in used and getattr(settings, key) != field.default:
            raise UserError(
                f"{section}.{key}: applies to folders, not to .npz files such as the simulated "
                "data; remove it, or set path to a folder"
            )


def split_rows(split: np.ndarray, names: Sequence[str], where: str) -> dict[str, Tensor]:
    """Return the indices of the rows of each split, int64 `[M]`.

    Args:
        split: Split of each row, `[N]`.
        names: Possible splits, the first of which must have rows.
        where: Place of the file, for error messages.

    Raises:
        UserError: If a split is unknown or no row belongs to the first split.
    """
    found = split.astype(str)
    check_names(np.unique(found).tolist(), names, f"{where}: split: unknown value")
    if names[0] not in found:
        raise UserError(f"{where}: split: expected rows of '{names[0]}', got none")
    return {
        name: torch.from_numpy(np.flatnonzero(found == name)) for name in names if name in found
    }


def _inputs(
    arrays: Mapping[str, np.ndarray], names: Sequence[str], where: str
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the inputs in arrays, and the names of the channels (see `read_inputs`)."""
    check_names(["x"], names, f"{where}: array", " not found")
    x = arrays["x"]
    if x.ndim not in (2, 3) or x.dtype.kind not in "iuf" or 0 in x.shape:
        raise UserError(
            f"{where}: x: expected numbers of shape (rows, samples, channels) or (rows, columns), "
            f"got {x.dtype} of shape {x.shape}"
        )
    # In tables, NaN stands for a missing value.
    is_invalid = np.isinf(x) if x.ndim == 2 else ~np.isfinite(x)
    if is_invalid.any():
        row = np.argwhere(is_invalid)[0][0]
        raise UserError(f"{where}: x: row {row}: NaN or infinite value")
    columns = tuple(map(str, arrays["columns"])) if "columns" in arrays else ()
    if columns and len(columns) != x.shape[-1]:
        raise UserError(f"{where}: columns: expected {x.shape[-1]} names, got {len(columns)}")
    return torch.from_numpy(x.astype(np.float32)), columns
