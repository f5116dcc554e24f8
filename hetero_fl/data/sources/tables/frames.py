"""Data sets from data frames: features, labels, and the splits of a data set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.api import types
from torch import Tensor

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames
from hetero_fl.data.dataset import (
    ColumnLayout,
    Dataset,
    indicator_names,
)
from hetero_fl.data.sources.tables.columns import (
    CATEGORICAL,
    MANY_CATEGORIES,
    category_values,
    check_cells,
    check_columns,
    column_as_text,
    describe_identifiers,
    encode_indicators,
    is_categorical,
    looks_like_ids,
    metadata_array,
    normalize_frame,
    parse_column,
    parse_names,
    parse_numbers,
    read_frame,
    refuse_separators,
)
from hetero_fl.data.table import Table, build
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.text import Caution, format_list, prefix_note

NO_NAME = re.compile(r"Unnamed: \d+(?:\.\d+)?|__index_level_\d+__")
"""Names under which pandas reads columns without a name, such as those of a saved index."""
SAVED_INDEX = "saved index"
"""Reason why a column that counts the rows is left out."""
RESET_INDEX = re.compile(r"level_\d+")
"""Names that pandas gives to an index that becomes a column, and that a feature may have, too."""
MAX_LISTED = 20
"""Maximum number of columns that a note lists."""


@dataclass(frozen=True)
class Roles:
    """Columns of a table that are not features.

    Attributes:
        labels: Columns of the labels.
        group: Column of the groups, or None.
        patient: Column of the patients, or None.
    """

    labels: tuple[str, ...] = ()
    group: str | None = None
    patient: str | None = None

    @property
    def owners(self) -> dict[str, str]:
        """Columns of groups and patients, keyed by "group" and "patient"."""
        found = {"group": self.group, "patient": self.patient}
        return {key: column for key, column in found.items() if column is not None}

    @property
    def columns(self) -> set[str]:
        """All columns."""
        return {*self.labels, *self.owners.values()}

    def describe(self) -> list[str]:
        """Return a remark on each role."""
        labels = [f"label {', '.join(self.labels)}"] if self.labels else []
        return labels + [f"{key} {column}" for key, column in self.owners.items()]

    def check(self, frame: pd.DataFrame, file: object, prefix: str) -> None:
        """Check that the columns exist, and that columns of labels have no other use.

        Args:
            frame: The table.
            file: Name of the table, for error messages.
            prefix: Start of error messages.
        """
        keys = [*(("label", name) for name in self.labels), *self.owners.items()]
        check_columns(frame, [(prefix + key, column) for key, column in keys], file)
        for column, count in Counter(self.labels).items():
            if count > 1:
                raise UserError(
                    f"{prefix}label: column '{column}' occurs {count} times; name it once"
                )
        for key, column in self.owners.items():
            if column in self.labels:
                raise UserError(
                    f"{prefix}{key}: must differ from label, got '{column}'; choose another column"
                )


def read_table(
    frame: pd.DataFrame,
    path: Path | str,
    label: str | None,
    *,
    group: str | None = None,
    patient: Any = None,
    kind: str | None = None,
    categories: Mapping[str, tuple[str, ...]] | None = None,
    labeled: bool = True,
) -> Dataset:
    """Create a data set from a table.

    Features (float32 `[N, F]`) are the numeric columns and the indicators of the one-hot encoded
    text columns. Other columns of text or dates are excluded and listed in `about` and `notes`.
    Surrounding spaces are removed from text, and labels such as 1.0 become 1. All columns that are
    not numeric features are in the metadata of the examples, as in the table.

    Text and booleans are names of classes, and numbers are read as by `from_arrays`.

    Args:
        frame: Table.
        path: File or name of the table, for messages. Rows in messages count from 1 below the
            header.
        label: Column of the labels, or several columns separated by commas. If None, there are no
            labels.
        group: Column of the groups. If None, rows have no groups.
        patient: Column of the patients, or the patient of each row, `[N]`. If None, rows have no
            patients.
        kind: Kind of the task, "multiclass", "multilabel" or "regression". If None, the kind is
            inferred from the labels.
        categories: Text columns to one-hot encode, with their values. If None, all text columns
            with fewer than 20 distinct values are encoded.
        labeled: Whether to read the labels.

    Raises:
        UserError: If a column or value is missing, or a cell is not a number.
    """
    in_config = isinstance(path, Path)
    where = f"path: {path}" if isinstance(path, Path) else path
    title = path.name if isinstance(path, Path) else path
    frame = normalize_frame(frame, where, categories)
    prefix = "" if in_config else f"{where}: "
    if labeled and label is None:
        hint = suggest_or_list("", list(frame.columns))
        raise UserError(f"{prefix}label: missing; name the column of the labels{hint}")
    labels = () if label is None else tuple(label_columns(frame.columns, label))
    roles = Roles(labels, group, patient if isinstance(patient, str) else None)
    roles.check(frame, path, prefix)
    frames = Frames(
        {"train": frame},
        where,
        {"train": where},
        roles,
        ExampleNames("x", f"label {', '.join(labels)}", first_row=1, in_config=in_config),
        f"table {title}" if in_config else where,
        kind,
        patient=None if isinstance(patient, str) else patient,
        labeled=labeled,
    )
    dataset = frames.read_features(categories)
    return replace(dataset, name="table", source="table", about=f"table {title}, {dataset.about}")


@dataclass(frozen=True)
class Frames:
    """Data frames of the splits of a data set, with one value for each row and column.

    Attributes:
        frames: The data frames, keyed by split.
        where: Place of all frames, for messages.
        places: Place of each frame, keyed by split.
        roles: Columns that are not features.
        names: Names of inputs, labels and rows, for messages.
        title: Start of notes.
        task: Kind of the task, or the task. If None, the labels determine it.
        labels: Labels of each split, if they are not in columns of the frames.
        patient: Patient of each training row, if it is not in a column of the frame.
        labeled: Whether there are labels.
    """

    frames: Mapping[str, pd.DataFrame]
    where: str
    places: Mapping[str, str]
    roles: Roles
    names: ExampleNames
    title: str
    task: Task | str | None = None
    labels: Mapping[str, Any] | None = None
    patient: Any = None
    labeled: bool = True

    def read_features(
        self,
        categories: Mapping[str, Sequence[str]] | None,
        left_out: Mapping[str, str] | None = None,
    ) -> Dataset:
        """Create a data set whose inputs are columns of numbers and categories.

        Args:
            categories: Text columns to one-hot encode, with their values. If None, all with fewer
                than 20 distinct values.
            left_out: Reasons why columns without a role are left out, keyed by column.
        """
        others = {*self.roles.columns, *(left_out or {})}
        names = [name for name in self.frames["train"].columns if name not in others]
        rest = {self.places[split]: frame[names] for split, frame in self.frames.items()}
        if categories is None:
            columns = {place: [part[name] for name in names] for place, part in rest.items()}
            categories = shared_categories(columns, {place: place for place in rest})
        encoded = {name: tuple(categories[name]) for name in names if name in categories}
        gaps: list[str] = []
        remarks: list[str] = []
        read = {
            place: features(part, place, gaps, encoded, remarks) for place, part in rest.items()
        }
        _, used, reasons = read[self.places["train"]]
        for place, (_, own, _) in read.items():
            if own != used:
                name = min(set(own) ^ set(used))
                raise UserError(
                    f"{place}: column '{name}' is numeric in one split and text in another; list "
                    "its values in data.categories"
                )
        reasons |= left_out or {}
        layout = ColumnLayout(used, (), tuple(encoded.items()))
        about = f"{len(layout.names)} columns"
        if reasons:
            about += f"; left out: {', '.join(reasons)}"
        summary = [*self.roles.describe(), *describe_columns(layout.names, encoded, reasons)]
        notes = ["; ".join(summary), *remarks]
        dataset = self.build(
            {split: read[place][0] for split, place in self.places.items()},
            notes,
            columns=used,
            categories=layout.categories,
            first_missing=gaps[0] if gaps else "",
            about=about,
        )
        if not self.names.in_config:
            dataset.notes += _note_left_out(self.frames["train"], reasons)
        return dataset

    def select(self, rows: Mapping[str, np.ndarray]) -> Frames:
        """Return the rows at the given indices of each split."""
        frames = {s: self.frames[s].iloc[own].reset_index(drop=True) for s, own in rows.items()}
        labels = self.labels and {s: np.asarray(self.labels[s])[own] for s, own in rows.items()}
        patient = self.patient
        if patient is not None:
            patient = [patient[row] for row in rows["train"]]
        return replace(self, frames=frames, labels=labels, patient=patient)

    def build(self, x: Mapping[str, Any], notes: Sequence[str], **options: Any) -> Dataset:
        """Create a data set with the labels, groups, patients and metadata of the frames.

        Args:
            x: Inputs of each split.
            notes: Remarks on the inputs.
            **options: Further arguments of `hetero_fl.data.table.build`.
        """
        train = self.frames["train"]
        layout = ColumnLayout(options.get("columns", ()), (), options.get("categories", ()))
        numeric = set(layout.columns) - {column for column, _ in layout.categories}
        tables = []
        for split, frame in self.frames.items():
            table = Table(x[split], self._labels(split), split, self.places[split], self.names)
            if split == "train":
                owners = {
                    key: parse_names(frame[column], table.where)
                    for key, column in self.roles.owners.items()
                }
                table = replace(table, **{"patient": self.patient, **owners})
                table.metadata = {
                    name: metadata_array(frame[name])
                    for name in frame.columns
                    if name not in numeric
                }
            tables.append(table)
        notes = [prefix_note(self.title, note) for note in notes]
        labels = self.roles.labels if self.labeled else ()
        dataset = build(tables, self.task, self.where, label_names=labels, notes=notes, **options)
        in_config = self.names.in_config
        others = [train[name] for name in train if name not in self.roles.columns]
        ids = describe_identifiers(others, layout.names, in_config, dataset.train.patient)
        # A program has determined the kind from the labels of all data frames, with the same notes.
        is_known = self.task is not None and not in_config
        kept = notes if is_known else dataset.notes
        return replace(dataset, notes=(*kept, *(prefix_note(self.title, note) for note in ids)))

    def _labels(self, split: str) -> Any:
        """Return the labels of a split, or None if there are none."""
        if not self.labeled:
            return None
        if self.labels is not None:
            return self.labels[split]
        columns = self.frames[split][list(self.roles.labels)]
        kind = self.task.kind if isinstance(self.task, Task) else self.task
        return label_values(columns, self.places[split], kind)


def _note_left_out(frame: pd.DataFrame, reasons: Mapping[str, str]) -> tuple[str, ...]:
    """Return a caution on columns that are no features, except saved indices and ids."""
    dropped = [
        name
        for name, reason in reasons.items()
        if name in frame and reason != SAVED_INDEX and not any(looks_like_ids(frame[name]))
    ]
    note = Caution(
        "columns left out of the features: "
        f"{format_list(dropped, MAX_LISTED, quote=True)}; convert them to numbers or to fewer than "
        f"{MANY_CATEGORIES} categories, or drop them"
    )
    return (note,) if dropped else ()


def describe_columns(
    used: Sequence[str], encoded: Mapping[str, Sequence[str]], left_out: Mapping[str, str]
) -> list[str]:
    """Return remarks on the columns that are used, encoded or left out."""
    remarks = [f"columns used: {format_list(used, MAX_LISTED)}"]
    if encoded:
        values = [f"{name} ({format_list(v, MAX_LISTED)})" for name, v in encoded.items()]
        remarks.append(f"encoded as indicators: {format_list(values, MAX_LISTED)}")
    reasons = [f"{name} ({reason})" for name, reason in left_out.items()]
    remarks.append(f"left out: {format_list(reasons, MAX_LISTED) or 'none'}")
    return remarks


def common_categories(files: Mapping[str, SourceConfig]) -> dict[str, tuple[str, ...]]:
    """Return the values of the text columns to one-hot encode in several files, keyed by column.

    Args:
        files: Sources of the tables, keyed by the configuration key of each source.

    Raises:
        UserError: If a column is text in one table and numeric in another.
    """
    columns = {}
    names = {}
    for place, source in files.items():
        path = Path(str(source.path)).expanduser()
        try:
            frame = read_frame(path, (source.group, source.patient), read=source.read)
            frame = normalize_frame(frame, f"path: {path}")
        except UserError as error:
            raise UserError(f"{place}.{error}") from error
        columns[place] = _feature_columns(frame, source.label, source.group, source.patient)
        names[place] = f"{place}.path: {source.path}"
    return shared_categories(columns, names)


def categories_of_frames(
    frames: Mapping[str, tuple[pd.DataFrame, str | None]],
) -> dict[str, tuple[str, ...]]:
    """Return the values of the text columns to one-hot encode in several data frames.

    Args:
        frames: Pairs of a data frame and its label column, keyed by the name that error messages
            use for the frame.

    Raises:
        UserError: If a column is text in one frame and numeric in another.
    """
    columns = {
        place: _feature_columns(normalize_frame(frame, place), label)
        for place, (frame, label) in frames.items()
    }
    return shared_categories(columns, {place: place for place in frames})


def shared_categories(
    columns: Mapping[str, Sequence[pd.Series]], names: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Return the values of the text columns to one-hot encode in several tables, keyed by column.

    These are the columns with fewer than `MANY_CATEGORIES` distinct values in all tables together.

    Args:
        columns: The columns of each table without labels, keyed by the place of the table.
        names: Names of the tables in error messages about single cells, keyed like `columns`.

    Raises:
        UserError: If a column is text in one table and numeric in another.
    """
    texts: dict[str, list[pd.Series]] = {}
    place_of: dict[str, str] = {}
    numeric: dict[str, str] = {}
    for place, own in columns.items():
        where = names[place]
        for column in own:
            name = str(column.name)
            check_cells(column, where)
            if is_categorical(column) and parse_numbers(column, where, [], CATEGORICAL) is None:
                texts.setdefault(name, []).append(column)
                place_of.setdefault(name, place)
            elif types.is_numeric_dtype(column) and column.notna().any():
                numeric.setdefault(name, place)
    for name in texts:
        if name in numeric:
            other = numeric[name].removesuffix(": data")
            raise UserError(
                f"{place_of[name]}: column '{name}' is text, but numeric for {other}; list its "
                "values in data.categories"
            )
    categories = {name: category_values(own) for name, own in texts.items()}
    return {name: v for name, v in categories.items() if 0 < len(v) < MANY_CATEGORIES}


