"""Data sets in the MedMNIST layout, from a `.npz` file or a folder of `.npy` files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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
from hetero_fl.data.checks import ExampleNames, check_examples, note_identifiers
from hetero_fl.data.dataset import Dataset, Examples, with_patients
from hetero_fl.data.labels import read_labels
from hetero_fl.data.sources.files import visible_files
from hetero_fl.utils.errors import UserError, one_line, suggest_file, suggest_or_list
from hetero_fl.utils.serialization import check_memory

PREFIXES = {"train": "train", "validation": "val", "test": "test"}
"""Prefix of the arrays of each split in the MedMNIST layout."""
PATIENT = "patient"
ALIGNED = tuple((f"{prefix}_images", f"{prefix}_labels") for prefix in PREFIXES.values())
"""Names of arrays with an entry for each row of a split."""


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
    Labels have shape `[N]`, `[N, 1]` or `[N, L]` and are read as by `from_arrays`.

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
    wanted = [f"{split}_{part}" for split in PREFIXES.values() for part in ("images", "labels")] + [
        patient or PATIENT
    ]
    arrays, names = read_npz_arrays(path, wanted, ALIGNED)
    raw = {
        split: split_arrays(arrays, prefix, where)
        for split, prefix in PREFIXES.items()
        if f"{prefix}_images" in arrays
    }
    if "train" not in raw:
        raise _missing_images_error(where, names)
    known = task is not None
    task, targets, notes = npz_targets({s: y for s, (_, y) in raw.items()}, where, task or kind)
    read: Sequence[Column]
    if stream is not None:
        files = [path / f"{PREFIXES[split]}_images.npy" for split in raw]
        read = [StoredRows(NpyReader(file), stream) for file in files]
    else:
        read = _npz_images(
            {f"{where}: {PREFIXES[s]}_images": x for s, (x, _) in raw.items()}, table=not known
        )
    splits = {}
    for (split, (x, _)), pixels in zip(raw.items(), read, strict=True):
        images = f"{PREFIXES[split]}_images"
        labels = f"{PREFIXES[split]}_labels"
        splits[split] = Examples(pixels, targets[split])
        check_examples(splits[split], task, where, names=ExampleNames(images, labels))
        if splits[split].x.shape[1:] != splits["train"].x.shape[1:]:
            raise UserError(
                f"{where}: {images}: expected rows of shape {raw['train'][0].shape[1:]} as in "
                f"train_images, got shape {x.shape}"
            )
    train = splits["train"]
    if (patients := arrays.get(patient or PATIENT)) is not None:
        train = with_patients(train, patients, f"{where}: {patient or PATIENT}")
    elif patient is not None:
        raise UserError(
            f"patient: array '{patient}' not found in {path}{suggest_or_list(patient, names)}"
        )
    advice = "" if patients is not None else ", or move it to an array 'patient'"
    return Dataset(
        name,
        task,
        train,
        splits.get("validation"),
        splits.get("test"),
        about=f"local {'folder' if path.is_dir() else 'file'} {path.name}",
        notes=(*notes, *note_identifiers(train.x, (), advice)),
    )


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
    where = f"path: {path}"
    arrays, names = read_npz_arrays(path, ["train_images"])
    if not arrays:
        raise _missing_images_error(where, names)
    if arrays["train_images"].shape[:1] in ((), (0,)):
        raise UserError(f"{where}: train_images: has no rows")
    return _npz_images({f"{where}: train_images": arrays["train_images"]}, table=True)[0]


def _missing_images_error(where: str, names: Sequence[str]) -> UserError:
    found = ", ".join(names) or "no arrays"
    return UserError(f"{where}: array 'train_images' not found; the file has {found}")


def read_npz_arrays(
    path: Path, wanted: Collection[str], aligned: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read selected arrays of a `.npz` file, if their headers announce valid sizes.

    Args:
        path: File to read, or a folder of `.npy` files, which are memory-mapped.
        wanted: Names of the arrays to read. Arrays that do not exist are skipped.
        aligned: Pairs of these arrays that must have the same number of rows, if they exist.

    Returns:
        The existing arrays, keyed by name, and the names of all arrays in the file.

    Raises:
        UserError: If the file is missing or damaged, numbers of rows differ, or the arrays do not
            fit into the memory.
    """
    where = f"path: {path}"
    if path.is_dir():
        files = {file.stem: file for file in visible_files(path, "*.npy")}
        found = {name: map_array(file) for name, file in files.items() if name in wanted}
        return found, list(files)
    if not path.is_file():
        raise UserError(f"path: file '{path}' not found{suggest_file(path)}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            check_headers(archive.zip, wanted, aligned, where)
            names = list(archive.files)
            return {name: archive[name] for name in names if name in wanted}, names
    except UserError:
        raise
    except Exception as error:
        # zipfile, zlib and numpy raise many kinds of errors for a damaged file.
        raise UserError(
            f"{where}: not a readable .npz file{_unreadable_reason(path, error)}"
        ) from error


def check_headers(
    archive: ZipFile, wanted: Collection[str], aligned: Sequence[tuple[str, str]], where: str
) -> None:
    """Check the sizes of arrays that are to be read (see `read_npz_arrays`)."""
    shapes = {}
    size = 0
    for entry in archive.namelist():
        if (name := entry.removesuffix(".npy")) in wanted:
            with archive.open(entry) as file:
                shapes[name], dtype = read_header(file)
            announced = math.prod(shapes[name]) * dtype.itemsize
            size += max(announced, archive.getinfo(entry).file_size)
    for first, second in aligned:
        rows, others = (shapes.get(name, ())[:1] for name in (first, second))
        if rows and others and rows != others:
            raise UserError(
                f"{where}: {second}: expected {rows[0]} rows as in {first}, got {others[0]}"
            )
    check_memory(size, where)


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


def split_arrays(arrays: Mapping[str, Any], split: str, where: str) -> tuple[Any, np.ndarray]:
    """Return the images of a split and its labels, `[N, L]`.

    Args:
        arrays: Arrays of a file in the MedMNIST layout, keyed by name. Images may be any object
            with a `shape`.
        split: Prefix of the arrays of the split.
        where: Place of the file, for error messages.

    Raises:
        UserError: If there are no labels, or the labels are malformed.
    """
    images = f"{split}_images"
    labels = f"{split}_labels"
    if labels not in arrays:
        raise UserError(f"{where}: array '{labels}' not found, which '{images}' needs")
    x = arrays[images]
    y = arrays[labels]
    if y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise UserError(f"{where}: {labels}: expected shape (N,), (N, 1) or (N, L), got {y.shape}")
    rows = x.shape[0] if x.shape else 0
    if not x.shape or rows != len(y):
        raise UserError(f"{where}: {labels}: expected {rows} rows as in {images}, got {len(y)}")
    if y.dtype.kind not in "buif":
        raise UserError(f"{where}: {labels}: expected numbers, got {y.dtype}")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        row = np.argwhere(~np.isfinite(y))[0][0]
        raise UserError(f"{where}: {labels}: row {row}: NaN or infinite value")
    return x, y[:, None] if y.ndim == 1 else y


def npz_targets(
    labels: Mapping[str, np.ndarray], where: str, task: Task | str | None
) -> tuple[Task, dict[str, Tensor], tuple[str, ...]]:
    """Return the task, the targets of each split, and notes (see `read_labels`)."""
    places = {split: f"{where}: {PREFIXES[split]}_labels" for split in labels}
    found, targets, notes = read_labels(
        {places[split]: y for split, y in labels.items()},
        f"{where}: labels",
        task=task,
        names=ExampleNames(in_config=True),
    )
    return found, {split: targets[place] for split, place in places.items()}, tuple(notes)


def _npz_images(raw: Mapping[str, np.ndarray], table: bool) -> list[Tensor]:
    """Return images `[N, C, H, W]`, integers or float32, or tables `[N, F]` if `table` is set."""
    for where, x in raw.items():
        if x.dtype.kind not in "buif":
            raise UserError(f"{where}: expected images as integers or floats, got {x.dtype}")
    check_memory(sum(x.nbytes for x in raw.values()), next(iter(raw)))
    # A tensor must not share the memory of a file.
    numbers = {where: as_numbers(np.array(x), where) for where, x in raw.items()}
    numbers |= as_pixels({where: x for where, x in numbers.items() if x.ndim > 2})
    read = {where: _to_images(x, where, table) for where, x in numbers.items()}
    ranged, _ = in_range({where: x for where, x in read.items() if x.ndim == 4})
    return list((read | ranged).values())


def _to_images(x: Tensor, where: str, table: bool) -> Tensor:
    shape = tuple(x.shape)
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and (shape[-1] <= MAX_CHANNELS or shape[1] in USUAL_CHANNELS):
        x = channels_first(x, where, documented="last")
    elif x.ndim != 2 or not table:
        raise UserError(f"{where}: expected shape (N, H, W) or (N, H, W, C), got {shape}")
    return x.float() if x.is_floating_point() or x.ndim == 2 else x
