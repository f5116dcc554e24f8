"""A run directory has the documented files, which are read, kept and continued as documented."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.reporting.comparison.result import Comparison
from hetero_fl.reporting.run_directory import RunDirectory, lock_folder
from hetero_fl.utils.errors import Interrupted, UserError
from tests.support.federations import MIXED, config, stop_after

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "run_directory.md"
LOGGERS = {"metrics.csv", "tensorboard/", "wandb/", "loggers.json"}
SERVER = {"model": {"name": "mlp", "hidden": [8]}}
# Messages are compressed, and the time of runs is simulated.
FEATURES = {
    "channel": {"compress": [{"topk": 0.2}], "compress_down": [{"quantize": 8}]},
    "devices": {"speed": {"median": 1e6, "sigma": 0.9}, "up": 1e5, "down": 1e6},
}
SOURCES: dict[str, dict[str, Any]] = {
    "simulated": config(
        "hybrid",
        MIXED,
        4,
        rounds=3,
        clients__per_round=3,
        server=SERVER,
        cohort={"sampling": "available"},
        **FEATURES,
    ),
    "asynchronous": config("fedbuff", "mlp", 3, rounds=3, clients__per_round=2, **FEATURES),
}
# These runs have no loggers, plots and report.
NOT_WRITTEN = {*LOGGERS, "plots/*.png", "report.html"}


def documented(heading: str) -> set[str]:
    """Return the names in the first column of a table of the documentation."""
    section = DOCUMENT.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def names_of(file: str, names: set[str]) -> set[str]:
    """Return the documented names of a file, of which the last may be a pattern."""
    folders = {name for name in names if name.endswith("/") and file.startswith(name)}
    return folders | {name for name in names if PurePosixPath(file).match(name)}


def check_files(folder: Path, names: set[str], not_written: set[str]) -> None:
    """Check that a folder has all documented files, except some, and no others."""
    found = {file: names_of(file, names) for file in contents(folder)}
    assert [file for file, of_file in found.items() if not of_file] == []
    assert names - set().union(*found.values()) == not_written


def results(path: Path) -> dict[str, Any]:
    """Return all results of a run, without seconds and notes, which mention extensions."""
    models = {name: data for name, data in contents(path).items() if name.startswith("models/")}
    directory = RunDirectory(path)
    summary = {key: value for key, value in directory.summary().items() if key != "seconds"}
    records = [
        {key: value for key, value in record.items() if key not in ("seconds", "wall")}
        for record in directory.metrics()
    ]
    return {
        "config": directory.config(),
        "details": {**directory.details(), "notes": []},
        "models": models,
        "records": records,
        "summary": summary,
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    return {
        kind: hetero_fl.run(source, out=folder / kind, quiet=True).path
        for kind, source in SOURCES.items()
    }


@pytest.mark.parametrize("kind", SOURCES)
def test_run_has_the_documented_files_and_keys(kind: str, finished: dict[str, Path]) -> None:
    path = finished[kind]
    summary = RunDirectory(path).summary()
    records = RunDirectory(path).metrics()

    check_files(path, documented("Files"), NOT_WRITTEN)
    keys = documented("`summary.json`")
    optional = {"attacks", "simulated", "wall", "baselines"}
    assert keys - optional <= summary.keys() <= keys
    assert all(
        {"cohort", "failed", "train_loss", "seconds", "personal", "validation"}
        <= record.keys()
        <= documented("A line of `metrics.jsonl`")
        for record in records
    )
    sent = [sum(record[key] for record in records) for key in ("up_bytes", "down_bytes")]
    assert [*summary["communication"].values()] == sent and min(sent) > 0
    assert "NaN" not in (path / "summary.json").read_text()
    rounds = {f"{number:06}" for number in (2, 3)}
    for test in ("personal", "global", "server"):
        best = summary[test]["best_by_validation"]
        rounds.add(f"{best['round']:06}")
        metrics = {"accuracy", "balanced_accuracy", "macro_f1", "auroc", "average_precision"}
        assert {*metrics, "loss"} <= best.keys() & summary[test]["last"].keys()
    assert {"accuracy_std", "accuracy_worst"} <= summary["global"]["last"].keys()
    columns = {"id", "model", "parameters", "n_train", "personal", "global"}
    assert all(client.keys() == columns for client in summary["clients"])
    # Former best rounds are kept, too, because an extended run may repeat the last round.
    assert rounds <= {file.stem[-6:] for file in (path / "checkpoint").iterdir()}


@pytest.mark.parametrize("kind", SOURCES)
def test_files_are_read_by_the_public_functions(
    kind: str, finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished[kind]
    before = contents(path)

    run = hetero_fl.Run.load(path)
    names = {*(client["id"] for client in run.summary["clients"]), "server"}
    images = torch.rand(2, 1, 8, 8)
    predicted = [
        each.predict("site_1", images) for each in (run, run.best("personal"), run.best("global"))
    ]

    assert set(run.models) == set(run.best("global").models) == names
    assert all(probabilities.shape == (2, 10) for probabilities in predicted)
    assert [record["round"] for record in run.metrics] == [1, 2, 3]
    assert run.directory.environment()["run_directory_version"] == 1
    assert hetero_fl.load_config(path / "config.yaml").rounds == 3
    assert run.directory.details()["clients"].keys() == names - {"server"}
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().err == ""
    assert contents(path) == before


@pytest.mark.parametrize("kind", SOURCES)
def test_resumed_run_has_the_same_bits(
    kind: str, finished: dict[str, Path], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    expected = results(finished[kind])

    for stop in (1, 2, 3):
        out = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            hetero_fl.run(SOURCES[kind], out=out, callbacks=[stop_after(stop)], quiet=True)
        assert not (out / "summary.json").exists() and not list(out.glob("models/best_*"))

        hetero_fl.run(SOURCES[kind], out=out, resume=True, quiet=True)

        with subtests.test(stop=stop):
            assert results(out) == expected
            check_files(out, documented("Files"), NOT_WRITTEN)
    shutil.rmtree(out / "models")
    (out / "summary.json").unlink()
    hetero_fl.run(SOURCES[kind], out=out, resume=True, quiet=True)
    assert results(out) == expected


def test_extended_run_equals_a_longer_run(tmp_path: Path) -> None:
    source = {**SOURCES["simulated"], "evaluation": {"every": 3}}

    for name, rounds in (("long", 3), ("extended", 2), ("extended", 3)):
        hetero_fl.run({**source, "rounds": rounds}, out=tmp_path / name, resume=True, quiet=True)

    assert results(tmp_path / "extended") == results(tmp_path / "long")


def test_missing_plots_and_report_are_written_on_resume(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(finished["simulated"], tmp_path / "run"))
    (path / "summary.json").unlink()

    hetero_fl.run({**SOURCES["simulated"], "output": {}}, out=path, resume=True, quiet=True)

    check_files(path, documented("Files"), LOGGERS)
    assert {"curves", "clients", "labels"} < {plot.stem for plot in (path / "plots").iterdir()}


def test_files_of_a_user_and_of_a_run_are_not_overwritten(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    source = SOURCES["asynchronous"]
    run = Path(shutil.copytree(finished["asynchronous"], tmp_path / "run"))
    (run / "notes.txt").write_text("mine")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.yaml").write_text("mine")
    before = contents(tmp_path)

    for out in (run, tmp_path / "own", run / "notes.txt"):
        with pytest.raises(UserError, match="already exists"):
            hetero_fl.run(source, out=out, quiet=True)
    for out in (tmp_path / "own", run / "notes.txt"):
        with pytest.raises(UserError):
            hetero_fl.run(source, out=out, resume=True, quiet=True)
    for out, resume in ((run, True), (tmp_path / "new", False)):
        words = f"{out.name}: in use by another process; wait for it to end or choose another"
        with lock_folder(out), pytest.raises(UserError, match=words):
            hetero_fl.run(source, out=out, resume=resume, quiet=True)
    with pytest.raises(UserError, match="run is the directory of a run; choose another folder"):
        hetero_fl.compare(source, "local", out=run, jobs=1, quiet=True)
    with pytest.raises(UserError, match="configuration differs: seed: was 0, is now 1"):
        hetero_fl.run({**source, "seed": 1}, out=run, resume=True, quiet=True)
    hetero_fl.run(source, out=run, resume=True, quiet=True)

    after = contents(tmp_path)
    assert after.pop("run/log.txt").startswith(before.pop("run/log.txt"))
    del after["new/.lock"]
    assert after == before


def test_comparison_has_the_documented_files(tmp_path: Path) -> None:
    source = config("local", "linear", 2, rounds=1)
    out = tmp_path / "out"

    made = hetero_fl.compare(source, "local,fedavg", [*range(5)], out=out, jobs=1, quiet=True)

    names = {name.replace(".tex", "comparison.tex") for name in documented("A comparison")}
    check_files(out, {*names, "runs/", "log.txt", ".lock"}, set())
    assert len(Comparison(out).frame) == len(made.runs) == 10
    for run in made.runs:
        not_written = {*NOT_WRITTEN, "models/best_personal/", "models/best_global/"}
        check_files(run.path, documented("Files"), not_written)
    before = contents(out)
    with pytest.raises(UserError, match=r"has other settings \(rounds: was 1, is now 2\); choose"):
        hetero_fl.compare({**source, "rounds": 2}, "local", out=out, jobs=1, quiet=True)
    with lock_folder(out), pytest.raises(UserError, match="out: in use by another process"):
        hetero_fl.compare(source, "local", out=out, jobs=1, quiet=True)
    assert contents(out) == before


def test_comparison_keeps_files_of_a_user(tmp_path: Path) -> None:
    own = tmp_path / "out" / "runs" / "fedavg-seed0" / "mine.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")

    with pytest.raises(UserError, match="fedavg-seed0: already exists; choose another folder"):
        hetero_fl.compare(
            config("local", "linear", 2, rounds=1), "fedavg", out=tmp_path / "out", jobs=1
        )

    assert contents(own.parent) == {"mine.txt": b"mine"}


def test_metrics_are_written_before_callbacks_run(tmp_path: Path) -> None:
    written: list[list[int]] = []

    def read(record: dict[str, Any]) -> None:
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == record
        written.append([json.loads(line)["round"] for line in lines])

    source = config("fedavg", "linear", 2, rounds=3, evaluation={"every": 2})
    run = hetero_fl.run(source, out=tmp_path / "run", callbacks=[read], quiet=True)

    assert written == [[1], [1, 2], [1, 2, 3]]
    # Every second round and the last one.
    assert [record.get("global") is not None for record in run.metrics] == [False, True, True]
