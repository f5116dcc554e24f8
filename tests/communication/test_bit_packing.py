"""Packing of integers in few bits: lossless, of the expected size, and strict when unpacking."""

from __future__ import annotations

import itertools
import lzma
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from hetero_fl.communication.bit_packing import (
    FILTERS,
    ByteReader,
    pack_bits,
    packed_size,
    read_indices,
    unpack_bits,
    write_indices,
)
from hetero_fl.core.payload import PayloadError
from tests.support.cases import each_case


@each_case(("bits", "count"), itertools.product(range(33), [1, 7, 8, 9, 1000]))
def test_packed_fields_round_trip_in_minimal_size(bits: int, count: int) -> None:
    values = np.random.default_rng(bits * count).integers(0, 2**bits, count)
    values[0] = 2**bits - 1
    raw = pack_bits(values, bits)
    assert len(raw) == packed_size(count, bits) and len(raw) < bits * count / 8 + 1
    assert (unpack_bits(ByteReader(raw), count, bits) == values).all()


def test_packed_bits_match_loop() -> None:
    values, bits = [5, 0, 7, 3, 1, 6, 2, 4, 7], 3
    expected = sum(v << (bits * i) for i, v in enumerate(values)).to_bytes(4, "little")
    assert pack_bits(np.array(values), bits) == expected


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 99), st.booleans())
@settings(max_examples=200, deadline=None)
def test_indices_round_trip(total: int, share: float, seed: int, entropy: bool) -> None:
    count = max(1, int(share * total))
    indices = np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
    raw = write_indices(indices, total, entropy)
    source = ByteReader(raw)
    assert (read_indices(source, count, total) == indices).all()
    source.expect_end()
    assert len(raw) <= 2 + count * (2 + math.log2(total / count)) / 8 + 1 + count / 8


def test_packed_indices_are_close_to_their_entropy() -> None:
    rng, total, count = np.random.default_rng(0), 1_000_000, 10_000
    spread = np.sort(rng.choice(total, count, replace=False))
    entropy = (
        (math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1))
        / math.log(2)
        / 8
    )
    plain = len(write_indices(spread, total))
    assert entropy < plain < 1.08 * entropy
    assert len(write_indices(spread, total, entropy=True)) <= plain
    near = np.sort(rng.choice(total // 20, count, replace=False))
    assert len(write_indices(near, total, entropy=True)) < 0.8 * len(write_indices(near, total))


@each_case("entropy", [False, True])
def test_invalid_indices_are_refused(entropy: bool) -> None:
    # Clustered indices: their gaps may be coded.
    indices = np.concatenate([np.arange(400), [9900]])
    raw = write_indices(indices, 10_000, entropy)
    assert raw[0] == entropy
    with pytest.raises(PayloadError, match="ascending values below 9900"):
        read_indices(ByteReader(raw), 401, 9900)
    for count in (400, 402):
        with pytest.raises(PayloadError):
            source = ByteReader(raw)
            read_indices(source, count, 10_000)
            source.expect_end()
    for cut in range(len(raw)):
        with pytest.raises(PayloadError):
            read_indices(ByteReader(raw[:cut]), 401, 10_000)
    with pytest.raises(PayloadError, match="unknown code"):
        read_indices(ByteReader(b"\7" + raw[1:]), 401, 10_000)


def test_oversized_gap_codes_are_not_unpacked() -> None:
    bomb = lzma.compress(bytes(10**7), lzma.FORMAT_RAW, filters=FILTERS)
    raw = b"\1" + len(bomb).to_bytes(4, "little") + bomb
    with pytest.raises(PayloadError, match="got 21 bytes"):
        read_indices(ByteReader(raw), 4, 100)
