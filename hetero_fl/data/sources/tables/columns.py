"""Read table files (CSV, TSV and Parquet), and their columns as numbers, classes and indicators."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from pandas.api import types
from torch import Tensor

from hetero_fl.config.data import ReadConfig
from hetero_fl.data.checks import DIVIDED_PATIENTS, first_true, is_identifier
from hetero_fl.data.registry import TABLE_SUFFIXES
from hetero_fl.utils.errors import UserError, check_names, suggest_file
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.serialization import check_memory
from hetero_fl.utils.text import Caution

INTEGER_PATTERN = re.compile(r"([+-]?\d+)(?:\.0*)?")
"""Pattern of integers such as 1, 01 and 1.0."""


def number_pattern(thousands: str, decimal: str) -> re.Pattern[str]:
    """Return the pattern of numbers with marks between groups of three digits.

    Args:
        thousands: Possible marks of thousands. If empty, digits are not grouped.
        decimal: Possible decimal marks.
    """
    groups = rf"|[1-9]\d{{0,2}}(?:[{re.escape(thousands)}]\d{{3}})+" if thousands else ""
    point = rf"[{re.escape(decimal)}]"
    return re.compile(rf"\s*[+-]?(?:(?:\d+{groups})(?:{point}\d*)?|{point}\d+)(?:[eE][+-]?\d+)?\s*")


SEPARATED = number_pattern(".,'’", ".,")
"""Pattern of numbers with any decimal mark and separator of thousands."""
MANY_CATEGORIES = 20
"""Number of distinct values from which text columns are not one-hot encoded by default."""
SEPARATORS = (",", ";", "|", "\t")
"""Separators of CSV files."""
SPACES = " \N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"
"""Spaces that may separate groups of three digits."""
MARKERS = frozenset(
    (
        "",
        "?",
        "??",
        "-",
        "--",
        "---",
        "–",
        "—",
        ".",
        "..",
        "...",
        "*",
        "na",
        "n/a",
        "n.a.",
        "#n/a",
        "#n/a n/a",
        "#na",
        "1.#ind",
        "-1.#ind",
        "1.#qnan",
        "-1.#qnan",
        "-nan",
        "<na>",
        "nan",
        "nil",
        "null",
        "none",
        "missing",
        "unknown",
    )
)
"""Markers of missing values in columns of numbers, in lower case, those of pandas included."""
NOT_SINGLE = (list, tuple, set, frozenset, dict, np.ndarray, bytearray, complex)
"""Types of cells that are not single numbers, booleans, dates or text."""
CATEGORICAL = "; for categories, list the values in data.categories"
OWNER_NAME = re.compile(
    r"(?i:patient|participant|subject|person|mrn)"
    r"(?:[ _.-]*(?i:id|no|nr|num|number|code|key|name|hash))?$"
)
"""Pattern of names of columns that identify patients, also if there are few patients."""
ID_NAME = re.compile(r"(?i:(?<![a-z])(?:[cps]?id|case))$|[a-z]I[Dd]$")
"""Pattern of names of columns that identify patients if they have many values."""


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


def normalize_frame(
    frame: pd.DataFrame, where: str, categories: Mapping[str, Collection[str]] | None = None
) -> pd.DataFrame:
    """Return a data frame with text as names of columns and rows that are numbered from 0.

    Markers of missing values become NaN, unless they are listed or declared as categories.

    Args:
        frame: Data frame that a program passes. It is not changed.
        where: Name of the data frame, for error messages.
        categories: Text columns to one-hot encode, with their values.

    Raises:
        UserError: If two columns have the same name.
    """
    for name, count in Counter(map(str, frame.columns)).items():
        if count > 1:
            raise UserError(f"{where}: column '{name}' occurs {count} times")
    frame = frame.rename(columns=str).reset_index(drop=True)
    for name in filter(lambda name: is_text(frame[name]), frame.columns):
        frame[name] = _without_markers(frame[name], (categories or {}).get(name, ()))
    return frame


def _without_markers(column: pd.Series, categories: Collection[str]) -> pd.Series:
    """Return a text column in which markers of missing values are NaN.

    `?` is such a marker in every column, the other markers only among numbers, because a minus sign
    is also a result of a test. If the column has `categories`, all markers but these are missing.
    """
    column = column.mask(column.map(lambda cell: cell is np.ma.masked).astype(bool))
    text = column.map(lambda cell: cell.strip().lower() if isinstance(cell, str) else None)
    marked = text.map(MARKERS.__contains__).astype(bool)
    if categories:
        is_listed = column.astype(object).map(lambda cell: str(cell).strip() in categories)
        marked &= ~is_listed.astype(bool)
    # Bytes need not be UTF-8 in a column that is not used.
    rest = column[~marked & column.notna()].map(str).astype(str)
    is_number = pd.to_numeric(rest, errors="coerce").notna() | rest.str.fullmatch(SEPARATED)
    has_markers = bool(categories) or (len(rest) > 0 and is_number.all())
    return column.mask(marked if has_markers else marked & (text == "?"))


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
        UserError: If a cell is missing, not a finite number, or not a single value.
    """
    name = str(column.name)
    check_cells(column, where)
    if not (types.is_numeric_dtype(column) or types.is_bool_dtype(column)):
        if not is_text(column):
            return None
        read = to_numbers(column)
        text = read.isna() & column.notna()
        refuse_separators(column, where)
        if text.any() and read.isna().all():
            return None
        if (row := first_true(text)) is not None:
            cell = str(column.iloc[row])
            remedy = number_hint(where) if re.search(r"\d[.,'’]\d", cell) else hint
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


