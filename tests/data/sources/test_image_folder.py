"""Images of a folder, in memory and decoded to a file that is mapped."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from hetero_fl import prepare
from hetero_fl.core.mapped_tensors import mapped_file
from hetero_fl.data import Dataset
from hetero_fl.data.sources import image_files
from hetero_fl.data.sources.image_files import read_image_files
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federated_data import read_source
from tests.support.image_folders import make_image_folder
from tests.support.mistakes import check_broken_folders, check_refused


def save(path: Path, value: int = 0, size: tuple[int, int] = (6, 5), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 255)).save(path)
    return path


def load(path: Path, group: str | None = None) -> Dataset:
    return read_source("image_folder", path, group=group)


def test_class_folders_become_labels(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "well" / f"{i}.png", 10 + i)
        save(tmp_path / "ill" / "deeper" / f"{i}.PNG", 20 + i)
    (tmp_path / "ill" / "notes.txt").write_text("")
    (tmp_path / ".cache").mkdir()
    dataset = load(tmp_path)
    assert dataset.task.names == ("ill", "well") and dataset.test is None
    assert dataset.train.x.shape == (6, 1, 5, 6) and dataset.train.x.dtype == torch.uint8
    assert dataset.train.x[:, 0, 0, 0].tolist() == [20, 21, 22, 10, 11, 12]
    assert dataset.train.y is not None and dataset.train.y.tolist() == [0, 0, 0, 1, 1, 1]


def test_folders_name_splits_and_groups(tmp_path: Path) -> None:
    for split, rows in (("train", 3), ("val", 1), ("test", 2)):
        for site in ("site_10", "site_2"):
            for name in ("a", "b"):
                for i in range(rows):
                    save(tmp_path / split / site / name / f"{i}.png")
    dataset = load(tmp_path, group="site")
    assert [len(s) for s in dataset.splits().values()] == [12, 4, 8]
    assert dataset.train.group_names == ("site_2", "site_10") and dataset.task.names == ("a", "b")
    assert dataset.train.group is not None and torch.bincount(dataset.train.group).tolist() == [
        6,
        6,
    ]


def test_pixels_keep_their_bits_and_become_rgb_together(tmp_path: Path) -> None:
    files = [save(tmp_path / "a" / "0.png", 7), save(tmp_path / "a" / "1.png", 9, mode="RGB")]
    x = read_image_files(files)
    assert x.shape == (2, 3, 5, 6)
    assert x[0, :, 0, 0].tolist() == [7, 7, 7] and x[1, :, 0, 0].tolist() == [9, 0, 255]
    for value, dtype, name in ((0x7F30, np.uint16, "deep.png"), (0x17F30, np.int32, "deeper.tif")):
        Image.fromarray(np.full((4, 4), value, dtype=dtype)).save(tmp_path / name)
        assert read_image_files([tmp_path / name])[0, 0, 0, 0] == value
    save(tmp_path / "a" / "1.png", 9, size=(20, 30))
    assert read_image_files(files, 8).shape == (2, 1, 8, 8)


def save_all(*folders: str) -> Callable[[Path], object]:
    return lambda path: [save(path / folder / "0.png") for folder in folders]


BROKEN: list[tuple[str, Callable[[Path], object], dict[str, Any], str]] = [
    ("none", lambda d: d.rmdir(), {}, "data.path: folder 'DIR' not found"),
    ("empty", save_all(), {}, "expected images as CLASS/"),
    ("split", save_all("train/a", "other/a"), {}, "unknown split folder 'other'"),
    ("upper case", save_all("Test/a"), {}, "folder 'train' not found, only test"),
    ("test only", save_all("test/a"), {}, "folder 'train' not found, only test"),
    (
        "two names",
        save_all("train/a", "val/a", "valid/a"),
        {},
        "'val' and 'valid' are both the validation set",
    ),
    (
        "sizes",
        lambda d: [save(d / "a" / "0.png"), save(d / "b" / "1.png", size=(7, 5))],
        {},
        "1.png: expected 6x5 pixels as in 0.png, got 7x5",
    ),
    (
        "damage",
        lambda d: save(d / "a" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken"),
        {},
        "0.png: not a readable image (unknown format or damaged file)",
    ),
    ("floats", lambda d: save(d / "a" / "0.tif", mode="F"), {}, "mode F"),
]


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_malformed_folder_raises_one_line(subtests: pytest.Subtests) -> None:
    check_broken_folders(subtests, BROKEN, make, load)


def save_turned(file: Path, pixels: np.ndarray, place: str) -> None:
    """Save an image whose orientation, a quarter turn, stands in EXIF or XMP data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/'
        '22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    options = {"exif": {"exif": exif}, "xmp": {"xmp": xmp.encode()}, "late": {}}[place]
    Image.fromarray(pixels).save(file, **options)
    if place == "late":
        content = file.read_bytes()
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        # The last 12 bytes are the end of the file.
        file.write_bytes(content[:-12] + chunk + content[-12:])


@each_case(
    ("suffix", "place", "dtype"),
    (
        ("png", "exif", np.uint8),
        ("png", "exif", np.uint16),
        ("png", "late", np.uint8),
        ("tif", "exif", np.uint8),
        ("tif", "exif", np.uint16),
        ("jpg", "exif", np.uint8),
        ("jpg", "xmp", np.uint8),
    ),
)
def test_images_are_turned_upright(suffix: str, place: str, dtype: Any, tmp_path: Path) -> None:
    pixels = np.arange(128, dtype=dtype).reshape(8, 16)
    file = tmp_path / f"turned.{suffix}"
    save_turned(file, pixels, place)

    in_memory = read_image_files([file])

    expected = np.rot90(pixels, -1)
    assert np.abs(in_memory[0, 0].numpy() - expected.astype(int)).max() <= 4 * (suffix == "jpg")


