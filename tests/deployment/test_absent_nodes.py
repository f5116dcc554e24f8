"""Slow, absent and returning nodes: a round goes on without them and reports it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.federation.simulation.sampling import ClientSampler
from hetero_fl.reporting.report import write_report
from tests.support.federations import config
from tests.support.nodes import LONG, Clock, Point, Sites, federation, records

CLIENTS = ["site_1", "site_2", "site_3"]


@pytest.mark.slow
def test_run_continues_with_five_of_twenty_nodes_down(tmp_path: Path) -> None:
    """Five nodes are down from the second round on; one of them is back for the last."""
    clients = [f"site_{i:02}" for i in range(1, 21)]
    run_config = config(
        "fedavg", "linear", clients=20, rounds=3, data__partition={"kind": "iid", "min_size": 5}
    )
    sites = Sites(clients, tmp_path / "sites")
    down = clients[3:8]

    def stop_sites(record: dict[str, Any]) -> None:
        for client in down if record["round"] == 1 else ():
            sites.stop(client)
        if record["round"] == 2:
            sites.start(down[0])

    deployed = federation(
        run_config, sites, tmp_path / "deployed", callbacks=[stop_sites], patience=0.5
    )
    first, second, last = records(deployed)
    assert (
        first["counts"] == {"invited": 20, "arrived": 20, "failed": 0, "late": 0}
        and "unread" not in first
    )
    assert second["counts"] == {"invited": 20, "arrived": 15, "failed": 5, "late": 0}
    assert second["unread"] == second["failed"] == dict.fromkeys(down, "its node is not connected")
    assert last["counts"]["failed"] == len(last["unread"]) == 4 and down[0] not in last["unread"]
    assert sorted(last["clients"]) == sorted(set(clients) - set(down[1:]))
    read = [scores["personal"]["accuracy"] for scores in last["clients"].values()]
    assert last["personal"]["accuracy"] == pytest.approx(sum(read) / 16)
    assert len(deployed.directory.model_files()) == 17  # and the server's
    assert deployed.summary["wall"]["failed"] == 9 and deployed.summary["rounds_completed"] == 3
    write_report(deployed.path)  # of those who were read


@pytest.mark.slow
@pytest.mark.parametrize("secret", [False, True], ids=["direct", "secure sum"])
def test_late_answers_are_not_used(tmp_path: Path, secret: bool, clock: Clock) -> None:
    """Compare with a run in which the late node is down for that round."""
    kills: dict[Point, str] = {("site_2", 1, "train"): "late"}
    run_config = config(
        "fedavg", "linear", rounds=3, cohort={"deadline": LONG}, evaluation={"every": 3}
    )
    if secret:
        run_config["channel"] = {"secure_sum": {"threshold": 2}}
    late = records(
        federation(
            run_config, Sites(CLIENTS, tmp_path / "a", kills, clock=clock), tmp_path / "late"
        )
    )
    assert [r["counts"]["late"] for r in late] == [0, 1, 0] and not any(r["failed"] for r in late)
    assert [r["counts"]["arrived"] for r in late] == [3, 2, 3]
    assert [row[0] for row in late[1]["tasks"] if row[3] == "late"] == ["site_2"]
    kills = {("site_2", 1, "train"): "before"}
    sites = Sites(CLIENTS, tmp_path / "b", kills, away=None)
    back = [lambda record: sites.start("site_2") if record["round"] == 2 else None]
    down = records(federation(run_config, sites, tmp_path / "down", patience=0.1, callbacks=back))
    assert down[1]["counts"] == {"invited": 3, "arrived": 2, "failed": 1, "late": 0}
    assert down[2]["counts"]["arrived"] == 3 and down[2]["global"] == late[2]["global"]


def test_first_arrivals_are_aggregated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []
    update = ClientSampler.update

    def note(self: ClientSampler, *args: Any) -> None:
        update(self, *args)
        seconds.append(self.known["site_1"][1])

    monkeypatch.setattr(ClientSampler, "update", note)
    kills: dict[Point, str] = {("site_1", 0, "train"): "last"}
    run_config = config(
        "fedavg",
        "linear",
        rounds=2,
        clients__per_round=2,
        cohort={"over_selection": 1.5, "sampling": "oort"},
    )
    deployed = records(
        federation(run_config, Sites(CLIENTS, tmp_path / "sites", kills), tmp_path / "deployed")
    )
    assert [r["counts"] for r in deployed] == [
        {"invited": 3, "arrived": 2, "failed": 0, "late": 1}
    ] * 2
    assert [row[3] for row in deployed[0]["tasks"]] == ["late", "arrived", "arrived"]
    assert seconds[0] > 0  # a late client counts as slow


def test_failed_client_does_not_count_as_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []
    update = ClientSampler.update

    def note(self: ClientSampler, *args: Any) -> None:
        update(self, *args)
        seconds.append(self.known["site_1"][1])
        self.known["site_1"][1] = 1000.0

    monkeypatch.setattr(ClientSampler, "update", note)
    kills: dict[Point, str] = {("site_1", 1, "train"): "before"}
    run_config = config(
        "fedavg",
        "linear",
        rounds=2,
        clients__per_round=3,
        cohort={"sampling": "oort"},
        evaluation={"every": 2},
    )
    sites = Sites(CLIENTS, tmp_path / "sites", kills, away=None)
    deployed = records(federation(run_config, sites, tmp_path / "deployed", patience=0.1))
    assert [record["counts"]["failed"] for record in deployed] == [0, 1]
    assert seconds[0] < 1000 and seconds[1] == 1000


@pytest.mark.slow
def test_round_with_too_few_nodes_waits_or_is_skipped(tmp_path: Path, clock: Clock) -> None:
    run_config = config("fedavg", "linear", rounds=3, cohort={"least": 3}, evaluation={"every": 3})
    run_config["devices"] = {"up": 1e6}
    kills: dict[Point, str] = {("site_1", 0, "train"): "before", ("site_2", 1, "train"): "before"}
    sites = Sites(CLIENTS, tmp_path / "sites", kills, away=1.5)
    deployed = federation(run_config, sites, tmp_path / "deployed", patience=0.1)
    assert [r["counts"]["arrived"] for r in records(deployed)] == [3, 3, 3]
    assert (
        "devices: no effect, because time is not simulated"
        in (deployed.path / "log.txt").read_text()
    )
    sites = Sites(CLIENTS, tmp_path / "others", {("site_1", 0, "train"): "missing"}, clock=clock)
    back = [lambda record: sites.start("site_1") if record["round"] == 1 else None]
    deployed = federation(run_config, sites, tmp_path / "skipped", patience=0.1, callbacks=back)
    assert records(deployed)[0].get("skipped") and records(deployed)[2]["counts"]["arrived"] == 3


def test_available_sampling_waits_for_enough_nodes(tmp_path: Path) -> None:
    cohort = {"sampling": "available", "least": 2}
    run_config = config(
        "fedavg", "linear", rounds=3, clients__per_round=3, cohort=cohort, evaluation={"every": 3}
    )
    sites = Sites(CLIENTS, tmp_path / "sites")

    def stop_sites(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            sites.stop("site_1")
            sites.stop("site_2")
            threading.Timer(1.0, sites.start, ["site_2"]).start()

    deployed = records(
        federation(run_config, sites, tmp_path / "deployed", patience=0.1, callbacks=[stop_sites])
    )
    assert [record["cohort"] for record in deployed] == [CLIENTS, CLIENTS[1:], CLIENTS[1:]]
    assert not any(record["failed"] for record in deployed) and list(deployed[2]["unread"]) == [
        "site_1"
    ]
