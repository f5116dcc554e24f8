"""Bytes that somebody sent, read from front to back and never beyond their end."""

from __future__ import annotations

from hetero_fl.payload import PayloadError


class Reader:
    """A view of bytes and a place in them."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._view, self._at = memoryview(data), 0

    def take(self, count: int) -> memoryview:
        """The next so many bytes. Raises PayloadError if there are fewer: nothing is allocated before they are there."""
        if not 0 <= count <= len(self._view) - self._at:
            raise PayloadError(f"cut short: {count} bytes are missing at {self._at} of {len(self._view)}")
        self._at += count
        return self._view[self._at - count : self._at]

    def number(self, size: int) -> int:
        """The next unsigned whole number of so many bytes."""
        return int.from_bytes(self.take(size), "little")

    def rest(self) -> memoryview:
        """All that is left."""
        return self.take(len(self._view) - self._at)

    def end(self) -> None:
        """Raises PayloadError if anything is left."""
        if self._at != len(self._view):
            raise PayloadError(f"{len(self._view) - self._at} bytes too many")
