"""Private state of clients between rounds, kept in append-only segment files."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hetero_fl.core.model_spec import Tensors
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import CodecError, decode, encode, num_tensor_bytes, sync_folder

# Segments: append-only files of checksummed blobs, each closed by a head and renamed into place,
# complete or not there at all.
#
# Layout: 8 bytes of magic; the blobs, end to end; the head; its length (8 bytes, little-endian);
# the SHA-256 of head and length. Where a blob lies and what its checksum is stands in a head, not
# beside the blob.

MAGIC = b"HFLCKPT2"
CHUNK = 1 << 20  # bytes in memory while a blob is verified or copied
TRAILER = 8 + 32


class Segment:
    """One file of blobs. Places point to the segment, so they stay right when it is renamed."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size

    @classmethod
    def open(cls, path: Path) -> Segment:
        """A segment that was sealed. Raises OSError if it is not there."""
        return cls(path, path.stat().st_size)

    def read(self, location: BlobLocation) -> bytes:
        """A blob. Raises CodecError if it is not what was written, OSError if it cannot be read."""
        data = b"".join(self._chunks(location, location.length))
        if hashlib.sha256(data).digest() != location.digest:
            raise CodecError(f"a checksum in {self.path.name} does not match")
        return data

    def verify(self, location: BlobLocation) -> None:
        """Raises as `read` does, a chunk in memory at a time."""
        for _ in self.stream(location):
            pass

    def stream(self, location: BlobLocation) -> Iterator[bytes]:
        """The chunks of a blob; raises as `read` does, at the end."""
        checksum = hashlib.sha256()
        for chunk in self._chunks(location, CHUNK):
            checksum.update(chunk)
            yield chunk
        if checksum.digest() != location.digest:
            raise CodecError(f"a checksum in {self.path.name} does not match")

    def _chunks(self, place: BlobLocation, size: int) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            file.seek(place.offset)
            left = place.length
            while left:
                if not (chunk := file.read(min(size, left))):
                    raise CodecError(f"{self.path.name} is cut short")
                left -= len(chunk)
                yield chunk

    def head(self) -> bytes:
        """The head of a sealed segment. Raises CodecError if a byte of magic, head or trailer is not what was written."""
        with open(self.path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CodecError("not a checkpoint of this version, or its first bytes are gone")
            if self.size < len(MAGIC) + TRAILER:
                raise CodecError("it is cut short")
            file.seek(self.size - TRAILER)
            trailer = file.read(TRAILER)
            length = int.from_bytes(trailer[:8], "little")
            if length > self.size - TRAILER - len(MAGIC):
                raise CodecError("its head is longer than the file")
            file.seek(self.size - TRAILER - length)
            head = file.read(length)
        if hashlib.sha256(head + trailer[:8]).digest() != trailer[8:]:
            raise CodecError("its checksum does not match")
        return head


class BlobLocation(NamedTuple):
    """Where a blob lies."""

    segment: Segment
    offset: int
    length: int
    digest: bytes  # SHA-256

    def read(self) -> bytes:
        """The blob. Raises CodecError or OSError."""
        return self.segment.read(self)


class OpenSegment(Segment):
    """A segment that is being written, under a temporary name. No handle is kept: a process may end at any moment."""

    def __init__(self, folder: Path) -> None:
        # Always the same temporary name: what a crash leaves behind is overwritten, not piled up.
        super().__init__(folder / ".next.ckpt.tmp", 0)

    def append(self, data: bytes) -> BlobLocation:
        """Add a blob. After an error, what was written of it is overwritten by the next."""
        return self._append(iter((data,)), hashlib.sha256(data).digest())

    def copy(self, place: BlobLocation) -> BlobLocation:
        """Add a blob of another segment, a chunk at a time. Raises CodecError if it is damaged there."""
        return self._append(place.segment.stream(place), place.digest)

    def _append(self, chunks: Iterator[bytes], digest: bytes) -> BlobLocation:
        if not self.size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(MAGIC)
            self.size = len(MAGIC)
        end = self.size
        with open(self.path, "r+b") as file:
            file.seek(end)
            for chunk in chunks:
                end += file.write(chunk)
        place = BlobLocation(self, self.size, end - self.size, digest)
        self.size = end
        return place

    def truncate(self, size: int) -> None:
        """Forget all blobs from there on."""
        if size < self.size:
            os.truncate(self.path, size)
            self.size = size

    def seal(self, path: Path, head: bytes) -> None:
        """Close it with a head and give it its name; on return it is safe on disk. It takes no more blobs."""
        length = len(head).to_bytes(8, "little")
        place = self.append(head)
        with open(self.path, "r+b") as file:
            file.seek(self.size)
            file.write(length + hashlib.sha256(head + length).digest())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.path, path)
        sync_folder(path.parent)
        self.path = path
        self.size = place.offset + place.length + TRAILER


