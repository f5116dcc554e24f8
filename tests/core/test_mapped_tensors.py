"""Tensors whose values are in files equal tensors in memory."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from hetero_fl.core import mapped_tensors
from hetero_fl.core.mapped_tensors import (
    join_rows,
    map_array,
    map_rows,
    mapped_file,
    shareable,
    take_rows,
)
from hetero_fl.data import Examples
from hetero_fl.utils.errors import UserError
from tests.support.mistakes import check_refused


def mapped(folder: Path, dense: Tensor, name: str = "a") -> Tensor:
    """Return a tensor of uint8 or int32 that is mapped from a file."""
    np.save(folder / f"{name}.npy", dense.numpy())
    return map_array(folder / f"{name}.npy", folder)


def halves(x: Tensor) -> Tensor:
    return x.float() / 2


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let results of more than 24 bytes be in files, and convert 12 bytes at a time."""
    monkeypatch.setattr(mapped_tensors, "SCRATCH_BYTES", 24)
    monkeypatch.setattr(mapped_tensors, "CHUNK_BYTES", 12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 20),
    rows=st.lists(st.integers(0, 19), max_size=30),
    is_deep=st.booleans(),
    seed=st.integers(0, 9),
)
@pytest.mark.usefixtures("small_limits")
def test_rows_equal_those_in_memory(
    tmp_path: Path, count: int, rows: list[int], is_deep: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int32 if is_deep else torch.uint8
    dense = torch.randint(0, 256, (count, 1, 2, 2), generator=generator, dtype=dtype)
    chosen = torch.tensor([row % count for row in rows], dtype=torch.int64)
    x = mapped(tmp_path, dense)

    taken = take_rows(x, chosen)
    found = (x, taken, map_rows(x, halves), map_rows(taken, halves), join_rows([x, taken]))

    expected = (dense, dense[chosen], halves(dense), halves(dense[chosen]))
    for result, other in zip(found, (*expected, torch.cat([dense, dense[chosen]])), strict=True):
        assert torch.equal(result, other) and result.dtype == other.dtype
    assert (mapped_file(taken) is None) == (taken.nbytes <= 24)
    assert mapped_file(take_rows(dense, chosen)) is None
    # Scratch files have no names.
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]


def test_changes_are_not_written_to_the_file(tmp_path: Path) -> None:
    dense = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    x = mapped(tmp_path, dense)

    x.zero_()

    assert torch.equal(map_array(tmp_path / "a.npy", tmp_path), dense)


def test_another_process_receives_the_place_of_rows(tmp_path: Path) -> None:
    dense = torch.arange(4 * 10**6, dtype=torch.int32).reshape(1000, 1, 40, 100)
    x = mapped(tmp_path, dense).movedim(1, -1)[100:900]

    content = pickle.dumps(Examples(x, torch.zeros(800)))
    found = pickle.loads(content).x

    assert len(content) < 20_000 and torch.equal(found, x) and mapped_file(found) == mapped_file(x)
    assert shareable(x) is x
    (tmp_path / "a.npy").write_bytes(b"short")
    check_refused(r"a\.npy: file is missing or has changed", pickle.loads, content)


@pytest.mark.parametrize("folder", ["/proc", "/none"])
def test_scratch_files_are_shared(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_tensors, "PROCESSES", folder)
    dense = torch.arange(10**6, dtype=torch.int32).reshape(1000, 1000)
    scratch = take_rows(mapped(tmp_path, dense), torch.arange(700))

    shared = shareable(scratch)
    command = "import pickle, sys; x = pickle.load(sys.stdin.buffer).x; print(int(x.sum()))"
    has_file = mapped_file(shared) is not None

    assert has_file == (folder == "/proc") and shared.is_shared()
    assert torch.equal(shared, dense[:700])
    if has_file:
        content = pickle.dumps(Examples(shared))
        done = subprocess.run(
            [sys.executable, "-c", command], input=content, stdout=subprocess.PIPE, check=True
        )
        assert int(done.stdout) == int(dense[:700].sum()) and len(content) < 20_000


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_tensors, "SCRATCH_BYTES", 0)
    x = mapped(tmp_path, torch.zeros(3, 4, dtype=torch.uint8))
    (tmp_path / "a.npy").unlink()
    tmp_path.rmdir()

    with pytest.raises(UserError, match=r"^data\.root: .*cannot store rows \(No such file"):
        take_rows(x, torch.arange(2))
