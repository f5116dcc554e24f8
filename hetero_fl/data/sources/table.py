"""Tables: a CSV, TSV or Parquet file, a row per example, columns of numbers, one or several columns of labels."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hetero_fl.config.source import SourceConfig
from hetero_fl.data.base import Dataset, Examples
from hetero_fl.data.registry import source
from hetero_fl.errors import UserError, nearest
from hetero_fl.state import in_order
from hetero_fl.task import Task

MOST_NUMBERED_CLASSES = 20


@source("table", keys=("path", "label", "group"))
def table(config: SourceConfig, root: Path) -> Dataset:
    """The rows of a file; see `read_table`. `config.label` names the labels, `config.group` whose row it is."""
    path = Path(str(config.path)).expanduser()
    frame = read_frame(path)
    if config.label is None:
        columns = ", ".join(map(str, frame.columns[:20]))
        raise UserError(f"label: missing; name the column of labels; choose from {columns}")
    return read_table(frame, path, config.label, config.group)


def read_table(frame: pd.DataFrame, path: Path, label: str, group: str | None = None) -> Dataset:
    """A data set of a frame. Features are all columns of numbers that are neither label nor group, as float32 `[N, F]`.

    One column of labels: text, truth values, and whole numbers of at most 20 different values are classes (in sorted
    order), other numbers a regression target. Several (comma between them): multilabel if all are 0 or 1, else
    regression. Columns of nothing but text or dates are left out, and named in `about`. Rows count from 1
    below the header.

    Raises:
        UserError: a missing column, a missing value, text among numbers; with file, row and column.
    """
    labels = [label] if label in frame.columns else [part.strip() for part in label.split(",")]
    where = f"path: {path}"
    for key, names in (("label", labels), ("group", [group] if group is not None else [])):
        for name in names:
            if name not in frame.columns:
                raise UserError(f"{key}: {path} has no column '{name}'{nearest(name, map(str, frame.columns))}")
    if group in labels:
        raise UserError(f"group: found '{group}', which is a label; name another column")
    x, columns, left_out = features(frame.drop(columns=[*labels, *([group] if group else [])]), where)
    task, y = _targets(frame[labels], where)
    examples = Examples(x, y)
    if group is not None:
        if (row := _first(frame[group].isna())) is not None:
            _refuse(where, row, group, "missing value")
        groups = frame[group].astype(str)
        names = in_order(groups.unique())
        examples = Examples(x, y, _places(groups, names), tuple(names))
    about = f"table {path.name}, {len(columns)} columns" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    return Dataset("table", task, examples, about=about, columns=columns)


def read_frame(path: Path) -> pd.DataFrame:
    """A CSV (comma), TSV (tabulator) or Parquet file."""
    where = f"path: {path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet"):
        raise UserError(f"{where}: found '{kind}'; choose .csv, .tsv or .parquet")
    try:
        if kind == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, sep="\t" if kind == ".tsv" else ",", low_memory=False)
    except ImportError as error:
        raise UserError(f"{where}: Parquet needs pyarrow; pip install 'hetero_fl[parquet]'") from error
    except (ValueError, OSError, UnicodeError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise UserError(f"{where}: not a readable {kind} file ({type(error).__name__}: {error})") from error


def features(frame: pd.DataFrame, where: str) -> tuple[Tensor, tuple[str, ...], list[str]]:
    """The columns of numbers as float32 `[N, F]`, their names, and the names of the others."""
    if len(frame) == 0:
        raise UserError(f"{where}: found no rows")
    numbers, left_out = {}, []
    for name in map(str, frame.columns):
        column = _numbers(frame[name], where, name)
        if column is None:
            left_out.append(name)
        else:
            numbers[name] = column
    if not numbers:
        raise UserError(f"{where}: no column of numbers besides label and group")
    return torch.from_numpy(np.stack(list(numbers.values()), axis=1).astype(np.float32)), tuple(numbers), left_out


def _numbers(column: pd.Series, where: str, name: str) -> np.ndarray | None:
    """The column as numbers, or None if it is all text or dates."""
    types = pd.api.types
    if not (types.is_numeric_dtype(column) or types.is_bool_dtype(column)):
        if not (types.is_object_dtype(column) or types.is_string_dtype(column)):
            return None
        numbers = pd.to_numeric(column, errors="coerce")
        text = numbers.isna() & column.notna()
        if text.any() and numbers.isna().all():
            return None
        if (row := _first(text)) is not None:
            _refuse(where, row, name, f"found '{column.iloc[row]}', not a number")
        column = numbers
    if (row := _first(column.isna())) is not None:
        _refuse(where, row, name, "missing value")
    values = column.to_numpy(dtype=np.float64)
    if (row := _first(~np.isfinite(values) | (np.abs(values) > np.finfo(np.float32).max))) is not None:
        _refuse(where, row, name, f"found {values[row]}, not a finite number")
    return values


def _targets(labels: pd.DataFrame, where: str) -> tuple[Task, Tensor]:
    names = tuple(map(str, labels.columns))
    for name in names:
        if (row := _first(labels[name].isna())) is not None:
            _refuse(where, row, name, "missing value")
    if len(names) == 1:
        column = labels[names[0]]
        classes = column.unique()
        numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        if not numeric or (len(classes) <= MOST_NUMBERED_CLASSES and all(float(c).is_integer() for c in classes)):
            column = (column.astype(np.int64) if numeric else column).astype(str)
            in_turn = in_order(column.unique())
            return Task("multiclass", len(in_turn), tuple(in_turn)), _places(column, in_turn)
    columns = []
    for name in names:
        numbers = _numbers(labels[name], where, name)
        if numbers is None:
            raise UserError(f"{where}: column '{name}' is text; several labels have to be numbers")
        columns.append(numbers)
    y = torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))
    several = len(names) > 1 and bool(((y == 0) | (y == 1)).all())
    return Task("multilabel" if several else "regression", len(names), names), y


def _places(values: pd.Series, names: list[str]) -> Tensor:
    return torch.from_numpy(pd.Categorical(values, categories=names).codes.astype(np.int64))


def _first(bad: pd.Series | np.ndarray) -> int | None:
    mask = np.asarray(bad, dtype=bool)
    return int(mask.argmax()) if mask.any() else None


def _refuse(where: str, row: int, column: str, what: str) -> NoReturn:
    raise UserError(f"{where}: row {row + 1}, column '{column}': {what}")
