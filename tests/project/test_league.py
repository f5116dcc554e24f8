"""The league from end to end: tuning, archive, continuation and failures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.league import league
from benchmarks.league.archive import RunArchive
from benchmarks.league.league import main, repeat_row, run_league
from benchmarks.league.results import BenchmarkResults, repetition_table
from hetero_fl.experiment.comparison.jobs import KILLED, Job, run_job
from hetero_fl.utils.errors import RunFailedError, UserError

CONFIG = {
    "data": {"name": "digits", "train_limit": 300, "validation": 0.1},
    "clients": {"count": 2, "defaults": {"model": "linear"}},
    "rounds": 1,
}
PROTOCOL: dict[str, Any] = {
    "seeds": [0, 1],
    "components": {"none": "", "all": "adjusted"},
    "tuning": {
        "seeds": [5],
        "keys": ["clients.defaults.optimizer.lr", "server.optimizer.lr"],
        "learning_rates": [0.001, 0.01, 0.1],
        "wider": [0.0001, 0.001, 0.01, 0.1, 1.0],
    },
    "rows": [
        {"method": "local", "components": "all", "tuned": {"clients.defaults.epochs": [1, 2]}},
        {"method": "fedavg", "components": "all", "settings": ["logit_adjustment=true"]},
    ],
    "primary": {
        "method": "fedavg",
        "against": ["local"],
        "components": "all",
        "metric": "global_last_balanced_accuracy",
        "federations": ["first"],
    },
}
FIRST = {"title": "First", "config": "../config.yaml"}
SECOND = {**FIRST, "title": "Second", "tuned_as": "first", "overrides": ["rounds=2"]}


@pytest.fixture(autouse=True)
def without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the rendering of plots, except in the test of the command."""
    if "slow" not in request.keywords:
        monkeypatch.setattr("hetero_fl.reporting.plots.style.to_png", lambda _figure: b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a benchmark of two federations, the second tuned as the first."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    write(tmp_path / "files", PROTOCOL)
    return tmp_path / "files"


def write(folder: Path, protocol: Any, **federations: Any) -> None:
    folder.mkdir(exist_ok=True)
    contents = {"protocol": protocol, "first": FIRST, "second": SECOND, **federations}
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


class InProcess:
    """Replacement of `run_jobs` that executes the runs in this process and counts them."""

    def __init__(self, edit: Callable[[Job], str | None] = lambda _job: None) -> None:
        self.edit = edit
        self.jobs: list[Job] = []

    def __call__(
        self, source: Any, base: list[str], jobs: Sequence[Job], *_: Any
    ) -> Iterator[tuple[Job, str | None]]:
        for job in jobs:
            error = self.edit(job)
            if error is None:
                run_job(source, [*base, *job.overrides], job.out)
            self.jobs.append(job)
            yield job, error


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """Execute the runs of benchmarks in this process."""
    replacement = InProcess()
    monkeypatch.setattr(league, "run_jobs", replacement)
    return replacement


def start(folder: Path, *names: str) -> Path:
    archive = folder.parent / "archive"
    out = folder.parent / "out"
    run_league(folder, names, out=out, archive=archive, jobs=1, quiet=True)
    return archive


def test_runs_are_tuned_archived_and_not_repeated(folder: Path, runs: InProcess) -> None:
    archive = start(folder)
    num_runs = len(runs.jobs)
    tuning = RunArchive(archive / "first_tuning.csv").rows
    assert num_runs == len(tuning) + 2 * 2 + 2 * 2
    assert {row["seed"] for row in tuning.values()} == {"5"}
    assert not (archive / "second_tuning.csv").exists()
    for name in ("first", "second"):
        rows = list(RunArchive(archive / f"{name}.csv").rows.values())
        assert [(row["method"], row["seed"]) for row in rows] == [
            ("local", "0"),
            ("fedavg", "0"),
            ("local", "1"),
            ("fedavg", "1"),
        ]
        for row in rows:
            chosen = row["settings"].split(":")
            scores = {
                trial["settings"]: float(trial["validation_score"])
                for trial in tuning.values()
                if trial["method"] == row["method"]
            }
            assert ":".join(chosen) in scores, "the settings of a run were tried"
            assert row["commit"] and len(row["config_hash"]) == 12
            assert row["torch"] == torch.__version__ and row["processor"]
            assert float(row["client_operations"]) > 0 and row["server_operations"] == "0"
            assert (float(row["up_bytes"]) > 0) == (row["method"] == "fedavg")
            assert 0 <= float(row["personal_last_accuracy_worst"]) <= 1
    assert not any((folder.parent / "out" / "first").iterdir()), "run directories are deleted"
    page = (archive / "results.md").read_text(encoding="utf-8")
    assert "FedAvg + adjusted" in page and (archive / "bytes.png").exists()

    start(folder)
    assert len(runs.jobs) == num_runs, "nothing is repeated"


def repeat(folder: Path, federation: str, row: str, **options: Any) -> Any:
    places = {"archive": folder.parent / "archive", "out": folder.parent / "out"}
    return repeat_row(federation, row, folder, **places, **options, jobs=1, quiet=True)


def test_a_row_can_be_repeated_with_its_tuned_settings(folder: Path, runs: InProcess) -> None:
    archive = RunArchive(start(folder, "second") / "second.csv")
    runs.jobs.clear()

    scores = repeat(folder, "second", "local/all")

    assert [job.seed for job in runs.jobs] == [0, 1]
    for values in scores.values():
        assert list(values) == [0, 1]
        for archived, repeated in values.values():
            assert repeated == pytest.approx(archived, abs=1e-6)
    settings = {found["settings"] for key, found in archive.rows.items() if key[0] == "local"}
    assert {":".join(job.point) for job in runs.jobs} == settings
    repeat(folder, "second", "local/all")
    assert len(runs.jobs) == 4, "finished runs are given to run_jobs again, which skips them"
    longer = repeat(folder, "second", "local/all", overrides=["clients.defaults.epochs=7"])
    assert {job.point[-1] for job in runs.jobs[4:]} == {"clients.defaults.epochs=7"}
    losses = longer["global_last_loss"].values()
    assert all(new != pytest.approx(archived) for archived, new in losses)

    changed = {seed: (archived + 0.02, new) for seed, (archived, new) in values.items()}
    changed[0] = changed[0][0] + 0.02, changed[0][1]
    assert "| 3.0 | 4.0 |" in " ".join(
        repetition_table({"global_last_balanced_accuracy": changed}).split()
    )


def test_results_of_another_benchmark_do_not_overwrite_the_published_archive(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["league", "--folder", str(folder), "--tables"])

    with pytest.raises(SystemExit):
        main()

    assert "requires --archive, a folder for its results" in capsys.readouterr().err


def test_rows_without_archived_runs_cannot_be_repeated(folder: Path, runs: InProcess) -> None:
    start(folder, "first")
    runs.jobs.clear()
    for federation, row, options, message in (
        ("frst", "local/all", {}, r"unknown federation 'frst'; did you mean 'first'"),
        ("first", "local/al", {}, r"first: unknown row 'local/al'.*local/all"),
        (
            "first",
            "local/all",
            {"seeds": [7]},
            r"first: local/all: .*archive has no run with seed 7",
        ),
        ("second", "fedavg/all", {}, r"second: fedavg/all: .*archive has no run with seed 0"),
    ):
        with pytest.raises(UserError, match=message):
            repeat(folder, federation, row, **options)
    assert not runs.jobs
    runs.edit = lambda job: "out of memory" if job.seed else None
    with pytest.raises(RunFailedError, match=r"1 run failed\nlocal.* seed 1: out of memory"):
        repeat(folder, "first", "local/all")


def test_a_missing_run_and_runs_of_a_changed_configuration_are_repeated(
    folder: Path, runs: InProcess
) -> None:
    archive = start(folder, "first")
    num_runs = len(runs.jobs)
    rows = RunArchive(archive / "first.csv")
    removed = list(rows.rows)[2]
    before = dict(rows.rows)
    rows.arrange([key for key in rows.rows if key != removed])

    start(folder, "first")

    (job,) = runs.jobs[num_runs:]
    assert (job.variant.label, job.seed) == ("local", 1)
    after = RunArchive(archive / "first.csv").rows
    assert list(after) == list(before)
    assert {**after[removed], "seconds_total": 0} == {**before[removed], "seconds_total": 0}

    write(folder, {**PROTOCOL, "overrides": ["clients.defaults.batch_size=16"]})
    start(folder, "first")
    # Tuning and reported runs, up to the widened grids.
    assert len(runs.jobs) >= 2 * num_runs - 1
    hashes = {row["config_hash"] for row in RunArchive(archive / "first.csv").rows.values()}
    assert len(hashes) == 2


def test_diverged_trials_are_archived_without_a_score(folder: Path, runs: InProcess) -> None:
    runs.edit = lambda job: "not finite" if "server.optimizer.lr=0.1" in job.point else None
    archive = start(folder, "first")
    trials = RunArchive(archive / "first_tuning.csv").rows.values()
    empty = [row for row in trials if not row["validation_score"]]
    assert empty and all("lr=0.1" in row["settings"] for row in empty)
    rows = RunArchive(archive / "first.csv").rows
    assert all("lr=0.1" not in key[2] for key in rows), "diverged settings are not chosen"


def test_killed_trials_and_failed_runs_are_not_archived(folder: Path, runs: InProcess) -> None:
    archive = folder.parent / "archive"
    runs.edit = lambda _job: KILLED
    with pytest.raises(RunFailedError, match="its process was killed"):
        start(folder, "first")
    assert not RunArchive(archive / "first_tuning.csv").rows

    failing = ("local", 1)
    runs.edit = lambda job: "no space\nleft" if (job.variant.label, job.seed) == failing else None
    words = r"1 run failed\nfirst: local .* seed 1: no space left"
    with pytest.raises(RunFailedError, match=words):
        start(folder, "first")
    assert len(RunArchive(archive / "first.csv").rows) == 3


def test_an_interrupted_benchmark_continues(folder: Path, runs: InProcess) -> None:
    def interrupt(job: Job) -> None:
        if runs.jobs:
            raise KeyboardInterrupt

    runs.edit = interrupt
    with pytest.raises(KeyboardInterrupt):
        start(folder, "first")
    (first,) = runs.jobs

    runs.edit = lambda _job: None
    archive = start(folder, "first")

    assert first not in runs.jobs[1:]
    assert len(RunArchive(archive / "first.csv").rows) == 4


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"method": "fedavgg"}, "first: fedavgg/all: .*did you mean 'fedavg'"),
    (
        {"method": "fedavg", "tuned": {"server_lr": [-1]}},
        "first: fedavg/all: .*server_lr: must be > 0, got -1",
    ),
    (
        {"method": "fedavg", "settings": ["server_lrr=1"]},
        "first: fedavg/all: .*server_lrr.*did you mean 'server_lr'",
    ),
]


