"""What a node keeps of a run: its private state by content, what it remembers within a round, its last answer.

States are named by their SHA-256 and never changed. The server says from which one a task starts, so that neither a crash at
either side nor a round that is repeated can leave the two with different ideas of what a client's state is.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hetero_fl.deployment.messages import RequestRefusedError
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import sync_folder, write_atomically

# states: two checkpoints of the server's may name one each, and a task in flight leaves one
MAX_STATES = 4
NONCE = 12  # bytes


class StateLostError(RequestRefusedError):
    """A private state that should be here is not."""


class Cipher:
    """AES-256-GCM, so that a disk that is lost tells nothing. Each file is bound to its name."""

    def __init__(self, key: bytes) -> None:
        self._box = AESGCM(key)

    @classmethod
    def from_key_file(cls, path: Path) -> Cipher:
        """With the key in a file, which is made if it is not there. Raises UserError if it is no key."""
        if not path.exists():
            _make_key(path)
        try:
            key = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: the key cannot be read ({error.strerror})") from None
        if len(key) != 32:
            raise UserError(f"{path}: found {len(key)} bytes; a key has 32")
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise UserError(f"{path}: others can read this key; chmod 600 {path}")
        return cls(key)

    def encrypt(self, data: bytes, name: str) -> bytes:
        nonce = secrets.token_bytes(NONCE)
        return nonce + self._box.encrypt(nonce, data, name.encode())

    def decrypt(self, data: bytes, name: str) -> bytes:
        """Raises InvalidTag for bytes that were changed, or that were sealed with another key or name."""
        return self._box.decrypt(data[:NONCE], data[NONCE:], name.encode())


def _make_key(path: Path) -> None:
    """Write a new key and flush it to disk."""
    new = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(AESGCM.generate_key(256))
        file.flush()
        os.fsync(file.fileno())
    for folder in (path.parent, *(made.parent for made in new)):
        sync_folder(folder)


class NodeStorage:
    """Files of one run in one folder, readable by their owner alone."""

    def __init__(self, folder: Path, cipher: Cipher | None = None) -> None:
        self.folder = folder
        self.cipher = cipher
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)

    def load_state(self, name: str) -> bytes:
        """A private state by its name; none has the empty one. Raises Lost if it is not there, or damaged."""
        if not name:
            return b""
        data = self.read(f"state-{name}")
        if data is None or hashlib.sha256(data).hexdigest() != name:
            raise StateLostError(
                f"the private state that this task starts from ({name[:12]}) is not here any more"
            )
        os.utime(self.folder / f"state-{name}")
        return data

    def save_state(self, data: bytes, protected: Collection[str] = ()) -> str:
        """Keep a private state; its name. The oldest that nobody has asked for goes, but for those to be spared."""
        if not data:
            return ""
        name = hashlib.sha256(data).hexdigest()
        self.write(f"state-{name}", data)
        files = sorted(
            self.folder.glob("state-*"), key=lambda file: file.stat().st_mtime_ns, reverse=True
        )
        for file in files[MAX_STATES:]:
            if file.name.removeprefix("state-") not in protected:
                file.unlink(missing_ok=True)
        return name

    def read(self, name: str) -> bytes | None:
        """A file's content; None if it is not there or was damaged."""
        try:
            data = (self.folder / name).read_bytes()
            return data if self.cipher is None else self.cipher.decrypt(data, name)
        except (FileNotFoundError, InvalidTag):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a file in one step."""
        data = data if self.cipher is None else self.cipher.encrypt(data, name)
        write_atomically(self.folder / name, data, private=True)

    def drop(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def secret(self, name: str) -> bytes:
        """256 bits of the system's, drawn once and kept. Raises UserError if they are there and cannot be read."""
        found = self.read(name)
        if found is None and (self.folder / name).exists():
            raise UserError(
                f"{self.folder / name}: it cannot be opened with this key, or was damaged"
            )
        if found is None:
            found = secrets.token_bytes(32)
            self.write(name, found)
        return found
