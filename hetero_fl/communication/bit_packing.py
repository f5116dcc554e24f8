"""Pack integers into as few bits as they need, and read untrusted bytes within their bounds."""

from __future__ import annotations

import lzma
from typing import Any

import numpy as np

from hetero_fl.core.payload import PayloadError

# Bytes that somebody sent, read from front to back and never beyond their end.


class ByteReader:
    """A view of bytes and a place in them."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._view = memoryview(data)
        self._at = 0

    def take(self, count: int) -> memoryview:
        """The next so many bytes. Raises PayloadError if there are fewer: nothing is allocated before they are there."""
        if not 0 <= count <= len(self._view) - self._at:
            raise PayloadError(
                f"cut short: {count} bytes are missing at {self._at} of {len(self._view)}"
            )
        self._at += count
        return self._view[self._at - count : self._at]

    def read_integer(self, size: int) -> int:
        """The next unsigned whole number of so many bytes."""
        return int.from_bytes(self.take(size), "little")

    def read_rest(self) -> memoryview:
        """All that is left."""
        return self.take(len(self._view) - self._at)

    def expect_end(self) -> None:
        """Raises PayloadError if anything is left."""
        if self._at != len(self._view):
            raise PayloadError(f"{len(self._view) - self._at} bytes too many")


# Whole numbers in as many bits as they need, vectorised: fields of equal width, and ascending
# indices.
#
# Indices are written by Elias and Fano's code (Elias 1974; Fano 1971): the low bits of each as they
# are, the high ones as a unary bitmap. k of n take k·(2 + log2(n/k)) bits, within half a bit each
# of the entropy of a random choice, and the length follows from k and n alone. By option their gaps
# are coded by LZMA instead where that is shorter: clustered indices are.

Numbers = np.ndarray[Any, np.dtype[Any]]
FANO = b"\0"
GAPS = b"\1"
ESCAPE = 255  # a gap of so much or more: written in full, apart
FILTERS = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16, "lc": 0, "lp": 0, "pb": 0}]


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many fields."""
    return count * (bits // 8) + (count * (bits % 8) + 7) // 8


def pack_bits(values: Numbers, bits: int) -> bytes:
    """Whole numbers below 2^bits (at most 32), one after the other: their low bytes in planes, the bits above packed."""
    values = np.ascontiguousarray(values)
    planes = []
    for place in range(bits // 8):
        planes.append((values >> (8 * place) if place else values).astype(np.uint8).tobytes())
    width = bits % 8
    if width:  # eight fields fill so many bytes
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
    """The reverse of `pack`: uint8 or uint16 where they suffice, else int64. Raises PayloadError for too few bytes."""
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
    """Ascending indices below `total`, int64 and at least one; how many there are is not written."""
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
    """The reverse of `write_indices`: int64, ascending and below `total`. Raises PayloadError for anything else."""
    how = bytes(source.take(1))
    if how == FANO:
        low = _low_bits(total, count)
        lows = unpack_bits(source, count, low).astype(np.int64)
        length = count + (total - 1 >> low) + 1
        bits = np.unpackbits(
            np.frombuffer(source.take((length + 7) // 8), np.uint8), bitorder="little"
        )
        places = np.flatnonzero(bits)
        if len(places) != count:
            raise PayloadError(f"{len(places)} indices where {count} were agreed")
        indices = (places - np.arange(count)) << low | lows
    elif how == GAPS:
        gaps = _index_differences(
            bytes(source.take(int.from_bytes(source.take(4), "little"))), count
        )
        indices = np.cumsum(gaps + 1) - 1
    else:
        raise PayloadError(f"indices in an unknown code {how[0]}")
    if indices[-1] >= total or (np.diff(indices) < 1).any():
        raise PayloadError(f"indices are not ascending below {total}")
    return indices


def _index_differences(coded: bytes, count: int) -> Numbers:
    try:
        raw = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS).decompress(
            coded, 5 * count + 1
        )
    except lzma.LZMAError:
        raise PayloadError("indices that cannot be decoded") from None
    gaps = np.frombuffer(raw[:count], np.uint8).astype(np.int64)
    wide = gaps == ESCAPE
    if len(gaps) != count or len(raw) != count + 4 * int(wide.sum()):
        raise PayloadError(f"{len(raw)} bytes of gaps for {count} indices")
    gaps[wide] = np.frombuffer(raw[count:], "<u4")
    return gaps
