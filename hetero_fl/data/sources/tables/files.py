"""Read table files: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

import pandas as pd

from hetero_fl.config.data import ReadConfig
from hetero_fl.data.checks import first_true
from hetero_fl.data.registry import TABLE_SUFFIXES
from hetero_fl.data.sources.tables.columns import (
    MARKERS,
    number_pattern,
    raise_cell_error,
)
from hetero_fl.utils.errors import UserError, suggest_file
from hetero_fl.utils.serialization import check_memory

SEPARATORS = (",", ";", "|", "\t")
"""Separators of CSV files."""
SPACES = " \N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"
"""Spaces that may separate groups of three digits."""


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
