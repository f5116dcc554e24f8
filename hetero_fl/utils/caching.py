"""A cache of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import cachetools

T = TypeVar("T")


class BoundedCache(cachetools.LRUCache[Hashable, T], Generic[T]):
    """A least recently used (LRU) cache of bounded size.

    A value that is larger than the whole cache replaces all other values. Pickling a cache omits
    its values, so the process that unpickles the cache computes the values again.

    Args:
        maxsize: Maximum number of values. If `size` is given, the maximum total size of the values.
            Must be greater than 0.
        size: Function that returns the size of a value. If None, each value has size 1.
    """

    def __init__(self, maxsize: float, size: Callable[[T], int] | None = None) -> None:
        super().__init__(maxsize, size and (lambda value: min(size(value), maxsize)))
        self._size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.maxsize, self._size)
