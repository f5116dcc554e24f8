from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data import load_source
from hetero_fl.data.sources.npz_files import check_image_size, read_images, read_npz
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.mistakes import check_refused, refusal

TWO = Task("multiclass", 2)


def load(path: Path, name: str = "npz") -> Any:
    return load_source(SourceConfig(name=name, path=str(path)), path.parent)


def test_npz_has_expected_layout(npz: Any) -> None:
    path = npz()
    dataset = load(path)
    with np.load(path) as arrays:
        for split, examples in (
            ("train", dataset.train),
            ("val", dataset.validation),
            ("test", dataset.test),
        ):
            assert examples.x.dtype == torch.uint8
            assert np.array_equal(examples.x[:, 0].numpy(), arrays[f"{split}_images"])
            assert np.array_equal(examples.y.numpy(), arrays[f"{split}_labels"][:, 0])
    assert dataset.task == TWO and dataset.name == "npz"


def test_file_in_place_of_a_named_set_keeps_name_and_task(npz: Any) -> None:
    dataset = load(npz(val_images=None, val_labels=None), "chest_xray")
    assert (dataset.name, dataset.task.names) == ("chest_xray", ("normal", "pneumonia"))
    assert dataset.validation is None
    assert load(npz(train_labels=np.zeros(30)), "medmnist:pathmnist").task.outputs == 9


def test_color_axis_moves_to_the_front(npz: Any) -> None:
    rng = np.random.default_rng(1)
    images = {
        f"{s}_images": rng.random((n, 8, 6, 3)) for s, n in (("train", 30), ("val", 6), ("test", 9))
    }
    x = load(npz(**images)).train.x
    assert x.shape == (30, 3, 8, 6) and x.dtype == torch.float32
    assert np.allclose(x[4, 2].numpy(), images["train_images"][4, :, :, 2])


def test_npz_with_table_rows_requires_no_named_set(npz: Any) -> None:
    rows = {f"{s}_images": np.zeros((n, 4)) for s, n in (("train", 30), ("val", 6), ("test", 9))}
    assert load(npz(**rows)).train.x.shape == (30, 4)
    check_refused("train_images: expected shape", load, npz(**rows), "chest_xray")


NAN = np.zeros((30, 8, 8), dtype=np.float32)
NAN[3, 1, 1] = np.nan
HIGH = (np.arange(30) % 2).astype(np.int64)
HIGH[11] = 7


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"train_images": NAN}, "train_images: row 3: NaN or infinite value"),
    (
        {"train_images": np.zeros((29, 8, 8), np.uint8)},
        "train_labels: expected 29 rows as in train_images, got 30",
    ),
    (
        {"train_images": np.zeros((30, 8, 8, 8, 3), np.uint8)},
        "train_images: expected shape (N, H, W) or (N, H, W, C), got (30, 8, 8, 8, 3)",
    ),
    ({"train_images": np.zeros((30, 28, 28, 28), np.uint8)}, "train_images: expected shape"),
    (
        {"train_images": np.zeros((30, 0, 8), np.uint8)},
        "train_images: expected images of shape",
    ),
    (
        {"train_images": np.full((30, 8, 8), 2**40)},
        "train_images: expected pixels of at most 31 bits, got 1099511627776 to",
    ),
    (
        {"train_images": np.zeros((30, 8, 8), complex)},
        "train_images: expected images as integers or floats, got complex128",
    ),
    (
        {"train_images": np.full((30, 8, 8), "a")},
        "train_images: expected images as integers or floats, got <U1",
    ),
    ({"train_images": np.array(3)}, "train_labels: expected 0 rows as in train_images, got 30"),
    (
        {"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0)},
        "train_images: has no rows",
    ),
    (
        {"test_images": np.zeros((9, 7, 7), np.uint8)},
        "test_images: expected rows of shape (8, 8) as in train_images, got shape (9, 7, 7)",
    ),
    (
        {"train_labels": HIGH},
        "train_labels: row 11: label 7 is out of range 0 to 1",
    ),
    ({"train_labels": -HIGH}, "train_labels: row 1: label -1 is out of range"),
    (
        {"train_labels": np.where(HIGH == 7, 1e30, HIGH)},
        "train_labels: row 11: expected a class number, got 1e+30",
    ),
    (
        {"train_labels": np.where(HIGH == 7, 0.5, HIGH)},
        "train_labels: row 11: expected a class number, got 0.5",
    ),
    ({"test_labels": np.full(9, np.nan)}, "test_labels: row 0: NaN or infinite value"),
    ({"train_labels": np.full(30, "x")}, "train_labels: expected numbers, got <U1"),
    ({"train_labels": np.zeros((30, 2))}, "train_labels: expected one column of labels, got 2"),
    (
        {"train_labels": np.zeros((30, 1, 1))},
        "train_labels: expected shape (N,), (N, 1) or (N, L), got (30, 1, 1)",
    ),
    ({"train_labels": np.array([None] * 30)}, "not a readable .npz file"),
    ({"val_labels": None}, "array 'val_labels' not found, which 'val_images' needs"),
    (
        {"train_images": None},
        "array 'train_images' not found; the file has train_labels, val_images",
    ),
    (
        {"train_labels": np.array([0, 255] * 15, np.uint8)},
        "train_labels: row 1: label 255 is out of range 0 to 1",
    ),
    ({"test_labels": np.zeros((9, 2))}, "test_labels: expected one column of labels, got 2"),
]


