"""Caches of bounded size, by key and by identity."""

from __future__ import annotations

import copy
import pickle

from hetero_fl.utils.caching import BoundedCache, IdentityCache


def test_bounded_cache_keeps_recently_used_values() -> None:
    cache: BoundedCache[int] = BoundedCache(2)
    for key in "aba":
        cache.setdefault(key, 1)

    assert cache.setdefault("c", 2) == 2

    assert set(cache) == {"a", "c"}
    assert cache.setdefault("a", 3) == 1


def test_bounded_cache_keeps_oversized_value() -> None:
    cache: BoundedCache[str] = BoundedCache(4, len)
    cache.setdefault("short", "ab")

    cache.setdefault("long", "abcdefgh")
    assert set(cache) == {"long"}

    cache.setdefault("short", "ab")
    assert set(cache) == {"short"}


def test_bounded_cache_is_empty_when_copied() -> None:
    cache: BoundedCache[str] = BoundedCache(4, len)
    cache.setdefault("a", "ab")

    for other in (pickle.loads(pickle.dumps(cache)), copy.copy(cache)):
        other.setdefault("b", "abcdefgh")
        assert set(other) == {"b"}
        assert other.maxsize == 4


def test_identity_cache_compares_by_identity() -> None:
    cache: IdentityCache[int] = IdentityCache(2)
    first, equal = [0], [0]
    assert cache.get(first, lambda: 1) == cache.get(first, lambda: 2) == 1
    assert cache.get(equal, lambda: 3) == 3
    cache.get([1], lambda: 4)
    assert cache.get(equal, lambda: 5) == 3 and cache.get(first, lambda: 6) == 6
    cache.clear()
    assert cache.get(equal, lambda: 7) == 7
