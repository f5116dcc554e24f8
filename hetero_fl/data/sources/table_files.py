"""Read table files: separators, missing values, features and labels."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.api import types
from torch import Tensor

from hetero_fl.config.data import ReadConfig, SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames, first_true
from hetero_fl.data.dataset import (
    ColumnLayout,
    Dataset,
    Examples,
    index_names,
    indicator_names,
    owner_list,
)
from hetero_fl.data.labels import read_labels
from hetero_fl.data.registry import TABLE_SUFFIXES
from hetero_fl.data.sources.table_columns import (
    CATEGORICAL,
    MANY_CATEGORIES,
    MARKERS,
    category_values,
    check_columns,
    column_as_text,
    describe_identifiers,
    encode_indicators,
    find_categories,
    is_categorical,
    looks_like_ids,
    metadata_array,
    normalize_frame,
    number_pattern,
    parse_column,
    parse_names,
    parse_numbers,
    raise_cell_error,
    refuse_separators,
)
from hetero_fl.utils.errors import UserError, suggest_file
from hetero_fl.utils.serialization import check_memory
from hetero_fl.utils.text import Caution, format_list, prefix_note

SEPARATORS = (",", ";", "|", "\t")
"""Separators of CSV files."""
SPACES = " \N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"
"""Spaces that may separate groups of three digits."""
NO_NAME = re.compile(r"Unnamed: \d+(?:\.\d+)?|__index_level_\d+__")
"""Names under which pandas reads columns without a name, such as those of a saved index."""
SAVED_INDEX = "saved index"
"""Reason why a column that counts the rows is left out."""
RESET_INDEX = re.compile(r"level_\d+")
"""Names that pandas gives to an index that becomes a column, and that a feature may have, too."""


def read_frame(
    path: Path,
    names: Iterable[str | None] = (),
    categories: Collection[str] = (),
    read: ReadConfig | None = None,
) -> pd.DataFrame:
    """Read a CSV, TSV or Parquet file.

    Args:
        path: File to read.
        names: Columns to read as text if they exist, so that site 01 does not become 1.
        categories: Columns to read as text in which `NA` and `None` may be categories.
        read: Separators and decimal mark of a CSV or TSV file. If None, a decimal point and
            the separator of the header.

    Raises:
        UserError: If the file cannot be read.
    """
    where = f"path: {path}"
    if path.is_dir():
        raise UserError(f"path: expected a file, got the folder '{path}'")
    if not path.is_file():
        raise UserError(f"path: file '{path}' not found{suggest_file(path)}")
    kind = path.suffix.lower()
    if kind not in TABLE_SUFFIXES:
        raise UserError(f"{where}: unknown suffix '{kind}'; choose .csv, .tsv or .parquet")
    try:
        if kind == ".parquet":
            from pyarrow.parquet import read_metadata

            announced = read_metadata(path)
            check_memory(8 * announced.num_rows * announced.num_columns, where)
            # Parquet files may have integers as names of columns.
            return pd.read_parquet(path).rename(columns=str)
        return _read_csv(path, names, categories, read or ReadConfig())
    except ImportError as error:
        raise UserError(
            f"{where}: Parquet files need pyarrow; run pip install 'hetero_fl[tables]'"
        ) from error
    except UnicodeError as error:
        raise UserError(
            f"{where}: not encoded in UTF-8 ({error}); save the file as UTF-8"
        ) from error
    except UserError:
        raise
    except (ValueError, OSError, csv.Error) as error:
        # The errors of pandas and pyarrow are ValueErrors.
        raise UserError(
            f"{where}: not a readable {kind} file ({type(error).__name__}: {error})"
        ) from error


def _read_csv(
    path: Path, names: Iterable[str | None], categories: Collection[str], read: ReadConfig
) -> pd.DataFrame:
    """Read a CSV or TSV file (see `read_frame`)."""
    is_tsv = path.suffix.lower() == ".tsv"
    separator = read.sep or ("\t" if is_tsv else _common_separator(path))
    _check_cells(path, separator)
    texts = list(filter(None, names))
    has_marks = read.decimal != "." or read.thousands is not None
    frame = pd.read_csv(
        _plain_numbers(path, separator, read, {*texts, *categories}) if has_marks else path,
        sep=separator,
        low_memory=False,
        dtype=dict.fromkeys(texts, str),
    )
    listed = frame.columns.intersection(list(categories)).tolist()
    if listed:
        frame[listed] = pd.read_csv(
            path, sep=separator, usecols=listed, dtype=str, keep_default_na=False
        )[listed]
    return frame


def _plain_numbers(
    path: Path, separator: str, read: ReadConfig, texts: Collection[str]
) -> io.StringIO:
    """Return a CSV or TSV file in which 1.234,5 is written as 1234.5.

    pandas removes the mark of thousands from any cell, and reads 0.5 as 5.

    Args:
        path: File to read.
        separator: Separator of the columns.
        read: Marks of the numbers in the file.
        texts: Columns that remain as they are.

    Raises:
        UserError: If a cell in a column of numbers has other marks.
    """
    frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False).fillna("")
    thousands = SPACES if read.thousands == " " else read.thousands or ""
    number = number_pattern(thousands, read.decimal)
    marks = f".,'’{thousands}"
    any_number = number_pattern(marks, marks)
    for name in frame.columns.difference(list(texts)):
        cells = frame[name].str.strip()
        cells = cells[~cells.str.lower().isin(MARKERS)]
        is_number = cells.str.fullmatch(number).to_numpy(bool)
        is_foreign = ~is_number & cells.str.fullmatch(any_number).to_numpy(bool)
        if (row := first_true(is_foreign)) is not None and (is_number | is_foreign).all():
            expected = f"the decimal mark '{read.decimal}'"
            if thousands:
                expected = f"'{read.thousands}' between groups of three digits, and {expected}"
            raise_cell_error(
                f"path: {path}",
                int(cells.index[row]),
                name,
                f"expected a number with {expected}, got '{cells.iloc[row]}'; correct the cell, or "
                "set data.read.decimal and thousands",
            )
        # Other cells remain, and are found when the column is used as numbers.
        cells = cells[is_number]
        plain = cells.str.replace(f"[{thousands}]", "", regex=True) if thousands else cells
        frame.loc[cells.index, name] = plain.str.replace(read.decimal, ".", regex=False)
    return io.StringIO(frame.to_csv(sep=separator, index=False))


def _check_cells(path: Path, separator: str) -> None:
    """Reject duplicate column names and rows longer than the header, which pandas accepts."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = filter(None, csv.reader(file, delimiter=separator))
        header = next(rows, None)
        if header is None:
            raise UserError(f"path: {path}: the file is empty")
        for name, count in Counter(header).items():
            if name and count > 1:
                raise UserError(f"path: {path}: header: column '{name}' occurs {count} times")
        for row, cells in enumerate(rows, 1):
            if len(cells) > len(header):
                raise UserError(
                    f"path: {path}: row {row}: expected {len(header)} cells as in the header, got "
                    f"{len(cells)}, '{cells[len(header)]}' after the last column '{header[-1]}'"
                )


