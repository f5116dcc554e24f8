"""Folders of `.npy` files, which are read into memory or mapped."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from hetero_fl.core.stored_rows import StoredRows, read_all
from hetero_fl.data import Dataset
from hetero_fl.data.sources.npz_files import read_npz
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federated_data import read_source
from tests.support.image_folders import make_arrays
from tests.support.mistakes import check_refused


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
    path.mkdir()
    for name, values in arrays.items():
        if values is not None:
            np.save(path / f"{name}.npy", values)
    return path


def load(path: Path, **settings: Any) -> Dataset:
    return read_source("npz", path, **{"stream": True, **settings})


def test_folder_equals_npz_file(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for stream in (True, False):
        for channels in (None, 1, 3):
            with subtests.test(stream=stream):
                images, labels = make_arrays(30)
                images = images[..., 0] if channels is None else images[..., :channels]
                arrays = {"train_images": images, "train_labels": labels}
                np.savez(tmp_path / "set.npz", **arrays)
                folder = tmp_path / f"{stream}_{channels}"
                write(folder, **arrays, test_images=None, test_labels=None)

                dataset = load(folder, stream=stream)
                expected = read_npz(tmp_path / "set.npz", "npz")

                assert isinstance(dataset.train.x, StoredRows) == stream
                assert dataset.task == expected.task and torch.equal(
                    dataset.train.labels, expected.train.labels
                )
                assert torch.equal(read_all(dataset.train.x), read_all(expected.train.x))


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    images, _ = make_arrays(39)
    x = load(write(tmp_path / "set")).train.x
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
        (
            {"train_images": None},
            "array 'train_images' not found; the file has test_images, test_labels, train_labels",
        ),
        (
            {"test_labels": np.arange(8)},
            "test_labels: expected 9 rows as in test_images, got 8",
        ),
        (
            {"train_images": np.zeros((30, 8, 8), np.float32)},
            "train_images.npy: expected images as integers, got float32",
        ),
        (
            {"train_images": np.zeros((30, 8), np.uint8)},
            r"train_images.npy: expected shape \(N, H, W\) or \(N, H, W, C\), got \(30, 8\)",
        ),
        (
            {"test_images": np.ones((9, 8, 8), np.uint8)},
            r"test_images: expected rows of shape \(8, 8, 3\) as in train_images, got",
        ),
        ({"train_labels": np.full(30, np.nan)}, "train_labels: row 0: NaN or infinite value"),
        (
            {"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, int)},
            "train_images: has no rows",
        ),
    ),
)
def test_malformed_folder_is_named(changes: Any, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", **changes)

    check_refused(rf"^data\.path: .*set.*{message}", load, folder)


def test_missing_and_other_folders_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    np.save(folder / "test_images.npy", np.array([{}], object))
    for path, stream, message in (
        (tmp_path / "none", None, r"file '.*none' not found"),
        (tmp_path, True, "array 'train_images' not found; the file has no arrays"),
        (
            folder,
            True,
            r"test_images\.npy: not a readable \.npy file \(ValueError: Array can't be mem",
        ),
    ):
        check_refused(message, load, path, stream=stream)
    np.savez(tmp_path / "set.npz", train_images=np.zeros((3, 8, 8)), train_labels=[0, 1, 2])
    check_refused(
        r"^data\.stream: needs a folder of \.npy files, got .*set\.npz", load, tmp_path / "set.npz"
    )


def test_array_that_changes_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    x = load(folder).train.x

    np.save(folder / "train_images.npy", np.zeros((31, 8, 8, 3), np.uint8))
    check_refused(r"^data\.path: .*train_images\.npy: expected 30 rows, got 31", read_all, x)

    (folder / "train_images.npy").unlink()
    check_refused(r"^data\.path: .*train_images\.npy: not a readable .npy file", read_all, x)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_file_is_read_or_named_in_one_line(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "set"
    shutil.rmtree(folder, ignore_errors=True)
    write(folder)
    files = sorted(f for f in folder.iterdir())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)

    try:
        read_all(load(folder).train.x)
    except UserError as error:
        assert "\n" not in str(error)
        assert re.match(r"data\.path: .*set", str(error))
