"""Downloads of data sets: the folder, the time limit, error messages, and archives."""

from __future__ import annotations

import io
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from hetero_fl.utils.errors import UserError

TIMEOUT = 60.0
"""Number of seconds without data after which a download fails."""


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
