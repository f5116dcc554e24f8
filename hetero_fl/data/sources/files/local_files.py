"""Checks of folders and files, lines of text files, and the cells of lines of CSV."""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hetero_fl.utils.errors import UserError, one_line

EMBEDDED = Path(__file__).parents[2] / "embedded"
"""Folder of the data that come with the package (see its README.md)."""
MARK = codecs.BOM_UTF8
"""Byte order mark that some programs write at the start of a file. It is not part of the text."""


def check_folder(path: Path) -> None:
    """Check that a folder exists.

    Raises:
        UserError: If the folder does not exist or is a file.
    """
    if path.is_file():
        raise UserError(f"path: {path}: expected a folder, got a file; give its folder")
    if not path.is_dir():
        raise UserError(f"path: folder '{path}' not found")


def contains_file(folder: Path, name: str) -> bool:
    """Return whether a file exists. The name may be one that no file can have."""
    # `Path.is_file` raises OSError if a name is too long.
    return os.path.isfile(folder / name)


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Return the sorted files of a folder whose names do not start with a dot."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def read_lines(
    path: Path, where: str = "path", encodings: Sequence[str] = ("utf-8",)
) -> list[tuple[int, str]]:
    r"""Return the non-blank lines of a file with their numbers, starting at 1.

    A line ends with `\n`, `\r\n` or `\r`.

    Args:
        path: File to read.
        where: Key of the file in the configuration, for error messages.
        encodings: Possible encodings, of which the first that fits is used.

    Raises:
        UserError: If the file cannot be read or no encoding fits.
    """
    try:
        content = path.read_bytes().removeprefix(MARK)
        text = _decode(content, encodings)
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{where}: {path}: line {number}: not encoded in UTF-8; save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{where}: {path}: {error.strerror}") from error
    # Unlike `str.splitlines`, this keeps characters such as U+0085 and U+2028 in a line.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _decode(content: bytes, encodings: Sequence[str]) -> str:
    """Decode text with the first encoding that fits.

    Raises:
        UnicodeDecodeError: If no encoding fits.
    """
    *others, last = encodings
    for encoding in others:
        with suppress(UnicodeDecodeError):
            return content.decode(encoding)
    return content.decode(last)


def split_cells(line: str, where: str) -> list[str]:
    """Return the cells of a line of CSV, without spaces around them.

    Args:
        line: Line to split at commas.
        where: Place of the line, for error messages.

    Raises:
        UserError: If a quote is not closed or is within a cell, or a cell is too long.
    """
    try:
        (cells,) = csv.reader([line], skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise UserError(
            f"{where}: expected CSV with closed quotes, got '{one_line(line, 60)}' ({error})"
        ) from error
    return [cell.strip() for cell in cells]
