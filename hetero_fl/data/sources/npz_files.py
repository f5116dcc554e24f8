"""Data sets from `.npz` files: in the MedMNIST layout, or with an array for each column.

The arrays of the MedMNIST layout may also be the `.npy` files of a folder.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import (
    MAX_CHANNELS,
    as_numbers,
    as_pixels,
)
from hetero_fl.core.mapped_tensors import map_array, open_array, store_rows
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames, first_true
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.sources.files import visible_files
from hetero_fl.data.sources.image_files import make_cache
from hetero_fl.data.table import Table, build
from hetero_fl.utils.errors import UserError, suggest_file
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
MAPPED_ROWS = 256
"""Number of mapped images that are converted at a time."""


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


INPUTS = {
    "x": ArraySpec(("N T F", "N F"), gaps=2),
    "columns": ArraySpec(("F",), NAMES, required=False),
}


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
    root: Path | None = None,
    labeled: bool = True,
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
        root: Folder for scratch files. If it is set, the images of a folder, integers `[N, H, W]`
            or `[N, H, W, C]`, are mapped (see `map_images`), otherwise read into memory.
        labeled: Whether to read labels. If False, only the training images are read.

    Raises:
        UserError: If the file is missing or malformed. The message names the array and the row.
    """
    where = f"path: {path}"
    if root is not None and not path.is_dir():
        raise UserError(
            f"stream: needs a folder of .npy files, got '{path}'; save each array with numpy.save, "
            "or remove stream"
        )
    patient_array = patient or PATIENT
    specs = {patient_array: ArraySpec(LABELS, NAMES, "train_images", required=patient is not None)}
    for split, prefix in PREFIXES.items():
        images = f"{prefix}_images"
        if labeled or split == "train":
            shapes = IMAGES + (TABLE if task is None else ())
            specs[images] = ArraySpec(shapes, required=split == "train", gaps=2)
        if labeled:
            specs[f"{prefix}_labels"] = ArraySpec(LABELS, None, images, required=False)
    arrays = read_arrays(path, specs)
    tables = []
    for split, prefix in PREFIXES.items():
        names = ExampleNames(f"{prefix}_images", f"{prefix}_labels", in_config=True)
        found = arrays.keys() & {names.x, names.y}
        if not found:
            continue
        if labeled and len(found) == 1:
            missing = names.y if names.x in found else names.x
            raise UserError(
                f"{where}: array '{missing}' not found, which '{found.pop()}' needs; add it"
            )
        x: Any = arrays[names.x] if root is None else map_images(path / f"{names.x}.npy", root)
        tables.append(Table(x, arrays.get(names.y), split, where, names))
    tables[0].patient = arrays.get(patient_array)
    if root is None:
        check_memory(sum(table.x.nbytes for table in tables), where)
    dataset = build(
        tables,
        task or kind,
        where,
        name=name,
        channels="last" if root is None else "",
        about=f"local {'folder' if path.is_dir() else 'file'} {path.name}",
    )
    gaps = (
        first_gap(part.x, table.x_place)
        for part, table in zip(dataset.splits().values(), tables, strict=True)
    )
    dataset.first_missing = next(filter(None, gaps), "")
    return dataset


