"""Pack integers into a fixed number of bits, and read untrusted bytes with bounds checks."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from hetero_fl.core.payload import PayloadError

Numbers = np.ndarray[Any, np.dtype[Any]]
# Bits of packed integers.
WIDTHS = (1, 2, 4, 8, 16, 32)


class ByteReader:
    """Reader that consumes untrusted bytes from front to back.

    Args:
        data: The bytes.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._view = memoryview(data)
        self._offset = 0

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes without a copy.

        Raises:
            PayloadError: If fewer bytes remain or `count` is negative.
        """
        if not 0 <= count <= len(self._view) - self._offset:
            raise PayloadError(
                f"truncated: expected {count} bytes at offset {self._offset} of {len(self._view)}"
            )
        self._offset += count
        return self._view[self._offset - count : self._offset]

    def read_integer(self, size: int) -> int:
        """Return the next unsigned little-endian integer of `size` bytes.

        Raises:
            PayloadError: If fewer bytes remain.
        """
        return int.from_bytes(self.take(size), "little")

    def read_rest(self) -> memoryview:
        """Return all remaining bytes."""
        return self.take(len(self._view) - self._offset)

    def expect_end(self) -> None:
        """Check that all bytes have been read.

        Raises:
            PayloadError: If any bytes remain.
        """
        if self._offset != len(self._view):
            raise PayloadError(f"{len(self._view) - self._offset} unexpected bytes at the end")


def pack_bits(values: Numbers, bits: int) -> bytes:
    """Pack integers into `bits` bits each.

    Several integers of less than 8 bits share a byte, the first one in the lowest bits. Longer
    integers are written as the lowest byte of all values, then the second byte of all values, and
    so on.

    Args:
        values: Integers from 0 to 2^bits - 1, shape `[N]`.
        bits: Bits per integer, one of `WIDTHS`.
    """
    if bits >= 8:
        planes = values.astype(f"<u{bits // 8}").view(np.uint8).reshape(-1, bits // 8).T
        return planes.tobytes()
    per_byte = 8 // bits
    padded = np.zeros(-(-len(values) // per_byte) * per_byte, np.uint8)
    padded[: len(values)] = values
    shifted = padded.reshape(-1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    packed: Numbers = np.bitwise_or.reduce(shifted, axis=1)
    return packed.tobytes()


def unpack_bits(source: ByteReader, count: int, bits: int) -> Numbers:
    """Unpack integers that were packed by `pack_bits`.

    Args:
        source: Reader at the start of the packed integers.
        count: Number of integers.
        bits: Bits per integer, one of `WIDTHS`.

    Returns:
        Integers, shape `[count]`, of the smallest unsigned type.

    Raises:
        PayloadError: If fewer bytes remain.
    """
    packed = np.frombuffer(source.take(-(-count * bits // 8)), np.uint8)
    if bits >= 8:
        values: Numbers = packed.reshape(bits // 8, count).T.copy().view(f"<u{bits // 8}")
        return values.reshape(-1)
    parts = packed[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)
    return (parts & (2**bits - 1)).reshape(-1)[:count]


def write_indices(indices: Numbers, strategy: int = zlib.Z_RLE) -> bytes:
    """Encode ascending indices. The number of indices is not part of the result.

    The differences of the indices are written byte by byte (see `pack_bits`) and compressed, each
    byte with a code of its own.

    Args:
        indices: At least one index, int64, shape `[K]`.
        strategy: Strategy of zlib.
    """
    gaps = np.diff(indices, prepend=-1) - 1
    compressor = zlib.compressobj(strategy=strategy)
    parts = []
    for plane in np.split(np.frombuffer(pack_bits(gaps, 32), np.uint8), 4):
        parts += [compressor.compress(plane.tobytes()), compressor.flush(zlib.Z_PARTIAL_FLUSH)]
    coded = b"".join([*parts, compressor.flush()])
    return len(coded).to_bytes(4, "little") + coded


def read_indices(source: ByteReader, count: int, total: int) -> Numbers:
    """Decode indices that were encoded by `write_indices`.

    Args:
        source: Reader at the start of the encoded indices.
        count: Number of indices, at least 1.
        total: Exclusive upper bound of the indices.

    Returns:
        Ascending indices, int64, shape `[count]`.

    Raises:
        PayloadError: If the bytes are malformed, or the indices are not ascending below `total`.
    """
    coded = source.take(source.read_integer(4))
    try:
        packed = ByteReader(zlib.decompressobj().decompress(coded, 4 * count + 1))
    except zlib.error:
        raise PayloadError("indices: cannot be decompressed") from None
    gaps = unpack_bits(packed, count, 32).astype(np.int64)
    packed.expect_end()
    indices = np.cumsum(gaps + 1) - 1
    if indices[-1] >= total:
        raise PayloadError(f"indices: expected ascending values below {total}")
    return indices
