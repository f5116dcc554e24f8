"""Runs with secure aggregation: close to plain runs, equal on any workers, or refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_fl.algorithms import Hybrid
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.core.payload import PayloadError
from hetero_fl.engine.driver import DivergedError
from hetero_fl.federation import client_runtime
from hetero_fl.federation.executors import processes
from hetero_fl.federation.executors.workers import WorkerJob
from hetero_fl.federation.simulation.conditions import FaultOutcome, Faults
from hetero_fl.federation.simulation.executor import SimulatedExecutor
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.federation.executors.test_workers import kill_workers
from tests.federation.simulation.test_simulated_rounds import arithmetic
from tests.federation.test_cost import estimate_and_count
from tests.support.asynchronous_runs import FAULTS
from tests.support.calls import record_calls
from tests.support.cases import each_case
from tests.support.federations import MIXED, SUMMING, config, rounds_of
from tests.support.summed_runs import largest_difference, secure
from tests.support.workers import (
    outcome,
    rounds_on,
    setup_of,
)

NOTHING = ["local", "centralized"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in SUMMING if name != "local"])
def test_secure_aggregation_matches_plain_sums(method: str, float64: None) -> None:
    student = {"server": {"model": "linear"}}
    plain, summed = (
        rounds_of(config(method, MIXED, 4, **student)),
        rounds_of(secure(method, **student)),
    )
    assert 0 < largest_difference(plain, summed) < 1e-9
    # Secrets are deleted after their round.
    assert not summed.store.notes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (
            "hybrid",
            {
                "clients__common": ["head."],
                "clients__overrides": [{"match": "site_2", "shares": ["backbone"]}],
            },
        ),
        ("hybrid", {"clients__overrides": [{"match": "site_[13]", "share_every": 2}], "rounds": 3}),
        ("hybrid", {"algorithm__teacher": "entropy"}),
        ("fedmd", {"algorithm__teacher": "samples"}),
        ("fd", {"algorithm__teacher": "contrast"}),
        ("fedavg", {"algorithm__weighting": "sum", "clients__per_round": 3}),
        ("heterofl", {"algorithm__masked": True}),
        ("hybrid", {"runtime": {"executor": "batched", "threads": 1}}),
        (
            "fedavg",
            {
                "channel__secure_sum": {
                    "fraction_bits": 40,
                    "range": 256,
                    "threshold": 4,
                }
            },
        ),
    ],
)
def test_secure_aggregation_with_settings_that_change_sums(
    method: str, changes: dict[str, Any], float64: None
) -> None:
    without = {k: v for k, v in changes.items() if not k.startswith("channel")}
    plain, summed = (
        rounds_of(config(method, MIXED, 4, **without)),
        rounds_of(secure(method, **changes)),
    )
    assert 0 < largest_difference(plain, summed) < 1e-8


@each_case("method", ["fedavg", "fedmd", "fedproto"])
def test_secure_aggregation_in_single_precision(method: str) -> None:
    plain, summed = rounds_of(config(method, MIXED, 4)), rounds_of(secure(method))
    assert largest_difference(plain, summed) < 2e-5


@each_case("method", NOTHING)
def test_methods_without_uploads_run_unchanged(method: str) -> None:
    assert rounds_of(secure(method)).traffic.up == 0


def test_reports_contain_only_mean_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = rounds_of(secure("hybrid"), num_rounds=0)
    seen = record_calls(monkeypatch, Hybrid, "aggregate", lambda method, server, uploads: uploads)
    record, plain = (
        rounds.run_round(),
        rounds_of(config("hybrid", MIXED, 4), num_rounds=0).run_round(),
    )
    uploads, _ = seen
    losses = plain["train_loss"].values()
    assert record["train_loss"] == {"mean": pytest.approx(sum(losses) / len(losses), rel=1e-9)}
    assert len(uploads) == 4 and [c.client_id for c in uploads.senders("logits")] == [
        f"site_{i}" for i in (1, 2, 3, 4)
    ]
    for ask in (lambda: uploads.each, lambda: uploads.containing("logits")):
        with pytest.raises(UserError, match="use='each'"):
            ask()


def failing(rounds: FederatedTrainer, who: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the training of some clients diverge."""
    carry_out = client_runtime.run_plans

    def bad(plans: list[Any], *rest: Any) -> list[Any]:
        outcomes = carry_out(plans, *rest)
        for (client, _), result in zip(plans, outcomes, strict=True):
            if client.participant_id in who:
                result.failure = DivergedError("its loss is nan")
        return outcomes

    monkeypatch.setattr(client_runtime, "run_plans", bad)


