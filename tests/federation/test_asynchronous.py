"""Asynchronous runs: the synchronous limit case, reproducibility, resume and failures."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from hetero_fl.federation.asynchronous import AsynchronousTrainer, idle_position
from hetero_fl.federation.round import RoundUploads
from hetero_fl.federation.simulation.conditions import FaultOutcome
from hetero_fl.utils.errors import RunFailedError
from tests.support.asynchronous_runs import session, source
from tests.support.calls import record_calls
from tests.support.cases import each_case
from tests.support.federations import MIXED, SUMMING, TOP, config, rounds_of, runtime_of, state_of

PACE = {"site_1": 1.0, "site_2": 1.3, "site_3": 2.9, "site_4": 7.1}


def bits(run: Any) -> dict[str, Any]:
    """Return the state of the server and all clients as bytes, and the traffic."""
    return {"state": state_of(run), "traffic": run.traffic}


# Synchronous limit case
@pytest.mark.slow
@each_case("method", [m for m in SUMMING if m != "ds_fl"])
def test_equal_task_times_match_synchronous_run(method: str) -> None:
    number = SUMMING.index(method)
    cohort = 2 if number % 2 else None
    changes: dict[str, Any] = {"channel": TOP if number % 3 == 0 else {}}
    changes |= {"clients__per_round": cohort} if cohort else {}
    if method == "fedavg":
        changes["algorithm"] = {"name": "fedavg", "weighting": "uniform"}
    run_config = config(method, MIXED, clients=4, rounds=3, server={"model": "linear"}, **changes)
    waits = rounds_of(run_config)
    pace = session(
        {**run_config, "runtime": {"threads": 1, "mode": "async"}},
        seconds=lambda client_id, task: 3.0,
    )
    records = [pace.run_round() for _ in range(3)]
    assert bits(pace) == bits(waits)
    assert (pace.version, pace.executor.now, records[1]["simulated"]) == (
        3,
        9.0,
        {"start": 3.0, "end": 6.0},
    )
    assert all(record["staleness"] == {"0": cohort or 4} for record in records)


def test_unequal_task_times_differ_from_synchronous_run() -> None:
    run_config = config("fedavg", clients=4, rounds=3)
    pace = session(
        {**run_config, "runtime": {"threads": 1, "mode": "async"}},
        seconds=lambda client_id, task: PACE[client_id],
    )
    records = [pace.run_round() for _ in range(3)]
    assert bits(pace) != bits(rounds_of(run_config))
    # Fast clients upload twice, slow ones never.
    assert any(len(set(record["cohort"])) < 4 for record in records)


def test_tasks_that_fail_before_upload_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    fates = {
        0: FaultOutcome("before"),
        1: FaultOutcome("during", completed_share=0.5),
        2: FaultOutcome("after"),
        3: FaultOutcome("lost"),
    }
    run = session(config("fedavg", clients=4, runtime={"threads": 1, "mode": "async"}), fates=fates)
    calls = record_calls(
        monkeypatch, run.executor.inner, "run", lambda clients, request: len(clients)
    )
    record = run.run_round()
    assert sorted(record["failed"]) == sorted(PACE) and sum(calls) == 4
    assert record["counts"] == {"invited": 8, "arrived": 4, "failed": 4, "late": 0}


def test_resume_within_a_version_samples_the_same_clients() -> None:
    runtime = {"threads": 1, "mode": "async", "buffer": 8}
    run_config = config("fedavg", "mlp", clients=8, rounds=3, clients__per_round=3, runtime=runtime)
    full, first, second = (
        session(run_config, seconds=lambda client_id, task: int(client_id[-1])) for _ in range(3)
    )

    records = [full.run_round() for _ in range(3)]
    first.run_round()
    second.load_state_dict(first.state_dict())
    resumed = [second.run_round() for _ in range(2)]

    assert records[0]["version"] == 0
    assert without_seconds(resumed) == without_seconds(records[1:])


def test_uploads_of_a_version_are_combined_in_the_order_of_client_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = {"threads": 1, "mode": "async", "buffer": 4}
    run_config = config("fedavg", "mlp", clients=4, runtime=runtime)
    run = session(run_config, seconds=lambda client_id, task: 10 - int(client_id[-1]))
    combined = record_calls(
        monkeypatch, RoundUploads, "add", lambda uploads, info, *rest: info.client_id
    )

    record = run.run_round()

    assert record["cohort"] == ["site_4", "site_3", "site_2", "site_1"]
    assert combined == sorted(record["cohort"])
    assert record["staleness"] == {"0": 4}


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


# Failures
@each_case("chance", [0.0, 0.3, 0.6, 0.9])
def test_runs_with_failures_complete_and_counts_add_up(
    chance: float,
) -> None:
    faults = dict.fromkeys(("before", "during", "after", "lost", "corrupted"), chance / 5)
    run = session(
        source("fedper", rounds=5, faults={**faults, "late": 0.05, "twice": 0.05, "delay": 5.0})
    )
    records = [run.run_round() for _ in range(5)]
    for record in records:
        counts, found = record["counts"], Counter(what for *_, what in record["tasks"])
        assert (
            counts["invited"]
            == counts["arrived"] + counts["failed"] + counts["late"]
            == len(record["tasks"])
        )
        assert (counts["arrived"], counts["late"]) == (3, 0) and found["failed"] == counts["failed"]
        assert all(
            started <= ends <= record["simulated"]["end"] for _, started, ends, _ in record["tasks"]
        )
    failed = sum(record["counts"]["failed"] for record in records)
    tasks = sum(record["counts"]["invited"] for record in records)
    assert abs(failed / tasks - chance) < 0.25 and (chance > 0) == (failed > 0)


def test_tasks_of_one_version_draw_separate_compression(monkeypatch: pytest.MonkeyPatch) -> None:
    run_config = config("fedavg", "mlp", 3, channel={"compress": [{"quantize": 4}]})
    run_config["runtime"] = {"threads": 1, "mode": "async", "buffer": 6}
    run = session(run_config, seconds=lambda client_id, _: PACE[client_id])
    compressor = runtime_of(run).links.up
    keys = record_calls(monkeypatch, compressor, "compress", lambda payload, key, *rest: key)
    records = [run.run_round() for _ in range(2)]
    assert not any(record["failed"] for record in records) and run.version == 1
    assert len(keys) > 3 and len(set(keys)) == len(keys)


# End of a run
def test_run_without_uploads_ends() -> None:
    run_config = config("fedavg", runtime={"threads": 1, "mode": "async"}, faults={"lost": 1.0})
    with pytest.raises(
        RunFailedError, match=r"round 1: no usable upload from 300 tasks; site_\d: upload lost$"
    ):
        session(run_config).run_round()
    wild = config("fedavg", models="mlp", runtime={"threads": 1, "mode": "async"})
    wild["clients"]["defaults"]["optimizer"]["lr"] = 1e30
    with pytest.raises(RunFailedError, match="no usable upload from 3 tasks"):
        session(wild).run_round()


def test_diverging_client_is_sampled_again_without_blocking() -> None:
    groups = [
        {"name": "calm", "count": 3, "model": "mlp"},
        {"name": "wild", "model": "mlp", "optimizer": {"lr": 1e30}},
    ]
    run = session(config("fedavg", clients__groups=groups, runtime={"threads": 1, "mode": "async"}))
    record = run.run_round()
    assert list(record["failed"]) == ["wild"] and set(record["cohort"]) == {
        "calm_1",
        "calm_2",
        "calm_3",
    }
    stops = config(
        "fedavg",
        clients__groups=groups,
        runtime={"threads": 1, "mode": "async", "divergence": "stop"},
    )
    with pytest.raises(RunFailedError, match="wild diverged"):
        session(stops).run_round()


def test_state_follows_accepted_uploads() -> None:
    """Check that a client keeps its previous head after a lost task."""
    run_config = config("fedper", clients=3, runtime={"threads": 1, "mode": "async"})
    pace = {"site_1": 1.0, "site_2": 1.1, "site_3": 1.2}
    plain = session(run_config, seconds=lambda client_id, _: pace[client_id])
    plain.run_round()
    lost = session(
        run_config,
        seconds=lambda client_id, _: pace[client_id],
        fates={3: FaultOutcome("lost"), 4: FaultOutcome("lost"), 5: FaultOutcome("lost")},
    )
    lost.run_round()
    before = state_of(lost)
    assert before == state_of(plain)
    seen = []
    end = lost._finish_task
    lost._finish_task = lambda task, *rest: (
        end(task, *rest),
        seen.append((task.number, state_of(lost))),
    )[0]  # type: ignore[method-assign,func-returns-value]
    lost.run_round()
    assert [number for number, _ in seen[:3]] == [3, 4, 5] and all(
        kept == before for _, kept in seen[:3]
    )
    assert seen[-1][1] != before


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
    return run, {**state_of(run), "now": run.executor.now}


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
        assert one["server"] == after(slow, {}, channel)[1]["server"]


@given(st.sets(st.integers(0, 30)))
def test_idle_clients_are_ranked(busy: set[int]) -> None:
    idle = [position for position in range(31) if position not in busy]

    assert [idle_position(sorted(busy), rank) for rank in range(len(idle))] == idle