# Private state of clients between rounds: staged by a task, committed when the server has used its
# upload and not before.
#
# State lives encoded, in a segment on disk (`state_store.py`) that the round's checkpoint then
# closes; what was used last is also held in memory, up to a bound. What comes out is always what
# the bytes say, so neither the bound nor a resume changes a result.

FORM = "private state 1"
MEMORY = 1 << 30  # bytes
COMPACT = 4  # a segment of which less than one part in so many is live is given up


@dataclass
class PrivateState:
    """What one client keeps: tensors by slot, and its own state (trees of tensors and plain values)."""

    models: dict[str, Tensors] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Its bytes, as they are kept and as they travel between processes; none if there is nothing to keep."""
        return (
            encode({"models": self.models, "state": self.state}, FORM)
            if self.models or self.state
            else b""
        )

    def normalized(self) -> PrivateState:
        """As it would be read from its bytes: tensors in memory of their own, a tuple a list …"""
        models = {
            slot: {
                n: t.detach().cpu().clone(memory_format=torch.contiguous_format)
                for n, t in tensors.items()
            }
            for slot, tensors in self.models.items()
        }
        return PrivateState(
            models, PrivateState.decode(PrivateState(state=self.state).encode()).state
        )

    @classmethod
    def decode(cls, data: bytes, bounded: bool = False) -> PrivateState:
        """Decode what `encode` made; `bounded`: the data is untrusted. Raises CodecError, TypeError if it is something else."""
        return cls(**decode(data, FORM, bounded)) if data else cls()


@dataclass
class StagedVersion:
    """One client's state as it was staged once; `stamp` names it within this process and is never used again."""

    stamp: int
    place: BlobLocation | None  # None: in memory only


