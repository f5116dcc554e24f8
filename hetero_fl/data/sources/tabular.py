"""A data set of a frame: which columns are features, what the labels are, of whom each row is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pandas.api import types
from torch import Tensor

from hetero_fl.data.base import MOST_NUMBERED_CLASSES, Dataset, Examples, places
from hetero_fl.data.sources.cells import decimal_commas, is_text, names, numbers, settled
from hetero_fl.errors import UserError, nearest
from hetero_fl.task import Task

SHOWN = 20  # columns that a note lists
PATIENT = re.compile("patient|subject|person|mrn", re.IGNORECASE)


def read_table(
    frame: pd.DataFrame,
    path: Path,
    label: str,
    group: str | None = None,
    patient: str | None = None,
    kind: str | None = None,
) -> Dataset:
    """A data set of a frame. Features are all columns of numbers that are no label, group or patient, as float32 `[N, F]`.

    One column of labels: text, truth values, and whole numbers of at most 20 different values are classes (in sorted
    order), other numbers a regression target. Several (comma between them): multilabel if all are 0 or 1, else
    regression. `kind` (multiclass, multilabel, regression) takes the place of these rules. Text is read without spaces
    around it, and 1.0 as 1. Columns of nothing but text or dates are left out, and named in `about` and `notes`. Rows count
    from 1 below the header.

    Raises:
        UserError: a missing column, a missing value, text among numbers; with file, row and column.
    """
    labels = [label] if label in frame.columns else [part.strip() for part in label.split(",")]
    where = f"path: {path}"
    owners = {key: column for key, column in (("group", group), ("patient", patient)) if column is not None}
    for key, column in [*(("label", column) for column in labels), *owners.items()]:
        if column not in frame.columns:
            raise UserError(f"{key}: {path} has no column '{column}'{nearest(column, map(str, frame.columns))}")
        if key != "label" and column in labels:
            raise UserError(f"{key}: found '{column}', which is a label; name another column")
    whose = {key: places(names(frame[column], where)) for key, column in owners.items()}
    rest = frame.drop(columns=list(set(owners.values())))
    if kind == "multiclass":  # classes may be called "1,2"
        targets, (rest, commas) = rest[labels], decimal_commas(rest.drop(columns=labels), where)
    else:
        rest, commas = decimal_commas(rest, where)
        targets, rest = rest[labels], rest.drop(columns=labels)
    gaps: list[str] = []
    x, columns, left_out = features(rest, where, gaps)
    task, y = _targets(targets, where, kind)
    examples = Examples(x, y, *whose.get("group", (None, ())), *whose.get("patient", (None, ())))
    about = f"table {path.name}, {len(columns)} columns" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    read = [f"label {', '.join(labels)}", *(f"{key} {column}" for key, column in owners.items())]
    read += [f"columns used: {_listed(columns)}"]
    read += [f"left out: {_listed([f'{name} ({why})' for name, why in left_out.items()]) or 'none'}"]
    read += [f"decimal commas in {_listed(commas)}"] if commas else []
    notes = [f"table {path.name}: {'; '.join(read)}"]
    if patient is None and (name := _patients(rest)) is not None:
        feature = "; as it is, it is a feature too" if name in columns else ""
        notes.append(
            f"table {path.name}: column '{name}' looks like a patient's number and repeats: name it in data.patient, or "
            f"rows of one patient are split between training and test{feature}"
        )
    gap = gaps[0] if gaps else ""
    return Dataset("table", task, examples, about=about, columns=columns, notes=tuple(notes), gap=gap)


def features(
    frame: pd.DataFrame, where: str, gaps: list[str] | None = None
) -> tuple[Tensor, tuple[str, ...], dict[str, str]]:
    """The columns of numbers as float32 `[N, F]`, their names, and the names of the others with what they are. Missing values
    are NaN where `gaps` is given, which gets a line for each column that has some; else they are refused."""
    if len(frame) == 0:
        raise UserError(f"{where}: found no rows")
    read, left_out = {}, {}
    for name in frame.columns:
        column = numbers(frame[name], where, gaps)
        if column is None:
            left_out[str(name)] = "text" if is_text(frame[name]) else str(frame[name].dtype)
        else:
            read[str(name)] = column
    if not read:
        raise UserError(f"{where}: no column of numbers besides label, group and patient")
    return torch.from_numpy(np.stack(list(read.values()), axis=1).astype(np.float32)), tuple(read), left_out


def _targets(labels: pd.DataFrame, where: str, kind: str | None) -> tuple[Task, Tensor]:
    columns = [settled(labels[name], where) for name in labels.columns]
    titles = tuple(map(str, labels.columns))
    if kind == "multiclass" and len(columns) > 1:
        raise UserError(
            f"label: found {len(columns)} columns, but data.task is multiclass; name one, or choose multilabel"
        )
    if kind == "multiclass" or (kind is None and len(columns) == 1 and _classes(columns[0])):
        y, classes = places(names(columns[0], where))
        return Task("multiclass", len(classes), classes), y
    values = []
    for column, title in zip(columns, titles, strict=True):
        found = numbers(column, where)
        if found is None:
            raise UserError(f"{where}: column '{title}' is text; {kind or 'several'} labels have to be numbers")
        values.append(found)
    y = torch.from_numpy(np.stack(values, axis=1).astype(np.float32))
    several = len(columns) > 1 and bool(((y == 0) | (y == 1)).all())
    if kind == "multilabel" or (kind is None and several):
        return Task("multilabel", len(columns), titles), y
    return Task("regression", len(columns), titles), y


def _classes(column: pd.Series) -> bool:
    """Whether one column of labels looks like classes."""
    if not types.is_numeric_dtype(column) or types.is_bool_dtype(column):
        return True
    values = column.unique()
    return len(values) <= MOST_NUMBERED_CLASSES and all(float(v).is_integer() for v in values)


def _patients(frame: pd.DataFrame) -> str | None:
    """A column that seems to say of whom a row is, several rows being of one patient. Two values are a mark, no names."""
    for name in map(str, frame.columns):
        if PATIENT.search(name) and 2 < frame[name].nunique() < len(frame):
            column = frame[name]
            if not types.is_float_dtype(column) or bool((column == np.floor(column)).all()):
                return name
    return None


def _listed(found: Sequence[str]) -> str:
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
