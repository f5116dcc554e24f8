"""A cache of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import cachetools

T = TypeVar("T")


class BoundedCache(cachetools.LRUCache[Hashable, T], Generic[T]):
    """A least recently used (LRU) cache of bounded size.

    A value that is larger than the whole cache replaces all others. A pickled cache is empty, so
    the process that loads it computes its own values.

    Args:
        maxsize: Maximum number of values or, with `size`, maximum sum of their sizes; greater than
            0.
        size: Function that returns the size of a value; None counts each value as 1.
    """

    def __init__(self, maxsize: float, size: Callable[[T], int] | None = None) -> None:
        super().__init__(maxsize, size and (lambda value: min(size(value), maxsize)))
        self._size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.maxsize, self._size)
