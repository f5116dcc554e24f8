"""A cache of columns that is bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from hetero_fl.data.base import Columns


class ColumnCache:
    """Keeps what was used last, up to `limit` bytes; the newest entry stays even if it alone is larger."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[Hashable, Columns] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, make: Callable[[], Columns]) -> Columns:
        """The entry, made if it is not there."""
        if key not in self._entries:
            self._entries[key] = columns = make()
            self.bytes += _size(columns)
            while self.bytes > self.limit and len(self._entries) > 1:
                self.bytes -= _size(self._entries.popitem(last=False)[1])
        self._entries.move_to_end(key)
        return self._entries[key]


def _size(columns: Columns) -> int:
    return sum(column.nbytes for column in columns.values())