def test_diverging_client_is_dropped_and_keeps_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = rounds_of(secure("fedproto", "mlp"), num_rounds=0)
    failing(rounds, ["site_2"], monkeypatch)
    assert rounds.run_round()["failed"] == {"site_2": "its loss is nan"}
    kept = [float(rounds.server.state["known"].sum())]
    counts = sum(
        (rounds.federation.label_counts(c) for c in ("site_1", "site_3", "site_4")), torch.zeros(10)
    )
    assert kept == [float((counts > 0).sum())]


def test_too_few_clients_fail_the_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = rounds_of(secure("fedproto", "mlp"), num_rounds=1)
    before = {c: rounds.store.encoded(c) for c in rounds.federation.client_infos}
    failing(rounds, ["site_2", "site_4"], monkeypatch)
    with pytest.raises(
        RunFailedError,
        match=r"round 2: secure aggregation stopped at 'train': 2 of 4 clients .* requires 3",
    ):
        rounds.run_round()
    assert {
        c: rounds.store.encoded(c) for c in rounds.federation.client_infos
    } == before and not rounds.store.notes


@pytest.mark.slow
@each_case("too_few", ["skip", None])
def test_abandoned_sum_counts_as_too_few_uploads(too_few: str | None) -> None:
    """Lose half of the uploads of five clients: four are rarely left for the sum."""
    more: dict[str, Any] = {"cohort": {"too_few": too_few}} if too_few else {}
    rounds = rounds_of(
        secure("fedper", "mlp", clients=5, faults={"lost": 0.4}, **more), num_rounds=0
    )
    records = [rounds.run_round() for _ in range(5)]
    assert any(r.get("skipped") for r in records)
    assert [bool(r.get("skipped")) for r in records] == [
        r["counts"]["arrived"] < 4 for r in records
    ]
    for record in records:
        counts = record["counts"]
        assert counts["invited"] == counts["arrived"] + counts["failed"] == 5


def test_out_of_range_values_are_reported() -> None:
    rounds = rounds_of(secure("fedproto", "mlp", channel__secure_sum={"range": 0.25}), num_rounds=0)
    with pytest.raises(
        RunFailedError, match=r"channel\.secure_sum\.range: values must be <= 0\.25"
    ):
        rounds.run_round()
    assert rounds.store.clients() == []


def test_client_that_refuses_after_training_discards_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vector = SecureAggregation.encode_upload

    def large(self: SecureAggregation, client: str, *rest: Any) -> Any:
        if client == "site_2":
            raise PayloadError("too large")
        return vector(self, client, *rest)

    monkeypatch.setattr(SecureAggregation, "encode_upload", large)
    rounds = rounds_of(secure("ditto", "mlp"), num_rounds=0)
    assert rounds.run_round()["failed"] == {
        "site_2": "upload refused: the client refused 'train': too large"
    }
    assert rounds.store.clients() == ["site_1", "site_3", "site_4"]


@pytest.mark.slow
def test_worker_killed_in_any_exchange_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the replacement knows the client's secrets and repeats no other client."""
    setup = setup_of(secure("hybrid", rounds=3, clients__per_round=3, server={"model": "linear"}))
    expected, due = outcome(rounds_on(setup, None), 2), ["shares", "train", "consistency", "unmask"]

    def first_of_its_kind(job: WorkerJob) -> bool:
        ask = next(iter(job.requests.values())).kind
        return ask in due and not due.remove(ask)  # type: ignore[func-returns-value]

    pool = processes.ProcessPool(setup, 2)
    try:
        killed = kill_workers(pool, monkeypatch, first_of_its_kind)
        assert outcome(rounds_on(setup, pool, 2), 2) == expected and len(killed) == 4
    finally:
        pool.close()


