"""Servers and nodes around a run: what sites are sent, how runs end, and how they are monitored."""

from __future__ import annotations

import argparse
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pandas as pd
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from hetero_fl.cli import main
from hetero_fl.cli.deployment_commands import print_status
from hetero_fl.deployment import messages
from hetero_fl.deployment.audit_log import verify
from hetero_fl.deployment.config import DisclosureConfig, SiteConfig
from hetero_fl.deployment.flower.worker import LoggedNode
from hetero_fl.deployment.monitoring import (
    STATUS_FILE,
    EventLog,
    LineStream,
    RunStatus,
    fetch_status,
    read_status,
    serve_status,
)
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.server import _RunLog, _stop_after_round, run_federation
from hetero_fl.deployment.transport import Envelope, Handle
from hetero_fl.experiment import run
from hetero_fl.experiment.configuration import load_config
from hetero_fl.federation.executors.worker import Worker
from hetero_fl.utils.errors import Interrupted, RunFailedError, UserError
from tests.support.deployments import SITES, Federation, small
from tests.support.federations import changed, config
from tests.support.loopback import LoopbackTransport
from tests.support.marked_sites import public_table
from tests.support.nodes import LONG, Clock, EventLines, models

ALL = DisclosureConfig(labels=True, details=True, model=True, errors=True)


SERIAL = {"runtime__executor": "serial"}


