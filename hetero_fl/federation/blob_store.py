"""Content-addressed files, which the server and the nodes use for private state and checkpoints."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from hetero_fl.communication.authenticated_encryption import decrypt, encrypt
from hetero_fl.core.payload import PayloadError
from hetero_fl.utils.serialization import CodecError, sync_folder

# Number of threads that flush or delete files.
THREADS = 16
_NAME = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """Folder of immutable files, each of which has the hash of its content as name.

    A new file has a temporary name until `sync` has flushed it to disk. A crash therefore never
    leaves a truncated file under a final name. The folder has one writer at a time.

    Args:
        folder: The folder, which is created with the first file. A file is in the subfolder that is
            named after the first two digits of its name.
        key: Key of the names. If None, names are SHA-256 hashes. Otherwise, they are HMACs, which
            do not confirm a guess of the content, and only the owner can read the files.
        encryption_key: Key that encrypts the files, 32 bytes. If None, files are not encrypted.
    """

    def __init__(
        self, folder: Path, key: bytes | None = None, encryption_key: bytes | None = None
    ) -> None:
        self.folder = folder
        self.key = key
        self.encryption_key = encryption_key
        self._mode = 0o777 if key is None else 0o700
        # Names of the files that are not flushed to disk yet.
        self._unsynced: set[str] = set()

    @cached_property
    def names(self) -> set[str]:
        """Names of all files, including temporary files that a crash has left."""
        return {path.name for path in self.folder.glob("??/*")}

    def name_of(self, data: bytes) -> str:
        """Return the name of a file with this content, 64 hexadecimal digits."""
        if self.key is None:
            return hashlib.sha256(data).hexdigest()
        return hmac.new(self.key, data, hashlib.sha256).hexdigest()

    def path(self, name: str) -> Path:
        """Return the current path of a file."""
        path = self.folder / name[:2] / name
        return _temporary(path) if name in self._unsynced else path

    def put(self, data: bytes) -> str:
        """Write a file, which `get` returns from now on and which is on disk after `sync`.

        An existing file with this content is replaced, because it may be damaged.

        Returns:
            Name of the file.
        """
        name = self.name_of(data)
        # This lists the files before the first one is written.
        names = self.names
        if name in self._unsynced:
            return name
        if self.encryption_key is not None:
            data = encrypt(self.encryption_key, data, name.encode())
        path = _temporary(self.path(name))
        self.folder.mkdir(self._mode, parents=True, exist_ok=True)
        path.parent.mkdir(self._mode, exist_ok=True)
        # A temporary file that a crash has left may be a hard link.
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(path, flags, self._mode & 0o666), "wb") as file:
            file.write(data)
        names.add(name)
        self._unsynced.add(name)
        return name

    def get(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            CodecError: If the file is damaged, or the name is not the name of a file.
            OSError: If the file is missing or cannot be read.
        """
        if _NAME.fullmatch(name) is None:
            raise CodecError(f"expected 64 hexadecimal digits, got '{name[:80]}'")
        data = self.path(name).read_bytes()
        try:
            if self.encryption_key is not None:
                data = decrypt(self.encryption_key, data, name.encode())
        except PayloadError as error:
            raise CodecError(f"{name}: {error}") from None
        if self.name_of(data) != name:
            raise CodecError(f"the content of {name} does not match its name")
        return data

    def sync(self) -> None:
        """Flush all new files to disk and give them their final names.

        If a file cannot be flushed, the next call tries again.

        Raises:
            OSError: If a file cannot be flushed, for example because the disk is full.
        """
        names = sorted(self._unsynced)
        _in_threads(self._sync_file, names)
        folders = {self.path(name).parent for name in names}
        _in_threads(sync_folder, {*folders, self.folder, self.folder.parent})

    def _sync_file(self, name: str) -> None:
        temporary = self.path(name)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, temporary.with_suffix(""))
        self._unsynced.remove(name)

    def keep(self, names: Collection[str]) -> None:
        """Delete all files whose names are not in `names`."""
        unused = self.names.difference(names)
        _in_threads(self._remove_file, unused)
        self._unsynced -= unused
        self.names -= unused

    def _remove_file(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_suffix(".tmp")


def _in_threads(function: Callable[[Any], None], arguments: Collection[Any]) -> None:
    """Call a function for each argument in parallel, because one write of a disk serves many."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(function, arguments))
