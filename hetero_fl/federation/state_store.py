"""Store the private state of clients between rounds, in append-only segment files.

State is staged while a round runs and committed when the server has used the client's upload. The
round's checkpoint (`checkpoint.py`) then closes the segment in which it lies.
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

# Layout of a segment: 8 bytes of magic; the blobs, one after the other; the head; the length of the
# head (8 bytes, little-endian); the SHA-256 of head and length. Offsets and checksums of blobs are
# in a head, not next to the blobs. A segment is renamed into place when it is sealed, so that it is
# complete or does not exist.

MAGIC = b"HFLCKPT2"
CHUNK = 1 << 20  # bytes in memory while a blob is verified or copied
TRAILER = 8 + 32


class Segment:
    """A file of blobs.

    Blob locations refer to the segment object, so they stay valid when the file is renamed.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size

    @classmethod
    def open(cls, path: Path) -> Segment:
        """Open a sealed segment. Raises OSError if it does not exist."""
        return cls(path, path.stat().st_size)

    def read(self, location: BlobLocation) -> bytes:
        """Read a blob. Raises CodecError if it is damaged, OSError if it cannot be read."""
        # As a single chunk, which `join` does not copy.
        return b"".join(self.stream(location, location.length))

    def stream(self, location: BlobLocation, chunk_size: int = CHUNK) -> Iterator[bytes]:
        """Yield the chunks of a blob. Raises as `read` does, for damage after the last chunk."""
        checksum = hashlib.sha256()
        with open(self.path, "rb") as file:
            file.seek(location.offset)
            for start in range(0, location.length, chunk_size):
                chunk = file.read(min(chunk_size, location.length - start))
                checksum.update(chunk)
                yield chunk
        if checksum.digest() != location.digest:
            raise CodecError(f"a checksum in {self.path.name} does not match")

    def verify(self, location: BlobLocation) -> None:
        """Check a blob with one chunk in memory at a time. Raises as `read` does."""
        for _ in self.stream(location):
            pass

    def head(self) -> bytes:
        """Return the head of a sealed segment.

        Raises:
            CodecError: If any byte of magic, head or trailer is damaged.
        """
        with open(self.path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CodecError("not a checkpoint of this version, or its first bytes are gone")
            file.seek(max(0, self.size - TRAILER))
            trailer = file.read(TRAILER)
            length = int.from_bytes(trailer[:8], "little")
            file.seek(max(0, self.size - TRAILER - length))
            head = file.read(min(length, self.size))
        if hashlib.sha256(head + trailer[:8]).digest() != trailer[8:]:
            raise CodecError("its checksum does not match, or it is cut short")
        return head


class BlobLocation(NamedTuple):
    """Where a blob lies, and its checksum."""

    segment: Segment
    offset: int
    length: int
    digest: bytes  # SHA-256

    def read(self) -> bytes:
        """Read the blob. Raises CodecError or OSError as `Segment.read` does."""
        return self.segment.read(self)


class OpenSegment(Segment):
    """A segment that is being written, under a temporary name.

    No file handle is kept, because the process may be killed at any moment.
    """

    def __init__(self, folder: Path) -> None:
        # Always the same temporary name: what a crash leaves behind is overwritten, not piled up.
        super().__init__(folder / ".next.ckpt.tmp", 0)

    def append(self, data: bytes) -> BlobLocation:
        """Append a blob. If writing fails, the next blob overwrites what was written of it."""
        return self._append([data], hashlib.sha256(data).digest())

    def copy(self, location: BlobLocation) -> BlobLocation:
        """Append a blob of another segment, one chunk in memory at a time.

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
        """Remove all blobs from offset `size` on."""
        if size < self.size:
            os.truncate(self.path, size)
            self.size = size

    def seal(self, path: Path, head: bytes) -> None:
        """Append the head, flush to disk and rename to `path`. No blob can be appended afterwards."""
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


FORM = "private state 1"
MEMORY = 1 << 30  # bytes
COMPACT = 4  # segments of which less than one part in COMPACT is live are given up


@dataclass
class PrivateState:
    """What one client keeps: tensors by slot, and a tree of tensors and plain values."""

    models: dict[str, Tensors] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.models or self.state)

    def encode(self) -> bytes:
        """Encode for disk and for other processes; an empty state has no bytes."""
        return encode({"models": self.models, "state": self.state}, FORM) if self else b""

    @classmethod
    def decode(cls, data: bytes, bounded: bool = False) -> PrivateState:
        """Decode what `encode` returned.

        Args:
            data: The bytes.
            bounded: Whether the bytes are untrusted, see `serialization.decode`.

        Raises:
            CodecError: If the bytes are malformed.
            TypeError: If they encode something else.
        """
        return cls(**decode(data, FORM, bounded)) if data else cls()

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return num_tensor_bytes([self.models, self.state])

    def on_cpu(self) -> PrivateState:
        """Return the state with its tensors on the CPU."""
        cpu = torch.device("cpu")
        return PrivateState(move_tree(self.models, cpu), move_tree(self.state, cpu))

    def normalized(self) -> PrivateState:
        """Return a copy as decoding would give it: contiguous tensors with memory of their own."""
        return PrivateState(**copy_tree({"models": self.models, "state": self.state}))


@dataclass
class StateVersion:
    """One client's state as it was staged once.

    `stamp` identifies it within this process and is never used again. `location` is None if the
    store has no folder.
    """

    stamp: int
    location: BlobLocation | None


class StateStore:
    """Private state by client id. A client without any costs nothing.

    The value of a state is always what its bytes say, so neither the size of the cache nor a resume
    changes a result.

    Args:
        folder: Where state is written as it is staged. Without one (tests, notebooks, worker
            processes) all of it stays in memory.
        memory: Upper bound of the bytes that are cached, decoded or encoded, if there is a folder.
    """

    def __init__(self, folder: Path | None = None, memory: int = MEMORY) -> None:
        self.folder = folder
        self.memory = memory
        self.open_segment: OpenSegment | None = None
        # What clients remember from one exchange of a round to the next; never on disk.
        self.notes: dict[str, bytes] = {}
        self._cache: LRUCache[int, PrivateState | bytes] = LRUCache(  # by stamp
            math.inf if folder is None else memory, getsizeof=_num_bytes
        )
        self._committed: dict[str, StateVersion] = {}
        # None: the client no longer keeps anything
        self._staged: dict[str, StateVersion | None] = {}
        self._stamps = itertools.count()
        self._committed_size = 0  # of the open segment
        self.start_segment()

    @property
    def cached_bytes(self) -> int:
        """Number of bytes in memory."""
        return int(self._cache.currsize)

    def get(self, client: str) -> PrivateState:
        """Return the committed state, empty if there is none. Do not change it in place.

        Raises:
            RunFailedError: If it has been damaged on disk.
        """
        version = self._committed.get(client)
        if version is None:
            return PrivateState()
        found = self._load(client, version)
        if isinstance(found, bytes):
            found = PrivateState.decode(found)
            self._add_to_cache(version.stamp, found)
        return found

    def encoded(self, client: str) -> bytes | None:
        """Return the committed state as `PrivateState.encode` does, None if there is none.

        Raises:
            RunFailedError: If it has been damaged on disk.
        """
        version = self._committed.get(client)
        if version is None:
            return None
        found = self._load(client, version)
        return found if isinstance(found, bytes) else found.encode()

    def stamp(self, client: str) -> int | None:
        """Return a number that changes with the committed state, None if there is none."""
        version = self._committed.get(client)
        return None if version is None else version.stamp

    def num_bytes(self, client: str) -> int:
        """Return the bytes of the committed state in memory, decoded or encoded as it is cached."""
        version = self._committed.get(client)
        return 0 if version is None else _num_bytes(self._load(client, version))

    def clients(self) -> list[str]:
        """Return the ids of clients that keep something, sorted."""
        return sorted(self._committed)

    # Rounds

    def stage(self, client: str, private: PrivateState | bytes) -> int | None:
        """Stage the state that a client's task has written; its upload is not used yet.

        Args:
            client: The client's id.
            private: The state, encoded if it comes from another process.

        Returns:
            The stamp that the state will have once it is committed, None if it is empty.
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
        """Drop what one client staged, because its upload is not used."""
        self._remove_from_cache(self._staged.pop(client, None))

    def commit(self, clients: Collection[str] | None = None) -> None:
        """Make staged state the committed state.

        Args:
            clients: The clients whose uploads were used; all of them by default.
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
        """Drop everything that is staged, because the round did not end."""
        for client in list(self._staged):
            self.discard_client(client)
        self.notes.clear()
        if self.open_segment is not None:
            self.open_segment.truncate(self._committed_size)

    # Checkpoints

    def locations(self) -> dict[str, BlobLocation]:
        """Return where the committed state of each client lies."""
        return {
            client: version.location
            for client, version in sorted(self._committed.items())
            if version.location is not None
        }

    def staged_locations(self) -> dict[str, BlobLocation | None]:
        """Return where the state staged by tasks in flight lies, None for clients that keep nothing."""
        return {
            client: None if version is None else version.location
            for client, version in sorted(self._staged.items())
        }

    def files(self) -> set[Path]:
        """Return the files in which committed or staged state lies."""
        segments = {location.segment for _, _, location in self._stored_versions()}
        return {segment.path for segment in segments}

    def compact_segments(self, replaced: Path) -> None:
        """Copy live state out of segments with little of it, and out of the file to be `replaced`.

        Raises:
            RunFailedError: If it has been damaged on disk.
        """
        assert self.open_segment is not None
        versions = self._stored_versions()
        live: Counter[Segment] = Counter()
        for _, _, location in versions:
            live[location.segment] += location.length
        given_up = {
            segment
            for segment, num_bytes in live.items()
            if segment is not self.open_segment
            and (segment.path == replaced or num_bytes * COMPACT < segment.size)
        }
        for client, version, location in versions:
            if location.segment in given_up:
                try:
                    version.location = self.open_segment.copy(location)
                except (CodecError, OSError) as error:
                    raise _damaged_error(client, error) from None
        self._mark_committed_size()

    def start_segment(self) -> None:
        """Start a new segment: the checkpoint has sealed the open one."""
        if self.folder is not None:
            self.open_segment = OpenSegment(self.folder)
        self._mark_committed_size()

    def load_locations(
        self,
        locations: Mapping[str, BlobLocation],
        staged_locations: Mapping[str, BlobLocation | None],
    ) -> None:
        """Replace committed and staged state by that of a checkpoint."""
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
        """Return all versions that lie on disk, in an order that is the same in every run."""
        return [
            (client, version, version.location)
            for versions in (self._committed, self._staged)
            for client, version in sorted(versions.items())
            if version is not None and version.location is not None
        ]

    def _mark_committed_size(self) -> None:
        """Remember up to where `discard` keeps the open segment."""
        self._committed_size = 0 if self.open_segment is None else self.open_segment.size

    # Cache

    def _load(self, client: str, version: StateVersion) -> PrivateState | bytes:
        """Return a version from the cache, or else its bytes from disk."""
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
        "--resume goes on from a whole checkpoint"
    )
