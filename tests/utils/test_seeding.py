"""Keyed random draws and seeding of torch's generators for a fit."""

from __future__ import annotations

import random
import traceback

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from hetero_fl.utils.seeding import sample_numbers, stream_key
from model_zoo.generators import generator_hash, keyed_generators, own_generators
from tests.support.federations import config, rounds_of


def test_seeded_draws_equal_manual_seed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = torch.randn(5)
    with keyed_generators(7):
        assert torch.equal(torch.randn(5), expected)


def test_brief_block_restores_all_generators_unless_it_is_inside_another() -> None:
    before = generator_hash()

    with keyed_generators(7, brief=True):
        first = random.random(), np.random.rand()

    assert generator_hash() == before
    with own_generators():
        with keyed_generators(7, brief=True):
            assert (random.random(), np.random.rand()) == first
        with keyed_generators(7, brief=True):
            assert (random.random(), np.random.rand()) == first
    assert generator_hash() == before


def test_seeding_takes_no_stack_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = rounds_of(config(), num_rounds=1)
    monkeypatch.setattr(
        traceback, "format_stack", lambda *_, **__: pytest.fail("torch notes a call for later")
    )
    monkeypatch.setattr(
        traceback, "extract_stack", lambda *_, **__: pytest.fail("torch notes a call for later")
    )
    rounds.run_round()


def test_key_depends_on_parts_and_types() -> None:
    assert (
        len(
            {
                stream_key("ab", "c"),
                stream_key("a", "bc"),
                stream_key("abc"),
                stream_key("a", "b", "c"),
            }
        )
        == 4
    )
    assert stream_key(1, 12) != stream_key(11, 2)
    assert stream_key(1) != stream_key("1")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 10**12), st.integers(0, 60), st.integers(0, 9))
def test_sample_is_sorted_without_duplicates(total: int, count: int, seed: int) -> None:
    count = min(count, total)
    drawn = sample_numbers(total, count, seed)
    assert len(set(drawn)) == len(drawn) == count and drawn == sorted(drawn)
    assert all(0 <= d < total for d in drawn) and drawn == sample_numbers(total, count, seed)


def test_sample_subsets_are_equally_likely() -> None:
    found: dict[tuple[int, ...], int] = {}
    for seed in range(6000):
        subset = tuple(sample_numbers(5, 3, "test", seed))
        found[subset] = found.get(subset, 0) + 1
    assert len(found) == 10
    # chi-square, 9 degrees of freedom, p = 0.001
    assert sum((n - 600) ** 2 / 600 for n in found.values()) < 27.9
