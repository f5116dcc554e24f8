"""Servers and nodes around a run: what sites are sent, how runs end, and how they are monitored."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from hetero_fl.cli import main
from hetero_fl.cli.deployment_commands import print_status
from hetero_fl.deployment import messages
from hetero_fl.deployment.audit_log import verify
from hetero_fl.deployment.config import DisclosureConfig, SiteConfig
from hetero_fl.deployment.monitoring import (
    STATUS_FILE,
    EventLog,
    LoggedNode,
    RunStatus,
    read_status,
)
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.server import run_federation
from hetero_fl.deployment.transport import Envelope, Handle
from hetero_fl.experiment import run
from hetero_fl.experiment.configuration import load_config
from hetero_fl.federation.executors.workers import Worker
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.deployments import SITES, Federation, small
from tests.support.federations import changed, config
from tests.support.loopback import LoopbackTransport
from tests.support.marked_sites import public_table
from tests.support.nodes import LONG, Clock, EventLines, models

ALL = DisclosureConfig(labels=True, details=True, model=True, errors=True)


SERIAL = {"runtime__executor": "serial"}


class Sites:
    """Nodes `site_1`, `site_2`, ... on their own loopback transport, with the lines they logged."""

    def __init__(self, folder: Path, sites: list[SiteConfig]) -> None:
        self.folder, self.sites = folder, sites
        self.lines = EventLines()
        self.nodes: list[LoggedNode] = []

    def gathered(
        self, change: Callable[[Envelope], Envelope] = lambda envelope: envelope
    ) -> LoopbackTransport:
        """Connect all nodes to a new server.

        Args:
            change: Changes each answer of the first node.
        """
        loopback = LoopbackTransport()
        for index, site in enumerate(self.sites):
            node = Node(site, self.folder / site.client, self.lines)
            attended = LoggedNode(node, self.lines)  # type: ignore[arg-type]
            self.nodes.append(attended)
            requests = attended.handle
            loopback.join(
                (lambda e, requests=requests: change(requests(e))) if index == 0 else requests
            )
        return loopback


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    clients = ["site_1", "site_2", "site_3"]
    return Sites(tmp_path / "sites", [SiteConfig(client=client, tells=ALL) for client in clients])


def test_status_file_is_complete_after_a_run(sites: Sites, tmp_path: Path) -> None:
    log_lines = EventLines()
    finished = run_federation(
        config(**SERIAL), sites.gathered(), out=tmp_path / "out", wait=LONG, log=log_lines
    )
    tree = read_status(tmp_path / "out")
    assert tree["phase"] == "done" and tree["round"] == 2
    assert all(node["here"] for node in tree["nodes"].values()) and len(tree["nodes"]) == 3
    up, down = (
        sum(record[name] for record in finished.metrics) for name in ("up_bytes", "down_bytes")
    )
    assert (tree["up_bytes"], tree["down_bytes"]) == (up, down)
    assert (
        sorted(log_lines)
        == [f"site_{i} connected" for i in (1, 2, 3)]
        == sorted(e["message"] for e in tree["events"])
    )
    assert sorted(map(str, log_lines.clients)) == ["site_1", "site_2", "site_3"]
    assert sites.lines.count("disconnected by the server") == 3
    line = "the site's file has no data: training on a part of the server's data (digits)"
    assert sites.lines.count(line) == 3


def test_server_finds_its_own_errors_before_it_waits(tmp_path: Path) -> None:
    missing = {"name": "table", "path": str(tmp_path / "missing.csv"), "label": "ill"}
    source = config(data=missing, models="tabular")
    with pytest.raises(UserError, match=r"missing\.csv"):
        run_federation(source, LoopbackTransport(), out=tmp_path / "out", wait=LONG)


def test_nodes_leave_if_the_server_ends_with_an_error(sites: Sites, tmp_path: Path) -> None:
    def fail(record: dict[str, Any]) -> None:
        raise RuntimeError("of all things")

    with pytest.raises(RuntimeError):
        run_federation(
            config(**SERIAL), sites.gathered(), out=tmp_path / "out", wait=LONG, callbacks=[fail]
        )

    line = "disconnected by the server: the server ended with an error; see its log"
    assert sites.lines.count(line) == 3


def test_site_without_data_is_told_to_set_it(tmp_path: Path) -> None:
    source = {**config(models="tabular", **SERIAL), "data": public_table(tmp_path / "public.csv")}
    words = "data: table is not in this site's allows.data; to use the site's own data, set data in"
    with pytest.raises(RunFailedError, match=words):
        Federation(tmp_path).serve(source)


def with_torch(answer: Envelope, version: str) -> Envelope:
    """Return an answer that names a version of torch if it names one."""
    if "torch" not in answer.head:
        return answer
    return Envelope({**answer.head, "torch": version}, answer.body)


def test_node_of_another_version_is_refused(sites: Sites, tmp_path: Path, clock: Clock) -> None:
    log_lines: list[str] = []
    with pytest.raises(RunFailedError, match="no node connected within 300 s for site_1"):
        run_federation(
            config(**SERIAL),
            sites.gathered(lambda answer: with_torch(answer, "1.0")),
            out=tmp_path / "out",
            wait=LONG,
            log=clock.after(3, log_lines),
        )
    line = f"torch: expected version '{messages.versions()['torch']}', got '1.0'"
    assert f"refused a node for client 'site_1': {line}" in log_lines
    assert f"disconnected by the server: {line}" in sites.lines
    assert not (tmp_path / "out").exists()


def test_nodes_with_another_build_of_torch_train(tmp_path: Path) -> None:
    version = torch.__version__.partition("+")[0] + "+rocm6.2"

    def rebuilt(handle: Handle) -> Handle:
        return lambda envelope: with_torch(handle(envelope), version)

    run = Federation(tmp_path).serve(small(rounds=1), dict.fromkeys(SITES, rebuilt), wait=20.0)

    assert not run.metrics[0]["failed"]


def test_exception_at_a_node_is_a_failure_with_a_traceback_in_its_log(tmp_path: Path) -> None:
    name = "python:tests.support.failing_methods:Fails"
    sites = {site: {"allows": {"own_code": [name]}} for site in SITES}
    federation = Federation(tmp_path, sites)

    run = federation.serve(load_config(small(name, "mlp"), allow_code=True))

    reason = run.metrics[1]["failed"]["site_1"]
    assert "ZeroDivisionError: of all things; the traceback is in the log of the site" in reason
    assert "ZeroDivisionError: of all things" in federation.log_lines
    assert any("failing_methods.py" in line for line in federation.log_lines)
    assert not any(line.startswith("refused") for line in federation.log_lines)
    outcomes = [entry["outcome"] for entry in verify(tmp_path / "site_1" / "audit.jsonl")]
    assert sum(outcome.startswith("error: train: ") for outcome in outcomes) == 1


def test_warnings_of_a_node_are_issued_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Worker._run_tasks

    def warn(*arguments: Any) -> None:
        warnings.warn("few rows", UserWarning, stacklevel=1)
        train(*arguments)

    monkeypatch.setattr(Worker, "_run_tasks", warn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Federation(tmp_path).serve(small(rounds=2))

    assert [str(each.message) for each in caught].count("few rows") == len(SITES)


def test_exception_while_a_node_prepares_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hetero_fl.deployment.node.load_federated_data",
        Mock(side_effect=RuntimeError("CUDA error: no kernel image is available")),
    )
    federation = Federation(tmp_path)

    with pytest.raises(RunFailedError, match=r"site_\d: the node failed: RuntimeError: CUDA error"):
        federation.serve(small(rounds=1))

    assert "RuntimeError: CUDA error: no kernel image is available" in federation.log_lines


def test_site_tables_use_common_encoding(tmp_path: Path) -> None:
    wards = {"public": ["A", "B"], "site_1": ["A", "C"], "site_2": ["B"], "site_3": ["1", "2"]}
    for seed, (name, values) in enumerate(wards.items()):
        draws = np.random.default_rng(seed)
        table = pd.DataFrame({"crp": draws.normal(size=80), "ward": draws.choice(values, 80)})
        table.assign(ill=np.where(table.crp > 0, "yes", "no")).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    groups = [{"name": "site", "count": 3, "model": "tabular"}]
    data = {
        "name": "table",
        "path": str(tmp_path / "public.csv"),
        "label": "ill",
        "proxy": {"size": 20},
    }
    source = {**config("fedmd", **SERIAL), "data": data, "clients": {"groups": groups}}
    expected = {
        c: {"name": "table", "path": str(tmp_path / f"{c}.csv"), "label": "ill"}
        for c in wards
        if c != "public"
    }
    sites = {client: {"data": data, "tells": {"model": True}} for client, data in expected.items()}

    deployed = Federation(tmp_path / "sites", sites).serve(source)
    each = [{"match": client, "data": expected[client]} for client in expected]
    simulated = run(changed(source, clients__overrides=each), out=tmp_path / "simulation")

    assert models(deployed) == models(simulated)
    assert deployed.models["site_1"].categories == (("ward", ("A", "B")),)
    del source["data"]["path"]
    with pytest.raises(UserError, match=r"^data\.path: required if clients keep their files"):
        Federation(tmp_path / "others", sites).serve(source)


def test_node_answers_task_with_invalid_round(sites: Sites) -> None:
    sites.gathered().close()
    answer = sites.nodes[0].handle(
        Envelope({"ask": "do", "run": "r", "round": "first", "what": "\x1b[2J"})
    )
    assert answer.head["ask"] == "refused" and "\\x1b[2J: refused" in sites.lines[-1]


def test_run_stopped_by_flower_is_interrupted(tmp_path: Path) -> None:
    # Like Flower's signal handler, a library raises SystemExit while the user's code runs.
    def stopped(record: dict[str, Any]) -> None:
        argparse.ArgumentParser().exit()

    with pytest.raises(SystemExit):
        Federation(tmp_path).serve(small(), callbacks=[stopped])

    assert read_status(tmp_path / "run")["phase"] == "interrupted"


SCORES = {
    "accuracy": 0.75,
    "balanced_accuracy": 0.7,
    "accuracy_std": 0.1,
    "accuracy_worst": 0.6,
    "auroc": None,
    "auroc_undefined": 2,
}


def record(round_idx: int, **more: Any) -> dict[str, Any]:
    return {
        "round": round_idx,
        "failed": {},
        "up_bytes": 1000,
        "down_bytes": 2000,
        "personal": SCORES,
        "global": None,
        "server": None,
        "seconds": {"training": 1.5, "evaluation": 0.5},
        **more,
    }


@pytest.fixture
def status(tmp_path: Path) -> RunStatus:
    result = RunStatus(tmp_path, ["north", "south"])
    result.update(name='a "run"', algorithm="hybrid", rounds=3, run="beef", phase="running")
    return result


def test_status_summarizes_records_and_events(status: RunStatus) -> None:
    present = ["north"]
    status.present = lambda: present
    status.report("north connected")
    status.add_record(
        record(1, failed={"south": "its node is not connected"}, privacy={"epsilon": 1.25})
    )
    status.add_record(record(1))  # after a resume: the record of a repeated round
    tree = status.to_dict()
    assert tree["nodes"]["north"]["here"] and tree["nodes"]["south"] == {
        "here": False,
        "since": None,
    }
    assert (tree["round"], tree["up_bytes"], tree["down_bytes"], tree["failures"]) == (
        1,
        1000,
        2000,
        1,
    )
    assert (tree["seconds"], tree["epsilon"], tree["personal"]) == (
        2.0,
        1.25,
        {"accuracy": 0.75, "balanced_accuracy": 0.7, "auroc": None},
    )
    assert [event["message"] for event in tree["events"]] == ["north connected"]
    status.add_record(record(2, failed={"north": "diverged", "south": "its node is not connected"}))
    assert status.to_dict()["failures"] == 3
    present.clear()
    absent = status.to_dict()["nodes"]["north"]
    assert not absent["here"] and absent["since"] >= tree["nodes"]["north"]["since"]


def test_status_file_exists_once_run_has_started(status: RunStatus, tmp_path: Path) -> None:
    status.report("someone came")
    assert not (tmp_path / STATUS_FILE).exists()
    (tmp_path / "config.yaml").write_text("name: run\n")
    status.add_record(record(1))
    assert read_status(tmp_path)["round"] == 1 and read_status(tmp_path)["phase"] == "running"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    status.update(pid=ended.pid)
    assert read_status(tmp_path)["phase"] == "gone"
    status.update(phase="done")
    assert read_status(tmp_path)["phase"] == "done"
    status.update(phase="running", host="elsewhere")  # a shared folder: nobody here can say
    assert read_status(tmp_path)["phase"] == "running"


def test_status_command_prints_summary(
    status: RunStatus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status.present = lambda: ["north"]
    (tmp_path / "config.yaml").touch()
    status.report("refused a node for client 'south': torch: expected version '2', got '1'")
    status.add_record(record(2, failed={"south": "gone"}))
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for words in (
        'a "run", hybrid: running, round 2 of 3',
        "local test: balanced accuracy 70.0%",
        "1 upload requested but not used",
        "torch: expected version '2'",
    ):
        assert words in out
    assert re.search(r"north +connected for", out) and re.search(r"south +not connected yet", out)
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["round"] == 2
    for mistake, line in (
        (str(tmp_path / "nowhere"), "folder not found"),
        (str(tmp_path.parent), "status.json not found"),
    ):
        assert main(["status", mistake]) == 2
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1
    (tmp_path / STATUS_FILE).write_text("{}")
    assert main(["status", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_json_log_lines_name_their_subject() -> None:
    stream = io.StringIO()
    log = EventLog("json", stream, client="north", run=None)
    log("round 1:\n done", round=1, seconds=0.5)
    (first,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {"message": "round 1: done", "client": "north", "round": 1, "seconds": 0.5}


def test_print_status_escapes_markup(status: RunStatus) -> None:
    """Lines quote nodes, so markup and terminal escapes must have no effect."""
    shown = io.StringIO()
    tree = {**status.to_dict(), "events": [{"time": 0.0, "message": "refused: [/red]\x1b[2J"}]}

    print_status(tree, Console(file=shown, force_terminal=True, width=200))

    assert "refused: [/red]\\x1b[2J" in shown.getvalue()


def test_log_line_is_printable_and_bounded() -> None:
    for line_format in ("text", "json"):
        stream = io.StringIO()
        EventLog(line_format, stream)("a\x1b[2J\ud800\n" + "b" * 10**6)
        assert (
            "a\\x1b[2J\\ud800" in stream.getvalue().replace("\\\\", "\\")
            and len(stream.getvalue()) < 2200
        )
