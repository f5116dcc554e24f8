"""Image files, which are read into memory or when they are used."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import StreamConfig
from hetero_fl.core.stored_rows import Column, StoredRows
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.serialization import check_memory

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM")
"""Formats of Pillow that are read. Others, such as EPS, may start programs."""
MAX_PIXELS = 89_478_485
"""Maximum number of pixels of an image, above which Pillow warns of decompression bombs."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
ORIENTATION_TAG = 0x0112
"""EXIF tag of the orientation of an image."""
TIFF_SIZE_TAGS = (0x0100, 0x0101)
"""Tags of the width and height of a TIFF file."""
ROTATED = (5, 6, 7, 8)
"""EXIF orientations of images that are rotated by 90 degrees."""
DAMAGED_EXIF = (SyntaxError, ValueError, TypeError, KeyError, struct.error)
"""Errors of Pillow for damaged EXIF data."""


def read_image_files(
    files: Sequence[Path], side: int | None = None, stream: StreamConfig | None = None
) -> Column:
    """Read image files, as grayscale if all images are grayscale, otherwise as RGB.

    Args:
        files: Files to read.
        side: Height and width in pixels to which images are resized. If None, images keep their
            size.
        stream: Settings for reading images when they are used. If None, all images are read into
            memory. Otherwise, only the sizes and color modes are read.

    Returns:
        Images, uint8 `[N, C, H, W]`, or int32 if the files have more than 8 bits per pixel.

    Raises:
        UserError: If a file is not an image, or the images have different sizes or bits.
    """
    places = [f"path: {file}" for file in files]
    if stream is None:
        return stack_images((_read(file, side) for file in files), places, files[0].name)
    headers = [_read_header(file) for file in files]
    sizes = [header.size for header in headers]
    if side is None:
        check_sizes(sizes, places, files[0].name)
    _check_bits([header.is_deep for header in headers], places, files[0].name)
    width, height = (side, side) if side else sizes[0]
    channels = 1 if all(header.is_gray for header in headers) else 3
    dtype = torch.int32 if headers[0].is_deep else torch.uint8
    reader = ImageFileReader(files, side, (channels, height, width), dtype)
    return StoredRows(reader, stream)


class ImageFileReader:
    """Reader of image files (see `RowReader`).

    Args:
        files: Files to read.
        side: Height and width in pixels to which images are resized. If None, images keep their
            size.
        shape: Shape of an image, `(C, H, W)`.
        dtype: Type of the pixels, uint8 or int32.
    """

    def __init__(
        self,
        files: Sequence[Path],
        side: int | None,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> None:
        # Strings take less memory than paths.
        self._files = [str(file) for file in files]
        self._side = side
        self.shape: tuple[int, ...] = shape
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rows: np.ndarray) -> Tensor:
        """Read images (see `RowReader.read`)."""
        images = torch.empty(len(rows), *self.shape, dtype=self.dtype)
        for image, row in zip(images, rows, strict=True):
            image.copy_(torch.tensor(self._read_image(Path(self._files[row]))))
        return images

    def _read_image(self, file: Path) -> np.ndarray:
        """Return the pixels of an image, `[C, H, W]` or `[1, H, W]`."""
        try:
            pixels = _read(file, self._side)
        except UserError as error:
            raise UserError(f"data.{error}") from error
        channels, height, width = self.shape
        if pixels.shape[:2] != (height, width):
            raise UserError(
                f"data.path: {file}: expected {width}x{height} pixels as on loading, got "
                f"{pixels.shape[1]}x{pixels.shape[0]}; the file has changed"
            )
        if pixels.ndim == 3 and channels == 1:
            raise UserError(
                f"data.path: {file}: expected a grayscale image as on loading, got a color image; "
                "the file has changed"
            )
        return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def stack_images(decoded: Iterable[np.ndarray], places: Sequence[str], first: str) -> Tensor:
    """Stack images, as grayscale if all images are grayscale, otherwise as RGB.

    Args:
        decoded: Pixels of each image, uint8 `[H, W]` or `[H, W, 3]`, or int32 `[H, W]`. Each image
            is checked before the next one is decoded.
        places: Place of each image, for error messages.
        first: Name of the first image, for error messages.

    Returns:
        Images, uint8 or int32 `[N, C, H, W]`.

    Raises:
        UserError: If the images have different sizes or bits, or do not fit into the memory.
    """
    images: list[np.ndarray] = []
    for place, image in zip(places, decoded, strict=True):
        images.append(image)
        if image.shape[:2] != images[0].shape[:2]:
            sizes = [each.shape[1::-1] for each in (images[0], image)]
            check_sizes(sizes, (places[0], place), first)
        if len(images) == 1:
            check_memory(len(places) * image.nbytes, place)
    has_color = any(image.ndim == 3 for image in images)
    _check_bits([image.dtype != np.uint8 for image in images], places, first)
    if has_color:
        images = [
            image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
            for image in images
        ]
        return torch.from_numpy(np.moveaxis(np.stack(images), -1, 1).copy())
    return torch.from_numpy(np.stack(images)[:, None])


