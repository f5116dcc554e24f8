"""The source `zarr`: image arrays in a zarr store, in the MedMNIST layout of `.npz` files."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import SourceConfig, StreamConfig
from hetero_fl.core.images import MAX_CHANNELS, as_numbers, as_pixels
from hetero_fl.core.stored_rows import StoredRows, read_all
from hetero_fl.data.checks import ExampleNames, check_examples
from hetero_fl.data.dataset import Dataset, Examples, with_patients
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.npz_files import PREFIXES, npz_targets, split_arrays
from hetero_fl.utils.errors import UserError, check_names, suggest_file
from hetero_fl.utils.serialization import check_memory


@register_source("zarr", keys=("path", "task", "stream", "patient"))
def zarr(config: SourceConfig, _root: Path) -> Dataset:
    """Load a local zarr store with images in the MedMNIST layout (see `read_zarr`)."""
    return read_zarr(Path(str(config.path)).expanduser(), config)


def read_zarr(path: Path, config: SourceConfig) -> Dataset:
    """Read a zarr store, which is a folder.

    The store contains arrays `{train,val,test}_images` and `{train,val,test}_labels`, of which only
    those of `train` are required. Images are integers and have shape `[N, H, W]` or `[N, H, W, C]`.
    Labels are as in `.npz` files (see `read_npz`).

    Args:
        path: Folder of the store.
        config: Settings `task`, `patient` (array with the patient of each training row), and
            `stream` for reading images when they are used. Without `stream`, all images are read
            into memory.

    Raises:
        UserError: If the store is missing or malformed. The message names the array.
    """
    where = f"path: {path}"
    arrays = _open_arrays(path, config.patient)
    found: dict[str, Any] = {
        n: a if n.endswith("_images") else _read(a, f"{where}: {n}") for n, a in arrays.items()
    }
    raw = {
        split: split_arrays(found, prefix, where)
        for split, prefix in PREFIXES.items()
        if f"{prefix}_images" in found
    }
    if "train" not in raw:
        listed = ", ".join(sorted(arrays)) or "no array of the layout"
        raise UserError(f"{where}: array 'train_images' not found; the store has {listed}")
    task, targets, notes = npz_targets({s: y for s, (_, y) in raw.items()}, where, config.task)
    splits = {}
    for split, (array, _) in raw.items():
        names = ExampleNames(f"{PREFIXES[split]}_images", f"{PREFIXES[split]}_labels")
        stored = _stored_images(path, names.x, array, config.stream)
        x = read_all(stored) if config.stream is None else stored
        examples = Examples(x, targets[split])
        check_examples(examples, task, where, names=names)
        splits[split] = examples
        if examples.x.shape[1:] != splits["train"].x.shape[1:]:
            raise UserError(
                f"{where}: {names.x}: expected images of shape "
                f"{tuple(splits['train'].x.shape[1:])} as in train_images, got "
                f"{tuple(examples.x.shape[1:])}"
            )
    train = splits["train"]
    if config.patient is not None:
        check_names([config.patient], found, "patient: array", f" not found in {path}")
        train = with_patients(train, found[config.patient], f"{where}: {config.patient}")
    return Dataset(
        "zarr",
        task,
        train,
        splits.get("validation"),
        splits.get("test"),
        about=f"zarr store {path.name}",
        notes=notes,
    )


class ZarrReader:
    """Reader of images in a zarr array (see `RowReader`).

    Args:
        path: Folder of the store.
        name: Name of the array.
        array: The array, integers `[N, H, W]` or `[N, H, W, C]`.
        key: Configuration key of the path in error messages.
    """

    def __init__(self, path: Path, name: str, array: Any, key: str) -> None:
        self._path = path
        self._key = key
        self._name = name
        self._array = array
        self._length = int(array.shape[0])
        height, width, *channels = array.shape[1:]
        self.shape = (*(channels or [1]), height, width)
        self.dtype = torch.uint8 if array.dtype in (np.uint8, np.bool_) else torch.int32

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_array": None}

    def read(self, rows: np.ndarray) -> Tensor:
        """Read images (see `RowReader.read`)."""
        place = f"{self._key}: {self._path}"
        # zarr returns the fill value for chunks that do not exist.
        if not (self._path / self._name).is_dir():
            raise UserError(f"{place}: array '{self._name}' not found")
        if self._array is None:
            # Worker processes open the store themselves.
            self._array = _open_arrays(self._path)[self._name]
        if len(rows) == 0:
            return torch.empty(0, *self.shape, dtype=self.dtype)
        values = _read(self._array.oindex, f"{place}: {self._name}", rows)
        values = values[:, None] if values.ndim == 3 else np.moveaxis(values, -1, 1)
        pixels = as_numbers(values, f"{place}: {self._name}")
        as_pixels({f"{place}: {self._name}": pixels})
        return pixels.to(self.dtype)


def _open_arrays(path: Path, patient: str | None = None) -> dict[str, Any]:
    """Return the arrays of the MedMNIST layout, and of patients, in a zarr store, keyed by name."""
    # Imported here because zarr is optional.
    import zarr

    if not path.is_dir():
        raise UserError(f"path: folder '{path}' not found{suggest_file(path)}")
    names = [f"{split}_{part}" for split in PREFIXES.values() for part in ("images", "labels")]
    names += [patient] if patient is not None else []
    try:
        # Versions of numcodecs without this name run code that a store contains.
        from numcodecs.pickles import ALLOW_UNSAFE_PICKLE_DECODE  # noqa: F401

        group = zarr.open_group(str(path), mode="r")
        return {name: group[name] for name in names if name in group}
    except Exception as error:
        # Malformed metadata raises many kinds of errors.
        raise UserError(
            f"path: {path}: not a readable zarr store ({type(error).__name__}: {error})"
        ) from error


def _check_chunks(array: Any, where: str) -> None:
    """Check that no chunk is missing, for which zarr returns zeros."""
    if array.nchunks_initialized < array.nchunks:
        raise UserError(
            f"{where}: expected {array.nchunks} chunks, got {array.nchunks_initialized}; write the "
            "store with write_empty_chunks=True"
        )


def _read(array: Any, where: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Read an array, or some of its rows, and convert errors to a UserError."""
    if rows is None:
        check_memory(array.nbytes, where)
        _check_chunks(array, where)
    try:
        return np.asarray(array[...] if rows is None else array[rows])
    except Exception as error:
        # Damaged chunks raise the errors of many codecs.
        _wait_for_chunks()
        raise UserError(f"{where}: not readable ({type(error).__name__}: {error})") from error


_waiting = threading.Lock()


def _wait_for_chunks() -> None:
    """Wait until zarr has read the other chunks of an array, of which one is damaged.

    Otherwise, the interpreter may exit before, and asyncio then prints many lines.
    """
    # Imported here because zarr is optional.
    from zarr.core.sync import sync

    async def wait() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    # Several threads that wait would wait for each other.
    with _waiting:
        sync(wait())


def _stored_images(path: Path, name: str, array: Any, stream: StreamConfig | None) -> StoredRows:
    """Return the images of an array, whose type and shape are checked."""
    where = f"path: {path}: {name}"
    shape = tuple(array.shape)
    if array.dtype.kind not in "bui":
        raise UserError(f"{where}: expected images as integers, got {array.dtype}")
    if array.ndim not in (3, 4) or 0 in shape[1:] or (array.ndim == 4 and shape[-1] > MAX_CHANNELS):
        raise UserError(f"{where}: expected shape (N, H, W) or (N, H, W, C), got {shape}")
    _check_chunks(array, where)
    # Streamed rows are read after the data set is loaded, which adds the section to the key.
    key = "path" if stream is None else "data.path"
    return StoredRows(ZarrReader(path, name, array, key), stream)
