"""A data set of a frame: which columns are features, what the labels are, of whom each row is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pandas.api import types
from torch import Tensor

from hetero_fl.config.source import SourceConfig
from hetero_fl.data.base import MOST_NUMBERED_CLASSES, Dataset, Examples, places
from hetero_fl.data.layout import Layout, indicators
from hetero_fl.data.sources.cells import (
    CATEGORICAL,
    MANY_CATEGORIES,
    categories_in,
    decimal_commas,
    indicated,
    is_categorical,
    names,
    numbers,
    settled,
    written,
)
from hetero_fl.data.sources.frames import read_frame
from hetero_fl.errors import UserError, nearest
from hetero_fl.state import in_order
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
    categories: Mapping[str, tuple[str, ...]] | None = None,
) -> Dataset:
    """A data set of a frame. Features are the columns that are no label, group or patient, as float32 `[N, F]`: those of
    numbers, and an indicator per value of the text columns in `categories` (none: of those with fewer than 20 values).

    One column of labels: text, truth values, and whole numbers of at most 20 different values are classes (in sorted
    order), other numbers a regression target. Several (comma between them): multilabel if all are 0 or 1, else
    regression. `kind` (multiclass, multilabel, regression) takes the place of these rules. Text is read without spaces
    around it, and 1.0 as 1. Other columns of text or dates are left out; `about` and `notes` name them, and `notes` the
    encoded ones. Rows count from 1 below the header.

    Raises:
        UserError: a missing column, a missing value, text among numbers; with file, row and column.
    """
    labels = _label_columns(frame, label)
    where = f"path: {path}"
    owners = {key: column for key, column in (("group", group), ("patient", patient)) if column is not None}
    for key, column in [*(("label", column) for column in labels), *owners.items()]:
        if column not in frame.columns:
            raise UserError(f"{key}: {path} has no column '{column}'{nearest(column, map(str, frame.columns))}")
        if key != "label" and column in labels:
            raise UserError(f"{key}: found '{column}', which is a label; name another column")
    whose = {key: places(names(frame[column], where)) for key, column in owners.items()}
    rest = frame.drop(columns=list(set(owners.values())))
    given = () if categories is None else tuple(categories)
    if kind == "multiclass":  # classes may be called "1,2"
        targets = rest[labels]
        rest, commas = decimal_commas(rest.drop(columns=labels), where, given)
    else:
        rest, commas = decimal_commas(rest, where, given)
        targets, rest = rest[labels], rest.drop(columns=labels)
    encoded = categories_in(rest, where) if categories is None else categories
    encoded = {str(name): tuple(encoded[str(name)]) for name in rest.columns if str(name) in encoded}
    gaps: list[str] = []
    doubts: list[str] = []
    x, columns, left_out = features(rest, where, gaps, encoded, doubts)
    task, y = _targets(targets, where, kind)
    examples = Examples(x, y, *whose.get("group", (None, ())), *whose.get("patient", (None, ())))
    used = Layout(columns, (), tuple(encoded.items())).names
    about = f"table {path.name}, {len(used)} columns" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    read = [f"label {', '.join(labels)}", *(f"{key} {column}" for key, column in owners.items())]
    read += [f"columns used: {_listed(used)}"]
    read += [f"encoded as indicators: {_listed([f'{name} ({_listed(v)})' for name, v in encoded.items()])}"] * bool(
        encoded
    )
    read += [f"left out: {_listed([f'{name} ({why})' for name, why in left_out.items()]) or 'none'}"]
    read += [f"decimal commas in {_listed(commas)}"] if commas else []
    notes = [f"table {path.name}: {'; '.join(read)}", *(f"table {path.name}: {d}" for d in doubts)]
    if patient is None and (name := _patients(rest)) is not None:
        feature = "; as it is, it is a feature too" if name in used else ""
        notes.append(
            f"table {path.name}: column '{name}' looks like a patient's number and repeats: name it in data.patient, or "
            f"rows of one patient are split between training and test{feature}"
        )
    gap = gaps[0] if gaps else ""
    return Dataset(
        "table",
        task,
        examples,
        about=about,
        columns=columns,
        notes=tuple(notes),
        gap=gap,
        categories=tuple(encoded.items()),
    )


def common_categories(files: Mapping[str, SourceConfig]) -> dict[str, tuple[str, ...]]:
    """Return the text columns of several tables, and their values in all of them, where these are few (see `categories_in`).

    Args:
        files: The tables, by the place in the configuration that names them.

    Raises:
        UserError: A column that is text in one table and holds numbers in another.
    """
    texts: dict[str, dict[str, None]] = {}
    place_of: dict[str, str] = {}
    numeric: dict[str, str] = {}
    for place, source in files.items():
        where = f"{place}.path: {source.path}"
        for column in _feature_columns(source, place):
            name = str(column.name)
            if is_categorical(column) and numbers(column, where, [], CATEGORICAL) is None:
                texts.setdefault(name, {}).update(dict.fromkeys(written(column).dropna().tolist()))
                place_of.setdefault(name, place)
            elif types.is_numeric_dtype(column) and column.notna().any():
                numeric.setdefault(name, place)
    for name in texts:
        if name in numeric:
            found = f"column '{name}' is text, and numbers in that of {numeric[name].removesuffix(': data')}"
            raise UserError(f"{place_of[name]}: {found}; list its values in data.categories")
    return {name: tuple(in_order(values)) for name, values in texts.items() if len(values) < MANY_CATEGORIES}


def _feature_columns(source: SourceConfig, place: str) -> list[pd.Series]:
    try:
        frame = read_frame(Path(str(source.path)).expanduser(), (source.group, source.patient))
        others = [*_label_columns(frame, source.label or ""), source.group, source.patient]
        rest, _ = decimal_commas(frame.drop(columns=[n for n in others if n in frame.columns]), f"path: {source.path}")
    except UserError as error:
        raise UserError(f"{place}.{error}") from error
    return [rest[name] for name in rest.columns]


def _label_columns(frame: pd.DataFrame, label: str) -> list[str]:
    return [label] if label in frame.columns else [part.strip() for part in label.split(",")]


def features(
    frame: pd.DataFrame,
    where: str,
    gaps: list[str] | None = None,
    categories: Mapping[str, tuple[str, ...]] | None = None,
    notes: list[str] | None = None,
) -> tuple[Tensor, tuple[str, ...], dict[str, str]]:
    """The columns of numbers and the indicators of `categories` as float32 `[N, F]`, their names, and the names of the other
    columns with what they are. Missing numbers are NaN where `gaps` is given, which gets a line for each column that has
    some; else they are refused. `notes` gets a line for each encoded column with empty cells or unknown values."""
    if len(frame) == 0:
        raise UserError(f"{where}: found no rows")
    read: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    for key in frame.columns:
        # A frame in memory or a Parquet file may have integers as names.
        name = str(key)
        if name in (categories or {}):
            values = (categories or {})[name]
            found = indicated(frame[key], values, notes)
            added = dict(zip(indicators(name, values), found.T, strict=True))
        else:
            column = numbers(frame[key], where, gaps)
            added = {} if column is None else {name: column}
            if column is None:
                left_out[name] = _why_left_out(frame[key])
        for other in added:
            if other in read:
                raise UserError(f"{where}: column '{other}' is there twice, once as an indicator; rename one")
        read |= added
    if not read:
        raise UserError(f"{where}: no column of numbers or categories besides label, group and patient")
    return torch.from_numpy(np.stack(list(read.values()), axis=1).astype(np.float32)), tuple(read), left_out


def _why_left_out(column: pd.Series) -> str:
    if not is_categorical(column):
        return str(column.dtype)
    count = written(column).nunique()
    return "text" if count < MANY_CATEGORIES else f"text, {count} different values"


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
    for name in frame.columns:
        if PATIENT.search(str(name)) and 2 < frame[name].nunique() < len(frame):
            column = frame[name]
            if not types.is_float_dtype(column) or bool((column == np.floor(column)).all()):
                return str(name)
    return None


def _listed(found: Sequence[str]) -> str:
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
