"""Monitoring of a federated run: the status file, the metrics port, the command and the logs."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from hetero_fl.cli import main
from hetero_fl.cli.deployment_commands import print_status
from hetero_fl.deployment.monitoring import (
    STATUS_FILE,
    EventLog,
    LineStream,
    RunStatus,
    fetch_status,
    read_status,
    serve_status,
)
from hetero_fl.deployment.server import _RunLog
from hetero_fl.utils.errors import UserError

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
