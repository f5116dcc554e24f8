"""Images of a folder that are read when they are used."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from hetero_fl.config.data import SourceConfig, StreamConfig
from hetero_fl.core.stored_rows import StoredRows, read_all
from hetero_fl.data import Dataset, load_source
from hetero_fl.data.sources.image_files import read_image_files
from hetero_fl.utils.errors import UserError
from tests.support.image_folders import make_image_folder
from tests.support.mistakes import check_refused

STREAM = StreamConfig(workers=2, prefetch=2)


def load(path: Path, **settings: object) -> Dataset:
    source = SourceConfig.model_validate(
        {"name": "image_folder", "path": str(path), "stream": True, **settings}
    )
    return load_source(source, path)


def train_images(dataset: Dataset) -> StoredRows:
    assert isinstance(dataset.train.x, StoredRows)
    return dataset.train.x


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "images", 30)


def test_streamed_images_equal_images_in_memory(tmp_path: Path) -> None:
    for split, rows in (("train", 12), ("val", 6), ("test", 9)):
        make_image_folder(tmp_path / split, rows)

    for size in (None, 5):
        streamed = load(tmp_path, size=size).splits()
        in_memory = load(tmp_path, size=size, stream=False).splits()

        assert list(streamed) == list(in_memory)
        for split, examples in in_memory.items():
            assert isinstance(examples.x, torch.Tensor)
            assert isinstance(streamed[split].x, StoredRows)
            assert torch.equal(read_all(streamed[split].x), examples.x)
            assert torch.equal(streamed[split].labels, examples.labels)


def test_streamed_images_of_several_modes_equal_images_in_memory(tmp_path: Path) -> None:
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
    for number in range(1, len(modes) + 1):
        files = []
        for mode in modes[:number]:
            files.append(tmp_path / f"{mode.replace(';', '')}.tif")
            Image.new(mode, (6, 5), 1).save(files[-1])
        assert torch.equal(
            read_all(read_image_files(files, None, STREAM)), read_all(read_image_files(files))
        )


def test_no_pixels_are_read_on_loading(folder: Path) -> None:
    file = folder / "red" / "000002.png"
    file.write_bytes(file.read_bytes()[:60])

    images = train_images(load(folder))

    assert images.shape == (30, 3, 8, 8)
    check_refused(r"data\.path: .*000002\.png: not a readable image", read_all, images)


def test_images_of_different_sizes_are_named_on_loading(folder: Path) -> None:
    Image.new("RGB", (7, 8)).save(folder / "green" / "000001.png")

    check_refused(r"000001\.png: expected 8x8 .* got 7x8; set data\.size", load, folder)
    assert train_images(load(folder, size=4)).shape == (30, 3, 4, 4)


def test_unreadable_headers_are_named_on_loading(folder: Path) -> None:
    (folder / "red" / "000002.png").write_bytes(b"text")
    check_refused(r"000002\.png: not a readable image", load, folder)

    (folder / "red" / "000002.png").unlink()
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(folder / "red" / "000002.tif")
    check_refused(r"000002\.tif: not a readable image .*mode F", load, folder)


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (None, "file not found"),
        (Image.new("RGB", (9, 8)), "expected 8x8 pixels as on loading, got 9x8; the file has"),
        (Image.new("RGB", (8, 8)), "expected a grayscale image as on loading, got a color image"),
    ],
)
def test_files_that_change_after_loading_are_named(
    tmp_path: Path, replacement: Image.Image | None, message: str
) -> None:
    file = tmp_path / "a" / "0.png"
    file.parent.mkdir()
    Image.new("L", (8, 8)).save(file)
    images = train_images(load(tmp_path))

    if replacement is None:
        file.unlink()
    else:
        replacement.save(file)

    check_refused(rf"^data\.path: .*0\.png: {message}", read_all, images)


def test_grayscale_image_among_color_images_is_repeated(folder: Path) -> None:
    Image.new("L", (8, 8), 7).save(folder / "green" / "000001.png")

    images = train_images(load(folder))

    assert (images.read(torch.tensor([10])) == 7).all()


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

    for stream in (None, STREAM):
        try:
            x = read_all(read_image_files([file], 8, stream))
        except UserError as error:
            assert "\n" not in str(error) and f"damaged.{suffix}" in str(error)
        else:
            assert x.dtype == torch.uint8 and x.shape[2:] == (8, 8)


def test_folder_that_disappears_is_named(folder: Path) -> None:
    images = train_images(load(folder))

    shutil.rmtree(folder)

    check_refused("file not found", images.read, torch.tensor([0]))