def read_columns(
    path: Path,
    name: str,
    label: str = "y",
    group: str = "group",
    *,
    needs_group: bool = False,
    task: Task | None = None,
    labeled: bool = True,
) -> Dataset:
    """Read a `.npz` file with an array for each column of a table.

    The file contains `x`, series `[N, T, F]` or a table `[N, F]`, and classes, as names or numbers
    `[N]` or one-hot rows `[N, L]`, which are read as by `from_arrays`. It may also contain the
    group of each row `[N]`, `split` `[N]` with the values `train`, `validation` and `test`
    (otherwise, all rows are training rows), and `columns`, the names of the F channels or columns.
    Only training rows keep their groups.

    Args:
        path: File to read.
        name: Name of the data set.
        label: Array of the classes.
        group: Array of the groups.
        needs_group: Whether the array of the groups must exist.
        task: Task whose class numbers the file contains. If None, the classes are those of the
            file.
        labeled: Whether to read labels, groups and splits. If False, all rows are training rows.

    Raises:
        UserError: If the file is malformed. The message names the array and the row.
    """
    where = f"path: {path}"
    specs = INPUTS
    if labeled:
        specs = {
            **INPUTS,
            group: ArraySpec(("N",), NAMES, "x", required=needs_group),
            "split": ArraySpec(("N",), NAMES, "x", required=False),
            label: ArraySpec(LABELS, None, "x"),
        }
    arrays = read_arrays(path, specs)
    x = torch.from_numpy(arrays["x"].astype(np.float32))
    columns = tuple(map(str, arrays.get("columns", ())))
    if columns and len(columns) != x.shape[-1]:
        raise UserError(f"{where}: columns: expected {x.shape[-1]} names, got {len(columns)}")
    names = ExampleNames("x", label, in_config=True)
    split = arrays.get("split", "train")
    table = Table(x, arrays.get(label), split, where, names, arrays.get(group))
    dataset = build(
        [table],
        task or "multiclass",
        where,
        name=name,
        about=f"{len(x):,} rows of {path.name}",
        columns=columns,
        first_missing=first_gap(x, table.x_place),
    )
    if labeled:
        check_classes(dataset.task, path)
    return dataset


def check_classes(task: Task, path: Path) -> None:
    """Check that a file has at least two classes.

    Raises:
        UserError: If there is only one class.
    """
    if task.outputs < 2:
        raise UserError(
            f"label: expected at least two classes in {path}, got {task.output_names[0]} only"
        )


def first_gap(x: Tensor, where: str) -> str:
    """Return the location of the first missing value of a table, or an empty string."""
    row = first_true(x.isnan().any(1)) if x.ndim == 2 else None
    return "" if row is None else f"{where}: row {row}: missing value"


def map_images(file: Path, root: Path) -> Tensor:
    """Map the images of a `.npy` file.

    Args:
        file: File with integers `[N, H, W]` or `[N, H, W, C]`. Other types than uint8 and int32 are
            copied to a scratch file of int32.
        root: Folder for scratch files.

    Returns:
        Images, uint8 or int32 `[N, C, H, W]`.
    """
    where = f"path: {file}"
    array = open_array(file)
    if array.dtype.kind not in "bui":
        raise UserError(f"{where}: expected images as integers, got {array.dtype}")
    if (
        array.ndim not in (3, 4)
        or 0 in array.shape
        or max(array.shape[3:], default=0) > MAX_CHANNELS
    ):
        raise UserError(f"{where}: expected shape (N, H, W) or (N, H, W, C), got {array.shape}")
    make_cache(root)
    if array.dtype in (np.uint8, np.bool_, np.int32) and array.flags.c_contiguous:
        x = map_array(file, root)
    else:
        x = store_rows(_deep_parts(array, where), str(root))
    return x[:, None] if x.ndim == 3 else x.movedim(-1, 1)


def _deep_parts(array: np.ndarray, where: str) -> Iterator[Tensor]:
    """Yield the rows of an array of integers as int32."""
    for start in range(0, len(array), MAPPED_ROWS):
        rows = as_numbers(array[start : start + MAPPED_ROWS], where)
        yield as_pixels({where: rows})[where].to(torch.int32)


def medmnist_file(name: str, size: int | None) -> str:
    """Return the name of the file of a MedMNIST set with images of `size` pixels (default 28)."""
    return f"{name}.npz" if size in (None, 28) else f"{name}_{size}.npz"


def check_image_size(images: Tensor, size: int, path: Path, name: str) -> None:
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
        arrays: dict[str, np.ndarray] = {
            name: open_array(file) for name, file in files.items() if name in specs
        }
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
