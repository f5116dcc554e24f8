"""Caches of bounded size."""

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


class IdentityCache(Generic[T]):
    """A cache of bounded size with one value per object. Objects are compared by identity.

    Args:
        maxsize: Maximum number of values.
    """

    def __init__(self, maxsize: int) -> None:
        # An entry keeps a reference to the object, so that no other object has the same id.
        self._entries: BoundedCache[tuple[object, T]] = BoundedCache(maxsize)

    def get(self, key: object, compute: Callable[[], T]) -> T:
        """Return the value of an object, which is computed if it is not in the cache."""
        entry = self._entries.get(id(key))
        if entry is None:
            entry = self._entries[id(key)] = (key, compute())
        return entry[1]

    def clear(self) -> None:
        """Remove all values."""
        self._entries.clear()
