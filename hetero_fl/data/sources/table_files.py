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
from hetero_fl.data.dataset import (
    MOST_NUMBERED_CLASSES,
    ColumnLayout,
    Dataset,
    Examples,
    first_true,
    index_names,
    indicator_names,
)
from hetero_fl.utils.errors import UserError, check_names, suggest_file
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import format_list

# Cells of tables as numbers and names: decimal commas, labels written in several ways, values that
# are missing.

INTEGER_PATTERN = re.compile(r"([+-]?\d+)(?:\.0*)?")  # 1, 01 and 1.0
WHOLE = re.compile(r"\s*[+-]?\d+\s*")
COMMA = re.compile(r"\s*[+-]?\d+,\d+(?:[eE][+-]?\d+)?\s*")
THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2},\d{3}\s*")
SEPARATED = re.compile(r"\s*[+-]?\d{1,3}(?:[.,'’]\d{3})+(?:[.,]\d+)?\s*")
MANY_CATEGORIES = 20  # a text column with so many different values is not encoded unless asked for
CATEGORICAL = "; if the column holds categories, list them in data.categories"
REMEDY = "write numbers as 1234.5"


def decimal_commas(
    frame: pd.DataFrame, where: str, besides: Collection[str] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """Return a table with columns such as "0,5" as numbers, and the names of those columns.

    "1,250" may have a decimal comma or separate thousands: it is a decimal comma if another cell of
    the table can be nothing else.

    Args:
        frame: The table.
        where: The file, for messages.
        besides: Columns that are left as they are.

    Raises:
        UserError: If no cell decides, or another column of the table has decimal points that may
            separate thousands.
    """
    columns = {
        name: frame[name].dropna().astype(str)
        for name in frame.columns
        if str(name) not in besides and is_text(frame[name])
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
            f"found '{texts.loc[frame.index[row]]}', decimal comma or thousands? {REMEDY}",
        )
    for name in frame.columns:
        if types.is_float_dtype(frame[name]):
            values = frame[name].dropna().to_numpy(dtype=np.float64)
            values = values[np.isfinite(values) & (values != np.floor(values))]
            if (
                len(values)
                and (np.abs(values) >= 1).all()
                and np.allclose(values * 1000, np.round(values * 1000), 0, 1e-6)
            ):
                raise UserError(
                    f"{where}: column '{name}' has decimal points and column '{next(iter(commas))}' decimal commas: "
                    f"are the points thousands? {REMEDY}"
                )
    frame = frame.copy(deep=False)
    for name in commas:
        frame[name] = frame[name].str.replace(",", ".").astype(np.float64)
    return frame, list(map(str, commas))


def parse_numbers(
    column: pd.Series, where: str, allow_missing: list[str] | None = None, hint: str = ""
) -> np.ndarray | None:
    """Return a column as numbers, float64 `[N]`, or None if it is all text or dates.

    Args:
        column: The column.
        where: The file, for messages.
        allow_missing: Gets a line on the first missing value, if there is one; missing values are
            then NaN. Without it they are refused.
        hint: Ends the message about a cell that is no number.

    Raises:
        UserError: With the row of the cell that is refused.
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
            remedy = f"; {REMEDY}" if re.search(r"\d[.,'’]\d", str(column.iloc[row])) else hint
            raise_cell_error(where, row, name, f"found '{column.iloc[row]}', not a number{remedy}")
        column = read
    gap = first_missing_value(column, where)
    if gap is not None:
        if allow_missing is None:
            raise UserError(f"{gap}; fill or drop them")
        allow_missing.append(gap)
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    beyond = ~np.isfinite(values) | (np.abs(values) > np.finfo(np.float32).max)
    if (row := first_true(beyond & ~column.isna().to_numpy())) is not None:
        raise_cell_error(where, row, name, f"found {values[row]}, not a finite number")
    return values


def _has_separators(column: pd.Series) -> bool:
    """Return whether all cells are numbers with separated thousands, such as 1.234,5."""
    return bool(column.dropna().astype(str).str.fullmatch(SEPARATED).all())


def parse_names(column: pd.Series, where: str) -> pd.Series:
    """Return a column of labels, sites or patients as text, however a file writes them.

    Spaces around a name are left out, and 1.0 is 1; but 01 is not 1 in a column of text. A missing
    value is refused.
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
    """Return a column as text without spaces around it, whole floats as integers; NaN is missing."""
    present = column[column.notna()]
    text = (
        parse_names(present, "")
        if types.is_float_dtype(present)
        else present.astype(str).str.strip()
    )
    return text[text != ""].astype(object).reindex(column.index)


def find_categories(frame: pd.DataFrame, where: str) -> dict[str, tuple[str, ...]]:
    """Return the text columns with fewer than `MANY_CATEGORIES` different values, and their values in order."""
    found = {}
    for name in frame.columns:
        if (
            is_categorical(frame[name])
            and parse_numbers(frame[name], where, [], CATEGORICAL) is None
        ):
            values = column_as_text(frame[name]).dropna().unique().tolist()
            if 0 < len(values) < MANY_CATEGORIES:
                found[str(name)] = tuple(natural_order(values))
    return found


def encode_indicators(
    column: pd.Series, values: Sequence[str], notes: list[str] | None = None
) -> np.ndarray:
    """Return 1 where a column has a value, else 0, as float64 `[N, len(values)]`.

    A row whose value is missing or is none of these has 0 everywhere; a line on such rows is added to `notes`.
    """
    text = column_as_text(column)
    plain = text.map(
        lambda cell: INTEGER_PATTERN.sub(r"\1", cell) if INTEGER_PATTERN.fullmatch(cell) else cell,
        na_action="ignore",
    )
    found = np.stack(
        [(text == value).to_numpy(bool) | (plain == value).to_numpy(bool) for value in values],
        axis=1,
    )
    unknown = text.notna().to_numpy() & ~found.any(axis=1)
    empty = text.isna().to_numpy()
    if notes is not None and (row := first_true(unknown)) is not None:
        what = f"{int(unknown.sum())} of {len(text)} rows have none of {', '.join(values)} (row {row + 1}: '{text.iloc[row]}')"
        notes.append(f"column '{column.name}': {what}; their indicators are 0")
    if notes is not None and (row := first_true(empty)) is not None:
        what = f"{int(empty.sum())} of {len(text)} cells are empty (row {row + 1})"
        notes.append(f"column '{column.name}': {what}; their indicators are 0")
    return found.astype(np.float64)


def parse_column(column: pd.Series, where: str) -> pd.Series:
    """Return a column without spaces around text, as numbers where every text is one."""
    column = strip_text(column, where)
    if is_text(column):
        read = pd.to_numeric(column.astype(str), errors="coerce")
        return read if np.isfinite(read).all() else column
    return column


def strip_text(column: pd.Series, where: str) -> pd.Series:
    """Return a column without spaces around text; refuse a missing value."""
    if is_text(column) or isinstance(column.dtype, pd.CategoricalDtype):
        text = column.astype(object).map(
            lambda value: value.strip() if isinstance(value, str) else value
        )
        column = text.mask(text == "")
    require_no_missing(column, where)
    return column


def require_no_missing(column: pd.Series, where: str) -> None:
    """Raise UserError for a missing value."""
    if (gap := first_missing_value(column, where)) is not None:
        raise UserError(f"{gap}; fill or drop them")


def first_missing_value(column: pd.Series, where: str) -> str | None:
    """Return a line on the first missing value; None if there is none."""
    gaps = column.isna()
    row = first_true(gaps)
    if row is None:
        return None
    return f"{where}: row {row + 1}, column '{column.name}': missing value ({int(gaps.sum())} in {len(gaps)} rows)"


def is_text(column: pd.Series) -> bool:
    """Return whether a column has text, or objects of any kind."""
    return not types.is_numeric_dtype(column) and (
        types.is_object_dtype(column) or types.is_string_dtype(column)
    )


def is_categorical(column: pd.Series) -> bool:
    """Return whether a column may hold categories: it is of text, or of pandas' categorical type."""
    return is_text(column) or isinstance(column.dtype, pd.CategoricalDtype)


def check_columns(
    frame: pd.DataFrame, wanted: Iterable[tuple[str, str | None]], file: object
) -> None:
    """Raise UserError for the first column that a table lacks.

    Args:
        frame: The table.
        wanted: Pairs of a configuration key and the column that it names, None for no column.
        file: What the table is called in the message.
    """
    for key, column in wanted:
        if column is not None:
            check_names([column], frame.columns, f"{key}: {file} has no column")


def raise_cell_error(where: str, row: int, column: str, what: str) -> NoReturn:
    """Raise the error of a cell; `row` counts from 0, messages count from 1 below the header."""
    raise UserError(f"{where}: row {row + 1}, column '{column}': {what}")


# Files of tables as frames: comma, semicolon or tabulator between cells, or Parquet.

SNIFFED_ROWS = 20  # rows below the header that decide about the separator


def read_frame(path: Path, names: Iterable[str | None] = ()) -> pd.DataFrame:
    """Read a CSV (comma or semicolon), TSV or Parquet file.

    Args:
        path: The file.
        names: Columns that are read as they are written (site 01 is not 1), where they exist.

    Raises:
        UserError: If the file cannot be read.
    """
    where = f"path: {path}"
    if path.is_dir():
        raise UserError(f"{where}: a folder; name a file in it")
    if not path.is_file():
        raise UserError(f"{where}: no such file{suggest_file(path)}")
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet"):
        raise UserError(f"{where}: found '{kind}'; choose .csv, .tsv or .parquet")
    try:
        if kind == ".parquet":
            return pd.read_parquet(path)
        separator = "\t" if kind == ".tsv" else _separator(path)
        _check_cells(path, separator)
        return pd.read_csv(
            path, sep=separator, low_memory=False, dtype=dict.fromkeys(filter(None, names), str)
        )
    except ImportError as error:
        raise UserError(
            f"{where}: Parquet needs pyarrow; pip install 'hetero_fl[parquet]'"
        ) from error
    except UnicodeError as error:
        raise UserError(
            f"{where}: not a readable {kind} file: it is not in UTF-8; save it in UTF-8 ({error})"
        ) from error
    except (ValueError, OSError, csv.Error) as error:
        # The errors of pandas and pyarrow are ValueErrors.
        raise UserError(
            f"{where}: not a readable {kind} file ({type(error).__name__}: {error})"
        ) from error


def _check_cells(path: Path, separator: str) -> None:
    """Refuse what pandas reads differently: a repeated name, a row longer than the header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = filter(None, csv.reader(file, delimiter=separator))
        header = next(rows, None)
        if header is None:
            raise UserError(f"path: {path}: an empty file")
        for name, count in Counter(header).items():
            if name and count > 1:
                raise UserError(f"path: {path}: header: column '{name}' stands there {count} times")
        for row, cells in enumerate(rows, 1):
            if len(cells) > len(header):
                found = f"found {len(cells)} cells, one of them '{cells[len(header)]}' beyond the last column"
                raise UserError(f"path: {path}: row {row}: {found}, '{header[-1]}'")


def _separator(path: Path) -> str:
    """Return the separator: the one that divides the header or, if both do, all rows equally."""
    divided = {}
    for separator in (",", ";"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            cells = csv.reader(file, delimiter=separator)
            divided[separator] = [len(row) for row in islice(cells, SNIFFED_ROWS + 1) if row] or [0]
    if divided[";"][0] < 2:
        return ","
    if divided[","][0] < 2:
        return ";"
    alike = [separator for separator, counts in divided.items() if len(set(counts)) == 1]
    if len(alike) == 1:
        return alike[0]
    raise UserError(
        f"path: {path}: commas or semicolons between the cells? both are in the header; save it as .tsv"
    )


# The data set of a table: features, labels, groups and patients.

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
    """Return the data set of a table.

    Features are the columns that are no label, group or patient, float32 `[N, F]`: those of numbers,
    and an indicator per value of encoded text columns. Other columns of text or dates are left out;
    `about` and `notes` name them. Text is read without spaces around it, and 1.0 as 1.

    One column of labels: text, truth values, and whole numbers of at most 20 different values are
    classes (in sorted order), other numbers a regression target. Several columns: multilabel if all
    are 0 or 1, otherwise regression.

    Args:
        frame: The table.
        path: Its file, for messages; rows count from 1 below the header.
        label: The column of labels; several with commas between them.
        group: The column of groups.
        patient: The column of patients.
        kind: multiclass, multilabel or regression, in place of what the labels look like.
        categories: The text columns to encode, with their values; None: those with fewer than 20
            different values.

    Raises:
        UserError: A missing column, a missing value or text among numbers, with file, row and
            column.
    """
    labels = _label_columns(frame, label)
    where = f"path: {path}"
    owners = {
        key: column
        for key, column in (("group", group), ("patient", patient))
        if column is not None
    }
    check_columns(frame, [*(("label", column) for column in labels), *owners.items()], path)
    for key, column in owners.items():
        if column in labels:
            raise UserError(f"{key}: found '{column}', which is a label; name another column")
    whose = {key: index_names(parse_names(frame[column], where)) for key, column in owners.items()}
    rest = frame.drop(columns=list(set(owners.values())))
    given = () if categories is None else tuple(categories)
    if kind == "multiclass":  # classes may be called "1,2"
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
    doubts: list[str] = []
    x, columns, left_out = features(rest, where, gaps, encoded, doubts)
    task, y = _targets(targets, where, kind)
    examples = Examples(x, y, *whose.get("group", (None, ())), *whose.get("patient", (None, ())))
    used = ColumnLayout(columns, (), tuple(encoded.items())).names
    about = f"table {path.name}, {len(used)} columns" + (
        f"; left out: {', '.join(left_out)}" if left_out else ""
    )
    values_of = [f"{name} ({format_list(values, SHOWN)})" for name, values in encoded.items()]
    reasons = [f"{name} ({why})" for name, why in left_out.items()]
    read = [f"label {', '.join(labels)}", *(f"{key} {column}" for key, column in owners.items())]
    read.append(f"columns used: {format_list(used, SHOWN)}")
    if encoded:
        read.append(f"encoded as indicators: {format_list(values_of, SHOWN)}")
    read.append(f"left out: {format_list(reasons, SHOWN) or 'none'}")
    if commas:
        read.append(f"decimal commas in {format_list(commas, SHOWN)}")
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
        min_gap=gap,
        categories=tuple(encoded.items()),
    )


def common_categories(files: Mapping[str, SourceConfig]) -> dict[str, tuple[str, ...]]:
    """Return the text columns of several tables with few different values, and these values.

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
            if is_categorical(column) and parse_numbers(column, where, [], CATEGORICAL) is None:
                texts.setdefault(name, {}).update(
                    dict.fromkeys(column_as_text(column).dropna().tolist())
                )
                place_of.setdefault(name, place)
            elif types.is_numeric_dtype(column) and column.notna().any():
                numeric.setdefault(name, place)
    for name in texts:
        if name in numeric:
            found = f"column '{name}' is text, and numbers in that of {numeric[name].removesuffix(': data')}"
            raise UserError(f"{place_of[name]}: {found}; list its values in data.categories")
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
    """Return the features of a table.

    Args:
        frame: The columns that are no label, group or patient.
        where: The file, for messages.
        allow_missing: Gets a line on each column with missing numbers, which are then NaN. Without
            it they are refused.
        categories: The text columns to encode, with their values.
        notes: Gets a line on each encoded column with empty cells or unknown values.

    Returns:
        The columns of numbers and the indicators, float32 `[N, F]`; their names; and the names of
        the columns that are left out, with what they are.
    """
    if len(frame) == 0:
        raise UserError(f"{where}: found no rows")
    read: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    for key in frame.columns:
        # A frame in memory or a Parquet file may have integers as names.
        name = str(key)
        if name in (categories or {}):
            values = (categories or {})[name]
            found = encode_indicators(frame[key], values, notes)
            added = dict(zip(indicator_names(name, values), found.T, strict=True))
        else:
            column = parse_numbers(frame[key], where, allow_missing)
            added = {} if column is None else {name: column}
            if column is None:
                left_out[name] = _why_left_out(frame[key])
        for other in added:
            if other in read:
                raise UserError(
                    f"{where}: column '{other}' is there twice, once as an indicator; rename one"
                )
        read |= added
    if not read:
        raise UserError(
            f"{where}: no column of numbers or categories besides label, group and patient"
        )
    return (
        torch.from_numpy(np.stack(list(read.values()), axis=1).astype(np.float32)),
        tuple(read),
        left_out,
    )


def _why_left_out(column: pd.Series) -> str:
    if not is_categorical(column):
        return str(column.dtype)
    count = column_as_text(column).nunique()
    return "text" if count < MANY_CATEGORIES else f"text, {count} different values"


def _targets(labels: pd.DataFrame, where: str, kind: str | None) -> tuple[Task, Tensor]:
    columns = [parse_column(labels[name], where) for name in labels.columns]
    titles = tuple(map(str, labels.columns))
    if kind == "multiclass" and len(columns) > 1:
        raise UserError(
            f"label: found {len(columns)} columns, but data.task is multiclass; name one, or choose multilabel"
        )
    if kind == "multiclass" or (kind is None and len(columns) == 1 and _classes(columns[0])):
        y, classes = index_names(parse_names(columns[0], where))
        return Task("multiclass", len(classes), classes), y
    values = []
    for column, title in zip(columns, titles, strict=True):
        found = parse_numbers(column, where)
        if found is None:
            raise UserError(
                f"{where}: column '{title}' is text; {kind or 'several'} labels have to be numbers"
            )
        values.append(found)
    y = torch.from_numpy(np.stack(values, axis=1).astype(np.float32))
    several = len(columns) > 1 and bool(((y == 0) | (y == 1)).all())
    if kind == "multilabel" or (kind is None and several):
        return Task("multilabel", len(columns), titles), y
    return Task("regression", len(columns), titles), y


def _classes(column: pd.Series) -> bool:
    """Return whether one column of labels looks like classes."""
    if not types.is_numeric_dtype(column) or types.is_bool_dtype(column):
        return True
    values = column.unique()
    return len(values) <= MOST_NUMBERED_CLASSES and all(float(v).is_integer() for v in values)


def _patients(frame: pd.DataFrame) -> str | None:
    """Return a column that seems to name patients with several rows each; None if there is none.

    A column of two values is an indicator, not names.
    """
    for name in frame.columns:
        if PATIENT.search(str(name)) and 2 < frame[name].nunique() < len(frame):
            column = frame[name]
            if not types.is_float_dtype(column) or bool((column == np.floor(column)).all()):
                return str(name)
    return None
