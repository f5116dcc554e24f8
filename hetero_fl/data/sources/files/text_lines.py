"""Lines of text files, and the cells of lines of CSV."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hetero_fl.utils.errors import UserError, one_line

MARK = codecs.BOM_UTF8
"""Byte order mark that some programs write at the start of a file. It is not part of the text."""


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
        text = decode(content, encodings)
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


def decode(content: bytes, encodings: Sequence[str]) -> str:
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
