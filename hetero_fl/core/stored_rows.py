"""Rows that are read from files in batches, with the interface that they share with tensors.

The column of a data set is a tensor or, with `data.stream`, a `StoredRows`. Code that supports both
selects rows by `column[indices]`, which reads nothing, and reads them by `read_batches`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import StreamConfig
from hetero_fl.utils.errors import UserError

PREFETCHED_BYTES = 64 * 2**20
"""Maximum size in bytes of the batches that are read ahead, except for the next batch."""
CONVERTED_BYTES = 4 * 2**20
"""Size in bytes of the raw rows that are converted at a time."""
WHOLE_BYTES = 8 * 2**20
"""Size in bytes of the raw rows that are read at a time if all rows are read in order."""


class RowReader(Protocol):
    """Rows in files, which several threads may read at the same time.

    Readers are pickled for worker processes.

    Attributes:
        shape: Shape of a row.
        dtype: Type of the values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> Tensor:
        """Read rows, shape `[N, *shape]`.

        Args:
            rows: Indices of the rows in any order, int64 `[N]`.

        Raises:
            UserError: If a row cannot be read.
        """
        ...


class StoredRows:
    """Rows that are read from files when they are used.

    Only the indices of the rows are in memory. Threads read batches ahead while earlier batches are
    processed.

    Args:
        reader: Reader of the raw rows.
        stream: Number of threads, and of batches that are read ahead.
        rows: Indices into the rows of the reader, int64 `[N]`. If None, all rows are selected.
        functions: Functions that convert a batch of raw rows, in the order in which they are
            applied. Each of them converts rows independently of each other.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from hetero_fl.core.stored_rows import StoredRows
        >>> class Squares:
        ...     shape = (1,)
        ...     dtype = torch.int64
        ...     def __len__(self):
        ...         return 100
        ...     def read(self, rows):
        ...         return torch.from_numpy(rows[:, None] ** 2)
        >>> squares = StoredRows(Squares())
        >>> squares.shape
        torch.Size([100, 1])
        >>> squares[torch.tensor([3, 5, 7])].read(torch.tensor([2, 0])).tolist()
        [[49], [9]]
    """

    def __init__(
        self,
        reader: RowReader,
        stream: StreamConfig | None = None,
        rows: np.ndarray | None = None,
        functions: tuple[Callable[[Tensor], Tensor], ...] = (),
    ) -> None:
        self._reader = reader
        self.stream = stream or StreamConfig()
        self._rows = np.arange(len(reader)) if rows is None else rows
        self._functions = functions
        empty = self._convert(torch.empty(0, *reader.shape, dtype=reader.dtype))
        self.dtype = empty.dtype
        self._row_shape = empty.shape[1:]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> torch.Size:
        """Shape of the rows as a tensor, `[N, ...]`."""
        return torch.Size((len(self), *self._row_shape))

    @property
    def ndim(self) -> int:
        """Number of dimensions of the rows as a tensor."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes of what is in memory."""
        return int(self._rows.nbytes)

    @property
    def raw_row_bytes(self) -> int:
        """Size in bytes of a row before it is converted."""
        return math.prod(self._reader.shape) * self._reader.dtype.itemsize

    def is_floating_point(self) -> bool:
        """Return whether the values are floats."""
        return self.dtype.is_floating_point

    def __getitem__(self, rows: Tensor | slice) -> StoredRows:
        index = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
        return StoredRows(self._reader, self.stream, self._rows[index], self._functions)

    def map(self, function: Callable[[Tensor], Tensor]) -> StoredRows:
        """Return the rows converted by a further function.

        Args:
            function: Function that converts a batch, `[B, ...]`, each row independently of the
                others.
        """
        return StoredRows(self._reader, self.stream, self._rows, (*self._functions, function))

    def read(self, rows: Tensor) -> Tensor:
        """Read rows, shape `[B, ...]`.

        Args:
            rows: Indices, int64 `[B]`.

        Raises:
            UserError: If a row cannot be read.
        """
        return self._convert(self._reader.read(self._rows[rows.cpu().numpy()]))

    def read_batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Read batches with threads and yield each batch, shape `[B, ...]`.

        Args:
            batches: Indices of each batch, int64 `[B]`.

        Raises:
            UserError: If a row cannot be read.
        """
        pending: deque[Future[Tensor]] = deque()
        pool = ThreadPoolExecutor(self.stream.workers)
        try:
            for rows in batches:
                raw_rows = self._rows[rows.cpu().numpy()]
                pending.append(pool.submit(self._reader.read, raw_rows))
                if len(pending) > self._num_ahead(len(rows)):
                    yield self._convert(pending.popleft().result())
            while pending:
                yield self._convert(pending.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _num_ahead(self, size: int) -> int:
        """Return the number of batches of `size` rows that are read ahead."""
        fitting = PREFETCHED_BYTES // max(1, size * self.raw_row_bytes)
        return max(1, min(self.stream.prefetch, fitting))

    def _convert(self, raw: Tensor) -> Tensor:
        """Convert raw rows in parts, so that intermediate results stay small."""
        size = max(1, CONVERTED_BYTES // max(1, self.raw_row_bytes))
        if len(raw) <= size:
            return self._convert_part(raw)
        first = self._convert_part(raw[:size])
        converted = first.new_empty(len(raw), *first.shape[1:])
        converted[:size] = first
        for begin in range(size, len(raw), size):
            converted[begin : begin + size] = self._convert_part(raw[begin : begin + size])
        return converted

    def _convert_part(self, rows: Tensor) -> Tensor:
        for function in self._functions:
            rows = function(rows)
        return rows.contiguous()


class JoinedReader:
    """Reader of several `StoredRows` of the same shape, one after the other.

    Args:
        parts: The rows to join, at least one.
    """

    def __init__(self, parts: Sequence[StoredRows]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = tuple(parts[0].shape[1:])
        self.dtype = reduce(torch.promote_types, [part.dtype for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: np.ndarray) -> Tensor:
        """Read rows (see `RowReader.read`)."""
        found = torch.empty(len(rows), *self.shape, dtype=self.dtype)
        owners = np.searchsorted(self._ends, rows, side="right")
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            part = self._parts[owner]
            offset = self._ends[owner] - len(part)
            found[torch.from_numpy(places)] = part.read(torch.from_numpy(rows[places] - offset))
        return found


Column = Tensor | StoredRows
"""A column of a data set: a tensor in memory, or rows that are read from files."""


def read_batches(column: Column, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield batches of a column, each as a tensor of shape `[B, ...]`.

    Args:
        column: The column. A tensor may be on any device.
        batches: Indices of each batch, int64 `[B]`, on the device of the column.
    """
    if isinstance(column, StoredRows):
        yield from column.read_batches(batches)
        return
    for rows in batches:
        yield column.index_select(0, rows)


