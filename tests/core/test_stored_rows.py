from __future__ import annotations

import pickle
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from hetero_fl.config.data import StreamConfig
from hetero_fl.core import stored_rows
from hetero_fl.core.stored_rows import (
    StoredRows,
    join_rows,
    map_rows,
    read_all,
    read_batches,
    read_rows,
    require_tensor,
    split_rows,
)
from hetero_fl.utils.errors import UserError


class Counting:
    """Rows that contain their index. Records the number of batches that are read but not used."""

    dtype = torch.uint8

    def __init__(self, length: int = 50, shape: tuple[int, ...] = (1, 2, 2)) -> None:
        self.length = length
        self.shape = shape
        self.read_batches = 0

    def __len__(self) -> int:
        return self.length

    def read(self, rows: np.ndarray) -> Tensor:
        self.read_batches += 1
        values = torch.from_numpy(rows.astype(np.uint8))
        return values.reshape(-1, *[1] * len(self.shape)).expand(-1, *self.shape).clone()


class Failing(Counting):
    """Rows of which number 7 cannot be read."""

    def read(self, rows: np.ndarray) -> Tensor:
        if 7 in rows:
            raise UserError("row 7 is damaged")
        return super().read(rows)


def halves(x: Tensor) -> Tensor:
    return x.float() / 2


@given(
    rows=st.lists(st.integers(0, 49), max_size=60),
    size=st.integers(1, 9),
    workers=st.integers(1, 4),
    prefetch=st.integers(1, 5),
)
def test_batches_equal_those_of_a_tensor(
    rows: list[int], size: int, workers: int, prefetch: int
) -> None:
    stored = StoredRows(Counting(), StreamConfig(workers=workers, prefetch=prefetch)).map(halves)
    dense = read_all(stored)
    chosen = torch.tensor(rows, dtype=torch.int64)
    batches = list(chosen.split(size))

    for column in (stored, stored[chosen]):
        in_memory = dense if column is stored else dense[chosen]
        assert column.shape == in_memory.shape and column.dtype == in_memory.dtype
        assert torch.equal(read_all(column), in_memory)
        parts = zip(split_rows(column, size), split_rows(in_memory, size), strict=True)
        assert all(torch.equal(a, b) for a, b in parts)
    parts = zip(read_batches(stored, batches), read_batches(dense, batches), strict=True)
    assert all(torch.equal(a, b) for a, b in parts)
    assert torch.equal(read_rows(stored, chosen), read_rows(dense, chosen))


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_joined_rows_equal_concatenated_tensors(lengths: list[int], seed: int) -> None:
    parts = [StoredRows(Counting(n)).map(halves) for n in lengths]
    joined = join_rows(parts)
    dense = torch.cat([read_all(part) for part in parts])
    order = torch.randperm(len(dense), generator=torch.Generator().manual_seed(seed))

    assert isinstance(joined, StoredRows) and joined.shape == dense.shape
    assert torch.equal(read_rows(joined, order), dense[order])
    assert torch.equal(read_all(join_rows([*parts, dense])), torch.cat([dense, dense]))


def test_rows_are_read_only_a_few_batches_ahead() -> None:
    reader = Counting()
    batches = StoredRows(reader, StreamConfig(workers=1, prefetch=3)).read_batches(
        torch.arange(50).split(5)
    )

    next(batches)
    batches.close()

    assert 1 <= reader.read_batches <= 4


def test_large_batches_are_not_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "PREFETCHED_BYTES", 40)
    reader = Counting()
    batches = StoredRows(reader, StreamConfig(workers=1, prefetch=8)).read_batches(
        torch.arange(50).split(10)
    )

    next(batches)
    batches.close()

    assert reader.read_batches <= 2


def test_rows_are_converted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = StoredRows(Counting())
    whole = read_all(stored.map(halves))
    converted = Mock(side_effect=halves)

    monkeypatch.setattr(stored_rows, "CONVERTED_BYTES", 28)
    parts = stored.map(converted).read(torch.arange(50))

    assert torch.equal(parts, whole)
    assert max(len(call.args[0]) for call in converted.call_args_list) == 7


def test_error_of_a_thread_is_raised_in_the_order_of_batches() -> None:
    batches = StoredRows(Failing()).read_batches(torch.arange(20).split(5))

    assert next(batches)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="row 7 is damaged"):
        next(batches)


def test_selecting_and_mapping_read_nothing() -> None:
    reader = Counting()
    stored = StoredRows(reader)[torch.tensor([3, 1])][1:].map(halves)

    assert (stored.shape, stored.nbytes) == ((1, 1, 2, 2), 8) and reader.read_batches == 0
    assert map_rows(torch.ones(2, 3), halves).tolist() == [[0.5] * 3] * 2


def test_pickled_rows_are_read_elsewhere() -> None:
    copy = pickle.loads(pickle.dumps(StoredRows(Counting()).map(halves)[torch.tensor([4])]))

    assert read_all(copy).unique().tolist() == [2]


def test_features_that_need_all_rows_name_the_key() -> None:
    with pytest.raises(UserError, match=r"data\.stream: join needs all rows in memory; remove"):
        require_tensor(StoredRows(Counting()), "join")
