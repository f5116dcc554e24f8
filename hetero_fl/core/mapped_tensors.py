"""Tensors whose values are in files, for data that is larger than memory.

A mapped tensor is an ordinary tensor, whose values the system reads from a file when they are used
and drops when memory is needed. Changes are never written to the file. Large results of
`take_rows`, `map_rows` and `join_rows` with mapped tensors are mapped, too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hetero_fl.utils.errors import UserError, one_line

SCRATCH_BYTES = 2**20
"""Size in bytes above which results with mapped tensors are in scratch files."""
CHUNK_BYTES = 2**20
"""Size in bytes of the rows of a mapped tensor that are converted at a time."""
PROCESSES = "/proc"
"""Folder with the open files of processes, which some systems lack."""
MAPPING = "hetero_fl_mapping"
"""Attribute of a mapped storage, which all views of the tensor share."""


class MappedFile(NamedTuple):
    """The place of a mapped tensor, from which another process can map it.

    Attributes:
        path: The file. Empty for a scratch file that other processes cannot open.
        scratch: Folder for scratch files.
        dtype: Type of the values.
        shape: Shape of the tensor.
        stride: Strides of the tensor in elements.
        offset: Number of elements before the first one.
    """

    path: str
    scratch: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def open(self) -> Tensor:
        """Return the mapped tensor.

        Raises:
            UserError: If the file does not exist or is too short.
        """
        steps = zip(self.shape, self.stride, strict=True)
        last = self.offset + sum((size - 1) * stride for size, stride in steps)
        try:
            size = (last + 1) * self.dtype.itemsize
            storage: torch.UntypedStorage = torch.UntypedStorage.from_file(self.path, False, size)  # type: ignore[assignment]
        except RuntimeError:
            raise UserError(f"data.path: {self.path}: file is missing or has changed") from None
        setattr(storage, MAPPING, (self.path, self.scratch))
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


def map_rows_of_file(
    path: Path, scratch: Path, dtype: torch.dtype, shape: Sequence[int], start: int = 0
) -> Tensor:
    """Map the rows of a file, which are stored one after the other.

    Args:
        path: The file.
        scratch: Folder for scratch files, which must exist.
        dtype: Type of the values.
        shape: Shape of the tensor, which is not empty.
        start: Number of bytes before the first value, a multiple of the size of a value.
    """
    stride = torch.empty(shape, dtype=dtype, device="meta").stride()
    offset = start // dtype.itemsize
    return MappedFile(str(path), str(scratch), dtype, tuple(shape), stride, offset).open()


def map_array(file: Path, scratch: Path) -> Tensor:
    """Map the array of a `.npy` file of uint8 or int32.

    Args:
        file: The file, whose array has the order of C.
        scratch: Folder for scratch files, which must exist.

    Raises:
        UserError: If the file is damaged.
    """
    array = open_array(file)
    dtype = torch.int32 if array.dtype == np.int32 else torch.uint8
    return map_rows_of_file(file, scratch, dtype, array.shape, array.offset)


def open_array(file: Path) -> np.memmap:
    """Map the array of a `.npy` file as a NumPy array, which cannot be written.

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except Exception as error:
        # numpy raises many kinds of errors for a damaged file.
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"path: {file}: not a readable .npy file ({reason})") from error


def mapped_file(x: Tensor) -> MappedFile | None:
    """Return the place of a mapped tensor, or None for a tensor in memory."""
    if x.device.type != "cpu" or (found := getattr(x.untyped_storage(), MAPPING, None)) is None:
        return None
    path, scratch = found
    return MappedFile(path, scratch, x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset()))


def shareable(x: Tensor) -> Tensor:
    """Return a tensor that other processes can use without a copy of their own.

    This is a tensor that is mapped from a file, or one in shared memory.
    """
    file = mapped_file(x)
    if file is None:
        return x.share_memory_()
    if file.path:
        return x
    if not Path(PROCESSES).is_dir():
        return x.clone().share_memory_()
    return store_rows(x.split(_chunk_rows(x)), file.scratch, is_shared=True)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return `x[rows]`, as a mapped tensor if `x` is mapped and the result is large."""
    file = mapped_file(x)
    if file is None or len(rows) * row_bytes(x) <= SCRATCH_BYTES:
        return x[rows]
    return store_rows((x[part] for part in rows.split(_chunk_rows(x))), file.scratch)


def map_rows(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `function(x)`, as a mapped tensor if `x` is mapped and the result is large.

    Args:
        x: The rows.
        function: Function that converts a batch, `[B, ...]`, each row independently of the others.
            It is called for parts of a mapped tensor.
    """
    file = mapped_file(x)
    if file is None or not len(x):
        return function(x)
    parts = (function(part) for part in x.split(_chunk_rows(x)))
    first = next(parts)
    if len(x) * row_bytes(first) <= SCRATCH_BYTES:
        return torch.cat([first, *parts])
    return store_rows(chain([first], parts), file.scratch)


def join_rows(columns: Sequence[Tensor]) -> Tensor:
    """Return `torch.cat(columns)`, as a mapped tensor if a column is mapped."""
    files = [file for file in map(mapped_file, columns) if file is not None]
    if not files or not sum(map(len, columns)):
        return torch.cat(list(columns))
    dtype = reduce(torch.promote_types, [column.dtype for column in columns])
    parts = (part.to(dtype) for column in columns for part in column.split(_chunk_rows(column)))
    return store_rows(parts, files[0].scratch)


def row_bytes(x: Tensor) -> int:
    """Return the size of a row in bytes."""
    return math.prod(x.shape[1:]) * x.dtype.itemsize


def _chunk_rows(x: Tensor) -> int:
    return max(1, CHUNK_BYTES // max(1, row_bytes(x)))


def store_rows(parts: Iterable[Tensor], folder: str, is_shared: bool = False) -> Tensor:
    """Write parts of rows to a scratch file, and return all rows as a mapped tensor.

    The file has no name afterwards, so that it disappears with the tensor or the process.

    Args:
        parts: The rows, shape `[B, ...]` each.
        folder: Folder for scratch files.
        is_shared: Whether other processes can map the file until this process ends.

    Raises:
        UserError: If the file cannot be written.
    """
    count = 0
    path = ""
    try:
        with NamedTemporaryFile(dir=folder, prefix="scratch_") as file:
            for part in parts:
                file.write(part.contiguous().flatten().view(torch.uint8).numpy().data)
                count += len(part)
            file.flush()
            x = map_rows_of_file(
                Path(file.name), Path(folder), part.dtype, (count, *part.shape[1:])
            )
            if is_shared:
                # The copy of the handle remains open.
                path = f"{PROCESSES}/{os.getpid()}/fd/{os.dup(file.fileno())}"
    except OSError as error:
        raise UserError(
            f"data.root: {folder}: cannot store rows ({error.strerror}); free disk space, or set "
            "another folder"
        ) from None
    setattr(x.untyped_storage(), MAPPING, (path, folder))
    return x