def check_cells(column: pd.Series, where: str) -> None:
    """Check that the cells of a column are single numbers, booleans, dates or text.

    Raises:
        UserError: If a cell is, for example, a list, a complex number or bytes that are no UTF-8.
    """
    is_declared = isinstance(column.dtype, pd.CategoricalDtype)
    cells = column.astype(object) if is_declared else column
    if not (types.is_object_dtype(cells) or types.is_complex_dtype(cells)):
        return
    if (row := first_true(~cells.map(_is_single).to_numpy(bool))) is not None:
        raise_cell_error(
            where,
            row,
            str(column.name),
            f"expected a number, text or date, got {type(cells.iloc[row]).__name__}; convert the "
            "column to columns of numbers or text, or drop it",
        )


def _is_single(cell: Any) -> bool:
    if isinstance(cell, bytes):
        # pandas converts bytes to text, which must be UTF-8.
        return cell.decode(errors="ignore").encode() == cell
    return not isinstance(cell, NOT_SINGLE)


def number_hint(where: str) -> str:
    """Return the end of a message about a number with other marks, which a CSV file may have."""
    is_csv = re.search(r"path: .*\.[ct]sv$", where, re.IGNORECASE) is not None
    marks = ", or name the marks in data.read.decimal and thousands" if is_csv else ""
    return f"; write numbers as 1234.5{marks}"


def to_numbers(column: pd.Series) -> pd.Series:
    """Return a column as numbers, with infinity for larger numbers and NaN for other cells."""
    try:
        return pd.to_numeric(column, errors="coerce")
    except OverflowError:
        # pandas reads an integer of hundreds of digits as a Python integer.
        return pd.to_numeric(column.astype(str).where(column.notna()), errors="coerce")


def refuse_separators(column: pd.Series, where: str) -> None:
    """Reject a column of text in which all cells are numbers with other separators, such as 1,5.

    Raises:
        UserError: If the column is one of numbers.
    """
    text = column.astype(str)
    if not is_text(column) or not text[column.notna()].str.fullmatch(SEPARATED).all():
        return
    separated = text.str.contains(r"\d[.,'’]\d") & to_numbers(column).isna()
    if (row := first_true(separated.to_numpy(bool))) is not None:
        problem = f"expected a number, got '{text.iloc[row]}'{number_hint(where)}"
        raise_cell_error(where, row, str(column.name), problem)


def parse_names(column: pd.Series, where: str) -> pd.Series:
    """Convert a column of labels, sites or patients to text.

    Surrounding spaces are removed, and 1.0 becomes 1. Leading zeros in a text column are kept.

    Raises:
        UserError: If a value is missing.
    """
    column = strip_text(column, where)
    if types.is_float_dtype(column):
        # Larger numbers, and infinity, do not fit into 64 bits.
        whole = (column == np.floor(column)) & (column.abs() < 2.0**63)
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


def category_values(columns: Sequence[pd.Series]) -> tuple[str, ...]:
    """Return the values of a categorical column in several tables.

    Values that all tables declare alike with the categorical dtype of pandas keep their order,
    which otherwise does not depend on the order of the tables. Declared values need not occur,
    unless there are `MANY_CATEGORIES`.
    """
    found: dict[str, None] = {}
    orders: set[tuple[str, ...] | None] = set()
    for column in columns:
        values = column
        is_declared = isinstance(column.dtype, pd.CategoricalDtype)
        if is_declared:
            is_short = len(column.cat.categories) < MANY_CATEGORIES
            used = column if is_short else column.cat.remove_unused_categories()
            values = used.cat.categories.to_series()
        texts = column_as_text(values).dropna().tolist()
        orders.add(tuple(texts) if is_declared else None)
        found |= dict.fromkeys(texts)
    has_one_order = len(orders) == 1 and None not in orders
    return tuple(found if has_one_order else natural_order(found))