class Sites:
    """Nodes `site_1`, `site_2`, ... on their own loopback transport, with the lines they logged."""

    def __init__(self, folder: Path, sites: list[SiteConfig], once: bool = False) -> None:
        self.folder, self.sites, self.once = folder, sites, once
        self.stops: list[threading.Event] = []
        self.lines = EventLines()
        self.refused: list[LoggedNode] = []

    def gathered(
        self, change: Callable[[Envelope], Envelope] = lambda envelope: envelope
    ) -> LoopbackTransport:
        """Connect all nodes to a new server.

        Args:
            change: Changes each answer of the first node.
        """
        loopback = LoopbackTransport()
        for index, site in enumerate(self.sites):
            self.stops.append(threading.Event())
            node = Node(site, self.folder / site.client, self.lines)
            attended = LoggedNode(node, self.lines, self.stops[-1], self.once)  # type: ignore[arg-type]
            self.refused.append(attended)
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
    assert not any(stop.is_set() for stop in sites.stops), "a node waits for the next run"
    line = "the site's file has no data: training on a part of the server's data (digits)"
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
    assert sites.stops[0].wait(LONG) and sites.refused[0].refused == line, (
        "its process ends, and says why"
    )
    assert not sites.stops[1].is_set()
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


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_server_finishes_the_round_on_sigterm(signals: int, sites: Sites, tmp_path: Path) -> None:
    """A second SIGTERM ends it at once, and the round is repeated on resuming.

    Either way, the resumed run ends with the same bits.
    """
    source, out = config(rounds=3, **SERIAL), tmp_path / "out"
    status, log = RunStatus(out, ["site_1", "site_2", "site_3"]), EventLog("json")

    def term(answer: Envelope) -> Envelope:
        if (
            answer.head.get("what") == "upload"
            and status.to_dict()["phase"] == "running"
            and status.to_dict()["round"] == 1
        ):
            signal.raise_signal(signal.SIGTERM)
            while status.to_dict()["phase"] == "running":
                time.sleep(0.01)
            if signals == 2:
                signal.raise_signal(signal.SIGTERM)
        return answer

    with _stop_after_round(status, log) as after_round, pytest.raises(Interrupted):
        loopback = sites.gathered(term)
        run_federation(source, loopback, out=out, wait=LONG, callbacks=[after_round], status=status)
    rounds = [
        json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert rounds == ([1, 2] if signals == 1 else [1])
    assert read_status(out)["phase"] == "interrupted"
    assert "disconnected by the server" not in sites.lines, (
        "nodes wait for a server that was interrupted"
    )
    resumed = run_federation(source, sites.gathered(), out=out, resume=True, wait=LONG)
    assert models(resumed) == models(run(source, out=tmp_path / "simulation"))
    assert read_status(out)["up_bytes"] == sum(record["up_bytes"] for record in resumed.metrics)


def test_node_with_once_ends_after_a_finished_run(sites: Sites, tmp_path: Path) -> None:
    sites.once = True
    interrupt = Mock(side_effect=KeyboardInterrupt)

    with pytest.raises(Interrupted):
        run_federation(
            config(**SERIAL),
            sites.gathered(),
            out=tmp_path / "out",
            wait=LONG,
            callbacks=[interrupt],
        )
    assert not any(stop.is_set() for stop in sites.stops)
    run_federation(config(**SERIAL), sites.gathered(), out=tmp_path / "out", resume=True, wait=LONG)
    assert all(stop.is_set() for stop in sites.stops[3:]) and not any(
        sites.refused[i].refused for i in range(6)
    )


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
    answer = sites.refused[0].handle(
        Envelope({"ask": "do", "run": "r", "round": "first", "what": "\x1b[2J"})
    )
    assert answer.head["ask"] == "unready" and "\\x1b[2J: unready" in sites.lines[-1]


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
    status.set_presence_source(lambda: present)
    status.add_event("north connected")
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


def test_prometheus_output_is_valid(status: RunStatus) -> None:
    status.set_presence_source(lambda: ["north"])
    status.add_record(record(1, privacy={"epsilon": 1.25}))

    text = status.prometheus()

    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {name: family.type for name, family in families.items()} == {
        "hetero_fl_info": "gauge",
        "hetero_fl_rounds": "gauge",
        "hetero_fl_rounds_completed": "gauge",
        "hetero_fl_nodes": "gauge",
        "hetero_fl_bytes": "counter",
        "hetero_fl_failures": "counter",
        "hetero_fl_round_seconds": "gauge",
        "hetero_fl_privacy_epsilon": "gauge",
        "hetero_fl_score": "gauge",
    }
    samples = {
        (sample.name.removeprefix("hetero_fl_"), *sample.labels.items()): sample.value
        for name, family in families.items()
        if name != "hetero_fl_info"
        for sample in family.samples
    }
    assert samples == {
        ("rounds",): 3,
        ("rounds_completed",): 1,
        ("nodes", ("state", "here")): 1,
        ("nodes", ("state", "gone")): 1,
        ("bytes_total", ("direction", "up")): 1000,
        ("bytes_total", ("direction", "down")): 2000,
        ("failures_total",): 0,
        ("round_seconds",): 2,
        ("privacy_epsilon",): 1.25,
        ("score", ("metric", "accuracy"), ("of", "personal")): 0.75,
        ("score", ("metric", "balanced_accuracy"), ("of", "personal")): 0.7,
    }, "an undefined figure is none"
    (about,) = families["hetero_fl_info"].samples
    assert about.value == 1 and set(about.labels) == {
        "run", "name", "algorithm", "phase", "package", "torch", "protocol",
    }  # fmt: skip
    assert (about.labels["name"], about.labels["run"]) == ('a "run"', "beef")


def test_status_file_exists_once_run_has_started(status: RunStatus, tmp_path: Path) -> None:
    status.add_event("someone came")
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


def test_http_endpoints_serve_status(status: RunStatus) -> None:
    with serve_status(status, "127.0.0.1", 0) as port:
        with urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            assert answer.status == 200 and json.loads(answer.read()) == {"phase": "running"}
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.read().decode() == status.prometheus()
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert fetch_status(f"127.0.0.1:{port}")["rounds"] == 3
        status.update(phase="failed")
        for path, code in (("healthz", 503), ("secrets", 404)):
            with pytest.raises(HTTPError) as raised:
                urlopen(f"http://127.0.0.1:{port}/{path}")
            assert raised.value.code == code
            raised.value.close()
        with (
            pytest.raises(UserError, match=rf"metrics.port: {port} is not available at 127.0.0.1"),
            serve_status(status, "127.0.0.1", port),
        ):
            pass
    with socket.socket() as probe:  # it is given back
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_status_command_prints_summary(
    status: RunStatus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status.set_presence_source(lambda: ["north"])
    (tmp_path / "config.yaml").touch()
    status.add_event("refused a node for client 'south': torch: expected version '2', got '1'")
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
    with serve_status(status, "127.0.0.1", 0) as port:
        assert main(["status", f"127.0.0.1:{port}", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["round"] == 2
    for mistake, line in (
        (f"127.0.0.1:{port}", "no answer from a server"),
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
    print("a line of\nsomeone else's", file=LineStream(log))
    first, *others = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {"message": "round 1: done", "client": "north", "round": 1, "seconds": 0.5}
    assert [line["message"] for line in others] == ["a line of", "someone else's"]


def test_json_log_of_a_run_names_the_client_of_an_event(
    status: RunStatus, capsys: pytest.CaptureFixture[str]
) -> None:
    log = _RunLog("json", status)

    log("north: metrics: expected a number", client="north")
    log("another north line")

    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["client"] == "north"
    assert "client" not in second


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
