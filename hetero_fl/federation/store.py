"""Private states of clients between rounds, and checkpoints of a run, in content-addressed files.

The new state of a client is staged after training. Staged states are committed when the server has
used the client's upload. A checkpoint is a small file with the name of a blob, the head, which
names all other blobs of the checkpoint: the committed states, and the rest of the run's state.
Blobs of unchanged states belong to several checkpoints. Staged states belong to none, because a
resumed run trains their clients again. The nodes of a deployment store their states as blobs, too.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache

from hetero_fl.communication.authenticated_encryption import decrypt, encrypt
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import move_tree
from hetero_fl.core.payload import PayloadError
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.serialization import (
    CodecError,
    as_bytes,
    as_tensor,
    copy_tree,
    decode,
    encode,
    num_tensor_bytes,
    refuse_malformed,
    sync_folder,
    write_atomically,
)

# Number of threads that flush or delete files.
THREADS = 16
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")


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
        if _BLOB_NAME.fullmatch(name) is None:
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


STATE_FORM = "private state 1"
CHECKPOINT_FORM = "hetero_fl checkpoint 4"
# First bytes of the checkpoints of earlier versions.
EARLIER = b"HFLCKPT"
# Maximum size in bytes of nested dictionaries that are written and read as a whole. Larger
# dictionaries are split, so that a second copy of the whole state is never in memory.
PIECE = 16 << 20
KEPT_CHECKPOINTS = 2
# Subfolder of the folder of checkpoints.
BLOBS = "blobs"
# Default size of the cache of states in bytes.
MEMORY = 1 << 30
_CHECKPOINT_NAME = re.compile(r"round-(\d{6,})\.ckpt")


@dataclass
class PrivateState:
    """Private state of one client.

    Attributes:
        models: Tensors of the client's personal models, keyed by slot (name of the model) and
            tensor name.
        state: Further state, as nested dictionaries and lists of tensors and plain values.
    """

    models: dict[str, Tensors] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.models or self.state)

    def encode(self) -> bytes:
        """Encode the state for storage and for other processes.

        An empty state is encoded as `b""`.
        """
        return encode({"models": self.models, "state": self.state}, STATE_FORM) if self else b""

    @classmethod
    def decode(cls, data: bytes, bounded: bool = False) -> PrivateState:
        """Decode the return value of `encode`.

        Args:
            data: The encoded state.
            bounded: Whether the bytes are untrusted (see `serialization.decode`).

        Raises:
            CodecError: If the bytes are malformed.
            TypeError: If the bytes encode an object other than a private state.
        """
        return cls(**decode(data, STATE_FORM, bounded)) if data else cls()

    @property
    def num_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return num_tensor_bytes([self.models, self.state])

    def on_cpu(self) -> PrivateState:
        """Return the state with all tensors on the CPU."""
        cpu = torch.device("cpu")
        return PrivateState(move_tree(self.models, cpu), move_tree(self.state, cpu))

    def normalized(self) -> PrivateState:
        """Return a copy with contiguous tensors, as if the state had been encoded and decoded."""
        return PrivateState(**copy_tree({"models": self.models, "state": self.state}))


class StateStore:
    """Store of the private states of clients.

    Clients with an empty state take no memory. Cached states are equal to the states on disk.
    Results therefore do not depend on the size of the cache or on whether a run is resumed.

    Args:
        folder: Folder of the checkpoints, to which staged states are written. If None, all states
            are stored in memory.
        memory: Maximum size of the cache in bytes. Ignored if `folder` is None.

    Attributes:
        blobs: Files of the states, or None if there is no folder.
        committed: Name of each client's committed state, keyed by client id. Without a folder,
            names are numbers. Clients with an empty state are missing.
        staged: Name of each client's staged state, keyed by client id. The name of an empty state
            is an empty string.
        notes: State of the clients between the exchanges of a round, keyed by client id. The notes
            are never written to disk.
    """

    def __init__(self, folder: Path | None = None, memory: int = MEMORY) -> None:
        self.folder = folder
        self.memory = memory
        self.blobs = None if folder is None else BlobStore(folder / BLOBS)
        self.committed: dict[str, str] = {}
        self.staged: dict[str, str] = {}
        self.notes: dict[str, bytes] = {}
        # Cached states, keyed by name.
        self._cache: LRUCache[str, PrivateState | bytes] = LRUCache(
            math.inf if folder is None else memory, getsizeof=_num_bytes
        )
        self._numbers = itertools.count()

    @property
    def cached_bytes(self) -> int:
        """Size of the cached states in bytes."""
        return int(self._cache.currsize)

    def get(self, client: str) -> PrivateState:
        """Return the committed state of a client.

        Returns:
            The state, which must not be modified in place. If the client has no committed state, an
            empty state is returned.

        Raises:
            RunFailedError: If the state is damaged on disk.
        """
        state = self._read(client)
        if isinstance(state, bytes):
            state = PrivateState.decode(state)
            self._add_to_cache(self.committed[client], state)
        return state or PrivateState()

    def encoded(self, client: str) -> bytes | None:
        """Return the encoded committed state of a client, or None if the state is empty.

        Raises:
            RunFailedError: If the state is damaged on disk.
        """
        state = self._read(client)
        return state.encode() if isinstance(state, PrivateState) else state

    def clients(self) -> list[str]:
        """Return the sorted ids of the clients with a committed state that is not empty."""
        return sorted(self.committed)

    def stage(self, client: str, private: PrivateState | bytes) -> None:
        """Stage the new state of a client, which replaces a staged state of the client.

        Args:
            client: Id of the client.
            private: The state, or the return value of `PrivateState.encode`.
        """
        self.discard_client(client)
        if not private:
            self.staged[client] = ""
            return
        if self.blobs is None:
            name = str(next(self._numbers))
        else:
            name = self.blobs.put(private if isinstance(private, bytes) else private.encode())
        self.staged[client] = name
        self._add_to_cache(name, private if isinstance(private, bytes) else private.normalized())

    def discard_client(self, client: str) -> None:
        """Drop the staged state of a client, for example because the upload cannot be used.

        This method has no effect if the client has no staged state.
        """
        self._cache.pop(self.staged.pop(client, ""), None)

    def commit(self, clients: Collection[str] | None = None) -> None:
        """Commit staged states, which replace the clients' previous states, and clear all notes.

        Args:
            clients: Ids of the clients whose states are committed. If None, all staged states are
                committed.
        """
        used = list(self.staged)
        if clients is not None:
            used = [client for client in clients if client in self.staged]
        for client in used:
            name = self.staged.pop(client)
            if (previous := self.committed.pop(client, "")) != name:
                self._cache.pop(previous, None)
            if name:
                self.committed[client] = name
        self.notes.clear()

    def discard(self) -> None:
        """Drop all staged states and all notes. The next checkpoint deletes their files."""
        for client in list(self.staged):
            self.discard_client(client)
        self.notes.clear()

    def reset(self, committed: Mapping[str, str]) -> None:
        """Replace all states by those of a checkpoint.

        Args:
            committed: Name of each client's state, keyed by client id.
        """
        self._cache.clear()
        self.committed = dict(committed)
        self.staged.clear()

    def _read(self, client: str) -> PrivateState | bytes | None:
        """Return the cached state, else the encoded state on disk. None if the state is empty."""
        name = self.committed.get(client, "")
        if not name or name in self._cache:
            return self._cache.get(name)
        assert self.blobs is not None, "without a folder, all states are cached"
        try:
            return self.blobs.get(name)
        except (CodecError, OSError) as error:
            raise RunFailedError(
                f"the private state of {client} is damaged on disk ({error}); "
                "resume the run from an undamaged checkpoint"
            ) from None

    def _add_to_cache(self, name: str, value: PrivateState | bytes) -> None:
        if _num_bytes(value) <= self._cache.maxsize:
            self._cache[name] = value


def _num_bytes(value: PrivateState | bytes) -> int:
    return len(value) if isinstance(value, bytes) else value.num_bytes


class EarlierVersionError(UserError):
    """Raised when a checkpoint was written by an earlier version of hetero_fl."""


class Checkpoints:
    """Checkpoints of a run, in the folder of the state store.

    Args:
        store: Store of the clients' private states.
        log: Function that is called with a message for each damaged checkpoint.

    Raises:
        ValueError: If the store has no folder, so that private states are only in memory.
    """

    def __init__(self, store: StateStore, log: Callable[[str], None]) -> None:
        if store.folder is None or store.blobs is None:
            raise ValueError("store: must have a folder for checkpoints, got a store in memory")
        self.store = store
        self.folder = store.folder
        self.blobs = store.blobs
        self.log = log
        # Names of the blobs of each kept checkpoint.
        self._names: dict[Path, set[str]] = {}

    def save(
        self, completed: int, state: Mapping[str, Any], kept_rounds: Collection[int] = ()
    ) -> Path:
        """Write a checkpoint, including the committed private states.

        Args:
            completed: Number of completed rounds.
            state: The rest of the run's state, as nested dictionaries.
            kept_rounds: Rounds whose checkpoints are kept, in addition to the two newest.

        Returns:
            Path of the checkpoint.
        """
        path = self.folder / checkpoint_name(completed)
        tree = self._put_tree(dict(state))
        head = Head(tree, self.store.committed)
        name = self.blobs.put(head.encode())
        self.blobs.sync()
        write_atomically(path, name.encode())
        self._names[path] = {name, *head.names()}
        # Later files are damaged checkpoints, which `load_newest` has skipped.
        self._remove_files_after(completed)
        self._remove_unused_files(kept_rounds)
        return path

    def _put_tree(self, tree: Any) -> Any:
        """Write nested dictionaries, and return the name of the blob.

        If the dictionary is larger than `PIECE`, each value is written separately, and a dictionary
        of names is returned.
        """
        if isinstance(tree, dict) and num_tensor_bytes(tree) > PIECE:
            return {key: self._put_tree(value) for key, value in tree.items()}
        return self.blobs.put(encode(tree, CHECKPOINT_FORM))

    def load(self, completed: int) -> dict[str, Any] | None:
        """Load the checkpoint of a round, including the private states.

        All private states in the store are replaced by the private states in the checkpoint.

        Args:
            completed: Number of completed rounds.

        Returns:
            The rest of the run's state, or None if the checkpoint is missing or damaged. The store
            is then empty.
        """
        return self._load_first_undamaged(lambda number: number == completed)

    def load_newest(self) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint, including the private states.

        Returns:
            The rest of the run's state, or None if there is no checkpoint.

        Raises:
            RunFailedError: If all checkpoints are damaged.
            EarlierVersionError: If the checkpoints were written by an earlier version.
        """
        tree = self._load_first_undamaged(lambda _number: True)
        if tree is None and checkpoint_files(self.folder):
            raise RunFailedError(
                f"{self.folder}: all checkpoints are damaged; start a new run in another folder"
            )
        return tree

    def load_before(self, completed: int) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint before a round, and remove later checkpoints.

        Args:
            completed: Number of completed rounds. Only checkpoints with fewer completed rounds are
                considered.

        Returns:
            The rest of the run's state, or None if there is no such checkpoint. The store is then
            empty, and no checkpoint is removed.
        """
        tree = self._load_first_undamaged(lambda number: number < completed)
        if tree is not None:
            self._remove_files_after(completed - 1)
        return tree

    def _load_first_undamaged(self, is_considered: Callable[[int], bool]) -> dict[str, Any] | None:
        self.store.reset({})
        files = [p for p in checkpoint_files(self.folder) if is_considered(checkpoint_round(p))]
        for path in reversed(files):
            try:
                tree, head = read_checkpoint(path)
            except (CodecError, OSError) as error:
                fallback = "" if path == files[0] else "; using the previous checkpoint"
                self.log(f"{path.name}: damaged ({error}){fallback}")
                continue
            self.store.reset(head.committed)
            return tree
        return None

    def _remove_files_after(self, completed: int) -> None:
        for path in checkpoint_files(self.folder):
            if checkpoint_round(path) > completed:
                path.unlink()

    def _remove_unused_files(self, kept_rounds: Collection[int]) -> None:
        """Remove checkpoints that are not kept, and the blobs that no kept checkpoint names."""
        files = checkpoint_files(self.folder)
        kept = [path for path in files if checkpoint_round(path) in kept_rounds]
        kept += files[-KEPT_CHECKPOINTS:]
        for path in set(files).difference(kept):
            path.unlink()
        self._names = {path: self._names.get(path) or self._read_names(path) for path in kept}
        self.blobs.keep(set(self.store.staged.values()).union(*self._names.values()))

    def _read_names(self, path: Path) -> set[str]:
        """Return the names of the blobs of a checkpoint. The names in a damaged one are unknown."""
        with suppress(CodecError, OSError), refuse_malformed():
            name = _read_name(path)
            return {name, *Head.decode(self.blobs.get(name)).names()}
        return set()


def checkpoint_name(completed: int) -> str:
    """Return the file name of the checkpoint after `completed` rounds."""
    return f"round-{completed:06}.ckpt"


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints in a folder, sorted by round.

    Other files are ignored.
    """
    return sorted(
        (path for path in folder.glob("round-*.ckpt") if _CHECKPOINT_NAME.fullmatch(path.name)),
        key=checkpoint_round,
    )


