"""Asynchronous runs in real time: given the order of uploads, they equal the simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from hetero_fl.deployment.messages import RequestRefusedError
from hetero_fl.deployment.node import Node
from hetero_fl.experiment import run
from hetero_fl.experiment.session import _evaluate
from hetero_fl.federation import asynchronous, real_time
from hetero_fl.utils.errors import RunFailedError
from tests.support.asynchronous_runs import session
from tests.support.federations import MIXED, TOP, config
from tests.support.nodes import (
    LossyTransport,
    OrderedTransport,
    Sites,
    federation,
    figures,
    models,
    records,
    same,
    until,
)

CLIENTS = ["site_1", "site_2", "site_3", "site_4"]


DOWN = {"compress_down": [{"topk": 0.2}, {"quantize": 6}]}


def source(
    method: str = "hybrid", clients: int = 4, places: int = 3, channel: dict[str, Any] = TOP
) -> dict[str, Any]:
    own = {"algorithm__heads": "keep"} if method == "hybrid" else {}
    runtime = {
        "threads": 1,
        "mode": "async",
        "executor": "serial",
        **({} if method == "fedbuff" else {"buffer": 2}),
    }
    return config(
        method,
        MIXED,
        clients=clients,
        rounds=3,
        clients__per_round=places,
        channel=channel,
        runtime=runtime,
        **own,
    )


def without(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("seconds", "wall", "simulated", "tasks")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def test_single_node_equals_simulation(tmp_path: Path) -> None:
    run_config = source(clients=1, places=1)
    deployed = federation(run_config, Sites(["site"], tmp_path / "sites"), tmp_path / "deployed")
    simulated = run(run_config, out=tmp_path / "simulated")
    assert without(records(deployed)) == without(records(simulated)) and models(deployed) == models(
        simulated
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "channel"), [("hybrid", TOP), ("fedbuff", TOP), ("hybrid", DOWN)]
)
def test_run_in_the_same_order_equals_simulation(
    method: str, channel: dict[str, Any], tmp_path: Path
) -> None:
    run_config = source(method, channel=channel)
    deployed = federation(
        run_config,
        Sites(CLIENTS, tmp_path / "sites", transport=OrderedTransport()),
        tmp_path / "deployed",
    )
    pace, lines = session(run_config, seconds=lambda client, task: 10 + task / 1000), []
    for _ in range(3):
        lines.append(pace.run_round())
        _evaluate(pace, lines[-1], None)
    assert without(records(deployed)) == without(lines)
    # there was something to be out of order
    assert any(record["staleness"].keys() - {"0"} for record in lines)


@pytest.mark.slow
@pytest.mark.parametrize("channel", [TOP, DOWN])
def test_tasks_in_flight_are_repeated_after_server_restart(
    channel: dict[str, Any], tmp_path: Path
) -> None:
    run_config = source(channel=channel)
    plain = federation(
        run_config, Sites(CLIENTS, tmp_path / "a", transport=OrderedTransport()), tmp_path / "plain"
    )
    sites = Sites(CLIENTS, tmp_path / "b", transport=OrderedTransport())
    killed = federation(run_config, sites, tmp_path / "killed", crashes=[14, 17, 22, 20])
    assert without(records(killed)) == without(records(plain)) and models(killed) == models(plain)


def test_client_with_lost_state_receives_full_model(tmp_path: Path) -> None:
    sites = Sites(CLIENTS, tmp_path / "sites")

    def delete_states(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            for file in (tmp_path / "sites" / "site_2").rglob("state-*"):
                file.unlink()

    run_config = {**source("fedavg", places=4, channel=DOWN), "rounds": 4}
    deployed = records(
        federation(run_config, sites, tmp_path / "deployed", callbacks=[delete_states])
    )

    reset = [record.get("anew", []) for record in deployed]  # style: ok (file key)
    assert {client for clients in reset for client in clients} == {"site_2"}
    assert all(record["counts"]["arrived"] == 4 for record in deployed)
    assert not any(record["failed"] for record in deployed)


@pytest.mark.slow
def test_slots_are_given_to_connected_nodes(tmp_path: Path) -> None:
    kills = {("site_1", 0, "train"): "before", ("site_2", 0, "train"): "during"}
    sites = Sites(CLIENTS, tmp_path / "sites", kills, away=None)

    absent = ("site_1", "site_2")

    def back(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            sites.request_counts.clear()
            for client in absent:
                sites.start(client)
        if record["round"] == 4:  # greeted since
            until(lambda: all(sites.request_counts[client, -1, "hello"] for client in absent))
        # met and given tasks since, which the rounds that are left hear of
        if record["round"] == 6:
            until(
                lambda: {client for client, _, what in sites.done if what == "train"} >= set(absent)
            )

    run_config = {**source(places=4), "rounds": 10, "evaluation": {"every": 10}}
    deployed = records(
        federation(run_config, sites, tmp_path / "deployed", patience=0.1, callbacks=[back])
    )
    assert len(deployed) == 10 and not sites.kills
    assert all(record["counts"]["arrived"] == 4 for record in deployed)
    failed = {client: reason for record in deployed for client, reason in record["failed"].items()}
    assert failed == dict.fromkeys(absent, "its node is not connected")
    assert set(absent) <= {client for record in deployed[2:] for client in record["cohort"]}


def test_refusing_nodes_are_asked_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Node, "_run_task", Mock(side_effect=RequestRefusedError("not today")))
    monkeypatch.setattr(real_time, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(asynchronous, "MAX_CONSECUTIVE_FAULTS", 3)
    with pytest.raises(
        RunFailedError, match=r"round 1: no usable upload from 9 tasks; site_\d: not today$"
    ):
        federation(source(), Sites(CLIENTS, tmp_path / "sites"), tmp_path / "deployed")


def test_empty_slot_does_not_block_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_time, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(real_time, "MAX_WAIT", 0.1)
    monkeypatch.setattr(
        real_time.RemoteAsynchronousTrainer,
        "_idle_clients",
        lambda self: (0, self.queue.idle_position),
    )
    with pytest.raises(RunFailedError, match="round 1: no client connected for"):
        federation(source(), Sites(CLIENTS, tmp_path / "sites"), tmp_path / "deployed")


def test_init_from_gives_nodes_their_initial_models(tmp_path: Path) -> None:
    first = run(config("hybrid", MIXED, rounds=1), out=tmp_path / "first")
    run_config = config(
        "hybrid", MIXED, rounds=2, algorithm__heads="keep", init_from=str(first.path)
    )
    deployed = federation(
        run_config,
        Sites(CLIENTS[:3], tmp_path / "sites", transport=LossyTransport()),
        tmp_path / "deployed",
    )
    simulated = run(run_config, out=tmp_path / "simulated")
    same(deployed, simulated)
    assert figures(deployed) != figures(
        run({**run_config, "init_from": None}, out=tmp_path / "other")
    )