def test_empty_class_folder_is_named(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for number, group in enumerate((None, "site")):
        with subtests.test(group=group):
            root = tmp_path / str(number)
            folder = root if group is None else root / "north"
            for i in range(3):
                save(folder / "a" / f"{i}.png", i)
            (folder / "b").mkdir()
            (folder / "b" / "readme.txt").write_text("no images")

            dataset = load(root, group)

            assert dataset.task.names == ("a",)
            assert "found no images of 'b', which are not classes" in dataset.notes
            data = {"name": "image_folder", "path": str(root), "group": group}
            check_refused(
                r"got 'a' in all 3 rows; found no images of 'b'$",
                prepare,
                {"data": data, "clients": {"count": 2}},
            )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "images", 30)


def load_mapped(path: Path, **keys: object) -> Dataset:
    return read_source("image_folder", path, path.parent / "root", **{"stream": True, **keys})


def decoded(path: Path) -> set[str]:
    """Return the names of the files of decoded images, of which no part remains."""
    return {file.name for file in (path.parent / "root" / "decoded").iterdir()}


def test_mapped_images_equal_images_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "images"
    for split, rows in (("train", 12), ("val", 6), ("test", 9)):
        make_image_folder(path / split, rows)

    for size in (None, 5):
        mapped = load_mapped(path, size=size).splits()
        in_memory = load_mapped(path, size=size, stream=False).splits()

        assert list(mapped) == list(in_memory)
        for split, examples in in_memory.items():
            assert mapped_file(mapped[split].x) is not None and mapped_file(examples.x) is None
            assert torch.equal(mapped[split].x, examples.x)
            assert torch.equal(mapped[split].labels, examples.labels)


def test_images_of_several_modes_equal_images_in_memory(tmp_path: Path) -> None:
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
    files = []
    for mode in modes:
        files.append(tmp_path / f"{mode}.tif")
        Image.new(mode, (6, 5), 1).save(files[-1])
        in_memory = read_image_files(files)
        assert torch.equal(read_image_files(files, None, tmp_path), in_memory)
        assert torch.equal(read_image_files(files[::-1]), in_memory.flip(0))


def test_images_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_mapped(folder).train.x
    names = decoded(folder)
    monkeypatch.setattr(image_files, "_read", lambda *_: pytest.fail("decoded again"))

    # A section of earlier versions means true.
    second = load_mapped(folder, stream={"workers": 2, "prefetch": 2}).train.x

    assert torch.equal(first, second) and len(names) == 1 and decoded(folder) == names


@pytest.mark.parametrize("change", ["pixels", "size", "new", "gone"])
def test_changed_images_are_decoded_again(change: str, folder: Path) -> None:
    load_mapped(folder)
    names = decoded(folder)
    file = folder / "red" / "000002.png"
    if change == "pixels":
        content = Image.new("RGB", (8, 8), 7)
        size = file.stat().st_size
        content.save(file)
        # A file of the same size differs in its time.
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    elif change == "gone":
        file.unlink()
    elif change == "new":
        shutil.copy(file, folder / "red" / "000100.png")

    x = load_mapped(folder, size=4 if change == "size" else None).train.x

    expected = load_mapped(folder, size=4 if change == "size" else None, stream=False).train.x
    assert torch.equal(x, expected) and decoded(folder) > names


@pytest.mark.parametrize("problem", ["damage", "interrupt", "disk", "root"])
def test_interrupted_decoding_leaves_no_file(
    problem: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if problem == "damage":
        (folder / "red" / "000002.png").write_bytes(b"text")
        check_refused(r"^data\.path: .*000002\.png: not a readable image", load_mapped, folder)
    elif problem == "root":
        (folder.parent / "root").write_text("")
        check_refused(r"^data\.root: .*root.decoded: not writable", load_mapped, folder)
        return
    elif problem == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
        check_refused(
            r"^data\.stream: .*GiB for decoded images, of which 0\.0", load_mapped, folder
        )
    else:
        monkeypatch.setattr(image_files, "_read", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_mapped(folder)
    assert decoded(folder) == set()


def test_processes_decode_at_the_same_time(folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = [dataset.train.x for dataset in pool.map(load_mapped, [folder] * 4)]

    assert all(torch.equal(x, load_mapped(folder, stream=False).train.x) for x in found)
    assert len(decoded(folder)) == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_image_folder(folder / "images", 3)
    for suffix in ("png", "jpg", "bmp", "tif"):
        file = io.BytesIO()
        Image.open(folder / "images" / "red" / "000002.png").save(
            file, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)
        )
        (folder / f"original.{suffix}").write_bytes(file.getvalue())
    return folder


# Pillow also warns of some kinds of damage.
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300)
@given(
    suffix=st.sampled_from(["png", "jpg", "bmp", "tif"]),
    keep=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
)
def test_damaged_image_is_read_or_named_in_one_line(
    small: Path, suffix: str, keep: float, changes: list[tuple[float, int]]
) -> None:
    data = bytearray((small / f"original.{suffix}").read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    file = small / f"damaged.{suffix}"
    file.write_bytes(data[: int(keep * len(data))])

    try:
        x = read_image_files([file], 8)
    except UserError as error:
        assert "\n" not in str(error) and f"damaged.{suffix}" in str(error)
    else:
        assert x.dtype == torch.uint8 and x.shape[2:] == (8, 8)
