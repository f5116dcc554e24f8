from __future__ import annotations

import asyncio
import pickle
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from hetero_fl.core.stored_rows import StoredRows, read_all
from hetero_fl.data import Dataset
from hetero_fl.data.sources.npz_files import read_npz
from hetero_fl.data.sources.zarr_stores import _read
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federated_data import read_source
from tests.support.image_folders import make_arrays
from tests.support.mistakes import check_refused

zarr = pytest.importorskip("zarr")
sync = pytest.importorskip("zarr.core.sync").sync


def write(path: Path, **changes: Any) -> Path:
    """Write 30 training and 9 test images. `changes` replace arrays, None omits one."""
    images, labels = make_arrays(39)
    arrays = {
        "train_images": images[:30],
        "train_labels": labels[:30],
        "test_images": images[30:],
        "test_labels": labels[30:],
        **changes,
    }
    group = zarr.open_group(str(path), mode="w")
    for name, values in arrays.items():
        if values is not None:
            chunks = (min(8, max(1, len(values))), *values.shape[1:])
            array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks)
            array[...] = values
    return path


def load(path: Path, **settings: Any) -> Dataset:
    return read_source("zarr", path, **{"stream": True, **settings})


def test_store_equals_npz_file(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for stream in (True, False):
        for channels in (None, 1, 3):
            with subtests.test(stream=stream):
                images, labels = make_arrays(30)
                images = images[..., 0] if channels is None else images[..., :channels]
                arrays = {"train_images": images, "train_labels": labels}
                np.savez(tmp_path / "set.npz", **arrays)
                store = write(tmp_path / "set.zarr", **arrays, test_images=None, test_labels=None)

                dataset = load(store, stream=stream)
                expected = read_npz(tmp_path / "set.npz", "npz")

                assert isinstance(dataset.train.x, StoredRows) == stream
                assert dataset.task == expected.task and torch.equal(
                    dataset.train.labels, expected.train.labels
                )
                assert torch.equal(read_all(dataset.train.x), read_all(expected.train.x))


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    images, _ = make_arrays(39)
    x = load(write(tmp_path / "set.zarr")).train.x
    rows = torch.tensor([29, 3, 3, 17])

    assert isinstance(x, StoredRows)
    for stored in (x, pickle.loads(pickle.dumps(x))):
        read = stored.read(rows)
        assert torch.equal(read, torch.from_numpy(images[rows.numpy()]).movedim(-1, 1))
    assert x.read(rows[:0]).shape == (0, 3, 8, 8)


@each_case(
    ("changes", "message"),
    (
        ({"train_labels": None}, "array 'train_labels' not found, which 'train_images' needs"),
        ({"train_images": None}, "array 'train_images' not found; the store has test_images"),
        (
            {"test_labels": np.arange(8)},
            "test_labels: expected 9 rows as in test_images, got 8",
        ),
        (
            {"train_images": np.zeros((30, 8, 8), np.float32)},
            "train_images: expected images as integers, got float32",
        ),
        (
            {"train_images": np.zeros((30, 8), np.uint8)},
            r"train_images: expected shape \(N, H, W\) or \(N, H, W, C\), got \(30, 8\)",
        ),
        (
            {"test_images": np.ones((9, 8, 8), np.uint8)},
            r"test_images: expected images of shape \(3, 8, 8\) as in train_images, got \(1, 8",
        ),
        ({"train_labels": np.full(30, np.nan)}, "train_labels: row 0: NaN or infinite value"),
        (
            {"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, int)},
            "train_labels: has no rows",
        ),
    ),
)
def test_malformed_store_is_named(changes: Any, message: str, tmp_path: Path) -> None:
    store = write(tmp_path / "set.zarr", **changes)

    check_refused(rf"^data\.path: .*set\.zarr: .*{message}", load, store)


def test_missing_and_other_folders_are_named(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "array.zarr"), shape=(3,), dtype="uint8")
    for path, message in (
        (tmp_path / "none.zarr", r"folder '.*none\.zarr' not found"),
        (tmp_path, "not a readable zarr store"),
        (tmp_path / "array.zarr", "not a readable zarr store"),
    ):
        check_refused(message, load, path)


def test_array_that_disappears_is_named(tmp_path: Path) -> None:
    x = load(write(tmp_path / "set.zarr")).train.x

    shutil.rmtree(tmp_path / "set.zarr" / "train_images")

    check_refused(r"^data\.path: .*array 'train_images' not found", read_all, x)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_store_is_read_or_named_in_one_line(tmp_path: Path, data: st.DataObject) -> None:
    store = tmp_path / "set.zarr"
    shutil.rmtree(store, ignore_errors=True)
    write(store)
    files = sorted(f for f in store.rglob("*") if f.is_file())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)

    try:
        read_all(load(store).train.x)
    except UserError as error:
        assert "\n" not in str(error)
        assert re.match(r"data\.path: .*set\.zarr", str(error))


class DamagedArray:
    """An array of which one chunk is damaged, while another one takes long to read."""

    nbytes = nchunks = nchunks_initialized = 1

    other: asyncio.Task[None]
    busy: asyncio.Task[None]

    def __getitem__(self, rows: Any) -> np.ndarray:
        async def occupy_loop() -> None:
            time.sleep(0.1)

        async def read() -> None:
            self.other = asyncio.create_task(asyncio.sleep(0.5))
            # So that all threads begin to wait together.
            self.busy = asyncio.create_task(occupy_loop())
            raise ValueError("damaged")

        sync(read())
        raise AssertionError


def test_error_is_raised_after_the_other_chunks_are_read() -> None:
    is_read = []

    def read() -> None:
        array = DamagedArray()
        check_refused("not readable", _read, array, "path: set.zarr")
        is_read.append(array.other.done())

    # Threads that fail together must not wait for each other.
    threads = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert is_read == [True] * len(threads)


def test_numcodecs_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write(tmp_path / "set.zarr")
    monkeypatch.delattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE")

    check_refused("cannot import name 'ALLOW_UNSAFE_PICKLE_DECODE'", load, store)


def test_missing_chunk_is_not_read_as_zeros(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for stream in (True, False):
        for name in ("train_images", "train_labels"):
            with subtests.test(stream=stream, name=name):
                store = write(tmp_path / "set.zarr")
                chunk = store / name / "c" / "1"
                shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()

                check_refused(
                    f"{name}: expected 4 chunks, got 3; write the store", load, store, stream=stream
                )