def test_malformed_arrays_are_named(npz: Any, subtests: pytest.Subtests) -> None:
    for changes, words in MALFORMED:
        path = npz(**changes)
        with subtests.test(words=words):
            refused = refusal(load, path, "chest_xray")
            assert refused.startswith(f"data.path: {path}: ")
            assert words in refused
    check_refused(
        r"test_labels: expected 1 columns as in .*train_labels, got",
        load,
        npz(test_labels=np.zeros((9, 2))),
    )


def test_only_another_file_is_suggested_for_a_size(tmp_path: Path) -> None:
    file = tmp_path / "pathmnist_64.npz"
    file.write_bytes(b"")
    images = torch.zeros(1, 3, 28, 28)
    check_refused(
        r"got 28x28; remove size, or set path to the file",
        check_image_size,
        images,
        64,
        file,
        "pathmnist",
    )
    check_refused(
        r"; did you mean 'pathmnist_64\.npz'\?",
        check_image_size,
        images,
        64,
        tmp_path / "pathmnist.npz",
        "pathmnist",
    )


def test_other_files_are_refused_without_wrong_advice(tmp_path: Path, npz: Any) -> None:
    for file in ("mine.csv", "mine.npz"):
        (tmp_path / file).write_text("a,b,label\n1,2,0\n3,4,1\n")
    npz(train_labels=np.array([None] * 30))
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "nothing.npz")
    with (tmp_path / "one.npz").open("wb") as file_of_one_array:
        np.save(file_of_one_array, np.zeros(3))
    unreadable = "data.path: PATH: not a readable .npz file: "
    for name, file, message in (
        ("npz", "mine.csv", "data.path: expected a .npz file, got 'PATH'; to read a table set da"),
        ("npz", "mine.npz", unreadable + "expected a complete archive as written by numpy.savez"),
        ("npz", "set.npz", unreadable + "contains an array of Python objects; save arrays of num"),
        ("chest_xray", "set.npz", unreadable + "contains an array of Python objects; save arrays"),
        ("npz", "mine.cvs", "data.path: file 'PATH' not found; did you mean 'mine.csv'?"),
        ("npz", "empty.npz", "data.path: PATH: "),
        ("npz", "one.npz", "data.path: PATH: "),
        ("npz", "nothing.npz", "data.path: PATH: "),
        ("npz", ".", "data.path: "),
    ):
        path = tmp_path / file
        assert refusal(load_source, SourceConfig(name=name, path=str(path)), tmp_path).startswith(
            message.replace("PATH", str(path))
        )


def test_damaged_files_are_detected(npz: Any) -> None:
    path = npz()
    content = path.read_bytes()
    good = read_npz(path, "npz").train.x
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        broken = bytearray(content)
        if rng.random() < 0.3:
            del broken[int(rng.integers(len(content))) :]
        else:
            broken[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            assert torch.equal(read_npz(path, "npz").train.x, good)  # a flip where nothing is read
        except UserError:
            refused += 1
    assert refused > 75


def test_images_are_read_without_labels(npz: Any) -> None:
    path = npz(train_labels=np.array([None] * 30))  # would be refused if it were read
    assert read_images(path).shape == (30, 1, 8, 8)
    check_refused("array 'train_images' not found", read_images, npz(train_images=None))
    check_refused("has no rows", read_images, npz(train_images=np.zeros((0, 8, 8))))


def announce(path: Path, **shapes: tuple[int, ...]) -> Path:
    """Write the headers of arrays of bytes, without their values."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in shapes.items():
            header = io.BytesIO()
            described = {"shape": shape, "fortran_order": False, "descr": "|u1"}
            np.lib.format.write_array_header_1_0(header, described)
            archive.writestr(f"{name}.npy", header.getvalue())
    return path


@each_case(
    ("name", "shapes", "line"),
    (
        (
            "npz",
            {"train_images": (10**9, 3), "train_labels": (30,)},
            "train_labels: expected 1000000000 rows as in train_images, got 30",
        ),
        (
            "npz",
            {"train_images": (30, 8, 8), "train_labels": (10**9,)},
            "train_labels: expected 30 rows as in train_images, got 1000000000",
        ),
        (
            "npz",
            {"train_images": (10**9, 10**6), "train_labels": (10**9,)},
            r"needs 931,323\.5 GiB of memory, of which [\d,.]+ GiB are free",
        ),
        (
            "activity",
            {"x": (10**6, 30, 30), "y": (30,)},
            "y: expected 1000000 rows as in x, got 30",
        ),
        ("npz", {"train_images": (-(10**18), 2), "train_labels": (30,)}, "rows as in|negative"),
    ),
)
def test_announced_sizes_are_compared_before_arrays_are_read(
    name: str, shapes: Any, line: str, tmp_path: Path
) -> None:
    path = announce(tmp_path / "set.npz", **shapes)

    check_refused(line, load_source, SourceConfig(name=name, path=str(path)), tmp_path)
