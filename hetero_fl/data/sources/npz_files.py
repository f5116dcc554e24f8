"""Data sets in the MedMNIST layout, from a `.npz` file or a folder of `.npy` files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import StreamConfig
from hetero_fl.core.images import (
    MAX_CHANNELS,
    USUAL_CHANNELS,
    as_numbers,
    as_pixels,
    channels_first,
    in_range,
)
from hetero_fl.core.stored_rows import Column, StoredRows
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames, check_examples, first_true, note_identifiers
from hetero_fl.data.dataset import Dataset, Examples, with_patients
from hetero_fl.data.labels import read_labels
from hetero_fl.data.sources.files import visible_files
from hetero_fl.utils.errors import UserError, one_line, suggest_file
from hetero_fl.utils.serialization import check_memory

PREFIXES = {"train": "train", "validation": "val", "test": "test"}
"""Prefix of the arrays of each split in the MedMNIST layout."""
PATIENT = "patient"
NUMBERS = ("buif", "numbers")
NAMES = ("buifU", "text or numbers")
DATES = ("M", "datetime64")
"""Kinds of NumPy types of an array, and their name in messages."""
IMAGES = ("N H W", "N H W C")
TABLE = ("N F",)
LABELS = ("N", "N L")


@dataclass(frozen=True)
class ArraySpec:
    """Specification of an array of a `.npz` file.

    Attributes:
        shapes: Possible shapes. A letter stands for any length, which is 0 for N only.
        types: Kinds of NumPy types and their name in messages. If None, any, as for labels.
        rows: Array with the same number of rows. If None, the rows are not compared.
        required: Whether the file must contain the array.
        gaps: Largest number of axes with which NaN stands for a missing value.
    """

    shapes: tuple[str, ...]
    types: tuple[str, str] | None = NUMBERS
    rows: str | None = None
    required: bool = True
    gaps: int = 0

    def check(self, array: np.ndarray, where: str) -> None:
        """Check an array.

        Args:
            array: The array.
            where: Name of the array, for error messages.

        Raises:
            UserError: If the array has another shape or type, or an invalid number.
        """
        if not any(_fits(array.shape, shape) for shape in self.shapes):
            axes = (", ".join(shape.split()) + "," * (len(shape) == 1) for shape in self.shapes)
            expected = " or ".join(f"({names})" for names in axes)
            raise UserError(f"{where}: expected shape {expected}, got {array.shape}")
        if not len(array):
            raise UserError(f"{where}: has no rows")
        if self.types is not None and array.dtype.kind not in self.types[0]:
            raise UserError(f"{where}: expected {self.types[1]}, got {array.dtype}")
        if array.dtype.kind == "f":
            invalid = np.isinf(array) if array.ndim <= self.gaps else ~np.isfinite(array)
            if (row := first_true(invalid.reshape(len(array), -1).any(1))) is not None:
                raise UserError(f"{where}: row {row}: NaN or infinite value; remove the row")


def _fits(shape: tuple[int, ...], pattern: str) -> bool:
    axes = pattern.split()
    return len(axes) == len(shape) and all(
        size == int(axis) if axis.isdigit() else size > 0 or axis == "N"
        for axis, size in zip(axes, shape, strict=True)
    )


def read_npz(
    path: Path,
    name: str,
    task: Task | None = None,
    kind: str | None = None,
    patient: str | None = None,
    *,
    stream: StreamConfig | None = None,
) -> Dataset:
    """Read a `.npz` file, or a folder of `.npy` files, in the MedMNIST layout.

    It contains arrays `{train,val,test}_images` and `{train,val,test}_labels`, of which only
    those of `train` are required. Images have shape `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`
    and values in 0..1 or 0..255, or integers of more bits. Floats `[N, F]` are rows of a table.
    Labels have shape `[N]` or `[N, L]` and are read as by `from_arrays`.

    Args:
        path: File or folder to read. The files of a folder are memory-mapped.
        name: Name of the data set.
        task: Learning task. If set, the file must contain images. If None, the task is inferred
            from the labels.
        kind: Kind of the task, "multiclass", "multilabel" or "regression". If None, the kind is
            inferred from the labels.
        patient: Name of the array with the patient of each training row. If None, the array
            "patient" is used if it exists.
        stream: Settings for reading the images of a folder when they are used. They are integers
            `[N, H, W]` or `[N, H, W, C]`. If None, all images are read into memory.

    Raises:
        UserError: If the file is missing or malformed. The message names the array and the row.
    """
    where = f"path: {path}"
    if stream is not None and not path.is_dir():
        raise UserError(
            f"stream: needs a folder of .npy files, got '{path}'; save each array with numpy.save, "
            "or remove stream"
        )
    specs = {
        patient or PATIENT: ArraySpec(LABELS, NAMES, "train_images", required=patient is not None)
    }
    for prefix in PREFIXES.values():
        images = f"{prefix}_images"
        specs[images] = _image_spec(is_table=task is None, required=prefix == "train")
        specs[f"{prefix}_labels"] = ArraySpec(LABELS, None, images, required=False)
    arrays = read_arrays(path, specs)
    prefixes = {s: prefix for s, prefix in PREFIXES.items() if f"{prefix}_images" in arrays}
    for prefix in prefixes.values():
        if f"{prefix}_labels" not in arrays:
            raise UserError(
                f"{where}: array '{prefix}_labels' not found, which '{prefix}_images' needs; add it"
            )
    task, targets, notes = read_labels(
        {f"{where}: {prefix}_labels": arrays[f"{prefix}_labels"] for prefix in prefixes.values()},
        f"{where}: labels",
        task=task or kind,
        names=ExampleNames(in_config=True),
    )
    read: Sequence[Column]
    if stream is not None:
        files = [path / f"{prefix}_images.npy" for prefix in prefixes.values()]
        read = [StoredRows(NpyReader(file), stream) for file in files]
    else:
        read = images_of_arrays(
            {f"{where}: {p}_images": arrays[f"{p}_images"] for p in prefixes.values()}
        )
    splits = {}
    gap = ""
    for (split, prefix), x, y in zip(prefixes.items(), read, targets.values(), strict=True):
        names = ExampleNames(f"{prefix}_images", f"{prefix}_labels")
        splits[split] = Examples(x, y)
        check_examples(splits[split], task, where, names=names, missing=True)
        gap = gap or first_gap(x, f"{where}: {names.x}")
        if x.shape[1:] != splits["train"].x.shape[1:]:
            raise UserError(
                f"{where}: {names.x}: expected rows of shape {arrays['train_images'].shape[1:]} as "
                f"in train_images, got shape {arrays[names.x].shape}"
            )
    train = splits["train"]
    if (patients := arrays.get(patient or PATIENT)) is not None:
        train = with_patients(train, patients, f"{where}: {patient or PATIENT}")
    advice = "" if patients is not None else ", or move it to an array 'patient'"
    return Dataset(
        name,
        task,
        train,
        splits.get("validation"),
        splits.get("test"),
        about=f"local {'folder' if path.is_dir() else 'file'} {path.name}",
        notes=(*notes, *note_identifiers(train.x, (), advice)),
        first_missing=gap,
    )


def _image_spec(*, is_table: bool, required: bool = True) -> ArraySpec:
    """Return the requirements of images, which may be a table if `is_table` is set."""
    return ArraySpec(IMAGES + (TABLE if is_table else ()), required=required, gaps=2)


def first_gap(x: Column, where: str) -> str:
    """Return the location of the first missing value of a table, or an empty string."""
    row = first_true(x.isnan().any(1)) if isinstance(x, Tensor) and x.ndim == 2 else None
    return "" if row is None else f"{where}: row {row}: missing value"


class NpyReader:
    """Reader of images in a `.npy` file, which is memory-mapped (see `RowReader`).

    Args:
        file: File with integers `[N, H, W]` or `[N, H, W, C]`.
    """

    def __init__(self, file: Path) -> None:
        array = map_array(file)
        if array.dtype.kind not in "bui":
            raise UserError(f"path: {file}: expected images as integers, got {array.dtype}")
        channels = array.shape[3:]
        if (
            array.ndim not in (3, 4)
            or 0 in array.shape[1:]
            or max(channels, default=0) > MAX_CHANNELS
        ):
            raise UserError(
                f"path: {file}: expected shape (N, H, W) or (N, H, W, C), got {array.shape}"
            )
        self._file = file
        self._length = len(array)
        self.shape = (*(channels or (1,)), *array.shape[1:3])
        self.dtype = torch.uint8 if array.dtype in (np.uint8, np.bool_) else torch.int32

    def __len__(self) -> int:
        return self._length

    def read(self, rows: np.ndarray) -> Tensor:
        """Read images (see `RowReader.read`)."""
        # Rows are read after the data set is loaded, which adds the section to the key.
        where = f"data.path: {self._file}"
        array = map_array(self._file, "data.path")
        if len(array) != self._length:
            raise UserError(f"{where}: expected {self._length} rows, got {len(array)}")
        values = array[rows]
        values = values[:, None] if values.ndim == 3 else np.moveaxis(values, -1, 1)
        pixels = as_numbers(values, where)
        as_pixels({where: pixels})
        return pixels.to(self.dtype)


def map_array(file: Path, key: str = "path") -> np.ndarray:
    """Map a `.npy` file into memory, read-only.

    Args:
        file: The file.
        key: Configuration key of the path, for error messages.

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except Exception as error:
        # numpy raises many kinds of errors for a damaged file.
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"{key}: {file}: not a readable .npy file ({reason})") from error


