from __future__ import annotations

import copy
import pickle

from hetero_fl.utils.caching import BoundedCache


def test_bounded_cache_keeps_the_values_used_last() -> None:
    cache: BoundedCache[int] = BoundedCache(2)
    for key in "aba":
        cache.get_or_make(key, lambda: 1)

    assert cache.get_or_make("c", lambda: 2) == 2

    assert set(cache) == {"a", "c"}
    assert cache.get_or_make("a", lambda: 3) == 1


def test_bounded_cache_keeps_a_value_that_is_larger_than_the_cache() -> None:
    cache: BoundedCache[str] = BoundedCache(4, len)
    cache.get_or_make("short", lambda: "ab")

    cache.get_or_make("long", lambda: "abcdefgh")
    assert set(cache) == {"long"}

    cache.get_or_make("short", lambda: "ab")
    assert set(cache) == {"short"}


def test_bounded_cache_is_empty_when_copied() -> None:
    cache: BoundedCache[str] = BoundedCache(4, len)
    cache.get_or_make("a", lambda: "ab")

    for other in (pickle.loads(pickle.dumps(cache)), copy.copy(cache)):
        other.get_or_make("b", lambda: "abcdefgh")
        assert set(other) == {"b"}
        assert other.maxsize == 4
