"""Extending a finished run gives the same bits as a run with more rounds from the start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_fl import Run
from hetero_fl.cli import main
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core import participant
from hetero_fl.core.participant import RoundContext, scheduled_optimizer
from hetero_fl.experiment import run
from hetero_fl.federation.store import Checkpoints
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import Interrupted, RunFailedError
from tests.support import asynchronous_runs
from tests.support.deployments import Federation, small
from tests.support.federations import MIXED, TOP, config
from tests.support.workers import figures, models

SHORT, LONG = 4, 7
CASES: dict[str, dict[str, Any]] = {
    "fedavg": config("fedavg", "linear", 2),
    "fedavg, evaluated at times": config("fedavg", "linear", 2, evaluation__every=3, channel=TOP),
    "hybrid": config(
        "hybrid", MIXED, 4, clients__per_round=3, algorithm__heads="keep", evaluation__every=3
    ),
    "fedasync": config(
        "fedasync",
        "mlp",
        4,
        clients__per_round=2,
        devices=asynchronous_runs.SLOW,
        faults=asynchronous_runs.FAULTS,
    ),
    "fedbuff, evaluated at times": config(
        "fedbuff",
        "mlp",
        4,
        clients__per_round=2,
        devices=asynchronous_runs.SLOW,
        evaluation__every=3,
        algorithm__buffer=3,
    ),
}


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def planned(source: dict[str, Any], rounds: int, **changes: Any) -> dict[str, Any]:
    return {**source, "rounds": rounds, **changes}


def results(path: Path) -> dict[str, Any]:
    """Return the results of a run except seconds and notes, which mention the extension."""
    summary = json.loads((path / "summary.json").read_text())
    details = json.loads((path / "details.json").read_text())
    del summary["seconds"], details["notes"]
    config_of = RunDirectory(path).config()
    return {
        "models": models(path),
        "figures": figures(path),
        "summary": summary,
        "details": details,
        "config": config_of,
        "checkpoints": sorted(p.name for p in (path / "checkpoint").iterdir()),
    }


@pytest.fixture(scope="module")
def prepared_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with the short and the long run of every case."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    for name, source in CASES.items():
        for rounds in (SHORT, LONG):
            run(planned(source, rounds), out=folder / name / str(rounds))
    yield folder


@pytest.fixture
def short(prepared_runs: Path, tmp_path: Path) -> Path:
    """Return a finished run of four rounds that evaluated the final round."""
    return Path(
        shutil.copytree(prepared_runs / "fedavg, evaluated at times" / str(SHORT), tmp_path / "a")
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_extended_run_equals_a_longer_run(case: str, prepared_runs: Path, tmp_path: Path) -> None:
    extended = Path(shutil.copytree(prepared_runs / case / str(SHORT), tmp_path / "a"))

    run(planned(CASES[case], LONG), out=extended, resume=True)

    assert results(extended) == results(prepared_runs / case / str(LONG))
    assert main(["check", str(extended)]) == 0


@pytest.mark.slow
def test_extending_twice_equals_extending_once(short: Path, prepared_runs: Path) -> None:
    source = CASES["fedavg, evaluated at times"]

    for rounds in (SHORT + 1, LONG):
        run(planned(source, rounds), out=short, resume=True)

    assert results(short) == results(prepared_runs / "fedavg, evaluated at times" / str(LONG))
    notes = json.loads((short / "details.json").read_text())["notes"]
    assert [note.partition(";")[0] for note in notes if "extended" in note] == [
        "extended from 4 to 5 rounds after round 3",
        "extended from 5 to 7 rounds after round 4",
    ]


@pytest.mark.slow
def test_unfinished_run_can_be_extended(prepared_runs: Path, tmp_path: Path) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(planned(CASES["fedavg"], SHORT), out=tmp_path / "a", callbacks=[stop])

    run(planned(CASES["fedavg"], LONG), out=tmp_path / "a", resume=True)

    assert results(tmp_path / "a") == results(prepared_runs / "fedavg" / str(LONG))


class ProcessKilled(BaseException):
    """Raised in place of the end of the process."""


POINTS = {
    "reopen": RunDirectory,
    "load_before": Checkpoints,
    "rewind_metrics": RunDirectory,
    "write_config": RunDirectory,
    "append_metrics": RunDirectory,
    "save": Checkpoints,
    "finish": RunDirectory,
}


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "again"), [("before", ["rounds=7"]), ("after", [])])
@pytest.mark.parametrize("point", POINTS)
def test_killed_extension_can_be_resumed(
    point: str,
    moment: str,
    again: list[str],
    short: Path,
    prepared_runs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = getattr(POINTS[point], point)

    def kill(*given: Any) -> Any:
        if moment == "after":
            plain(*given)
        raise ProcessKilled

    with monkeypatch.context() as patched:
        patched.setattr(POINTS[point], point, kill)
        with pytest.raises(ProcessKilled):
            run(short / "config.yaml", overrides=["rounds=7"], out=short, resume=True)
    started = RunDirectory(short).config()["rounds"]

    assert main(["train", "--resume", "--out", str(short), *again]) == 0

    expected = LONG if again else started
    assert results(short) == results(prepared_runs / "fedavg, evaluated at times" / str(expected))
    assert main(["check", str(short)]) == 0


@pytest.mark.slow
def test_extension_is_reported_in_log_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = planned(CASES["fedavg"], 2)
    source["output"] = {}
    source["clients"] = {
        **source["clients"],
        "defaults": {"optimizer": {"name": "sgd", "lr": 0.05, "schedule": "cosine"}},
    }
    run(source, out=tmp_path / "a")
    before = (tmp_path / "a" / "report.html").read_text()

    assert main(["train", "--resume", "--out", str(tmp_path / "a"), "rounds=3"]) == 0

    line = "extended from 2 to 3 rounds after round 2; schedules use the new total"
    assert capsys.readouterr().err.count(line) == 1
    assert (tmp_path / "a" / "log.txt").read_text().count(line) == 1
    report = (tmp_path / "a" / "report.html").read_text()
    assert line in report and line not in before
    assert Run(tmp_path / "a").summary["rounds_completed"] == 3
    run({**source, "rounds": 3}, out=tmp_path / "b")
    # the first rounds used the schedule of the shorter run
    assert models(tmp_path / "a") != models(tmp_path / "b")


def test_extended_run_uses_the_new_total(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def note(config: OptimizerConfig, context: RoundContext) -> OptimizerConfig:
        seen.add((context.round_idx, context.num_rounds))
        return scheduled_optimizer(config, context)

    monkeypatch.setattr(participant, "scheduled_optimizer", note)

    run(short / "config.yaml", overrides=["rounds=5"], out=short, resume=True)

    # The first round is that of a dry run, whose result may be cached.
    assert seen - {(0, 5)} == {(3, 5), (4, 5)}


def refusal(path: Path, capsys: pytest.CaptureFixture[str], *changes: str) -> str:
    """Return the line that refuses changes of a run, whose files must stay as they are."""
    before = contents(path)

    assert main(["train", "--resume", "--out", str(path), *changes]) == 2

    assert contents(path) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix(f"error: {path}: ")


def test_resume_refuses_changes_other_than_more_rounds(
    short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    differs = "cannot be resumed: the configuration differs: "
    fewer = "rounds: was 4, is now 3; a resumed run may have more rounds, not fewer"

    assert refusal(short, capsys, "rounds=3") == fewer
    assert refusal(short, capsys, "rounds=7", "seed=3") == f"{differs}seed: was 0, is now 3"
    epochs = refusal(short, capsys, "clients.groups.0.epochs=2")
    assert epochs == f"{differs}clients.groups.0.epochs: was not set, is now 2"
    (short / "models" / "site_1.safetensors").unlink()
    assert "models/site_1.safetensors: missing" in refusal(short, capsys, "rounds=7")


def test_run_on_nodes_cannot_be_extended(tmp_path: Path) -> None:
    path = Federation(tmp_path / "first").serve(small(rounds=1)).path
    shutil.copytree(path, tmp_path / "second" / path.name)

    line = r"site_\d: the node refused the run: .* the configuration"
    with pytest.raises(RunFailedError, match=line):
        Federation(tmp_path / "first").serve(small(rounds=2), resume=True)
    # The hash of the rows is keyed with a secret in the folder of the site.
    with pytest.raises(RunFailedError, match="the site changed its rows or lost its folder"):
        Federation(tmp_path / "second").serve(small(rounds=1), resume=True)


PRIVATE = {"unit": "client", "target_epsilon": 8.0, "clip": 1.0, "delta": 1e-3}
STILL = {"optimizer": {"name": "sgd", "lr": 1e-9}}
ENDED: dict[str, tuple[dict[str, Any], str, str]] = {
    "one-shot": (
        config("dense", "cnn_bn_small", 2, rounds=1),
        "rounds: was 1, is now 40; dense is a one-shot method, whose runs cannot be extended",
        "after 1 round",
    ),
    "private": (
        config("fedavg", "linear", 3, privacy=PRIVATE),
        "rounds: was 2, is now 40; privacy.target_epsilon allows at most 2",
        "after 2 rounds",
    ),
    "patience": (
        config("local", "linear", 2, rounds=30, evaluation__patience=2, clients__defaults=STILL),
        "rounds: was 30, is now 40; evaluation.patience=2 stopped the run after round 3",
        "after 3 of 30 rounds",
    ),
}


@pytest.mark.parametrize("reason", ENDED)
def test_ended_run_cannot_be_extended(
    reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, words, ended = ENDED[reason]
    path = run(source, out=tmp_path / "a", quiet=True).path
    before = contents(path)
    capsys.readouterr()

    assert refusal(path, capsys, "rounds=40") == words
    assert main(["train", "--resume", "--out", str(path)]) == 0
    assert capsys.readouterr().err.startswith(f"{path}: this run has finished, {ended}\n")
    assert contents(path) == before
    if reason == "patience":
        (path / "summary.json").unlink()
        assert main(["train", "--resume", "--out", str(path), "rounds=40"]) == 2


def test_final_evaluation_does_not_stop_an_extension(tmp_path: Path) -> None:
    """Ignore the evaluation of round 3, which a longer run with every=2 does not evaluate."""
    source = config("local", "linear", 2, rounds=3, evaluation={"patience": 1, "every": 2})
    source["clients"]["defaults"] = STILL
    run(source, out=tmp_path / "a")

    run({**source, "rounds": 6}, out=tmp_path / "a", resume=True)

    run({**source, "rounds": 6}, out=tmp_path / "b")
    assert results(tmp_path / "a") == results(tmp_path / "b")