def _feature_columns(
    frame: pd.DataFrame, label: str | None, *owners: str | None
) -> list[pd.Series]:
    """Return the columns of a table that are not those of labels, groups and patients."""
    labels = [] if label is None else label_columns(frame.columns, label)
    return [frame[name] for name in frame.columns if name not in (*labels, *owners)]


def label_columns(columns: Collection[str], label: str) -> list[str]:
    """Return the columns that a setting `label` names, which may not exist."""
    return [label] if label in columns else [part.strip() for part in label.split(",")]


def features(
    frame: pd.DataFrame,
    where: str,
    allow_missing: list[str] | None = None,
    categories: Mapping[str, tuple[str, ...]] | None = None,
    notes: list[str] | None = None,
) -> tuple[Tensor, tuple[str, ...], dict[str, str]]:
    """Convert the columns of a table to features.

    Args:
        frame: Columns without labels, groups and patients, whose names are text.
        where: Name of the file, for error messages.
        allow_missing: List to which the location of the first missing value of each column is
            appended. Missing values are then NaN. If None, a missing value is an error.
        categories: Text columns to one-hot encode, with their values.
        notes: List to which remarks on encoded columns are appended. If None, there are no remarks.

    Returns:
        A tuple of the features (numbers and indicators), float32 `[N, F]`, the names of the
        features, and the reasons why other columns are left out, keyed by column.

    Raises:
        UserError: If there are no rows or features, or a value is missing or not a number.
    """
    if len(frame) == 0:
        raise UserError(f"{where}: has no rows")
    found: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    encoded = categories or {}
    for name in frame.columns:
        added: dict[str, np.ndarray] = {}
        if name in encoded:
            indicators = encode_indicators(frame[name], encoded[name], notes)
            added = dict(zip(indicator_names(name, encoded[name]), indicators.T, strict=True))
        elif (numbers := parse_numbers(frame[name], where, allow_missing)) is None:
            left_out[name] = _reason_left_out(frame[name])
        elif _is_index(name, numbers):
            left_out[name] = SAVED_INDEX
            if notes is not None and len(np.unique(numbers)) < len(numbers):
                notes.append(
                    Caution(
                        f"column '{name}' has no name and repeats, and is left out as a saved "
                        "index; if it is a feature, name it"
                    )
                )
        else:
            added = {name: numbers.astype(np.float32)}
        for other in added:
            if other in found:
                raise UserError(
                    f"{where}: duplicate column '{other}', which is also the name of an indicator; "
                    "rename the column"
                )
        found |= added
    if not found:
        raise UserError(
            f"{where}: has no numeric or categorical columns other than label, group and patient"
        )
    return (
        torch.from_numpy(np.stack(list(found.values()), axis=1, dtype=np.float32)),
        tuple(found),
        left_out,
    )


