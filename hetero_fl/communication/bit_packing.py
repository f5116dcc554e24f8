"""Pack integers into a fixed number of bits, and read untrusted bytes with bounds checks.

Ascending indices are encoded with the Elias-Fano code (Elias 1974; Fano 1971), which needs about
k (2 + log2(n / k)) bits for k of n indices. Optionally, the differences of the indices are
compressed with LZMA if the result is shorter.
"""

from __future__ import annotations

import lzma
from typing import Any

import numpy as np

from hetero_fl.core.payload import PayloadError

Numbers = np.ndarray[Any, np.dtype[Any]]
# First byte of encoded indices: `FANO` for the Elias-Fano code, `GAPS` for compressed differences.
FANO = b"\0"
GAPS = b"\1"
# Differences of at least this value are replaced by it, and written separately in 32 bits.
ESCAPE = 255
FILTERS = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16, "lc": 0, "lp": 0, "pb": 0}]


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


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that `count` packed integers of `bits` bits occupy."""
    return count * (bits // 8) + (count * (bits % 8) + 7) // 8


def pack_bits(values: Numbers, bits: int) -> bytes:
    """Pack integers into `bits` bits each.

    The lowest `bits // 8` bytes are written byte by byte: the lowest byte of all values, then the
    second byte of all values, and so on. The remaining `bits % 8` high bits of all values follow
    without gaps.

    Args:
        values: Integers from 0 to 2^bits - 1, shape `[N]`.
        bits: Bits per integer, at most 32.
    """
    values = np.ascontiguousarray(values)
    planes = [
        (values >> (8 * place) if place else values).astype(np.uint8).tobytes()
        for place in range(bits // 8)
    ]
    width = bits % 8
    if width:
        # Eight values of `width` bits fill `width` bytes.
        rest = (values >> (bits - width)) & ((1 << width) - 1)
        padded = np.zeros(-(-len(rest) // 8) * 8, np.uint8)
        padded[: len(rest)] = rest
        eights = padded.reshape(-1, 8)
        acc = np.zeros(len(padded) // 8, "<u8")
        for i in range(8):
            acc |= eights[:, i].astype("<u8") << np.uint64(i * width)
        planes.append(
            acc.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()[: (len(values) * width + 7) // 8]
        )
    return b"".join(planes)


def unpack_bits(source: ByteReader, count: int, bits: int) -> Numbers:
    """Unpack integers that were packed by `pack_bits`.

    Args:
        source: Reader at the start of the packed integers.
        count: Number of integers.
        bits: Bits per integer, at most 32.

    Returns:
        Integers, shape `[count]`, of type uint8, uint16 or int64.

    Raises:
        PayloadError: If fewer bytes remain.
    """
    dtype = np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.int64
    raw = source.take(packed_size(count, bits))
    values = np.zeros(count, dtype)
    for place in range(bits // 8):
        values |= np.frombuffer(raw[place * count : (place + 1) * count], np.uint8).astype(
            dtype
        ) << (8 * place)
    width = bits % 8
    if width:
        rest = np.frombuffer(raw[count * (bits // 8) :], np.uint8)
        padded = np.zeros(-(-count // 8) * width, np.uint8)
        padded[: len(rest)] = rest
        whole = np.zeros((-(-count // 8), 8), np.uint8)
        whole[:, :width] = padded.reshape(-1, width)
        acc = whole.view("<u8")[:, 0]
        eights = np.empty((len(whole), 8), np.uint8)
        for i in range(8):
            eights[:, i] = (acc >> np.uint64(i * width)) & np.uint64((1 << width) - 1)
        values |= eights.reshape(-1)[:count].astype(dtype) << (bits - width)
    return values


def _low_bits(total: int, count: int) -> int:
    return max(0, (total // count).bit_length() - 1)


def write_indices(indices: Numbers, total: int, entropy: bool = False) -> bytes:
    """Encode ascending indices. The number of indices is not part of the result.

    Args:
        indices: At least one index, int64, shape `[K]`.
        total: Exclusive upper bound of the indices.
        entropy: Whether to compress the differences of the indices with LZMA if the result is
            shorter.
    """
    low = _low_bits(total, len(indices))
    bitmap = np.zeros(len(indices) + (total - 1 >> low) + 1, bool)
    bitmap[(indices >> low) + np.arange(len(indices))] = True
    plain = FANO + pack_bits(indices, low) + np.packbits(bitmap, bitorder="little").tobytes()
    if not entropy:
        return plain
    gaps = np.diff(indices, prepend=-1) - 1
    wide = gaps[gaps >= ESCAPE].astype("<u4").tobytes()
    coded = lzma.compress(
        np.minimum(gaps, ESCAPE).astype(np.uint8).tobytes() + wide, lzma.FORMAT_RAW, filters=FILTERS
    )
    coded = GAPS + len(coded).to_bytes(4, "little") + coded
    return min(plain, coded, key=len)


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
    code = bytes(source.take(1))
    if code == FANO:
        low = _low_bits(total, count)
        lows = unpack_bits(source, count, low).astype(np.int64)
        length = count + (total - 1 >> low) + 1
        bits = np.unpackbits(
            np.frombuffer(source.take((length + 7) // 8), np.uint8), bitorder="little"
        )
        places = np.flatnonzero(bits)
        if len(places) != count:
            raise PayloadError(f"expected {count} indices, got {len(places)}")
        indices = (places - np.arange(count)) << low | lows
    elif code == GAPS:
        gaps = _index_differences(
            bytes(source.take(int.from_bytes(source.take(4), "little"))), count
        )
        indices = np.cumsum(gaps + 1) - 1
    else:
        raise PayloadError(f"indices: unknown code {code[0]}")
    if indices[-1] >= total or (np.diff(indices) < 1).any():
        raise PayloadError(f"indices: expected ascending values below {total}")
    return indices


def _index_differences(coded: bytes, count: int) -> Numbers:
    try:
        raw = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS).decompress(
            coded, 5 * count + 1
        )
    except lzma.LZMAError:
        raise PayloadError("indices: cannot be decompressed") from None
    gaps = np.frombuffer(raw[:count], np.uint8).astype(np.int64)
    wide = gaps == ESCAPE
    if len(gaps) != count or len(raw) != count + 4 * int(wide.sum()):
        raise PayloadError(
            f"indices: expected differences of {count} indices, got {len(raw)} bytes"
        )
    gaps[wide] = np.frombuffer(raw[count:], "<u4")
    return gaps
