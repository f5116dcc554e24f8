"""Private states of clients between rounds: a cache in memory, and files named by their hashes.

The new state of a client is staged after training. Staged states are committed when the server has
used the client's upload. Checkpoints record the names of the states (see `checkpoint.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache

from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import move_tree
from hetero_fl.federation.blob_store import BlobStore
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import CodecError, copy_tree, decode, encode, num_tensor_bytes

FORM = "private state 1"
# Subfolder of the folder of checkpoints.
BLOBS = "blobs"
# Default size of the cache of states in bytes.
MEMORY = 1 << 30


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
        return encode({"models": self.models, "state": self.state}, FORM) if self else b""

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
        return cls(**decode(data, FORM, bounded)) if data else cls()

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

    def stamp(self, client: str) -> str | None:
        """Return the name of a client's committed state, or None if the state is empty.

        Different states have different names.
        """
        return self.committed.get(client)

    def num_bytes(self, client: str) -> int:
        """Return the size of a client's committed state in bytes. 0 if the state is empty.

        If the state is not cached, the size of the encoded state is returned.
        """
        return _num_bytes(self._read(client) or b"")

    def clients(self) -> list[str]:
        """Return the sorted ids of the clients with a committed state that is not empty."""
        return sorted(self.committed)

    def stage(self, client: str, private: PrivateState | bytes) -> str | None:
        """Stage the new state of a client, which replaces a staged state of the client.

        Args:
            client: Id of the client.
            private: The state, or the return value of `PrivateState.encode`.

        Returns:
            The name of the state (see `stamp`), or None if the state is empty.
        """
        self.discard_client(client)
        if not private:
            self.staged[client] = ""
            return None
        if self.blobs is None:
            name = str(next(self._numbers))
        else:
            name = self.blobs.put(private if isinstance(private, bytes) else private.encode())
        self.staged[client] = name
        self._add_to_cache(name, private if isinstance(private, bytes) else private.normalized())
        return name

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

    def load(self, committed: Mapping[str, str], staged: Mapping[str, str]) -> None:
        """Replace all states by the states of a checkpoint.

        Args:
            committed: Name of each client's committed state, keyed by client id.
            staged: Name of each client's staged state, keyed by client id. The name of an empty
                state is an empty string.
        """
        self._cache.clear()
        self.committed = dict(committed)
        self.staged = dict(staged)

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
