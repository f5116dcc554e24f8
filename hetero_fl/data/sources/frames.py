"""Files of tables as frames: comma, semicolon or tabulator between cells, or Parquet."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pandas as pd

from hetero_fl.errors import UserError, beside

LOOK = 20  # rows below the header from which the separator is told


def read_frame(path: Path, names: Iterable[str | None] = ()) -> pd.DataFrame:
    """A CSV (comma or semicolon), TSV (tabulator) or Parquet file. Columns of `names` (of sites, patients; those that there
    are) are read as they are written: site 01 is not 1. Raises UserError."""
    where = f"path: {path}"
    if path.is_dir():
        raise UserError(f"{where}: a folder; name a file in it")
    if not path.is_file():
        raise UserError(f"{where}: no such file{beside(path)}")
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet"):
        raise UserError(f"{where}: found '{kind}'; choose .csv, .tsv or .parquet")
    try:
        if kind == ".parquet":
            return pd.read_parquet(path)
        separator = "\t" if kind == ".tsv" else _separator(path)
        _check_cells(path, separator)
        return pd.read_csv(path, sep=separator, low_memory=False, dtype=dict.fromkeys(filter(None, names), str))
    except ImportError as error:
        raise UserError(f"{where}: Parquet needs pyarrow; pip install 'hetero_fl[parquet]'") from error
    except UnicodeError as error:
        raise UserError(
            f"{where}: not a readable {kind} file: it is not in UTF-8; save it anew so ({error})"
        ) from error
    except (ValueError, OSError, csv.Error) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise UserError(f"{where}: not a readable {kind} file ({type(error).__name__}: {error})") from error


def _check_cells(path: Path, separator: str) -> None:
    """Refuse what pandas reads otherwise than it is written: a name that stands twice, a row longer than the header."""
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
    """Comma or semicolon: whichever divides the header, or if both do, every row alike."""
    divided = {}
    for separator in (",", ";"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            cells = csv.reader(file, delimiter=separator)
            divided[separator] = [len(row) for row in islice(cells, LOOK + 1) if row] or [0]
    if divided[";"][0] < 2:
        return ","
    if divided[","][0] < 2:
        return ";"
    alike = [separator for separator, counts in divided.items() if len(set(counts)) == 1]
    if len(alike) == 1:
        return alike[0]
    raise UserError(f"path: {path}: commas or semicolons between the cells? both are in the header; save it as .tsv")
