"""Files that sources read: checks of folders, lines of text, cells of CSV, and downloads."""

from __future__ import annotations

import codecs
import csv
import io
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from hetero_fl.utils.errors import UserError, one_line

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""Folder of the data that come with the package (see its README.md)."""
MARK = codecs.BOM_UTF8
"""Byte order mark that some programs write at the start of a file. It is not part of the text."""
TIMEOUT = 60.0
"""Number of seconds without data after which a download fails."""


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


@contextmanager
def download_folder(
    name: str, root: Path, advice: str = "set data.path to a local file"
) -> Iterator[Path]:
    """Create the folder for downloads, and convert download errors to a UserError.

    Console output of the download, such as progress bars, is shown on terminals only.

    Args:
        name: Name of the data set, for error messages.
        root: Folder for downloads.
        advice: End of the error message.

    Yields:
        The folder for downloads.

    Raises:
        UserError: If the download fails.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with quiet_unless_terminal():
            yield root
    except UserError:
        raise
    except Exception as error:
        # The exceptions of download packages have no common base class.
        raise UserError(
            f"name: download of {name} failed ({describe_cause(error)}); {advice}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def download_archive(
    name: str, url: str, md5: str, folder: Path, *, inner: str = ".", advice: str
) -> Path:
    """Download and unpack an archive, unless the folder of its content exists.

    The archive is removed afterwards. If unpacking fails, it is kept for the next attempt.

    Args:
        name: Name of the data set, for error messages.
        url: Address of the archive.
        md5: MD5 checksum of the archive.
        folder: Folder for the content, in the folder for downloads.
        inner: Folder in the archive that contains the files.
        advice: End of the error message.

    Returns:
        The folder.

    Raises:
        UserError: If the download or unpacking fails, or the checksum differs.
    """
    if folder.is_dir():
        return folder
    from torchvision.datasets.utils import download_url, extract_archive

    root = folder.parent
    with download_folder(name, root, advice):
        suffix = ".tar.gz" if url.endswith(".tar.gz") else Path(url).suffix
        archive = root / f"{folder.name}{suffix}"
        download_url(url, str(root), archive.name, md5)
        # An interrupted extraction must not look like a complete folder.
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}_", dir=root))
        try:
            extract_archive(str(archive), str(partial))
            os.replace(partial / inner, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        archive.unlink()
    return folder


@contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Suppress console output, such as progress bars, unless it goes to a terminal."""
    stream = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with redirect_stdout(stream), redirect_stderr(stream):
        yield


def describe_cause(error: BaseException) -> str:
    """Return the original cause of a library's error, shortened. Interrupts are raised again."""
    while (cause := _cause(error)) is not None:
        error = cause
    if isinstance(error, KeyboardInterrupt):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)