def medmnist_file(name: str, size: int | None) -> str:
    """Return the name of the file of a MedMNIST set with images of `size` pixels (default 28)."""
    return f"{name}.npz" if size in (None, 28) else f"{name}_{size}.npz"


def check_image_size(images: Column, size: int, path: Path, name: str) -> None:
    """Check that images `[N, C, H, W]` that were read from a file have the configured size.

    Raises:
        UserError: If the height or the width is not `size`.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return
    other = path.with_name(medmnist_file(name, size))
    hint = f"; did you mean '{other.name}'?" if other != path and other.is_file() else ""
    raise UserError(
        f"size: expected {size}x{size} pixels in {path}, got {width}x{height}"
        f"{hint or '; remove size, or set path to the file of this size'}"
    )


def read_images(path: Path) -> Tensor:
    """Read the training images of a `.npz` file in the MedMNIST layout, without labels.

    Returns:
        Images, integers or float32 `[N, C, H, W]`, or rows of a table, float32 `[N, F]`.

    Raises:
        UserError: If the file is missing or malformed.
    """
    arrays = read_arrays(path, {"train_images": _image_spec(is_table=True)})
    return images_of_arrays({f"path: {path}: train_images": arrays["train_images"]})[0]


def has_images(path: Path) -> bool:
    """Return whether a file is a readable `.npz` file in the MedMNIST layout."""
    try:
        return "train_images" in _read_archive(path, (), ())[1]
    except UserError:
        return False


def read_arrays(path: Path, specs: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Read arrays of a `.npz` file, if their headers announce valid sizes, and check them.

    Args:
        path: File to read, or a folder of `.npy` files, which are memory-mapped.
        specs: Requirements of the arrays to read, keyed by name.

    Returns:
        The arrays that exist, keyed by name.

    Raises:
        UserError: If the file is missing or damaged, an array is missing or malformed, numbers of
            rows differ, or the arrays do not fit into the memory.
    """
    where = f"path: {path}"
    aligned = [(spec.rows, name) for name, spec in specs.items() if spec.rows is not None]
    if path.is_dir():
        files = {file.stem: file for file in visible_files(path, "*.npy")}
        arrays = {name: map_array(file) for name, file in files.items() if name in specs}
        check_rows({name: array.shape for name, array in arrays.items()}, aligned, where)
        names = list(files)
    else:
        arrays, names = _read_archive(path, specs, aligned)
    for name, spec in specs.items():
        if name in arrays:
            spec.check(arrays[name], f"{where}: {name}")
        elif spec.required:
            found = ", ".join(names) or "no arrays"
            raise UserError(f"{where}: array '{name}' not found; the file has {found}")
    return arrays


