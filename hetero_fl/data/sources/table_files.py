"""Read table files: separators, decimal commas, missing values, features and labels."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import torch
from pandas.api import types
from torch import Tensor

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import first_true
from hetero_fl.data.dataset import (
    MAX_NUMBERED_CLASSES,
    ColumnLayout,
    Dataset,
    Examples,
    index_names,
    indicator_names,
)
from hetero_fl.utils.errors import UserError, check_names, suggest_file
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import format_list

INTEGER_PATTERN = re.compile(r"([+-]?\d+)(?:\.0*)?")
"""Pattern of integers such as 1, 01 and 1.0."""
WHOLE = re.compile(r"\s*[+-]?\d+\s*")
COMMA = re.compile(r"\s*[+-]?\d+,\d+(?:[eE][+-]?\d+)?\s*")
THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2},\d{3}\s*")
SEPARATED = re.compile(r"\s*[+-]?\d{1,3}(?:[.,'’]\d{3})+(?:[.,]\d+)?\s*")
MANY_CATEGORIES = 20
"""Number of distinct values from which text columns are not one-hot encoded by default."""
CATEGORICAL = "; for categories, list the values in data.categories"
NUMBER_HINT = "write numbers as 1234.5"


def decimal_commas(
    frame: pd.DataFrame, where: str, excluded: Collection[str] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """Convert text columns with decimal commas, such as "0,5", to numbers.

    As numbers such as "1,250" are ambiguous, at least one cell of the table must have an
    unambiguous decimal comma.

    Args:
        frame: Table.
        where: Name of the file, for error messages.
        excluded: Columns that are not converted.

    Returns:
        The table, and the names of the converted columns.

    Raises:
        UserError: If all cells are ambiguous, or another column has decimal points that may
            separate thousands.
    """
    columns = {
        name: frame[name].dropna().astype(str)
        for name in frame.columns
        if str(name) not in excluded and is_text(frame[name])
    }
    commas = {
        name: texts
        for name, texts in columns.items()
        if (decimal := texts.str.fullmatch(COMMA)).any()
        and (decimal | texts.str.fullmatch(WHOLE)).all()
    }
    if not commas:
        return frame, []
    if all(
        texts[texts.str.contains(",")].str.fullmatch(THOUSANDS).all() for texts in commas.values()
    ):
        name, texts = next(iter(commas.items()))
        row = int(frame[name].astype(str).str.contains(",").to_numpy().argmax())
        raise_cell_error(
            where,
            row,
            str(name),
            f"ambiguous number '{texts.loc[frame.index[row]]}' (decimal comma or thousands); "
            f"{NUMBER_HINT}",
        )
    for name in frame.columns:
        if types.is_float_dtype(frame[name]) and _may_be_thousands(frame[name]):
            raise UserError(
                f"{where}: column '{name}': points may separate thousands, as column "
                f"'{next(iter(commas))}' has decimal commas; {NUMBER_HINT}"
            )
    frame = frame.copy(deep=False)
    for name in commas:
        frame[name] = frame[name].str.replace(",", ".").astype(np.float64)
    return frame, list(map(str, commas))


def _may_be_thousands(column: pd.Series) -> bool:
    """Return whether all fractions of a float column have at most three digits, as in 1.250."""
    values = column.dropna().to_numpy(dtype=np.float64)
    values = values[np.isfinite(values) & (values != np.floor(values))]
    return bool(
        len(values)
        and (np.abs(values) >= 1).all()
        and np.allclose(values * 1000, np.round(values * 1000), 0, 1e-6)
    )


def parse_numbers(
    column: pd.Series, where: str, allow_missing: list[str] | None = None, hint: str = ""
) -> np.ndarray | None:
    """Return a column as numbers, float64 `[N]`, or None if all cells are text or dates.

    Args:
        column: Column to read.
        where: Name of the file, for error messages.
        allow_missing: List to which the location of the first missing value is appended. Missing
            values are then NaN. If None, a missing value is an error.
        hint: End of the error message for a cell that is not a number.

    Raises:
        UserError: If a cell is missing or not a finite number.
    """
    name = str(column.name)
    if not (types.is_numeric_dtype(column) or types.is_bool_dtype(column)):
        if not is_text(column):
            return None
        read = pd.to_numeric(column, errors="coerce")
        text = read.isna() & column.notna()
        if text.any() and read.isna().all() and not _has_separators(column):
            return None
        if (row := first_true(text)) is not None:
            cell = str(column.iloc[row])
            remedy = f"; {NUMBER_HINT}" if re.search(r"\d[.,'’]\d", cell) else hint
            raise_cell_error(where, row, name, f"expected a number, got '{cell}'{remedy}")
        column = read
    gap = first_missing_value(column, where)
    if gap is not None:
        if allow_missing is None:
            raise UserError(f"{gap}; fill or remove missing values")
        allow_missing.append(gap)
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    too_large = ~np.isfinite(values) | (np.abs(values) > np.finfo(np.float32).max)
    if (row := first_true(too_large & ~column.isna().to_numpy())) is not None:
        raise_cell_error(where, row, name, f"expected a finite number, got {values[row]}")
    return values


def _has_separators(column: pd.Series) -> bool:
    """Return whether all cells are numbers with thousands separators, such as 1.234,5."""
    return bool(column.dropna().astype(str).str.fullmatch(SEPARATED).all())


def parse_names(column: pd.Series, where: str) -> pd.Series:
    """Convert a column of labels, sites or patients to text.

    Surrounding spaces are removed, and 1.0 becomes 1. Leading zeros in a text column are kept.

    Raises:
        UserError: If a value is missing.
    """
    column = strip_text(column, where)
    if types.is_float_dtype(column):
        whole = column == np.floor(column)
        return column.astype(str).where(~whole, column.where(whole, 0).astype(np.int64).astype(str))
    text = column.astype(str)
    return (
        text.str.replace(INTEGER_PATTERN, r"\1", regex=True)
        if text.str.fullmatch(INTEGER_PATTERN).all()
        else text
    )


def column_as_text(column: pd.Series) -> pd.Series:
    """Convert a column to stripped text, in which 1.0 becomes 1 and missing values are NaN."""
    present = column[column.notna()]
    text = (
        parse_names(present, "")
        if types.is_float_dtype(present)
        else present.astype(str).str.strip()
    )
    return text[text != ""].astype(object).reindex(column.index)


def find_categories(frame: pd.DataFrame, where: str) -> dict[str, tuple[str, ...]]:
    """Return the values of the text columns to one-hot encode by default, keyed by column.

    These are the columns with at least one and fewer than `MANY_CATEGORIES` distinct values.

    Raises:
        UserError: If a column contains both numbers and text.
    """
    categories = {}
    for name in frame.columns:
        if (
            is_categorical(frame[name])
            and parse_numbers(frame[name], where, [], CATEGORICAL) is None
        ):
            values = column_as_text(frame[name]).dropna().unique().tolist()
            if 0 < len(values) < MANY_CATEGORIES:
                categories[str(name)] = tuple(natural_order(values))
    return categories


def encode_indicators(
    column: pd.Series, values: Sequence[str], notes: list[str] | None = None
) -> np.ndarray:
    """One-hot encode a column.

    Args:
        column: Column to encode.
        values: Known values.
        notes: List to which remarks on missing and unknown values are appended. If None, there are
            no remarks.

    Returns:
        Indicators, float64 `[N, len(values)]`. A row with a missing or unknown value is all 0.
    """
    text = column_as_text(column)
    plain = text.map(
        lambda cell: INTEGER_PATTERN.sub(r"\1", cell) if INTEGER_PATTERN.fullmatch(cell) else cell,
        na_action="ignore",
    )
    indicators = np.stack(
        [(text == value).to_numpy(bool) | (plain == value).to_numpy(bool) for value in values],
        axis=1,
    )
    unknown = text.notna().to_numpy() & ~indicators.any(axis=1)
    empty = text.isna().to_numpy()
    if notes is not None and (row := first_true(unknown)) is not None:
        notes.append(
            f"column '{column.name}': {int(unknown.sum())} of {len(text)} rows have none of "
            f"{', '.join(values)} (row {row + 1}: '{text.iloc[row]}'); their indicators are 0"
        )
    if notes is not None and (row := first_true(empty)) is not None:
        notes.append(
            f"column '{column.name}': {int(empty.sum())} of {len(text)} cells are empty "
            f"(row {row + 1}); their indicators are 0"
        )
    return indicators.astype(np.float64)


def parse_column(column: pd.Series, where: str) -> pd.Series:
    """Convert a column to numbers if every cell is a finite number, otherwise strip the text.

    Raises:
        UserError: If a value is missing.
    """
    column = strip_text(column, where)
    if is_text(column):
        read = pd.to_numeric(column.astype(str), errors="coerce")
        return read if np.isfinite(read).all() else column
    return column


def strip_text(column: pd.Series, where: str) -> pd.Series:
    """Remove surrounding spaces from the text of a column.

    Raises:
        UserError: If a value is missing.
    """
    if is_text(column) or isinstance(column.dtype, pd.CategoricalDtype):
        text = column.astype(object).map(
            lambda value: value.strip() if isinstance(value, str) else value
        )
        column = text.mask(text == "")
    require_no_missing(column, where)
    return column


def require_no_missing(column: pd.Series, where: str) -> None:
    """Check that a column has no missing value.

    Raises:
        UserError: If a value is missing.
    """
    if (gap := first_missing_value(column, where)) is not None:
        raise UserError(f"{gap}; fill or remove missing values")


def first_missing_value(column: pd.Series, where: str) -> str | None:
    """Return the location of the first missing value as text, or None if no value is missing."""
    gaps = column.isna()
    row = first_true(gaps)
    if row is None:
        return None
    count = f"{int(gaps.sum())} in {len(gaps)} rows"
    return f"{where}: row {row + 1}, column '{column.name}': missing value ({count})"


def is_text(column: pd.Series) -> bool:
    """Return whether a column contains text or other objects."""
    return not types.is_numeric_dtype(column) and (
        types.is_object_dtype(column) or types.is_string_dtype(column)
    )


def is_categorical(column: pd.Series) -> bool:
    """Return whether a column contains text or has the categorical dtype of pandas."""
    return is_text(column) or isinstance(column.dtype, pd.CategoricalDtype)


def check_columns(
    frame: pd.DataFrame, wanted: Iterable[tuple[str, str | None]], file: object
) -> None:
    """Check that the columns that a configuration names exist in a table.

    Args:
        frame: Table.
        wanted: Pairs of a configuration key and the column that the key names. If the column is
            None, the pair is ignored.
        file: Name of the table, for error messages.

    Raises:
        UserError: If a column is missing.
    """
    for key, column in wanted:
        if column is not None:
            check_names([column], frame.columns, f"{key}: column", f" not found in {file}")


def raise_cell_error(where: str, row: int, column: str, problem: str) -> NoReturn:
    """Raise an error that describes the problem of a cell.

    Args:
        where: Name of the file.
        row: Row of the cell, from 0. The message counts from 1 below the header.
        column: Name of the column.
        problem: Description of the problem.

    Raises:
        UserError: Always.
    """
    raise UserError(f"{where}: row {row + 1}, column '{column}': {problem}")


SNIFFED_ROWS = 20
"""Maximum number of rows below the header from which the separator is determined."""


def read_frame(path: Path, names: Iterable[str | None] = ()) -> pd.DataFrame:
    """Read a CSV (comma or semicolon), TSV or Parquet file.

    Args:
        path: File to read.
        names: Columns to read as text if they exist, so that site 01 does not become 1.

    Raises:
        UserError: If the file cannot be read.
    """
    where = f"path: {path}"
    if path.is_dir():
        raise UserError(f"path: expected a file, got the folder '{path}'")
    if not path.is_file():
        raise UserError(f"path: file '{path}' not found{suggest_file(path)}")
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet"):
        raise UserError(f"{where}: unknown suffix '{kind}'; choose .csv, .tsv or .parquet")
    try:
        if kind == ".parquet":
            return pd.read_parquet(path)
        separator = "\t" if kind == ".tsv" else _detect_separator(path)
        _check_cells(path, separator)
        return pd.read_csv(
            path, sep=separator, low_memory=False, dtype=dict.fromkeys(filter(None, names), str)
        )
    except ImportError as error:
        raise UserError(
            f"{where}: Parquet files need pyarrow; run pip install 'hetero_fl[parquet]'"
        ) from error
    except UnicodeError as error:
        raise UserError(
            f"{where}: not encoded in UTF-8 ({error}); save the file as UTF-8"
        ) from error
    except (ValueError, OSError, csv.Error) as error:
        # The errors of pandas and pyarrow are ValueErrors.
        raise UserError(
            f"{where}: not a readable {kind} file ({type(error).__name__}: {error})"
        ) from error


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


def _detect_separator(path: Path) -> str:
    """Return the separator of a CSV file, a comma or a semicolon.

    If the header contains commas and semicolons, the separator that divides all rows into the same
    number of cells is returned.

    Raises:
        UserError: If neither or both separators divide all rows into the same number of cells.
    """
    divided = {}
    for separator in (",", ";"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            cells = csv.reader(file, delimiter=separator)
            divided[separator] = [len(row) for row in islice(cells, SNIFFED_ROWS + 1) if row] or [0]
    if divided[";"][0] < 2:
        return ","
    if divided[","][0] < 2:
        return ";"
    consistent = [separator for separator, counts in divided.items() if len(set(counts)) == 1]
    if len(consistent) == 1:
        return consistent[0]
    raise UserError(
        f"path: {path}: ambiguous separator, as the header has commas and semicolons; save the "
        "file as .tsv"
    )


MAX_LISTED = 20
"""Maximum number of columns that a note lists."""
PATIENT = re.compile("patient|subject|person|mrn", re.IGNORECASE)


def read_table(
    frame: pd.DataFrame,
    path: Path | str,
    label: str,
    *,
    group: str | None = None,
    patient: str | None = None,
    kind: str | None = None,
    categories: Mapping[str, tuple[str, ...]] | None = None,
) -> Dataset:
    """Create a data set from a table.

    Features (float32 `[N, F]`) are the numeric columns and the indicators of the one-hot encoded
    text columns. Other columns of text or dates are excluded and listed in `about` and `notes`.
    Surrounding spaces are removed from text, and labels such as 1.0 become 1.

    A single column of labels is read as classes if the column contains text, booleans, or integers
    with at most 20 distinct values, otherwise as a regression target. Several columns are
    multilabel targets if all values are 0 or 1, otherwise regression targets.

    Args:
        frame: Table.
        path: File or name of the table, for messages. Rows in messages count from 1 below the
            header.
        label: Column of the labels, or several columns separated by commas.
        group: Column of the groups. If None, rows have no groups.
        patient: Column of the patients. If None, rows have no patients.
        kind: Kind of the task, "multiclass", "multilabel" or "regression". If None, the kind is
            inferred from the labels.
        categories: Text columns to one-hot encode, with their values. If None, all text columns
            with fewer than 20 distinct values are encoded.

    Raises:
        UserError: If a column or value is missing, or a cell is not a number.
    """
    labels = _label_columns(frame, label)
    where = f"path: {path}" if isinstance(path, Path) else path
    title = path.name if isinstance(path, Path) else path
    owners = {
        key: column
        for key, column in (("group", group), ("patient", patient))
        if column is not None
    }
    check_columns(frame, [*(("label", column) for column in labels), *owners.items()], path)
    for key, column in owners.items():
        if column in labels:
            raise UserError(f"{key}: must differ from label, got '{column}'; choose another column")
    indexed = {
        key: index_names(parse_names(frame[column], where)) for key, column in owners.items()
    }
    rest = frame.drop(columns=list(set(owners.values())))
    given = () if categories is None else tuple(categories)
    if kind == "multiclass":
        # Names of classes may be similar to decimal commas, such as "1,2".
        targets = rest[labels]
        rest, commas = decimal_commas(rest.drop(columns=labels), where, given)
    else:
        rest, commas = decimal_commas(rest, where, given)
        targets = rest[labels]
        rest = rest.drop(columns=labels)
    encoded = find_categories(rest, where) if categories is None else categories
    encoded = {
        str(name): tuple(encoded[str(name)]) for name in rest.columns if str(name) in encoded
    }
    gaps: list[str] = []
    remarks: list[str] = []
    x, columns, left_out = features(rest, where, gaps, encoded, remarks)
    task, y = _targets(targets, where, kind)
    group_columns = indexed.get("group", (None, ()))
    patient_columns = indexed.get("patient", (None, ()))
    examples = Examples(x, y, *group_columns, *patient_columns)
    used = ColumnLayout(columns, (), tuple(encoded.items())).names
    about = f"table {title}, {len(used)} columns" + (
        f"; left out: {', '.join(left_out)}" if left_out else ""
    )
    summary = [f"label {', '.join(labels)}", *(f"{key} {column}" for key, column in owners.items())]
    summary += _describe_columns(used, encoded, left_out, commas)
    notes = [f"table {title}: {'; '.join(summary)}"]
    notes += [f"table {title}: {remark}" for remark in remarks]
    if patient is None and (name := _find_patient_column(rest)) is not None:
        feature = ", and the column is a feature" if name in used else ""
        notes.append(
            f"table {title}: column '{name}' seems to identify patients and repeats; set "
            f"data.patient to keep the rows of a patient together, otherwise they are divided "
            f"between training and test{feature}"
        )
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


def _describe_columns(
    used: Sequence[str],
    encoded: Mapping[str, Sequence[str]],
    left_out: Mapping[str, str],
    commas: Sequence[str],
) -> list[str]:
    """Return remarks on the columns that are used, encoded or left out."""
    remarks = [f"columns used: {format_list(used, MAX_LISTED)}"]
    if encoded:
        values = [f"{name} ({format_list(v, MAX_LISTED)})" for name, v in encoded.items()]
        remarks.append(f"encoded as indicators: {format_list(values, MAX_LISTED)}")
    reasons = [f"{name} ({reason})" for name, reason in left_out.items()]
    remarks.append(f"left out: {format_list(reasons, MAX_LISTED) or 'none'}")
    if commas:
        remarks.append(f"decimal commas in {format_list(commas, MAX_LISTED)}")
    return remarks


def common_categories(files: Mapping[str, SourceConfig]) -> dict[str, tuple[str, ...]]:
    """Return the values of the text columns to one-hot encode in several tables, keyed by column.

    These are the columns with fewer than `MANY_CATEGORIES` distinct values in all tables together.

    Args:
        files: Sources of the tables, keyed by the configuration key of each source.

    Raises:
        UserError: If a column is text in one table and numeric in another.
    """
    texts: dict[str, dict[str, None]] = {}
    place_of: dict[str, str] = {}
    numeric: dict[str, str] = {}
    for place, source in files.items():
        where = f"{place}.path: {source.path}"
        for column in _feature_columns(source, place):
            name = str(column.name)
            if is_categorical(column) and parse_numbers(column, where, [], CATEGORICAL) is None:
                texts.setdefault(name, {}).update(
                    dict.fromkeys(column_as_text(column).dropna().tolist())
                )
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
    return {
        name: tuple(natural_order(values))
        for name, values in texts.items()
        if len(values) < MANY_CATEGORIES
    }


def _feature_columns(source: SourceConfig, place: str) -> list[pd.Series]:
    try:
        frame = read_frame(Path(str(source.path)).expanduser(), (source.group, source.patient))
        others = [*_label_columns(frame, source.label or ""), source.group, source.patient]
        rest, _ = decimal_commas(
            frame.drop(columns=[n for n in others if n in frame.columns]), f"path: {source.path}"
        )
    except UserError as error:
        raise UserError(f"{place}.{error}") from error
    return [rest[name] for name in rest.columns]


def _label_columns(frame: pd.DataFrame, label: str) -> list[str]:
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
        frame: Columns without labels, groups and patients.
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
    for key in frame.columns:
        # Data frames and Parquet files may have integers as names.
        name = str(key)
        if name in (categories or {}):
            values = (categories or {})[name]
            indicators = encode_indicators(frame[key], values, notes)
            added = dict(zip(indicator_names(name, values), indicators.T, strict=True))
        else:
            column = parse_numbers(frame[key], where, allow_missing)
            added = {} if column is None else {name: column.astype(np.float32)}
            if column is None:
                left_out[name] = _reason_left_out(frame[key])
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


def _reason_left_out(column: pd.Series) -> str:
    if not is_categorical(column):
        return str(column.dtype)
    count = column_as_text(column).nunique()
    return "text" if count < MANY_CATEGORIES else f"text, {count} different values"


def _targets(labels: pd.DataFrame, where: str, kind: str | None) -> tuple[Task, Tensor]:
    columns = [parse_column(labels[name], where) for name in labels.columns]
    titles = tuple(map(str, labels.columns))
    if kind == "multiclass" and len(columns) > 1:
        raise UserError(
            f"label: data.task=multiclass needs one column, got {len(columns)}; set one column or "
            "data.task=multilabel"
        )
    if kind == "multiclass" or (kind is None and len(columns) == 1 and _are_classes(columns[0])):
        y, classes = index_names(parse_names(columns[0], where))
        return Task("multiclass", len(classes), classes), y
    values = []
    for column, title in zip(columns, titles, strict=True):
        found = parse_numbers(column, where)
        if found is None:
            raise UserError(
                f"{where}: column '{title}': expected numbers as {kind or 'multiple'} labels, got "
                "text"
            )
        values.append(found)
    y = torch.from_numpy(np.stack(values, axis=1).astype(np.float32))
    several = len(columns) > 1 and bool(((y == 0) | (y == 1)).all())
    if kind == "multilabel" or (kind is None and several):
        return Task("multilabel", len(columns), titles), y
    return Task("regression", len(columns), titles), y


def _are_classes(column: pd.Series) -> bool:
    """Return whether a column of labels should be read as classes."""
    if not types.is_numeric_dtype(column) or types.is_bool_dtype(column):
        return True
    values = column.unique()
    return len(values) <= MAX_NUMBERED_CLASSES and all(float(v).is_integer() for v in values)


def _find_patient_column(frame: pd.DataFrame) -> str | None:
    """Return the name of a column that seems to identify patients with several rows, or None.

    Columns with two values are treated as indicators.
    """
    for name in frame.columns:
        if PATIENT.search(str(name)) and 2 < frame[name].nunique() < len(frame):
            column = frame[name]
            if not types.is_float_dtype(column) or bool((column == np.floor(column)).all()):
                return str(name)
    return None
