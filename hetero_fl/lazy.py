"""Mappings whose values are made when they are asked for: memory follows what is used, not what there is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Lazy(Mapping[str, T]):
    """`make(key)` for each of the keys, called at every access."""

    def __init__(self, keys: Collection[str], make: Callable[[str], T]) -> None:
        self._keys: Collection[str] = dict.fromkeys(keys) if isinstance(keys, list) else keys  # to be looked up in
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
