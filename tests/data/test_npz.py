from __future__ import annotations

import io
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import from_arrays, load_source
from hetero_fl.data.sources.npz_files import check_image_size, read_npz
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.mistakes import check_refused, refusal


def load(path: Path, name: str = "npz", missing: bool = False) -> Any:
    return load_source(SourceConfig(name=name, path=str(path)), path.parent, missing=missing)


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
        "train_images: expected shape (N, H, W) or (N, H, W, C), got (30, 0, 8)",
    ),
    (
        {"train_images": np.full((30, 8, 8), 2**40)},
        "train_images: expected pixels of at most 31 bits, got 1099511627776 to",
    ),
    (
        {"train_images": np.zeros((30, 8, 8), complex)},
        "train_images: expected numbers, got complex128",
    ),
    (
        {"train_images": np.full((30, 8, 8), "a")},
        "train_images: expected numbers, got <U1",
    ),
    (
        {"train_images": np.array(3)},
        "train_images: expected shape (N, H, W) or (N, H, W, C), got ()",
    ),
    (
        {"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0)},
        "train_images: has no rows",
    ),
    (
        {"test_images": np.zeros((9, 7, 7), np.uint8)},
        "train_images, got uint8 and shape (1, 7, 7)",
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
    (
        {"train_labels": np.full(30, "x")},
        "val_labels: expected text as in",
    ),
    ({"train_labels": np.zeros((30, 2))}, "train_labels: expected one column of labels, got 2"),
    (
        {"train_labels": np.zeros((30, 1, 1))},
        "train_labels: expected shape (N,) or (N, L), got (30, 1, 1)",
    ),
    ({"train_labels": np.array([None] * 30)}, "not a readable .npz file"),
    ({"val_images": None}, "array 'val_images' not found, which 'val_labels' needs; add it"),
    ({"val_labels": None}, "array 'val_labels' not found, which 'val_images' needs; add it"),
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
    read = partial(read_npz, name="npz", labeled=False)
    path = npz(train_labels=np.array([None] * 30))  # would be refused if it were read
    assert read(path).train.x.shape == (30, 1, 8, 8)
    check_refused("array 'train_images' not found", read, npz(train_images=None))
    check_refused("has no rows", read, npz(train_images=np.zeros((0, 8, 8))))


N = np.arange(60)
WINDOWS = {"x": np.ones((60, 8, 2)), "y": N % 3, "columns": ["a", "b"]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "npz": {"train_images": np.ones((60, 8, 8), np.uint8), "train_labels": N % 3},
    "activity": WINDOWS | {"person": N // 15},
    "speech": WINDOWS | {"device": N // 15},
    "driving": {
        "frame": np.random.default_rng(0).integers(0, 256, (120, 3, 8, 9), np.uint8),
        "speed": np.arange(120.0),
        "position": np.ones((120, 2)),
        "angle": np.arange(120) / 10,
        "vehicle": np.full(120, "a"),
        "split": np.full(120, "train"),
    },
    "traffic": {
        "DateTime": np.datetime64("2024-01-01", "h") + np.arange(800),
        "Vehicles": np.arange(800) % 24 + 1.0,
    },
}
"""Arrays of a file of each source with a layout of its own."""


def saved(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / f"{name}.npz"
    np.savez(path, **{k: v for k, v in {**LAYOUTS[name], **changes}.items() if v is not None})
    return path


def with_nan(array: np.ndarray, row: int = 3) -> np.ndarray:
    changed = array.astype(float)
    changed[row] = np.nan
    return changed


FRAMES = LAYOUTS["driving"]["frame"]
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("npz", {"train_labels": with_nan(N % 3)}, "train_labels: row 3: NaN or infinite value; remov"),
    ("activity", {"y": with_nan(N % 3)}, "y: row 3: NaN or infinite value; remove the row"),
    ("speech", {"y": with_nan(N % 3)}, "y: row 3: NaN or infinite value; remove the row"),
    ("speech", {"y": N / 7}, "y: row 1: expected a class number, got 0.142857"),
    ("speech", {"y": np.ones((60, 2, 2))}, "y: expected shape (N,) or (N, L), got (60, 2, 2)"),
    ("speech", {"y": np.array(3)}, "y: expected shape (N,) or (N, L), got ()"),
    ("speech", {"y": np.zeros(60)}, "label: expected at least two classes in FILE, got 0 only"),
    ("speech", {"x": np.ones((60, 8, 0))}, "x: expected shape (N, T, F) or (N, F), got (60, 8, 0)"),
    ("speech", {"x": with_nan(WINDOWS["x"])}, "x: row 3: NaN or infinite value; remove the row"),
    ("speech", {"columns": 3}, "columns: expected shape (F,), got ()"),
    ("speech", {"x": None}, "array 'x' not found; the file has y, columns, device"),
    ("speech", {"device": with_nan(N)}, "device: row 3: NaN or infinite value; remove the row"),
    ("speech", {"device": np.ones((60, 2))}, "device: expected shape (N,), got (60, 2)"),
    ("speech", {"device": N.astype("m8")}, "device: expected text or numbers, got timedelta64"),
    ("speech", {"split": N}, "split: unknown value '0'; choose from test, train, validation"),
    ("driving", {"frame": FRAMES[:, 0]}, "frame: expected shape (N, 3, H, W) or (N, H, W, 3), got"),
    ("driving", {"frame": np.array(1)}, "frame: expected shape (N, 3, H, W) or (N, H, W, 3), got"),
    (
        "driving",
        {"frame": FRAMES.astype(int) * 256},
        "frame: expected uint8 or floats from 0 to 1, got int64",
    ),
    ("driving", {"frame": FRAMES - 1.0}, "frame: expected uint8 or floats from 0 to 1, got floats"),
    ("driving", {"frame": with_nan(FRAMES)}, "frame: row 3: NaN or infinite value; remove the row"),
    (
        "driving",
        {"angle": with_nan(np.ones(120))},
        "angle: row 3: NaN or infinite value; remove the row",
    ),
    ("driving", {"angle": np.full(120, "left")}, "angle: expected numbers, got <U4"),
    ("driving", {"angle": np.ones((120, 1))}, "angle: expected shape (N,), got (120, 1)"),
    ("driving", {"vehicle": None}, "array 'vehicle' not found; the file has frame, speed, "),
    ("traffic", {"Vehicles": np.ones((800, 2))}, "Vehicles: expected shape (N,), got (800, 2)"),
    ("traffic", {"Vehicles": np.ones(3)}, "Vehicles: expected 800 rows as in DateTime, got 3"),
    ("traffic", {"Vehicles": None}, "array 'Vehicles' not found; the file has DateTime"),
    ("traffic", {"rain": np.full(800, "wet")}, "rain: expected numbers, got <U3"),
    ("traffic", {"rain": np.full(800, np.inf)}, "rain: row 0: NaN or infinite value"),
    ("traffic", {"Junction": np.ones((800, 2))}, "Junction: expected shape (N,), got (800, 2)"),
    ("traffic", {"DateTime": np.arange(800)}, "DateTime: expected datetime64, got int64"),
]


def test_wrong_files_of_all_layouts_are_one_line(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name, changes, words in WRONG:
        with subtests.test(name=name, words=words):
            path = saved(tmp_path, name, **changes)
            expected = words.replace("FILE", str(path))
            assert f"{path}" in (refused := refusal(load, path, name)) and expected in refused


@each_case("name", ("activity", "speech"))
def test_labels_of_layouts_are_read_as_those_of_arrays(name: str, tmp_path: Path) -> None:
    for y in (N % 3, N % 3 + 1, N % 2 * 3.0, np.eye(3)[N % 3], np.resize(["b", "a"], 60), N % 30):
        for given in (y, y[:, None]) if y.ndim == 1 else (y,):
            found = load(saved(tmp_path, name, y=given), name)

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = from_arrays(np.ones((60, 2)), y, task="multiclass")
            assert found.task == expected.task
            assert torch.equal(found.train.labels, expected.train.labels)
    renumbered = load(saved(tmp_path, name, y=N % 3 + 1), name)
    assert f"{name}.npz: y: read as 3 classes: 1 as class 0, 2" in renumbered.notes[0]


def test_frames_have_one_range_whatever_their_type(tmp_path: Path) -> None:
    expected = load(saved(tmp_path, "driving"), "driving")
    for frames in (FRAMES / 255, FRAMES * 1.0, FRAMES.astype(np.int64), np.moveaxis(FRAMES, 1, -1)):
        found = load(saved(tmp_path, "driving", frame=frames), "driving")
        assert torch.allclose(found.train.x, expected.train.x) and found.blocks == expected.blocks
    gap = load(
        saved(tmp_path, "driving", speed=with_nan(np.ones(120), 10)), "driving", missing=True
    ).train.x
    assert gap.isnan().sum() == 1


def test_missing_values_of_tables_name_the_array(tmp_path: Path) -> None:
    table = with_nan(np.ones((60, 2)))
    for name, changes in (
        ("npz", {"train_images": table}),
        ("activity", {"x": table}),
    ):
        path = saved(tmp_path, name, **changes)
        array = next(iter(changes))
        words = rf"\.npz: {array}: row 3: missing value; fill or remove .*missing=indicate$"
        check_refused(words, load, path, name)
        assert load(path, name, missing=True).train.x.isnan().sum() == 2


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
