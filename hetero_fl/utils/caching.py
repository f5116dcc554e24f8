"""Mappings whose values are made when they are asked for: memory follows what is used, not what there is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")
RECENT = 4096  # small values that are kept


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


class LRUCache(Generic[T]):
    """Keeps the values that were used last, at most `limit`. A copy for another process is empty."""

    def __init__(self, limit: int = RECENT) -> None:
        self.limit = limit
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value, made if it is not there."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self.limit:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit,)