def test_invalid_rows_are_named_before_any_run(folder: Path, runs: InProcess) -> None:
    local = {"method": "local", "components": "all"}
    for row, words in INVALID:
        primary = {**PROTOCOL["primary"], "method": row["method"]}
        rows = [local, {**row, "components": "all"}]
        write(folder, {**PROTOCOL, "rows": rows, "primary": primary})
        with pytest.raises(UserError, match=words) as caught:
            start(folder, "first")
        assert "\n" not in str(caught.value)
    assert not runs.jobs
    third = {**SECOND, "title": "Third", "tuned_as": "second"}
    write(folder, PROTOCOL, second={**FIRST, "rows": ["fedavg"]}, third=third)
    with pytest.raises(UserError, match="third: local/all has no tuned settings"):
        start(folder, "third")


def test_settings_can_be_tuned_again_in_a_variant(folder: Path, runs: InProcess) -> None:
    second = {**SECOND, "retuned": {"local/all": {"clients.defaults.epochs": [3, 4]}}}
    write(folder, PROTOCOL, second=second)
    archive = start(folder, "second")

    trials = list(RunArchive(archive / "second_tuning.csv").rows.values())
    assert {(trial["method"], trial["seed"]) for trial in trials} == {("local", "5")}
    (base,) = {
        row["settings"]
        for row in RunArchive(archive / "first.csv").rows.values()
        if row["method"] == "local"
    }
    rate = base.rpartition(":")[0]
    assert [trial["settings"] for trial in trials] == [
        f"{rate}:clients.defaults.epochs={epochs}" for epochs in (3, 4)
    ]
    best = max(trials, key=lambda trial: float(trial["validation_score"]))
    rows = RunArchive(archive / "second.csv").rows
    assert {key[2] for key in rows if key[0] == "local"} == {best["settings"]}
    tuned = BenchmarkResults(folder, archive).choices("second")["local", "all"].tuned
    assert [key.key for key in tuned] == ["clients.defaults.epochs"]


@pytest.mark.slow
def test_command_in_worker_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> None:
        places = ["--folder", "files", "--archive", "docs", "--out", "runs", "--jobs", "2"]
        monkeypatch.setattr(sys, "argv", ["league", *arguments, *places])
        main()

    monkeypatch.chdir(folder.parent)
    command("first")
    assert capsys.readouterr().out.strip() == "docs/results.md"
    assert len(RunArchive(Path("docs/first.csv")).rows) == 4
    page = Path("docs/results.md").read_text(encoding="utf-8")
    assert page == BenchmarkResults("files", "docs").page()
    Path("docs/results.md").unlink()
    command("--tables")
    assert Path("docs/results.md").read_text(encoding="utf-8") == page
    command("first", "--repeat", "local/all", "--seeds", "1")
    assert "| Metric " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown federation 'frist'; did you mean 'first'"):
        command("frist")