def check_sizes(sizes: Sequence[tuple[int, ...]], places: Sequence[str], first: str) -> None:
    """Check that all images have the same size.

    Args:
        sizes: Width and height of each image in pixels.
        places: Place of each image, for error messages.
        first: Name of the first image, for error messages.

    Raises:
        UserError: If the images have different sizes.
    """
    for place, (width, height) in zip(places, sizes, strict=True):
        if (width, height) != sizes[0]:
            raise UserError(
                f"{place}: expected {sizes[0][0]}x{sizes[0][1]} pixels as in {first}, got "
                f"{width}x{height}; set data.size to resize all images"
            )


def _check_bits(are_deep: Sequence[bool], places: Sequence[str], first: str) -> None:
    """Raise UserError if only some images have more than 8 bits per pixel."""
    for place, is_deep in zip(places, are_deep, strict=True):
        if is_deep != are_deep[0]:
            expected, found = ("16", "8") if are_deep[0] else ("8", "16")
            raise UserError(
                f"{place}: expected {expected} bits per pixel as in {first}, got {found}; save all "
                "images with the same number of bits"
            )


def image_files(path: Path) -> list[Path]:
    """Return the sorted paths of all images in a folder and its subfolders."""
    found = (
        f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")
    )
    # Comparing paths is slow.
    return sorted(found, key=lambda file: file.parts)


@contextmanager
def open_image(content: Path | AbstractContextManager[IO[bytes]], where: str = "") -> Iterator[Any]:
    """Open an image of one of `FORMATS` with Pillow, and convert errors to a UserError.

    Args:
        content: File, or context manager that opens it.
        where: Place of the image, for error messages. If empty, the file.
    """
    from PIL import Image, UnidentifiedImageError

    where = where or f"path: {content}"
    if isinstance(content, Path) and not content.is_file():
        raise UserError(f"{where}: file not found")
    try:
        # Pillow maps files that it opens by name, and then garbles rotated TIFF files.
        file = content.open("rb") if isinstance(content, Path) else content
        with file as read, Image.open(read, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS:,} pixels")
            yield opened
    # Pillow raises exceptions of many types for damaged images.
    except Exception as error:
        # The text of Pillow contains the address of an object in memory.
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "unknown format or damaged file" if is_unknown else one_line(error, 200)
        raise UserError(f"{where}: not a readable image ({reason})") from error


def _read(file: Path, side: int | None) -> np.ndarray:
    """Return the pixels of an image file (see `image_pixels`)."""
    with open_image(file) as opened:
        return image_pixels(opened, side)


class _Header(NamedTuple):
    """Width and height in pixels, and whether the image is grayscale and has more than 8 bits."""

    size: tuple[int, int]
    is_gray: bool
    is_deep: bool


def _read_header(file: Path) -> _Header:
    with open_image(file) as opened:
        width, height = opened.size
        if opened.format == "TIFF":
            # Some versions of Pillow have swapped the size of a rotated image.
            width, height = (opened.tag_v2[tag] for tag in TIFF_SIZE_TAGS)
        size = (height, width) if _is_rotated(opened, file) else (width, height)
        return _Header(size, is_grayscale(opened), opened.mode.startswith("I"))


def _is_rotated(image: Any, file: Path) -> bool:
    """Return whether the EXIF orientation of an image swaps its width and height."""
    from PIL import Image

    try:
        if image.format == "PNG" and "exif" not in image.info and not _has_exif(file):
            # The method of PNG images would read the pixels to find the data behind them.
            return Image.Image.getexif(image).get(ORIENTATION_TAG) in ROTATED
        return image.getexif().get(ORIENTATION_TAG) in ROTATED
    except DAMAGED_EXIF:
        return False


def _has_exif(file: Path) -> bool:
    """Return whether a PNG file has EXIF data, which may follow the pixels."""
    with file.open("rb") as content:
        content.seek(8)
        while len(header := content.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"eXIf":
                return True
            content.seek(length + 4, 1)
    return False


def _upright(image: Any) -> Any:
    """Return the image in the orientation of its EXIF data, which is ignored if damaged."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except DAMAGED_EXIF:
        return image


def is_grayscale(image: Any) -> bool:
    """Return whether a Pillow image is read as grayscale.

    Raises:
        ValueError: If the range of the pixels is unknown, or Pillow would drop some of their bits.
    """
    if image.mode == "F":
        raise ValueError("pixels of mode F have no fixed range; save it with 8 or 16 bits")
    is_gray = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    # Pillow reads 16 bits of a single channel only. The tiles of a loaded image are unknown.
    raw_modes = [str(tile[3] if isinstance(tile[3], str) else tile[3][0]) for tile in image.tile]
    if not image.mode.startswith("I") and any(";16" in mode for mode in raw_modes):
        raise ValueError(f"16 bits per channel of mode {image.mode}; save it with 8 bits")
    return is_gray


def image_pixels(image: Any, side: int | None) -> np.ndarray:
    """Return the pixels of a Pillow image.

    Args:
        image: Image of any mode.
        side: Height and width in pixels to which the image is resized. If None, it keeps its size.

    Returns:
        uint8 `[H, W]` (grayscale) or `[H, W, 3]` (RGB), or int32 `[H, W]` if the image has more
        than 8 bits per pixel.

    Raises:
        ValueError: If the range of the pixels is unknown.
    """
    from PIL import Image

    mode = "L" if is_grayscale(image) else "RGB"
    image = _upright(image)
    if image.mode.startswith("I"):
        # Pillow resizes 32-bit images only.
        image = Image.fromarray(np.asarray(image).astype(np.int32))
    else:
        image = image.convert(mode)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR) if side else image)
