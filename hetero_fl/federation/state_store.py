"""Storage of clients' private state between rounds, in append-only segment files.

The new state of a client is staged after training. Staged states are committed when the server has
used the client's upload. The next checkpoint seals the segment (see `checkpoint.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cachetools import LRUCache

from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import move_tree
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import (
    CodecError,
    copy_tree,
    decode,
    encode,
    num_tensor_bytes,
    sync_folder,
)

MAGIC = b"HFLCKPT2"
# Maximum number of bytes in memory while a blob is verified or copied.
CHUNK = 1 << 20
# Number of bytes after the head: the length of the head and a SHA-256 checksum.
TRAILER = 8 + 32
FORM = "private state 1"
# Default size of the cache of states in bytes.
MEMORY = 1 << 30
# If less than 1 / COMPACT of a segment is in use, the part in use is copied, and the segment is
# removed.
COMPACT = 4


class Segment:
    """File that contains blobs, which are byte strings such as encoded states.

    A segment consists of 8 magic bytes, the blobs, the head, the length of the head (8 bytes,
    little-endian), and the SHA-256 checksum of the head and the length. The head contains the
    locations and checksums of blobs in this segment and in older segments. Locations refer to the
    segment object and therefore remain valid when the file is renamed.

    Args:
        path: Path of the file.
        size: Size of the file in bytes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size

    @classmethod
    def open(cls, path: Path) -> Segment:
        """Open a sealed segment.

        Raises:
            OSError: If the file does not exist or is not accessible.
        """
        return cls(path, path.stat().st_size)

    def read(self, location: BlobLocation) -> bytes:
        """Read a blob, and verify the checksum.

        Raises:
            CodecError: If the blob is damaged.
            OSError: If the file cannot be read.
        """
        # `join` does not copy a single chunk.
        return b"".join(self.stream(location, self.size))

    def stream(self, location: BlobLocation, chunk_size: int = CHUNK) -> Iterator[bytes]:
        """Yield the chunks of a blob, and verify the checksum after the last chunk.

        Raises:
            CodecError: If the blob is damaged. Raised after all chunks have been yielded.
            OSError: If the file cannot be read.
        """
        checksum = hashlib.sha256()
        # The location may be damaged, too.
        length = min(location.length, self.size)
        with open(self.path, "rb") as file:
            file.seek(location.offset)
            for start in range(0, length, chunk_size):
                chunk = file.read(min(chunk_size, length - start))
                checksum.update(chunk)
                yield chunk
        if checksum.digest() != location.digest:
            raise CodecError(f"a checksum in {self.path.name} does not match")

    def verify(self, location: BlobLocation) -> None:
        """Verify the checksum of a blob. Only one chunk is in memory at a time.

        Raises:
            CodecError: If the blob is damaged.
            OSError: If the file cannot be read.
        """
        for _ in self.stream(location):
            pass

    def head(self) -> bytes:
        """Return the head of a sealed segment.

        Raises:
            CodecError: If the magic bytes, the head or the bytes after the head are damaged.
            OSError: If the file cannot be read.
        """
        with open(self.path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CodecError("not a checkpoint of this version, or its first bytes are damaged")
            file.seek(max(0, self.size - TRAILER))
            trailer = file.read(TRAILER)
            length = int.from_bytes(trailer[:8], "little")
            file.seek(max(0, self.size - TRAILER - length))
            head = file.read(min(length, self.size))
        if hashlib.sha256(head + trailer[:8]).digest() != trailer[8:]:
            raise CodecError("its checksum does not match, or it is truncated")
        return head


class BlobLocation(NamedTuple):
    """Location and checksum of a blob.

    Attributes:
        segment: The segment that contains the blob.
        offset: Offset of the first byte.
        length: Number of bytes.
        digest: SHA-256 checksum.
    """

    segment: Segment
    offset: int
    length: int
    digest: bytes

    def read(self) -> bytes:
        """Read the blob, and verify the checksum (see `Segment.read`)."""
        return self.segment.read(self)


class OpenSegment(Segment):
    """Segment to which blobs can be appended.

    The file has a temporary name until the segment is sealed, so that a sealed segment is always
    complete. The file is closed after each call, because the process may be killed at any time.

    Args:
        folder: Folder of the file.
    """

    def __init__(self, folder: Path) -> None:
        # The name is always the same, so that files do not accumulate after crashes.
        super().__init__(folder / ".next.ckpt.tmp", 0)

    def append(self, data: bytes) -> BlobLocation:
        """Append a blob, and return the location of the blob.

        If writing fails, the next blob overwrites the incomplete blob.
        """
        return self._append([data], hashlib.sha256(data).digest())

    def copy(self, location: BlobLocation) -> BlobLocation:
        """Append a blob of another segment, and return the new location of the blob.

        Only one chunk is in memory at a time.

        Raises:
            CodecError: If the blob is damaged in the other segment.
        """
        return self._append(location.segment.stream(location), location.digest)

    def _append(self, chunks: Iterable[bytes], digest: bytes) -> BlobLocation:
        if not self.size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(MAGIC)
            self.size = len(MAGIC)
        end = self.size
        with open(self.path, "r+b") as file:
            file.seek(end)
            for chunk in chunks:
                end += file.write(chunk)
        location = BlobLocation(self, self.size, end - self.size, digest)
        self.size = end
        return location

    def truncate(self, size: int) -> None:
        """Remove all blobs at offsets from `size` on."""
        if size < self.size:
            os.truncate(self.path, size)
            self.size = size

    def seal(self, path: Path, head: bytes) -> None:
        """Append the head, flush the file to disk, and rename the file.

        No blobs can be appended afterwards.

        Args:
            path: New path of the file.
            head: The encoded head.
        """
        length = len(head).to_bytes(8, "little")
        self.append(head)
        with open(self.path, "r+b") as file:
            file.seek(self.size)
            file.write(length + hashlib.sha256(head + length).digest())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.path, path)
        sync_folder(path.parent)
        self.path = path
        self.size += TRAILER


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


