"""Segments: append-only files of checksummed blobs, each closed by a head and renamed into place, complete or not there at all.

Layout: 8 bytes of magic; the blobs, end to end; the head; its length (8 bytes, little-endian); the SHA-256 of head and length.
Where a blob lies and what its checksum is stands in a head, not beside the blob.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hetero_fl.codec import CodecError
from hetero_fl.files import sync_folder

MAGIC = b"HFLCKPT2"
CHUNK = 1 << 20  # bytes in memory while a blob is verified or copied
TRAILER = 8 + 32


class Segment:
    """One file of blobs. Places point to the segment, so they stay right when it is renamed."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    @classmethod
    def open(cls, path: Path) -> Segment:
        """A segment that was sealed. Raises OSError if it is not there."""
        return cls(path, path.stat().st_size)

    def read(self, place: Place) -> bytes:
        """A blob. Raises CodecError if it is not what was written, OSError if it cannot be read."""
        data = b"".join(self._chunks(place, place.length))
        if hashlib.sha256(data).digest() != place.digest:
            raise CodecError(f"a checksum in {self.path.name} does not match")
        return data

    def verify(self, place: Place) -> None:
        """Raises as `read` does, a chunk in memory at a time."""
        for _ in self.stream(place):
            pass

    def stream(self, place: Place) -> Iterator[bytes]:
        """The chunks of a blob; raises as `read` does, at the end."""
        checksum = hashlib.sha256()
        for chunk in self._chunks(place, CHUNK):
            checksum.update(chunk)
            yield chunk
        if checksum.digest() != place.digest:
            raise CodecError(f"a checksum in {self.path.name} does not match")

    def _chunks(self, place: Place, size: int) -> Iterator[bytes]:
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


class Place(NamedTuple):
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

    def append(self, data: bytes) -> Place:
        """Add a blob. After an error, what was written of it is overwritten by the next."""
        return self._append(iter((data,)), hashlib.sha256(data).digest())

    def copy(self, place: Place) -> Place:
        """Add a blob of another segment, a chunk at a time. Raises CodecError if it is damaged there."""
        return self._append(place.segment.stream(place), place.digest)

    def _append(self, chunks: Iterator[bytes], digest: bytes) -> Place:
        if not self.size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(MAGIC)
            self.size = len(MAGIC)
        end = self.size
        with open(self.path, "r+b") as file:
            file.seek(end)
            for chunk in chunks:
                end += file.write(chunk)
        place = Place(self, self.size, end - self.size, digest)
        self.size = end
        return place

    def cut(self, size: int) -> None:
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
        self.path, self.size = path, place.offset + place.length + TRAILER