def _is_index(name: str, numbers: np.ndarray) -> bool:
    """Return whether a column is taken for a saved index.

    Columns without a name are if they have integers in any order or increasing numbers, and
    `level_0` is if it counts the rows.
    """
    steps = np.diff(numbers)
    if RESET_INDEX.fullmatch(name):
        return bool((steps == 1).all())
    return NO_NAME.fullmatch(name) is not None and bool(
        (numbers % 1 == 0).all() or (steps > 0).all()
    )


def _reason_left_out(column: pd.Series) -> str:
    if not is_categorical(column):
        return str(column.dtype)
    count = column_as_text(column).nunique()
    return "text" if count < MANY_CATEGORIES else f"text, {count} different values"


def label_values(labels: pd.DataFrame, where: str, kind: str | None = None) -> Any:
    """Return the columns of labels as text `[N]`, or as numbers `[N]` or `[N, L]`.

    Args:
        labels: Columns of the labels.
        where: Name of the table, for error messages.
        kind: Kind of the task. For "multiclass", fractions are names of classes.

    Raises:
        UserError: If a value is missing, or a cell is not a number in several columns or although
            the kind needs numbers.
    """
    columns = [parse_column(labels[name], where) for name in labels.columns]
    first = columns[0]
    is_number = types.is_numeric_dtype(first) and not types.is_bool_dtype(first)
    is_class = kind == "multiclass" or (kind is None and not is_number)
    if is_number and all(float(value).is_integer() for value in first.unique()):
        is_class = False
    if kind is None:
        refuse_separators(first, where)
    if len(columns) == 1 and is_class:
        return parse_names(first, where).to_numpy(dtype=object)
    values = []
    for column in columns:
        found = parse_numbers(column, where)
        if found is None:
            raise UserError(
                f"{where}: column '{column.name}': expected numbers as {kind or 'multiple'} "
                "labels, got text"
            )
        is_whole = types.is_integer_dtype(column) or types.is_bool_dtype(column)
        values.append(found.astype(np.int64) if is_whole else found)
    return values[0] if len(values) == 1 else np.stack(values, axis=1)
