"""Keyed draws."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_fl.seeding import sample


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 10**12), st.integers(0, 60), st.integers(0, 9))
def test_a_sample_is_sorted_and_without_doubles(total: int, count: int, key: int) -> None:
    count = min(count, total)
    drawn = sample(total, count, key)
    assert len(set(drawn)) == len(drawn) == count and drawn == sorted(drawn)
    assert all(0 <= d < total for d in drawn) and drawn == sample(total, count, key)


def test_every_subset_is_as_likely_as_any_other() -> None:
    found: dict[tuple[int, ...], int] = {}
    for key in range(6000):
        subset = tuple(sample(5, 3, "test", key))
        found[subset] = found.get(subset, 0) + 1
    assert len(found) == 10
    assert sum((n - 600) ** 2 / 600 for n in found.values()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