def _read_archive(
    path: Path, wanted: Collection[str], aligned: Sequence[tuple[str, str]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the wanted arrays of a `.npz` file, and the names of all arrays."""
    if not path.is_file():
        raise UserError(f"path: file '{path}' not found{suggest_file(path)}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            check_headers(archive.zip, wanted, aligned, f"path: {path}")
            names = list(archive.files)
            return {name: archive[name] for name in names if name in wanted}, names
    except UserError:
        raise
    except Exception as error:
        # zipfile, zlib and numpy raise many kinds of errors for a damaged file.
        raise UserError(
            f"path: {path}: not a readable .npz file{_unreadable_reason(path, error)}"
        ) from error


def check_headers(
    archive: ZipFile, wanted: Collection[str], aligned: Sequence[tuple[str, str]], where: str
) -> None:
    """Check the sizes of arrays that are to be read.

    Args:
        archive: The `.npz` file.
        wanted: Names of the arrays to read.
        aligned: Pairs of these arrays that must have the same number of rows, if they exist.
        where: Name of the file, for error messages.

    Raises:
        UserError: If numbers of rows differ, or the arrays do not fit into the memory.
    """
    shapes = {}
    size = 0
    for entry in archive.namelist():
        if (name := entry.removesuffix(".npy")) in wanted:
            with archive.open(entry) as file:
                shapes[name], dtype = read_header(file)
            announced = math.prod(shapes[name]) * dtype.itemsize
            size += max(announced, archive.getinfo(entry).file_size)
    check_rows(shapes, aligned, where)
    check_memory(size, where)


def check_rows(
    shapes: Mapping[str, tuple[int, ...]], aligned: Sequence[tuple[str, str]], where: str
) -> None:
    """Check that arrays have the same number of rows (see `check_headers`)."""
    for first, second in aligned:
        rows, others = (shapes.get(name, ())[:1] for name in (first, second))
        if rows and others and rows != others:
            raise UserError(
                f"{where}: {second}: expected {rows[0]} rows as in {first}, got {others[0]}"
            )


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of an array, and return its shape and type.

    Raises:
        ValueError: If the file is not an array.
    """
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version[0]}.{version[1]} of arrays is not read")
    shape, _, dtype = readers[version](file)
    return shape, dtype


def _unreadable_reason(path: Path, error: Exception) -> str:
    # NumPy's message would recommend unpickling the file.
    if not is_zipfile(path):
        return ": expected a complete archive as written by numpy.savez"
    if "pickle" in str(error):
        return ": contains an array of Python objects; save arrays of numbers"
    return f" ({type(error).__name__}: {error})"


def images_of_arrays(raw: Mapping[str, np.ndarray]) -> list[Tensor]:
    """Return images `[N, C, H, W]`, integers or float32, or tables `[N, F]` as float32.

    Args:
        raw: Numbers `[N, H, W]`, `[N, H, W, C]`, `[N, C, H, W]` or `[N, F]`, keyed by the name that
            error messages quote.

    Raises:
        UserError: If the value range or axis order of images is ambiguous.
    """
    check_memory(sum(x.nbytes for x in raw.values()), next(iter(raw)))
    # A tensor must not share the memory of a file.
    numbers = {where: as_numbers(np.array(x), where) for where, x in raw.items()}
    numbers |= as_pixels({where: x for where, x in numbers.items() if x.ndim > 2})
    read = {where: _to_images(x, where) for where, x in numbers.items()}
    ranged, _ = in_range({where: x for where, x in read.items() if x.ndim == 4})
    return list((read | ranged).values())


def _to_images(x: Tensor, where: str) -> Tensor:
    shape = tuple(x.shape)
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and shape[-1] > MAX_CHANNELS and shape[1] not in USUAL_CHANNELS:
        raise UserError(f"{where}: expected shape (N, H, W) or (N, H, W, C), got {shape}")
    elif x.ndim == 4:
        x = channels_first(x, where, documented="last")
    return x.float() if x.is_floating_point() or x.ndim == 2 else x