def _common_separator(path: Path) -> str:
    """Return the most frequent of `SEPARATORS` in the header of a CSV file."""
    with path.open(encoding="utf-8-sig") as file:
        header = next(filter(str.strip, file), "")
    return max(SEPARATORS, key=header.count)


MAX_LISTED = 20
"""Maximum number of columns that a note lists."""


def read_table(
    frame: pd.DataFrame,
    path: Path | str,
    label: str,
    *,
    group: str | None = None,
    patient: Any = None,
    kind: str | None = None,
    categories: Mapping[str, tuple[str, ...]] | None = None,
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
        label: Column of the labels, or several columns separated by commas.
        group: Column of the groups. If None, rows have no groups.
        patient: Column of the patients, or the patient of each row, `[N]`. If None, rows have no
            patients.
        kind: Kind of the task, "multiclass", "multilabel" or "regression". If None, the kind is
            inferred from the labels.
        categories: Text columns to one-hot encode, with their values. If None, all text columns
            with fewer than 20 distinct values are encoded.

    Raises:
        UserError: If a column or value is missing, or a cell is not a number.
    """
    where = f"path: {path}" if isinstance(path, Path) else path
    title = path.name if isinstance(path, Path) else path
    frame = normalize_frame(frame, where, categories)
    labels = label_columns(frame, label)
    owners = {
        key: column
        for key, column in (("group", group), ("patient", patient))
        if isinstance(column, str)
    }
    _check_special_columns(frame, labels, owners, path)
    indexed = {
        key: index_names(parse_names(frame[column], where)) for key, column in owners.items()
    }
    if patient is not None and "patient" not in indexed:
        indexed["patient"] = index_names(owner_list(patient, len(frame), f"{where}: patient"))
    rest = frame.drop(columns=list(set(owners.values())))
    targets = rest[labels]
    rest = rest.drop(columns=labels)
    encoded = find_categories(rest, where) if categories is None else categories
    encoded = {name: tuple(encoded[name]) for name in rest.columns if name in encoded}
    gaps: list[str] = []
    remarks: list[str] = []
    x, columns, left_out = features(rest, where, gaps, encoded, remarks)
    task, y, label_notes = _targets(targets, where, kind, isinstance(path, Path))
    groups, group_names = indexed.get("group", (None, ()))
    patients, patient_names = indexed.get("patient", (None, ()))
    inputs = {name for name in columns if name not in encoded}
    metadata = {name: metadata_array(frame[name]) for name in frame.columns if name not in inputs}
    examples = Examples(x, y, groups, group_names, patients, patient_names, metadata=metadata)
    examples = replace(examples, row=torch.arange(1, len(x) + 1), files=(where,))
    used = ColumnLayout(columns, (), tuple(encoded.items())).names
    about = f"table {title}, {len(used)} columns" + (
        f"; left out: {', '.join(left_out)}" if left_out else ""
    )
    summary = [f"label {', '.join(labels)}", *(f"{key} {column}" for key, column in owners.items())]
    summary += describe_columns(used, encoded, left_out)
    # The name of a data frame is its place.
    place = f"table {title}" if isinstance(path, Path) else where
    notes = [f"{place}: {'; '.join(summary)}", *label_notes]
    notes += [prefix_note(place, remark) for remark in remarks]
    dropped = [
        name
        for name, reason in left_out.items()
        if reason != SAVED_INDEX and not any(looks_like_ids(rest[name]))
    ]
    if dropped and not isinstance(path, Path):
        notes.append(
            Caution(
                "columns left out of the features: "
                f"{format_list(dropped, MAX_LISTED, quote=True)}; convert them to numbers or to "
                f"fewer than {MANY_CATEGORIES} categories, or drop them"
            )
        )
    others = [rest[name] for name in rest.columns]
    found = describe_identifiers(others, used, isinstance(path, Path), patients)
    notes += [prefix_note(place, note) for note in found]
    return Dataset(
        "table",
        task,
        examples,
        about=about,
        columns=columns,
        notes=tuple(notes),
        first_missing=gaps[0] if gaps else "",
        categories=tuple(encoded.items()),
    )


def _check_special_columns(
    frame: pd.DataFrame, labels: Sequence[str], owners: Mapping[str, str], path: Path | str
) -> None:
    """Check that the columns of labels, groups and patients exist, and that labels are distinct.

    Args:
        frame: Table.
        labels: Columns of the labels.
        owners: Columns of groups and patients, keyed by "group" and "patient".
        path: File or name of the table, for error messages.

    Raises:
        UserError: If a column is missing, or a column of labels has several uses.
    """
    check_columns(frame, [*(("label", column) for column in labels), *owners.items()], path)
    for column, count in Counter(labels).items():
        if count > 1:
            raise UserError(f"label: column '{column}' occurs {count} times; name it once")
    for key, column in owners.items():
        if column in labels:
            raise UserError(f"{key}: must differ from label, got '{column}'; choose another column")


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
    columns = {place: _feature_columns(source, place) for place, source in files.items()}
    names = {place: f"{place}.path: {source.path}" for place, source in files.items()}
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
    columns = {}
    for place, (frame, label) in frames.items():
        table = normalize_frame(frame, place)
        labels = label_columns(table, label) if label is not None else []
        rest = table.drop(columns=labels, errors="ignore")
        columns[place] = [rest[name] for name in rest.columns]
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
    return {name: values for name, values in categories.items() if len(values) < MANY_CATEGORIES}


def _feature_columns(source: SourceConfig, place: str) -> list[pd.Series]:
    try:
        path = Path(str(source.path)).expanduser()
        frame = read_frame(path, (source.group, source.patient), read=source.read)
        frame = normalize_frame(frame, f"path: {path}")
        others = [*label_columns(frame, source.label or ""), source.group, source.patient]
        rest = frame.drop(columns=[n for n in others if n in frame.columns])
    except UserError as error:
        raise UserError(f"{place}.{error}") from error
    return [rest[name] for name in rest.columns]


def label_columns(frame: pd.DataFrame, label: str) -> list[str]:
    """Return the columns that a setting `label` names, which may not exist."""
    return [label] if label in frame.columns else [part.strip() for part in label.split(",")]


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


def _targets(
    labels: pd.DataFrame, where: str, kind: str | None, in_config: bool
) -> tuple[Task, Tensor, list[str]]:
    """Return the task of the columns of labels, the targets, and notes."""
    titles = tuple(map(str, labels.columns))
    task, targets, notes = read_labels(
        {where: label_values(labels, where, kind)},
        f"{where}: label {', '.join(titles)}",
        task=kind,
        names=ExampleNames(first_row=1, in_config=in_config),
    )
    is_column_of_classes = task.kind == "multiclass" and len(titles) == 1
    names = task.output_names if is_column_of_classes else titles
    # A program has determined the kind from the labels of all data frames, with the same notes.
    is_known = kind is not None and not in_config
    return replace(task, names=names), targets[where], [] if is_known else notes


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
