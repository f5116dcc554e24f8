"""Folders of `.npy` files, which are read into memory or mapped."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from hetero_fl.core.mapped_tensors import mapped_file
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
    return read_source("npz", path, path.parent / "root", **{"stream": True, **settings})


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

                assert (mapped_file(dataset.train.x) is not None) == stream
                assert dataset.task == expected.task and torch.equal(
                    dataset.train.labels, expected.train.labels
                )
                assert torch.equal(dataset.train.x, expected.train.x)


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int32", "uint16", "int64", ">i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_integers_of_any_type_are_mapped(dtype: str, order: Any, tmp_path: Path) -> None:
    images = (np.arange(30 * 4 * 5) % (2 if dtype == "bool" else 200)).reshape(30, 4, 5)
    folder = write(
        tmp_path / "set",
        train_images=np.asarray(images.astype(dtype), order=order),
        test_images=None,
        test_labels=None,
    )
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    x = load(folder).train.x

    assert torch.equal(x[:, 0].long(), torch.from_numpy(images)) and mapped_file(x) is not None
    assert x.dtype == (torch.uint8 if dtype in ("uint8", "bool") and order == "C" else torch.int32)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


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
            r"test_images: expected rows of uint8 and shape \(3, 8, 8\) as in ",
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
        load(folder)
    except UserError as error:
        assert "\n" not in str(error)
        assert re.match(r"data\.path: .*set", str(error))
