from __future__ import annotations

import copy
import pickle

from hetero_fl.utils.caching import BoundedCache


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
