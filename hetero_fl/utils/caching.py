"""Mappings that compute values on access, and a cache of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import cachetools

T = TypeVar("T")


class LazyMapping(Mapping[str, T]):
    """`make(key)` for each of the keys, called at every access."""

    def __init__(self, keys: Collection[str], make: Callable[[str], T]) -> None:
        # to be looked up in
        self._keys: Collection[str] = dict.fromkeys(keys) if isinstance(keys, list) else keys
        self._make = make

    def __getitem__(self, key: str) -> T:
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


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

    def get_or_make(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key; compute it if it is not in the cache."""
        if key not in self:
            self[key] = make()
        return self[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.maxsize, self._size)
