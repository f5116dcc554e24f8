"""Faults during secure aggregation: clients that fail after the key exchange are unmasked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from hetero_fl.federation.simulation.faults import FaultOutcome, Faults
from hetero_fl.federation.synchronous import SynchronousTrainer
from tests.federation.simulation.test_simulated_rounds import EVERY, arithmetic
from tests.support.federations import MIXED, rounds_of
from tests.support.summed_runs import largest_difference, secure

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
) -> tuple[SynchronousTrainer, dict[str, list[str]]]:
    """Return a new run of six clients and their future answers."""
    run_config: dict[str, Any] = {"devices": CLOCK, "cohort": {"deadline": 60}, **changes}
    rounds = rounds_of(
        secure("hybrid", MIXED, 6, algorithm__heads="keep", **run_config), num_rounds=0
    )
    rounds.environment = replace(
        rounds.environment, faults=ScriptedFaults(rounds.environment.faults, fates)
    )
    kinds, answer = defaultdict[str, list[str]](list), rounds.executor.run

    def watched(clients: Any, request: Any) -> Any:
        for client in clients:
            kinds[client].append(request(client).kind)
        return answer(clients, request)

    rounds.executor.run = watched  # type: ignore[method-assign]
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
        plain.sampler.sample = lambda *a: (uninvited, 0.0)  # type: ignore[method-assign,misc]
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
    vector = 8 * lost.protocol.agreed.layout(0).size  # type: ignore[union-attr]
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
    [{}, {"deadline": 1.5}, {"deadline": 1.5, "partial_work": True}, {"over_selection": 1.4}],
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
        faults={**EVERY, "delay": 2.0},
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
