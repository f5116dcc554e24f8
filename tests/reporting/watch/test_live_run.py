"""Runs in progress are read line by line, with half-written, rewound and damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.watch.live_run import LiveRun

MakeRun = Callable[..., RunDirectory]


def lines_of(directory: RunDirectory) -> list[bytes]:
    return directory.lines()


def write_lines(directory: RunDirectory, lines: list[bytes]) -> None:
    (directory.path / "metrics.jsonl").write_bytes(b"".join(lines))


def read(directory: RunDirectory) -> LiveRun:
    run = LiveRun(directory.path)
    run.refresh()
    return run


def test_totals_and_means_of_a_finished_run(made_run: MakeRun) -> None:
    directory = made_run(rounds=4, every=2, failures=True)
    records = directory.metrics()

    run = read(directory)

    assert run.state == "finished"
    assert run.problem == ""
    assert run.algorithm == "Hybrid"
    assert run.planned == 4
    assert [r.up_bytes for r in run.rounds] == [n * records[0]["up_bytes"] for n in (1, 2, 3, 4)]
    assert run.rounds[3].seconds == pytest.approx(4 * 2.5)
    assert [bool(r.means) for r in run.rounds] == [False, True, False, True]
    assert run.rounds[3].means["global"] == records[3]["global"]
    assert run.rounds[1].failed == ("hospital_2",)
    assert run.models["hospital_3"] == "resnet18"


def test_new_rounds_are_appended(made_run: MakeRun) -> None:
    directory = made_run(rounds=3)
    lines = lines_of(directory)
    write_lines(directory, lines[:1])
    run = read(directory)
    assert len(run.rounds) == 1

    write_lines(directory, lines)
    run.refresh()

    assert [r.number for r in run.rounds] == [1, 2, 3]


def test_half_written_last_line_is_read_when_it_is_complete(made_run: MakeRun) -> None:
    directory = made_run(rounds=3)
    lines = lines_of(directory)
    path = directory.path / "metrics.jsonl"
    path.write_bytes(lines[0] + lines[1][:40])
    run = read(directory)
    assert len(run.rounds) == 1
    assert run.problem == ""

    with open(path, "ab") as file:
        file.write(lines[1][40:])
    run.refresh()

    assert len(run.rounds) == 2


def test_rewound_rounds_of_a_resumed_run_are_replaced(made_run: MakeRun) -> None:
    directory = made_run(rounds=4)
    run = read(directory)
    assert len(run.rounds) == 4
    repeated = json.loads(lines_of(directory)[2]) | {"up_bytes": 7}

    directory.rewind_metrics(2)
    run.refresh()
    assert len(run.rounds) == 2
    directory.append_metrics(repeated)
    run.refresh()

    assert len(run.rounds) == 3
    assert run.rounds[2].up_bytes - run.rounds[1].up_bytes == 7


def test_rewind_between_two_reads_is_detected(made_run: MakeRun) -> None:
    directory = made_run(rounds=4)
    lines = lines_of(directory)
    run = read(directory)
    repeated = json.loads(lines[3]) | {"up_bytes": 7}

    directory.rewind_metrics(3)
    directory.append_metrics(repeated)
    directory.append_metrics(json.loads(lines[3]) | {"round": 5})
    run.refresh()

    assert [r.number for r in run.rounds] == [1, 2, 3, 4, 5]
    assert run.rounds[3].up_bytes - run.rounds[2].up_bytes == 7


def test_run_without_rounds_is_empty(made_run: MakeRun) -> None:
    directory = made_run(rounds=1)
    run = read(directory)
    (directory.path / "metrics.jsonl").unlink()

    run.refresh()

    assert run.rounds == []
    assert run.problem == ""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{]\n", "metrics.jsonl: line 2: not valid JSON"),
        (b"[]\n", "metrics.jsonl: line 2: expected the record of a round"),
        (b'{"round": 2}\n', "metrics.jsonl: line 2: expected the record of a round"),
        (b"\xff\n", "metrics.jsonl: line 2: not valid JSON"),
        (b"[" * 100_000 + b"\n", "metrics.jsonl: line 2: not valid JSON"),
    ],
)
def test_damaged_line_is_a_problem_of_the_run(made_run: MakeRun, line: bytes, problem: str) -> None:
    directory = made_run(rounds=1)
    with open(directory.path / "metrics.jsonl", "ab") as file:
        file.write(line)

    run = read(directory)

    assert len(run.rounds) == 1
    assert run.problem.endswith(problem)


@pytest.mark.parametrize("key", ["up_bytes", "seconds", "train_loss", "failed", "clients"])
def test_record_with_a_wrong_type_is_a_problem(made_run: MakeRun, key: str) -> None:
    directory = made_run(rounds=2)
    record = directory.metrics()[1] | {key: 3 if key != "up_bytes" else "x"}
    write_lines(directory, [lines_of(directory)[0], json.dumps(record).encode() + b"\n"])

    run = read(directory)

    assert run.problem.endswith("line 2: expected the record of a round")


def test_skipped_round_is_a_problem(made_run: MakeRun) -> None:
    directory = made_run(rounds=3)
    lines = lines_of(directory)
    write_lines(directory, [lines[0], lines[2]])

    assert read(directory).problem.endswith("line 2: expected round 2, got round 3")


def test_damaged_configuration_is_a_problem(made_run: MakeRun) -> None:
    directory = made_run(rounds=1)
    directory.write_text("config.yaml", "{")

    run = read(directory)

    assert "config.yaml: not valid YAML" in run.problem
    assert run.algorithm == "?"


def unfinished(directory: RunDirectory, log: str) -> RunDirectory:
    (directory.path / "summary.json").unlink()
    (directory.path / "log.txt").write_text(log, encoding="utf-8")
    return directory


def test_locked_run_is_running(made_run: MakeRun) -> None:
    directory = unfinished(made_run(rounds=1), "")

    with FileLock(directory.path / ".lock"):
        assert read(directory).state == "running"
    assert read(directory).state == "interrupted"


def test_failure_at_the_end_of_the_log_is_shown(made_run: MakeRun) -> None:
    start = "2026-01-01 10:00:00  6 clients, 3 rounds\n"
    log = f"{start}2026-01-01 10:01:00  failed: no <memory>\nTrace\n"

    run = read(unfinished(made_run(rounds=1), log))

    assert (run.state, run.problem) == ("failed", "no <memory>")


def test_failure_before_a_resume_is_not_shown(made_run: MakeRun) -> None:
    log = "2026-01-01 10:01:00  failed: no memory\nTrace\n2026-01-01 10:02:00  resumed\n"

    run = read(unfinished(made_run(rounds=1), log))

    assert (run.state, run.problem) == ("interrupted", "")


def test_key_depends_on_the_path_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys: set[Any] = {LiveRun(Path("a")).key, LiveRun(tmp_path / "a").key}

    assert len(keys) == 1
    assert LiveRun(Path("b")).key not in keys
