"""A cache of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import cachetools

T = TypeVar("T")


class BoundedCache(cachetools.LRUCache[Hashable, T], Generic[T]):
    """Cache of the values that were used last.

    A value that is larger than the whole cache replaces all others. A pickled cache is empty: the
    process that loads it computes its own values.

    Args:
        maxsize: Number of values or, with `size`, the sum of their sizes; greater than 0.
        size: Function that returns the size of a value.
    """

    def __init__(self, maxsize: float, size: Callable[[T], int] | None = None) -> None:
        super().__init__(maxsize, size and (lambda value: min(size(value), maxsize)))
        self._size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.maxsize, self._size)
