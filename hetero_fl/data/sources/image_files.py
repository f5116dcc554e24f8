"""Image files, which are decoded into memory, or once into a file that is mapped."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.mapped_tensors import map_array
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.extras import check_extra
from hetero_fl.utils.serialization import check_memory, make_folder

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM")
"""Formats of Pillow that are read. Others, such as EPS, may start programs."""
MAX_PIXELS = 89_478_485
"""Maximum number of pixels of an image, above which Pillow warns of decompression bombs."""
DICOM = ".dcm"
"""Suffix of DICOM files, which pydicom reads."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", DICOM}
DAMAGED_EXIF = (SyntaxError, ValueError, TypeError, KeyError, struct.error)
"""Errors of Pillow for damaged EXIF data."""
DECODED = "decoded"
"""Folder of decoded images in the folder for downloads."""
Allocate = Callable[[tuple[int, ...], np.dtype[Any], str], np.ndarray]
"""A function of the shape, the type and a place for messages that returns an array."""


def read_image_files(
    files: Sequence[Path], side: int | None = None, root: Path | None = None
) -> Tensor:
    """Read image files, as grayscale if all images are grayscale, otherwise as RGB.

    Args:
        files: Files to read.
        side: Height and width in pixels to which images are resized. If None, images keep their
            size.
        root: Folder for downloads, in which the images are decoded to a file unless the same files
            have been decoded before. The result is mapped from this file. If None, the images are
            read into memory.

    Returns:
        Images, uint8 `[N, C, H, W]`, or int32 if the files have more than 8 bits per pixel.

    Raises:
        UserError: If a file is not an image, or the images have different sizes or bits.
    """
    images = (_read(file, side) for file in files)
    places = [f"path: {file}" for file in files]
    if root is None:
        return stack_images(images, places, files[0].name)
    folder = root / DECODED
    decoded = folder / f"{_content_key(files, side)}.npy"
    if not decoded.is_file():
        make_cache(folder)
        _decode(images, places, files[0].name, decoded)
    return map_array(decoded, folder)


def make_cache(folder: Path) -> None:
    """Create a folder for decoded images or scratch files, which must be writable."""
    try:
        make_folder(folder)
    except UserError as error:
        raise UserError(f"root: {error}") from None


def _content_key(files: Sequence[Path], side: int | None) -> str:
    """Return a hash of the names, sizes and times of files, and of the size of the images."""
    digest = hashlib.sha256(f"1 {side}".encode())
    for file in files:
        try:
            found = file.stat()
        except OSError as error:
            raise UserError(f"path: {file}: file not found") from error
        name = os.fsencode(file.absolute())
        digest.update(b"\0%s %d %d" % (name, found.st_size, found.st_mtime_ns))
    return digest.hexdigest()


def _decode(images: Iterable[np.ndarray], places: Sequence[str], first: str, target: Path) -> None:
    """Write decoded images to a `.npy` file, which appears when it is complete."""
    with TemporaryDirectory(dir=target.parent, prefix="decoding_") as folder:
        part = Path(folder) / target.name

        def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], _: str) -> np.ndarray:
            # A file with fewer channels remains mapped until its images are copied.
            part.unlink(missing_ok=True)
            needed = math.prod(shape) * dtype.itemsize
            if needed > (free := shutil.disk_usage(folder).free):
                raise UserError(
                    f"stream: {target.parent}: needs {needed / 2**30:,.1f} GiB for decoded images, "
                    f"of which {free / 2**30:,.1f} GiB are free; set data.root to another folder"
                )
            return np.lib.format.open_memmap(part, "w+", dtype, shape)

        pixels = _stack(images, places, first, allocate)
        # `flush` writes to the disk.
        pixels.flush()  # type: ignore[attr-defined]
        os.replace(part, target)


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

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], place: str) -> np.ndarray:
        check_memory(math.prod(shape) * dtype.itemsize, place)
        return np.empty(shape, dtype)

    return torch.from_numpy(_stack(decoded, places, first, allocate))


def _stack(
    decoded: Iterable[np.ndarray], places: Sequence[str], first: str, allocate: Allocate
) -> np.ndarray:
    """Copy images to an allocated array (see `stack_images`)."""
    pixels: np.ndarray = np.empty((0, 0, 0, 0))
    for row, (place, image) in enumerate(zip(places, decoded, strict=True)):
        height, width = image.shape[:2]
        channels = 3 if image.ndim == 3 else 1
        if row == 0:
            pixels = allocate((len(places), channels, height, width), image.dtype, place)
        if (height, width) != pixels.shape[2:]:
            raise UserError(
                f"{place}: expected {pixels.shape[3]}x{pixels.shape[2]} pixels as in {first}, got "
                f"{width}x{height}; set data.size to resize all images"
            )
        if image.dtype != pixels.dtype:
            expected, found = ("8", "16") if pixels.dtype == np.uint8 else ("16", "8")
            raise UserError(
                f"{place}: expected {expected} bits per pixel as in {first}, got {found}; save all "
                "images with the same number of bits"
            )
        if channels > pixels.shape[1]:
            gray = pixels
            pixels = allocate((len(places), channels, height, width), gray.dtype, place)
            pixels[:row] = gray[:row]
        pixels[row] = image if channels == 1 else np.moveaxis(image, -1, 0)
    return pixels


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
    if file.suffix.lower() == DICOM:
        return _read_dicom(file, side)
    with open_image(file) as opened:
        return image_pixels(opened, side)


def _read_dicom(file: Path, side: int | None) -> np.ndarray:
    """Return the stored values of a DICOM file with one frame, in which larger is brighter."""
    check_extra("dicom", ["pydicom"], f"path: {file}: a DICOM file")
    import pydicom
    from PIL import Image

    if not file.is_file():
        raise UserError(f"path: {file}: file not found")
    try:
        content = pydicom.dcmread(file)
        if content.Rows * content.Columns > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels")
        if int(content.get("NumberOfFrames") or 1) > 1:
            raise ValueError("more than one frame; save each frame to a file")
        pixels = content.pixel_array
        if pixels.min() < 0:
            raise ValueError(f"pixels must be >= 0, got {pixels.min()}")
        if content.PhotometricInterpretation == "MONOCHROME1":
            pixels = 2**content.BitsStored - 1 - pixels.astype(np.int32)
        pixels = pixels.astype(np.uint8 if content.BitsStored <= 8 else np.int32)
        return _resized(Image.fromarray(pixels), side)
    # pydicom raises exceptions of many types for damaged files.
    except Exception as error:
        raise UserError(f"path: {file}: not a readable image ({one_line(error, 200)})") from error


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
    return _resized(image, side)


def _resized(image: Any, side: int | None) -> np.ndarray:
    """Return the pixels of a Pillow image, which is resized unless `side` is None."""
    from PIL import Image

    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR) if side else image)