def checkpoint_round(path: Path) -> int:
    """Return the number of completed rounds in the file name of a checkpoint.

    Raises:
        ValueError: If the file name does not have the form of `checkpoint_name`.
    """
    match = _CHECKPOINT_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"path: expected a file name such as {checkpoint_name(1)}, got {path}")
    return int(match[1])


@dataclass(frozen=True)
class Head:
    """Names of the blobs of a checkpoint.

    Attributes:
        tree: Names of the blobs with the state of the run without private states. Either one name,
            or nested dictionaries of names.
        committed: Name of each client's private state, keyed by client id.
    """

    tree: Any
    committed: dict[str, str]

    def encode(self) -> bytes:
        """Encode the head, with committed states as a table, because there may be a million."""
        committed = {
            # Client ids are file names, so that none contains a slash.
            "clients": "".join(f"{client}/" for client in self.committed),
            "names": as_tensor(bytes.fromhex("".join(self.committed.values()))),
        }
        return encode({"tree": self.tree, "committed": committed}, CHECKPOINT_FORM)

    @classmethod
    def decode(cls, data: bytes) -> Head:
        """Decode the return value of `encode`.

        Raises:
            CodecError: If the bytes are malformed.
        """
        head = decode(data, CHECKPOINT_FORM, bounded=False)
        clients = head["committed"]["clients"].split("/")[:-1]
        digits = as_bytes(head["committed"]["names"]).hex()
        names = [digits[start : start + 64] for start in range(0, len(digits), 64)]
        return cls(head["tree"], dict(zip(clients, names, strict=True)))

    def names(self) -> set[str]:
        """Return all names except that of the head."""
        return {*_leaves(self.tree), *self.committed.values()}


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Head]:
    """Read a checkpoint, and verify all its blobs.

    Returns:
        The state of the run without private states, and the names of the blobs.

    Raises:
        CodecError: If any byte of the checkpoint is damaged.
        OSError: If a file is missing or cannot be read.
        EarlierVersionError: If the checkpoint was written by an earlier version.
    """
    blobs = BlobStore(path.parent / BLOBS)
    # Anyone can write a file with a valid checksum.
    with refuse_malformed():
        head = Head.decode(blobs.get(_read_name(path)))
        for name in head.names():
            blobs.get(name)
        return _read_tree(head.tree, blobs), head


def _read_name(path: Path) -> str:
    """Return the name of the head of a checkpoint."""
    with open(path, "rb") as file:
        content = file.read(1000)
    if content.startswith(EARLIER):
        raise EarlierVersionError(
            f"{path}: written by an earlier version of hetero_fl; start a new run in another folder"
        )
    return content.decode()


def _read_tree(names: Any, blobs: BlobStore) -> Any:
    if isinstance(names, dict):
        return {key: _read_tree(value, blobs) for key, value in names.items()}
    return decode(blobs.get(names), CHECKPOINT_FORM, bounded=False)


def _leaves(names: Any) -> list[str]:
    """Return the leaves of nested dictionaries."""
    if isinstance(names, dict):
        return [leaf for value in names.values() for leaf in _leaves(value)]
    return [names]
