"""A round of every method sends what is declared and counted, and changes only its own state."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.federations import METHODS, MIXED, config, rounds_of, state_of
from tests.support.observe import observe

UNCOUNTED = ("local", "centralized")
ASYNCHRONOUS = ("fedasync", "fedbuff")
CHANNELS: dict[str, dict[str, Any]] = {
    "topk": {"compress": [{"topk": 0.1}, {"quantize": 8}]},
    "random": {
        "compress": [{"randk": 0.3}, {"top_classes": 3}, {"quantize": 6, "bucket": 100}],
        "compress_down": [{"top_classes": 3}, "half"],
    },
    "changes": {"compress_down": [{"topk": 0.2}, {"quantize": 6}]},
}


@pytest.mark.parametrize("method", METHODS)
def test_observed_run_equals_run_without_evaluation(method: str) -> None:
    source = config(method, MIXED, clients=4, server={"model": "linear"})

    seen = observe(source, chunk=4)

    assert seen.changed_in_place == []
    assert all(0 <= record["global"]["accuracy"] <= 1 for record in seen.records)
    assert all(record["clients"].keys() == {*source_clients()} for record in seen.records)
    assert state_of(seen.trainer) == state_of(rounds_of(source))
    check_traffic(method, seen)


def source_clients() -> list[str]:
    return [f"site_{number}" for number in range(1, 5)]


def check_traffic(method: str, seen: Any) -> None:
    """Check that estimated, encoded and counted bytes are equal."""
    assert not any(record["failed"] for record in seen.records)
    assert any(seen.counted) == (method not in UNCOUNTED)
    if method in UNCOUNTED:
        assert seen.counted == seen.estimated == (0, 0)
    elif seen.cost.is_upper_bound:
        assert all(e >= c for e, c in zip(seen.estimated, seen.counted, strict=True))
    elif method not in ASYNCHRONOUS:
        assert seen.estimated == seen.counted
    assert method in UNCOUNTED or seen.uploaded == seen.counted[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compressed_run_sends_the_estimated_bytes(method: str) -> None:
    channel = list(CHANNELS)[METHODS.index(method) % len(CHANNELS)]
    # The cost of asynchronous runs is estimated for clients that are not all busy.
    per_round = None if method in ASYNCHRONOUS else 3
    source = config(
        method,
        MIXED,
        4,
        rounds=3,
        server={"model": "linear"},
        channel=CHANNELS[channel],
        clients__per_round=per_round,
    )

    check_traffic(method, observe(source))