@dataclass
class StateVersion:
    """Staged or committed version of a client's state.

    Attributes:
        stamp: Number of the version, which is unique in a store.
        location: Location on disk, or None if the store has no folder.
    """

    stamp: int
    location: BlobLocation | None


class StateStore:
    """Store of the private states of clients.

    Clients with an empty state take no memory. Cached states are equal to the states on disk.
    Results therefore do not depend on the size of the cache or on whether a run is resumed.

    Args:
        folder: Folder to which staged states are written. If None, all states are stored in memory.
        memory: Maximum size of the cache in bytes. Ignored if `folder` is None.

    Attributes:
        open_segment: The segment to which states are written, or None if there is no folder.
        notes: State of the clients between the exchanges of a round, keyed by client id. The notes
            are never written to disk.
    """

    def __init__(self, folder: Path | None = None, memory: int = MEMORY) -> None:
        self.folder = folder
        self.memory = memory
        self.open_segment: OpenSegment | None = None
        self.notes: dict[str, bytes] = {}
        # Cached states, keyed by stamp.
        self._cache: LRUCache[int, PrivateState | bytes] = LRUCache(
            math.inf if folder is None else memory, getsizeof=_num_bytes
        )
        self._committed: dict[str, StateVersion] = {}
        # The value is None for a client whose new state is empty.
        self._staged: dict[str, StateVersion | None] = {}
        self._stamps = itertools.count()
        # Size of the open segment at the last commit.
        self._committed_size = 0
        self.start_segment()

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
        version = self._committed.get(client)
        if version is None:
            return PrivateState()
        state = self._load(client, version)
        if isinstance(state, bytes):
            state = PrivateState.decode(state)
            self._add_to_cache(version.stamp, state)
        return state

    def encoded(self, client: str) -> bytes | None:
        """Return the encoded committed state of a client, or None if the state is empty.

        Raises:
            RunFailedError: If the state is damaged on disk.
        """
        version = self._committed.get(client)
        if version is None:
            return None
        state = self._load(client, version)
        return state if isinstance(state, bytes) else state.encode()

    def stamp(self, client: str) -> int | None:
        """Return the version number of a client's committed state, or None if the state is empty.

        The number changes with each commit of a new state.
        """
        version = self._committed.get(client)
        return None if version is None else version.stamp

    def num_bytes(self, client: str) -> int:
        """Return the size of a client's committed state in bytes. 0 if the state is empty.

        If the state is not cached, the size of the encoded state is returned.
        """
        version = self._committed.get(client)
        return 0 if version is None else _num_bytes(self._load(client, version))

    def clients(self) -> list[str]:
        """Return the sorted ids of the clients with a committed state that is not empty."""
        return sorted(self._committed)

    def stage(self, client: str, private: PrivateState | bytes) -> int | None:
        """Stage the new state of a client, which replaces a staged state of the client.

        Args:
            client: Id of the client.
            private: The state, or the return value of `PrivateState.encode`.

        Returns:
            The version number that the state will have when it is committed (see `stamp`). None if
            the state is empty.
        """
        self.discard_client(client)
        if not private:
            self._staged[client] = None
            return None
        location = None
        if self.open_segment is not None:
            data = private if isinstance(private, bytes) else private.encode()
            location = self.open_segment.append(data)
        version = StateVersion(next(self._stamps), location)
        self._staged[client] = version
        cached = private if isinstance(private, bytes) else private.normalized()
        self._add_to_cache(version.stamp, cached)
        return version.stamp

    def discard_client(self, client: str) -> None:
        """Drop the staged state of a client, for example because the upload cannot be used.

        This method has no effect if the client has no staged state.
        """
        self._remove_from_cache(self._staged.pop(client, None))

    def commit(self, clients: Collection[str] | None = None) -> None:
        """Commit staged states, which replace the clients' previous states, and clear all notes.

        Args:
            clients: Ids of the clients whose states are committed. If None, all staged states are
                committed.
        """
        used = list(self._staged)
        if clients is not None:
            used = [client for client in clients if client in self._staged]
        for client in used:
            version = self._staged.pop(client)
            self._remove_from_cache(self._committed.pop(client, None))
            if version is not None:
                self._committed[client] = version
        self.notes.clear()
        self._mark_committed_size()

    def discard(self) -> None:
        """Drop all staged states and all notes."""
        for client in list(self._staged):
            self.discard_client(client)
        self.notes.clear()
        if self.open_segment is not None:
            self.open_segment.truncate(self._committed_size)

    def locations(self) -> dict[str, BlobLocation]:
        """Return the locations of the committed states on disk, keyed by client id."""
        return {
            client: version.location
            for client, version in sorted(self._committed.items())
            if version.location is not None
        }

    def staged_locations(self) -> dict[str, BlobLocation | None]:
        """Return the locations of the staged states on disk, keyed by client id.

        The value is None if the state is empty or if the store has no folder.
        """
        return {
            client: None if version is None else version.location
            for client, version in sorted(self._staged.items())
        }

    def files(self) -> set[Path]:
        """Return the paths of the files that contain committed or staged states."""
        segments = {location.segment for _, _, location in self._stored_versions()}
        return {segment.path for segment in segments}

    def compact_segments(self, replaced: Path) -> None:
        """Copy states from segments of which only a small part is in use to the open segment.

        Args:
            replaced: File that will be overwritten. All states in use in this file are copied.

        Raises:
            RunFailedError: If a state is damaged on disk.
        """
        assert self.open_segment is not None
        versions = self._stored_versions()
        used_bytes: Counter[Segment] = Counter()
        for _, _, location in versions:
            used_bytes[location.segment] += location.length
        obsolete = {
            segment
            for segment, num_bytes in used_bytes.items()
            if segment is not self.open_segment
            and (segment.path == replaced or num_bytes * COMPACT < segment.size)
        }
        for client, version, location in versions:
            if location.segment in obsolete:
                try:
                    version.location = self.open_segment.copy(location)
                except (CodecError, OSError) as error:
                    raise _damaged_error(client, error) from None
        self._mark_committed_size()

    def start_segment(self) -> None:
        """Start a new segment. Call this method after the previous segment has been sealed.

        This method has no effect if the store has no folder.
        """
        if self.folder is not None:
            self.open_segment = OpenSegment(self.folder)
        self._mark_committed_size()

    def load_locations(
        self,
        locations: Mapping[str, BlobLocation],
        staged_locations: Mapping[str, BlobLocation | None],
    ) -> None:
        """Replace all states by the states of a checkpoint.

        Args:
            locations: Location of each client's committed state, keyed by client id.
            staged_locations: Location of each client's staged state, keyed by client id. The value
                is None if the state is empty.
        """
        self._cache.clear()
        self._committed = {
            client: StateVersion(next(self._stamps), location)
            for client, location in locations.items()
        }
        self._staged = {
            client: None if location is None else StateVersion(next(self._stamps), location)
            for client, location in staged_locations.items()
        }
        self.start_segment()

    def _stored_versions(self) -> list[tuple[str, StateVersion, BlobLocation]]:
        """Return all versions on disk in a reproducible order."""
        return [
            (client, version, version.location)
            for versions in (self._committed, self._staged)
            for client, version in sorted(versions.items())
            if version is not None and version.location is not None
        ]

    def _mark_committed_size(self) -> None:
        """Record the size to which `discard` truncates the open segment."""
        self._committed_size = 0 if self.open_segment is None else self.open_segment.size

    def _load(self, client: str, version: StateVersion) -> PrivateState | bytes:
        """Return the cached state. If there is none, return the encoded state from disk."""
        cached = self._cache.get(version.stamp)
        if cached is not None:
            return cached
        assert version.location is not None, "a version without a location is always cached"
        try:
            return version.location.read()
        except (CodecError, OSError) as error:
            raise _damaged_error(client, error) from None

    def _add_to_cache(self, stamp: int, value: PrivateState | bytes) -> None:
        if _num_bytes(value) <= self._cache.maxsize:
            self._cache[stamp] = value

    def _remove_from_cache(self, version: StateVersion | None) -> None:
        if version is not None:
            self._cache.pop(version.stamp, None)


def _num_bytes(value: PrivateState | bytes) -> int:
    return len(value) if isinstance(value, bytes) else num_tensor_bytes([value.models, value.state])


def _damaged_error(client: str, error: Exception) -> RunFailedError:
    return RunFailedError(
        f"the private state of {client} is damaged on disk ({error}); "
        "resume the run from an undamaged checkpoint"
    )