def metadata_array(column: pd.Series) -> np.ndarray:
    """Return a copy of a column as an array, in which text is an array of objects."""
    is_number = types.is_numeric_dtype(column) and not types.is_extension_array_dtype(column)
    dtype = None if is_number or types.is_datetime64_dtype(column) else object
    return column.to_numpy(dtype=dtype, copy=True)


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
            Caution(
                f"column '{column.name}': {int(unknown.sum())} of {len(text)} rows have none of "
                f"{', '.join(values)} (row {row + 1}: '{text.iloc[row]}'); their indicators are 0"
            )
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
        UserError: If a value is missing or not a single value.
    """
    check_cells(column, where)
    if is_categorical(column):
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
    """Return whether a column contains text or other objects, but is no Categorical."""
    if isinstance(column.dtype, pd.CategoricalDtype) or types.is_numeric_dtype(column):
        return False
    return types.is_object_dtype(column) or types.is_string_dtype(column)


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
        if column is None:
            continue
        names = [str(name) for name in frame.columns]
        if column not in names and len(names) == 1 and set(SEPARATORS) & set(names[0]):
            raise UserError(
                f"{key}: column '{column}' not found in {file}, whose only column is '{names[0]}'; "
                "set the separator in data.read.sep"
            )
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


def _is_number(column: pd.Series) -> bool:
    return types.is_numeric_dtype(column) and not types.is_bool_dtype(column)


def looks_like_ids(column: pd.Series) -> tuple[bool, bool]:
    """Return whether the values of a column look like ids, and whether its name does."""
    name = str(column.name)
    is_number = _is_number(column)
    present = column.dropna()
    if not (is_number or is_categorical(column)) or types.is_complex_dtype(column):
        return False, False
    if types.is_float_dtype(column) and not (present == np.floor(present)).all():
        return False, False
    distinct = present.nunique()
    is_owner = distinct > 2 and OWNER_NAME.search(name) is not None
    # A column `id` with few numbers may be a count.
    is_named = is_owner or (
        distinct > (MANY_CATEGORIES if is_number else 2) and ID_NAME.search(name) is not None
    )
    has_span = is_number and not is_named and distinct > 0
    span = float(present.max() - present.min()) if has_span else 0
    is_id = is_identifier(distinct, len(present), span) and (
        is_number or not present.astype(str).str.contains(r"\s").any()
    )
    return bool(is_id), is_named


def describe_identifiers(
    columns: Iterable[pd.Series],
    used: Collection[str],
    in_config: bool,
    patient: Sequence[object] | Tensor | None = None,
) -> list[Caution]:
    """Return warnings about columns that seem to identify patients or rows.

    Such a column repeats, so that the rows of a patient may be divided, or is a feature.

    Args:
        columns: Columns other than labels, groups and patients.
        used: Names of the columns that are features.
        in_config: Whether the patients are set in the configuration instead of by an argument.
        patient: Patient of each row. If None, the rows have no patients.
    """
    remarks = []
    for column in columns:
        name = str(column.name)
        present = column.dropna()
        is_id, is_named = looks_like_ids(column)
        if not (is_id or is_named):
            continue
        keep = f"set data.patient={name}" if in_config else f"pass patient='{name}'"
        feature = ", and the column is a feature" if name in used else ""
        relation = None if patient is None else _relation(present, patient)
        if present.nunique() < len(present) and relation is None:
            too = "" if patient is None else ", too,"
            remarks.append(
                Caution(
                    f"column '{name}' seems to identify patients{too} and repeats{feature}; {keep} "
                    f"to keep the rows of a patient together, otherwise {DIVIDED_PATIENTS}"
                )
            )
        elif feature and (relation or (is_id and _is_number(column))):
            found = relation or "has another integer in almost every row, as an id has"
            cure = f"remove the column, or {keep}" if patient is None else "remove the column"
            remarks.append(Caution(f"column '{name}' {found}, and is a feature; {cure}"))
    return remarks


def _relation(column: pd.Series, patient: Sequence[object] | Tensor) -> str | None:
    """Describe a column of ids if each value belongs to one patient, and otherwise return None."""
    values = column.groupby(np.asarray(patient)[column.index])
    pairs = values.nunique().sum()
    if pairs > column.nunique():
        return None
    is_patient = pairs == values.ngroups
    return "identifies the patients, too" if is_patient else "seems to identify rows of a patient"