@pytest.mark.slow
@each_case(
    ("method", "changes"),
    [
        ("hybrid", {"clients__overrides": [{"match": "site_[12]", "share_every": 3}]}),
        ("fedproto", {"clients__per_round": 3}),
    ],
)
def test_cost_is_exact(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    estimated, counted = estimate_and_count(tmp_path, secure(method, rounds=4, **changes))
    assert estimated == counted and min(counted) > 0


@each_case("chain", [[{"quantize": 4}], ["half"]])
def test_quantizing_chain_works_with_secure_sum(chain: Any, float64: None) -> None:
    rounded = {"channel__compress": chain}
    plain, summed = (
        rounds_of(run_config)
        for run_config in (config("hybrid", MIXED, 4, **rounded), secure("hybrid", **rounded))
    )
    assert 0 < largest_difference(plain, summed) < 1e-9
    assert largest_difference(plain, rounds_of(config("hybrid", MIXED, 4))) > 1e-4


CLOCK = {"speed": 1e6, "up": 1e6, "down": 1e6}


WHOLE = ["keys", "shares", "train", "consistency", "unmask"]


class ScriptedFaults(Faults):
    """Fault outcomes by client; other clients have no faults."""

    def __init__(self, like: Faults, fates: Mapping[str, FaultOutcome]) -> None:
        super().__init__(like.config, like.devices)
        self.fates = fates

    def outcome(self, client_id: str, task: int) -> FaultOutcome:
        return self.fates.get(client_id, FaultOutcome())


def with_faults(
    fates: Mapping[str, FaultOutcome], **changes: Any
) -> tuple[FederatedTrainer, dict[str, list[str]]]:
    """Return a new run of six clients and their future answers."""
    run_config: dict[str, Any] = {"devices": CLOCK, "cohort": {"deadline": 60}, **changes}
    rounds = rounds_of(
        secure("hybrid", MIXED, 6, algorithm__heads="keep", **run_config), num_rounds=0
    )
    executor = rounds.executor
    assert isinstance(executor, SimulatedExecutor)
    executor.faults = ScriptedFaults(executor.faults, fates)
    kinds, answer = defaultdict[str, list[str]](list), executor.inner.run

    def watched(clients: Any, request: Any) -> Any:
        for client in clients:
            kinds[client].append(request(client).kind)
        return answer(clients, request)

    executor.inner.run = watched  # type: ignore[method-assign]
    return rounds, kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["before", "during", "after", "lost", "late", "corrupted", "twice"]
)
def test_each_fault_occurs_in_its_exchange(what: str) -> None:
    rounds, kinds = with_faults(
        {"site_2": FaultOutcome(what, delay=100.0 if what == "late" else 0.0, completed_share=0.5)}
    )  # type: ignore[arg-type]
    record = rounds.run_round()
    arithmetic(record)
    found = {client: what for client, _, _, what in record["tasks"]}["site_2"]
    assert found == {"late": "late", "twice": "arrived"}.get(what, "failed")
    answered = {"before": [], "corrupted": WHOLE[:3], "twice": WHOLE}.get(what, WHOLE[:2])
    assert kinds["site_2"] == answered and kinds["site_3"] == WHOLE
    plain, _ = with_faults({})
    if what != "twice":
        uninvited = [c for c in rounds.federation.client_infos if c != "site_2"]
        plain.sample_cohort = lambda *a: uninvited  # type: ignore[method-assign,misc]
    plain.run_round()
    # The other masks cancel, and the client's training is discarded.
    assert largest_difference(rounds, plain) < 2e-5
    assert set(rounds.store.clients()) == set(plain.store.clients())


def test_traffic_of_unresponsive_clients_is_counted() -> None:
    """Check that a lost client received every message and that its vector counts as sent."""
    (plain, _), (lost, _), (twice, _) = (
        with_faults(f)
        for f in ({}, {"site_2": FaultOutcome("lost")}, {"site_2": FaultOutcome("twice")})
    )
    for rounds in (plain, lost, twice):
        rounds.run_round()
    vector = 8 * lost.protocol.shared_setup.layout(0).size  # type: ignore[union-attr]
    # The shares that it would have sent.
    assert 0 < plain.traffic.up - lost.traffic.up < 2000
    assert 0 < plain.traffic.down - lost.traffic.down < 2000
    assert vector <= twice.traffic.up - plain.traffic.up < vector + 1000


def test_masked_vector_determines_upload_time() -> None:
    """Count eight bytes for each summed number instead of the client's plain upload."""
    rounds, _ = with_faults({}, devices={"up": 1e3}, cohort={})
    took = rounds.run_round()["simulated"]["end"]
    assert took == pytest.approx(rounds.traffic.up / 6 / 1e3, rel=0.02)


def test_too_many_dropouts_abandon_the_sum() -> None:
    rounds, kinds = with_faults(
        {f"site_{i}": FaultOutcome("during", completed_share=0.5) for i in (1, 2, 3)}
    )
    record = rounds.run_round()
    assert record["skipped"] and record["counts"] == {
        "invited": 6,
        "arrived": 0,
        "failed": 6,
        "late": 0,
    }
    assert (
        sum("the round was abandoned: round" in reason for reason in record["failed"].values()) == 3
    )
    assert (
        "unmask" not in kinds["site_5"] and rounds.store.clients() == [] and not rounds.store.notes
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [{}, {"deadline": 1.5}, {"over_selection": 1.4}],
)
def test_counts_add_up_for_every_policy(
    policy: dict[str, Any],
) -> None:
    devices = {"speed": {"median": 1e6, "sigma": 0.9}, "up": 1e6}
    run_config = secure(
        "fedper",
        "mlp",
        7,
        rounds=6,
        devices=devices,
        faults={**FAULTS, "delay": 2.0},
        cohort=policy,
        clients__per_round=5,
        channel__secure_sum={"threshold": 0.51},
        data__partition={"kind": "iid", "min_size": 10},
    )
    rounds = rounds_of(run_config, num_rounds=0)
    records = [rounds.run_round() for _ in range(6)]
    for record in records:
        arithmetic(record)
    assert any(
        not r.get("skipped") and r["counts"]["failed"] + r["counts"]["late"] for r in records
    )
