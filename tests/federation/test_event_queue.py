"""The event queue: any order of events and any fault leaves unrelated state unchanged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from hetero_fl.federation.asynchronous import AsynchronousTrainer, ClientTask, TaskQueue
from hetero_fl.federation.simulation.faults import NO_FAULT, FaultOutcome
from tests.support.asynchronous_runs import session
from tests.support.federations import TOP, config

SOURCE = config(
    "fedper",
    {"name": "mlp", "hidden": [8]},
    3,
    rounds=9,
    data__train_limit=180,
    data__partition__min_size=15,
    data__proxy__size=0,
    runtime={"threads": 1, "mode": "async", "buffer": 2},
)
SECONDS = st.lists(st.floats(0.1, 10), min_size=64, max_size=64)
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


# Without and with compression residuals.
CHANNELS = st.sampled_from([{}, TOP])


def after(
    seconds: list[float], fates: dict[int, FaultOutcome], channel: dict[str, Any]
) -> tuple[AsynchronousTrainer, dict[str, Any]]:
    """Return a run after two rounds, and the state of server and clients."""
    run = session(
        {**SOURCE, "channel": channel},
        seconds=lambda client_id, task: seconds[task % 64],
        fates=fates,
    )
    counts = [run.run_round()["counts"] for _ in range(2)]
    assert all(c["invited"] == c["arrived"] + c["failed"] + c["late"] for c in counts)
    models = {
        slot: {n: t.numpy().tobytes() for n, t in m.items()}
        for slot, m in run.server.models.items()
    }
    return run, {
        "models": models,
        "private": {
            client_id: run.store.encoded(client_id) for client_id in run.federation.client_infos
        },
        "now": run.now,
    }


@pytest.mark.slow
@QUICK
@given(SECONDS, st.sets(st.integers(0, 12)), CHANNELS)
def test_duplicate_upload_counts_once(
    seconds: list[float], twice: set[int], channel: dict[str, Any]
) -> None:
    plain, once = after(seconds, {}, channel)
    run, again = after(seconds, {number: FaultOutcome("twice") for number in twice}, channel)
    assert again == once
    assert run.traffic.down == plain.traffic.down and run.traffic.up >= plain.traffic.up


@pytest.mark.slow
@QUICK
@given(SECONDS, st.sets(st.integers(0, 12)), CHANNELS)
def test_corrupted_upload_counts_as_lost(
    seconds: list[float], bad: set[int], channel: dict[str, Any]
) -> None:
    _, lost = after(seconds, {number: FaultOutcome("lost") for number in bad}, channel)
    _, changed = after(seconds, {number: FaultOutcome("corrupted") for number in bad}, channel)
    assert changed == lost


@pytest.mark.slow
@QUICK
@given(SECONDS, st.sets(st.integers(0, 12)), st.floats(0.1, 20), CHANNELS)
def test_delayed_upload_equals_slow_client(
    seconds: list[float], late: set[int], by: float, channel: dict[str, Any]
) -> None:
    slow = [s + (by if i in late else 0.0) for i, s in enumerate(seconds)]
    _, one = after(seconds, {number: FaultOutcome("late", delay=by) for number in late}, channel)
    run, _ = after(slow, {}, channel)
    # Durations repeat after that.
    if run.num_tasks <= 64:
        assert one["models"] == after(slow, {}, channel)[1]["models"]


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 5)), max_size=40), st.data())
def test_events_are_ordered_by_end_and_idle_clients_ranked(
    tasks: list[tuple[int, float]], data: st.DataObject
) -> None:
    queue, flight, number = TaskQueue(), dict[int, tuple[float, int]](), 0
    for place, ends in tasks:
        if place in flight:
            ends_first = min(flight.values())
            popped = queue.pop()
            assert (popped.end, popped.number) == ends_first
            flight = {p: e for p, e in flight.items() if e != ends_first}
        if place not in flight:
            queue.push(ClientTask(number, f"c{place}", place, 0, 0, 0.0, ends, b"", 0, NO_FAULT))
            flight[place] = (ends, number)
            number += 1
        idle = [p for p in range(31) if p not in flight]
        if idle:
            rank = data.draw(st.integers(0, len(idle) - 1))
            assert queue.idle_position(rank) == idle[rank]
    assert len(queue) == len(flight)
