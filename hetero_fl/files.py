"""Files written in one step: after a crash at any moment they hold the old content or the new, never half of one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

CHUNK = 1 << 20  # bytes in memory while a file is hashed


def write_atomically(path: Path, data: bytes, private: bool = False) -> None:
    """Replace a file: written beside it, flushed to disk, then renamed. Its folder is made if it is not there.

    `private`: readable by its owner alone, at every moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same temporary name: what a crash leaves behind is overwritten, not piled up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if private:
            temporary.unlink(missing_ok=True)  # one that a crash left may be readable by others
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits. Raises OSError if it cannot be read."""
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            checksum.update(chunk)
    return checksum.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename durable; systems that cannot open a folder (Windows) do it by themselves."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