def read_rows(column: Column, rows: Tensor) -> Tensor:
    """Return rows of a column as a tensor of shape `[B, ...]`.

    Args:
        column: The column.
        rows: Indices, int64 `[B]`, on the device of the column.
    """
    return column.read(rows) if isinstance(column, StoredRows) else column[rows]


def split_rows(column: Column, size: int) -> Iterator[Tensor]:
    """Yield consecutive batches of a column, like `Tensor.split`.

    Like `Tensor.split`, an empty column has one batch, which is empty.

    Args:
        column: The column.
        size: Number of rows of each batch. The last batch may be smaller.
    """
    if isinstance(column, StoredRows):
        yield from column.read_batches(torch.arange(len(column)).split(size))
    else:
        yield from column.split(size)


def read_all(column: Column) -> Tensor:
    """Return all rows of a column as a tensor in memory."""
    if isinstance(column, Tensor):
        return column
    size = max(1, WHOLE_BYTES // max(1, column.raw_row_bytes))
    rows = torch.empty(column.shape, dtype=column.dtype)
    begin = 0
    for batch in split_rows(column, size):
        rows[begin : begin + len(batch)] = batch
        begin += len(batch)
    return rows


def map_rows(column: Column, function: Callable[[Tensor], Tensor]) -> Column:
    """Convert a column by a function that converts each row independently of the others.

    Args:
        column: The column. Rows in files are converted when they are read.
        function: Function that converts a batch, `[B, ...]`.
    """
    return column.map(function) if isinstance(column, StoredRows) else function(column)


def join_rows(columns: Sequence[Column]) -> Column:
    """Concatenate columns of the same shape and type.

    Args:
        columns: Columns that are all in memory or all in files. Otherwise, the rows in files are
            read.
    """
    stored = [column for column in columns if isinstance(column, StoredRows)]
    if len(stored) < len(columns):
        return torch.cat([read_all(column) for column in columns])
    return stored[0] if len(stored) == 1 else StoredRows(JoinedReader(stored), stored[0].stream)


def require_tensor(column: Column, feature: str) -> Tensor:
    """Return a column that must be in memory.

    Args:
        column: The column.
        feature: The feature that needs all rows at once, for the error message.

    Raises:
        UserError: If the rows are in files.
    """
    if isinstance(column, StoredRows):
        raise UserError(f"data.stream: {feature} needs all rows in memory; remove data.stream")
    return column


def targets(columns: Mapping[str, Column]) -> Tensor:
    """Return the column "y", which is always in memory."""
    y = columns["y"]
    assert isinstance(y, Tensor)
    return y
