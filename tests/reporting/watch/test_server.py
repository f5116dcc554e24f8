"""The page and its data, read over HTTP."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

import pytest

from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.watch.content import WatchedRuns, find_runs
from hetero_fl.reporting.watch.live_run import LiveRun
from hetero_fl.reporting.watch.server import serve_watch
from hetero_fl.utils.errors import UserError
from tests.support.run_directories import Case, write_run


def fetch(address: str, **query: str) -> Any:
    with urlopen(f"{address}?{urlencode(query)}", timeout=10) as answer:
        return json.loads(answer.read())


def test_runs_of_several_folders_are_listed(three_runs: list[Path]) -> None:
    with serve_watch(three_runs) as address:
        content = fetch(f"{address}runs.json", test="global", metric="accuracy")

    fedavg, hybrid, live = content["runs"]
    records = RunDirectory(Path(fedavg["folder"])).metrics()
    assert [run["label"] for run in content["runs"]] == ["fedavg-seed0", "hybrid-seed0", "live"]
    assert [run["state"] for run in content["runs"]] == ["finished", "finished", "running"]
    assert (live["completed"], live["rounds"]) == (5, 8)
    assert (hybrid["algorithm"], live["algorithm"]) == ("Hybrid", "FedMD")
    assert [row[0] for row in fedavg["scores"]] == [1, 2, 3, 4, 5, 6]
    assert [row[3] for row in fedavg["scores"]] == [r["global"]["accuracy"] for r in records]
    assert [row[5] for row in fedavg["scores"]] == [r["global"]["accuracy_worst"] for r in records]
    assert fedavg["up"] == sum(r["up_bytes"] for r in records)
    assert fedavg["down"] == sum(r["down_bytes"] for r in records)
    best = max(records, key=lambda r: r["validation"]["global"]["accuracy"])
    assert fedavg["best"] == {
        "round": best["round"],
        "score": best["global"]["accuracy"],
    }
    assert (fedavg["epsilon"], live["epsilon"]) == (None, 1.5)
    assert content["is_percentage"] is True
    assert {"name": "auroc", "title": "AUROC"} in content["metrics"]["personal"]


def test_smaller_losses_are_better(three_runs: list[Path]) -> None:
    runs = WatchedRuns(three_runs)
    content = runs.overview("personal", "loss")
    first = content["runs"][0]
    clients = runs.clients(first["key"], "personal", "loss")["clients"]

    records = RunDirectory(Path(first["folder"])).metrics()
    best = min(records, key=lambda r: r["validation"]["personal"]["loss"])
    assert first["best"]["score"] == best["personal"]["loss"]
    assert [c["last"] for c in clients] == sorted((c["last"] for c in clients), reverse=True)
    assert first["worst_client"] == {"id": clients[0]["id"], "last": clients[0]["last"]}
    assert content["is_percentage"] is False


def test_runs_without_validation_have_no_best_round(
    three_runs: list[Path], live: RunDirectory
) -> None:
    records = live.metrics()
    live.rewind_metrics(0)
    for record in records:
        live.append_metrics(record | {"validation": None})

    run = WatchedRuns(three_runs).overview("global", "accuracy")["runs"][2]

    assert run["last"] == records[-1]["global"]["accuracy"]
    assert run["best"] is None


def test_best_round_is_not_that_of_the_best_test_score(
    three_runs: list[Path], live: RunDirectory
) -> None:
    records = live.metrics()
    worst = min(records, key=lambda r: r["global"]["accuracy"])
    live.rewind_metrics(0)
    for record in records:
        accuracy = 0.9 if record["round"] == worst["round"] else 0.5
        validation = record["validation"] | {"global": {"accuracy": accuracy}}
        live.append_metrics(record | {"validation": validation})

    best = WatchedRuns(three_runs).overview("global", "accuracy")["runs"][2]["best"]

    assert (best["round"], best["score"]) == (worst["round"], worst["global"]["accuracy"])


def test_clients_of_a_run_are_listed_worst_first(three_runs: list[Path]) -> None:
    with serve_watch(three_runs) as address:
        key = fetch(f"{address}runs.json")["runs"][1]["key"]
        content = fetch(f"{address}clients.json", run=key, test="personal", metric="accuracy")

    records = RunDirectory(three_runs[0] / "runs" / "hybrid-seed0").metrics()
    last = {name: tests["personal"]["accuracy"] for name, tests in records[-1]["clients"].items()}
    worst = content["clients"][0]
    assert worst["id"] == min(last, key=lambda name: last[name])
    assert {row["id"]: row["last"] for row in content["clients"]} == last
    assert [number for number, _ in worst["points"]] == [1, 2, 3, 4, 5, 6]
    assert worst["first"] == records[0]["clients"][worst["id"]]["personal"]["accuracy"]
    assert worst["model"]


def test_new_rounds_and_new_runs_appear(three_runs: list[Path], live: RunDirectory) -> None:
    runs = WatchedRuns(three_runs)
    assert runs.overview()["runs"][2]["completed"] == 5

    live.append_metrics(live.metrics()[4] | {"round": 6})
    write_run(three_runs[0] / "runs" / "local-seed0", Case(rounds=1))

    content = runs.overview()
    assert [(run["label"], run["completed"]) for run in content["runs"]] == [
        ("fedavg-seed0", 6), ("hybrid-seed0", 6), ("local-seed0", 1), ("live", 6),
    ]  # fmt: skip


def test_most_important_available_metric_is_chosen(three_runs: list[Path]) -> None:
    runs = WatchedRuns(three_runs)

    content = runs.overview("server", "mae")

    assert (content["test"], content["metric"]) == ("server", "balanced_accuracy")
    assert runs.overview("nonsense")["test"] == "personal"


def test_regression_has_its_own_metrics(tmp_path: Path) -> None:
    write_run(tmp_path / "a", Case(kind="regression", rounds=2))

    content = WatchedRuns([tmp_path]).overview()

    assert content["metric"] == "mae"
    assert "mean absolute error" in content["metrics"]["global"][0]["title"].lower()


def test_folder_without_runs_is_empty(tmp_path: Path) -> None:
    content = WatchedRuns([tmp_path]).overview()

    assert (content["runs"], content["metrics"], content["metric"]) == ([], {}, "")
    assert WatchedRuns([tmp_path]).clients("unknown")["clients"] == []


def test_runs_of_the_same_name_have_distinct_labels(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_run(tmp_path / folder / "runs" / "seed0", Case(rounds=1))

    separate = WatchedRuns([tmp_path / "a", tmp_path / "b"]).overview()
    together = WatchedRuns([tmp_path]).overview()

    assert [run["label"] for run in separate["runs"]] == ["a/seed0", "b/seed0"]
    assert [run["label"] for run in together["runs"]] == ["a/runs/seed0", "b/runs/seed0"]


def test_run_that_is_given_twice_is_listed_once(three_runs: list[Path]) -> None:
    folder = three_runs[1]

    again = folder.parent / "comparison" / ".." / "live"
    content = WatchedRuns([folder, folder.parent, folder, again]).overview()

    assert [run["label"] for run in content["runs"]].count("live") == 1


def test_values_that_are_not_numbers_are_left_out(
    three_runs: list[Path], live: RunDirectory
) -> None:
    record = live.metrics()[4] | {"round": 6, "global": {"accuracy": "<b>x</b>"}}
    live.append_metrics(record)

    (run,) = WatchedRuns([live.path]).overview("global", "accuracy")["runs"]

    assert run["scores"][-1][3] is None


def test_long_curves_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetero_fl.reporting.watch.content.MAX_POINTS", 10)
    write_run(tmp_path / "a", Case(rounds=95))

    (run,) = WatchedRuns([tmp_path]).overview()["runs"]

    numbers = [row[0] for row in run["curves"]]
    assert len(numbers) <= 11
    assert (numbers[0], numbers[-1]) == (1, 95)
    assert run["completed"] == 95


def test_page_is_self_contained(three_runs: list[Path]) -> None:
    with serve_watch(three_runs) as address, urlopen(address, timeout=10) as answer:
        page = answer.read().decode()
        policy = answer.headers["Content-Security-Policy"]

    assert not re.search(r"(src|href)\s*=|@import|url\(", page)
    assert "innerHTML" not in page
    assert "default-src 'none'" in policy


def test_folder_names_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x>"
    folder.mkdir()

    with serve_watch([folder]) as address, urlopen(address, timeout=10) as answer:
        page = answer.read().decode()

    assert "<img" not in page
    assert "&lt;img src=x&gt;" in page


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_only_loopback_names_are_answered(three_runs: list[Path], host: str, status: int) -> None:
    with serve_watch(three_runs) as address:
        request = Request(f"{address}runs.json", headers={"Host": host})
        try:
            with urlopen(request, timeout=10) as answer:
                found = answer.status
        except HTTPError as error:
            found = error.code

    assert found == status


def test_unknown_page_is_not_found(three_runs: list[Path]) -> None:
    with (
        serve_watch(three_runs) as address,
        pytest.raises(HTTPError, match="404"),
    ):
        urlopen(f"{address}../../etc/passwd", timeout=10)


def test_missing_folder_suggests_a_similar_one(three_runs: list[Path]) -> None:
    with pytest.raises(UserError, match=r"folder not found; did you mean 'comparison'\?"):
        WatchedRuns([three_runs[0].with_name("comparisn")])


def test_folder_of_a_run_that_has_just_started_names_its_parent(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"has just started .*, or watch {tmp_path}$"):
        WatchedRuns([tmp_path / "three"])
    with pytest.raises(UserError, match=r"try again$"):
        WatchedRuns([tmp_path / "w" / "three"])


def test_port_in_use_is_reported(three_runs: list[Path]) -> None:
    with serve_watch(three_runs) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        with (
            pytest.raises(UserError, match=rf"^port: {port} is not available at 127.0.0.1"),
            serve_watch(three_runs, port=port),
        ):
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_prints_the_address_and_ends_with_a_signal(
    three_runs: list[Path], number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "hetero_fl", "watch", "--port", "0", *map(str, three_runs)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        content = fetch(f"{address}runs.json")
        # The process waits for signals after the line has been printed.
        time.sleep(0.5)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)

    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    assert len(content["runs"]) == 3
    assert errors.splitlines() == ["press Ctrl-C to stop", "stopped"]
    assert process.returncode == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"clients": {"a": {"global": 5}}},
        {"clients": {"a": 5}},
        {"global": [1]},
        {"global": {"accuracy": 10**400}},
        {"up_bytes": "many"},
        {"failed": [["a"]]},
    ],
)
def test_damaged_record_does_not_hide_other_runs(
    three_runs: list[Path], live: RunDirectory, changes: dict[str, Any]
) -> None:
    record = live.metrics()[4] | changes
    live.rewind_metrics(4)
    live.append_metrics(record)

    watched = WatchedRuns(three_runs)
    content = watched.overview("global", "accuracy")
    clients = watched.clients(content["runs"][2]["key"], "global", "accuracy")

    assert [run["completed"] for run in content["runs"]][:2] == [6, 6]
    assert clients["clients"]


def test_run_that_cannot_be_shown_has_a_problem(
    three_runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: LiveRun, *arguments: object, **options: object) -> None:
        if run.rounds and run.path.name == "live":
            raise KeyError("a")

    monkeypatch.setattr("hetero_fl.reporting.watch.content._worst_client", fail)

    content = WatchedRuns(three_runs).overview()

    assert [bool(run["problem"]) for run in content["runs"]] == [False, False, True]
    assert "metrics.jsonl: cannot be shown" in content["runs"][2]["problem"]


def test_links_to_a_parent_are_not_followed(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run", Case(rounds=1))
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self").symlink_to(tmp_path / "self")

    assert [path.name for path in find_runs(tmp_path)] == ["run"]
    assert list(find_runs(tmp_path / "self")) == []


def test_invalid_address_has_status_400(three_runs: list[Path]) -> None:
    with serve_watch(three_runs) as address:
        port = urlsplit(address).port
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.putrequest("GET", "http://[", skip_host=True)
        connection.putheader("Host", f"127.0.0.1:{port}")
        connection.endheaders()

        assert connection.getresponse().status == 400
        connection.close()