class StateStore:
    """Private state by client id. A client without any costs nothing.

    With a `folder`, state goes to disk as it is staged, and at most `memory` bytes of it are held decoded or encoded besides
    what a caller has in hand; without one (tests, notebooks, worker processes) it stays in memory, all of it.
    """

    def __init__(self, folder: Path | None = None, memory: int = MEMORY) -> None:
        self.folder = folder
        self.memory = memory
        # takes the blobs of the round
        self.open = OpenSegment(folder) if folder is not None else None
        self.held = 0  # bytes in memory
        # by stamp; the last used at the end
        self._held: OrderedDict[int, PrivateState | bytes] = OrderedDict()
        self._kept: dict[str, StagedVersion] = {}
        self._staged: dict[
            str, StagedVersion | None
        ] = {}  # None: the client keeps nothing any more
        self._stamps = itertools.count()
        self._mark = 0  # the open segment's size at the last commit
        self.notes: dict[
            str, bytes
        ] = {}  # what clients remember from one exchange of a round to the next: never on disk

    def get(self, client: str) -> PrivateState:
        """The state as committed; empty for a client that keeps nothing. Do not change it in place.

        Raises RunFailedError if it has been damaged on disk.
        """
        version = self._kept.get(client)
        if version is None:
            return PrivateState()
        found = self._held.get(version.stamp)
        if isinstance(found, PrivateState):
            self._held.move_to_end(version.stamp)
            return found
        private = PrivateState.decode(found if found is not None else self._read(client, version))
        self._cache(version.stamp, private)
        return private

    def encoded(self, client: str) -> bytes | None:
        """The committed state as `PrivateState.encode` gives it, None if there is none; raises as `get` does."""
        version = self._kept.get(client)
        if version is None:
            return None
        found = self._held.get(version.stamp)
        if found is None:
            return self._read(client, version)
        return found.encode() if isinstance(found, PrivateState) else found

    def stamp(self, client: str) -> int | None:
        """A number that is another whenever the committed state is, None if there is none: equal stamps, equal state."""
        version = self._kept.get(client)
        return None if version is None else version.stamp

    def clients(self) -> list[str]:
        """Those who keep something, sorted."""
        return sorted(self._kept)

    # A round -----------------------------------------------------------------------------------------------------
    def stage(self, client: str, private: PrivateState | bytes) -> int | None:
        """State written by a task whose upload is not used yet; as bytes if it comes from another process.

        Returns the stamp that it will have once it is committed.
        """
        self.discard_client(client)
        if not private or (
            isinstance(private, PrivateState) and not (private.models or private.state)
        ):
            self._staged[client] = None
            return None
        place = None
        if self.open is not None:
            place = self.open.append(
                private.encode() if isinstance(private, PrivateState) else private
            )
        version = self._staged[client] = StagedVersion(next(self._stamps), place)
        self._cache(
            version.stamp, private.normalized() if isinstance(private, PrivateState) else private
        )
        return version.stamp

    def discard_client(self, client: str) -> None:
        """Forget what one client staged: the server did not take its upload."""
        self._release(self._staged.pop(client, None))

    def commit(self, clients: Collection[str] | None = None) -> None:
        """Make what was staged the state: of these clients, whose uploads were used; of all, as the round has ended."""
        for client in (
            list(self._staged) if clients is None else [c for c in clients if c in self._staged]
        ):
            version = self._staged.pop(client)
            self._release(self._kept.pop(client, None))
            if version is not None:
                self._kept[client] = version
        self.notes.clear()
        self._mark = self.open.size if self.open is not None else 0

    def discard(self) -> None:
        """Forget what was staged; the round did not end."""
        for version in self._staged.values():
            self._release(version)
        self._staged.clear()
        self.notes.clear()
        if self.open is not None:
            self.open.truncate(self._mark)

    # Checkpoints -------------------------------------------------------------------------------------------------
    def locations(self) -> dict[str, BlobLocation]:
        """Where the committed state of each client lies."""
        return {c: v.place for c, v in sorted(self._kept.items()) if v.place is not None}

    def staged_locations(self) -> dict[str, BlobLocation | None]:
        """Where the staged state of each client lies, None for one that keeps nothing any more: of tasks in flight."""
        return {c: v.place if v is not None else None for c, v in sorted(self._staged.items())}

    def compact_segments(self, replaced: Path) -> None:
        """Before a checkpoint: copy what is still live out of segments that hold little else, and out of `replaced`.

        Raises RunFailedError if it has been damaged on disk.
        """
        live: dict[Path, int] = {}
        for _, version in self._versions():
            if version.place is not None:
                path = version.place.segment.path
                live[path] = live.get(path, 0) + version.place.length
        for client, version in self._versions():
            place = version.place
            if self.open is None or place is None or place.segment is self.open:
                continue
            path = place.segment.path
            if path == replaced or live[path] * COMPACT < place.segment.size:
                try:
                    version.place = self.open.copy(place)
                except (CodecError, OSError) as error:
                    raise _damaged_error(client, error) from None
        self._mark = self.open.size if self.open is not None else 0

    def files(self) -> set[Path]:
        """The files in which state lies, committed or staged."""
        return {v.place.segment.path for _, v in self._versions() if v.place is not None}

    def _versions(self) -> list[tuple[str, StagedVersion]]:
        """All that may still be read, in an order that is the same in every run."""
        return [
            *sorted(self._kept.items()),
            *((c, v) for c, v in sorted(self._staged.items()) if v is not None),
        ]

    def start_segment(self) -> None:
        """After a checkpoint: what is staged from now on goes into the next segment."""
        if self.folder is not None:
            self.open = OpenSegment(self.folder)
            self._mark = 0

    def load_locations(
        self,
        locations: Mapping[str, BlobLocation],
        staged_locations: Mapping[str, BlobLocation | None],
    ) -> None:
        """Set the state, and what is staged, to what a checkpoint holds, and forget everything else."""
        self._held.clear()
        self.held = 0
        self._kept = {c: StagedVersion(next(self._stamps), place) for c, place in locations.items()}
        self._staged = {
            c: place and StagedVersion(next(self._stamps), place)
            for c, place in staged_locations.items()
        }
        self.start_segment()

    # Memory ------------------------------------------------------------------------------------------------------
    def _read(self, client: str, version: StagedVersion) -> bytes:
        assert version.place is not None  # what has no place is always held
        try:
            return version.place.read()
        except (CodecError, OSError) as error:
            raise _damaged_error(client, error) from None

    def _cache(self, stamp: int, value: PrivateState | bytes) -> None:
        self._uncache(stamp)
        if self.folder is not None:
            if _size(value) > self.memory:
                return
            while self.held + _size(value) > self.memory:
                self._uncache(next(iter(self._held)))
        self._held[stamp] = value
        self.held += _size(value)

    def _uncache(self, stamp: int) -> None:
        if (value := self._held.pop(stamp, None)) is not None:
            self.held -= _size(value)

    def _release(self, version: StagedVersion | None) -> None:
        if version is not None:
            self._uncache(version.stamp)


def _size(value: PrivateState | bytes) -> int:
    return len(value) if isinstance(value, bytes) else num_tensor_bytes([value.models, value.state])


def _damaged_error(client: str, error: Exception) -> RunFailedError:
    return RunFailedError(
        f"the private state of {client} is damaged on disk ({error}); --resume goes on from a whole checkpoint"
    )
