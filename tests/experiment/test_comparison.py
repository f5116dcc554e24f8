"""Comparisons: duplicates, grids and their choice by validation, labels."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import Mock

import pytest

from hetero_fl.algorithms import register_algorithm
from hetero_fl.cli import main
from hetero_fl.core.task import Task
from hetero_fl.experiment import compare
from hetero_fl.experiment.comparison import compare as comparison
from hetero_fl.experiment.comparison.jobs import Job, Variant, run_job
from hetero_fl.experiment.comparison.tuning import Grid, best_trial, rate
from hetero_fl.reporting.formatting import algorithm_base, algorithm_name
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.text import split_top_level
from tests.support.cases import each_case
from tests.support.federations import config


def small(**changes: Any) -> dict[str, Any]:
    return config("local", "linear", 2, rounds=1, **changes)


def test_duplicates_run_once(tmp_path: Path, in_process: list[str]) -> None:
    compare(small(), ["local", " local", "local"], [1, 0, 1], out=tmp_path / "out")
    assert in_process == ["local-seed1", "local-seed0"]
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert [row["seed"] for row in rows] == ["1", "0"]


def test_grid_works_without_local_test_rows(tmp_path: Path, in_process: list[str]) -> None:
    grid = {"clients.defaults.optimizer.lr": ["1e-9", "0.05"]}
    compare(small(data__split={"test": 0}), "local", out=tmp_path / "out", grid=grid)
    assert len(in_process) == 2
    chosen = "clients.defaults.optimizer.lr=0.05 (chosen by validation)"
    written = {p.name: p.read_text() for p in (tmp_path / "out").glob("*.*") if p.suffix != ".png"}
    assert chosen in written["comparison.md"] and chosen in written["report.html"]
    assert written["comparison.tex"].count(f"local: {chosen}.") == 2
    (row,) = csv.DictReader(written["comparison.csv"].splitlines())
    assert row["clients.defaults.optimizer.lr"] == "0.05"


def test_grid_rates_only_settings_that_finished_with_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lr = "clients.defaults.optimizer.lr"

    def run_jobs(source: Any, base: Any, jobs: list[Job], *_: Any, **__: Any) -> Any:
        for job in jobs:
            is_better_rate = job.seed == 1 and f"{lr}=0.05" in job.point
            if is_better_rate or (job.variant.label == "fedavg" and job.seed == 0):
                yield job, "diverged"
                continue
            run_job(source, [*base, *job.overrides], job.out)
            yield job, None

    monkeypatch.setattr(comparison, "run_jobs", run_jobs)
    out = tmp_path / "out"

    with pytest.raises(RunFailedError) as caught:
        compare(small(), "local,fedavg", [0, 1], out=out, grid={lr: ["1e-9", "0.05"]})

    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    # The better rate of Local has finished with one of two seeds.
    assert [(row["algorithm"], row["seed"], row[lr]) for row in rows] == [
        ("local", "0", "1e-9"),
        ("local", "1", "1e-9"),
    ]
    text = (out / "comparison.md").read_text()
    assert text.count("failed with a seed") == 3
    reason = "fedavg: no setting of the grid has finished with every seed"
    assert reason in str(caught.value) and reason in (out / "report.html").read_text()


@pytest.mark.slow
def test_report_shows_candidates_with_validation_scores(
    tmp_path: Path, in_process: list[str]
) -> None:
    grid = {"clients.defaults.optimizer.lr": ["1e-9", "0.05"]}
    compare(small(), "local,fedavg", [0, 1], out=tmp_path, grid=grid)
    text, page = (tmp_path / name for name in ("comparison.md", "report.html"))
    section = text.read_text().partition("## Tuning candidates")[2].partition("## Details")[0]

    for name in ("local", "fedavg"):
        scores = []
        for seed in (0, 1):
            folder = f"{name}-clients.defaults.optimizer.lr=0.05-seed{seed}"
            found = Run(tmp_path / "runs" / folder).metrics[-1]["validation"]
            scores += [found[test]["balanced_accuracy"] for test in ("personal", "global")]
        start = f"| {algorithm_name(name)} "
        rows = [row for row in section.splitlines() if row.startswith(start)]
        (line,) = (row for row in rows if "lr=0.05 " in row)
        assert line.split("|")[3].strip() == f"**{100 * fmean(scores):.1f}**"
        assert len(rows) == 2 and "lr=1e-9 " in "".join(rows)
    for value in grid["clients.defaults.optimizer.lr"]:
        cell = f'<td class="text">clients.defaults.optimizer.lr={value}</td>'
        assert cell in page.read_text()
    assert section.count("**") == 4


@pytest.mark.parametrize(
    ("kind", "best"), [("multilabel", 0), ("regression", 0), ("multiclass", 1)]
)
def test_choice_uses_the_metric_of_the_task(kind: Any, best: int, tmp_path: Path) -> None:
    scores = [
        {"auroc": 0.9, "mae": 1.0, "balanced_accuracy": 0.1},
        {"auroc": 0.6, "mae": 3.0, "balanced_accuracy": 0.7},
    ]
    grid = Grid({"lr": ["1", "2"]})
    ratings = {}
    for point, found in zip(grid.points, scores, strict=True):
        job = Job.in_folder(tmp_path, Variant.parse("local"), point, 0)
        job.out.mkdir()
        record = {"round": 1, "seconds": {}, "validation": {"personal": None, "global": found}}
        (job.out / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        (job.out / "summary.json").touch()
        ratings[point] = rate([job], Task(kind, 3), {})

    trial = best_trial(grid.trials(ratings))

    assert trial is not None and trial.point == grid.points[best]


@pytest.mark.slow
def test_lists_are_not_split_within_brackets(tmp_path: Path, in_process: list[str]) -> None:
    labels = (
        "local,fedmd:sharpen=none:clients.defaults.recalibrate=[local_test,global_test],"
        "fml:mentee={name: mlp, hidden: [8, 8]}:alpha=0.7"
    )
    compare(small(), labels, out=tmp_path / "out", grid={})
    assert len(in_process) == 3
    configs = [Run(tmp_path / "out" / "runs" / name).directory.config() for name in in_process]
    assert configs[2]["algorithm"]["mentee"]["hidden"] == [8, 8]
    recalibrated = configs[1]["clients"]["defaults"]["recalibrate"]
    assert recalibrated == ["local_test", "global_test"]
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert [row["algorithm"] for row in rows] == split_top_level(labels, ",")


@each_case(
    ("label", "base", "name"),
    [
        (
            "fml:mentee={name: mlp, hidden: [16]}:beta=1",
            "fml",
            "FML (mentee = {name: mlp, hidden: [16]}, beta = 1)",
        ),
        (
            "python:a.b:Own:net={name: mlp}:mu=1",
            "python:a.b:Own",
            "Own (net = {name: mlp}, mu = 1)",
        ),
    ],
)
def test_label_gives_name_and_overrides(label: str, base: str, name: str) -> None:
    assert algorithm_base(label) == base and algorithm_name(label) == name
    variant = Variant.parse(label)
    assert variant.overrides[0] == f"algorithm.name={base}" and len(variant.overrides) == 3


def test_grid_accepts_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Mock(side_effect=RunFailedError("stopped"))
    monkeypatch.setattr("hetero_fl.experiment.compare", stopped)
    command = "compare -c c.yaml --algorithms heterofl --out o --grid algorithm.model=[1,0.5],[1]"

    assert main(command.split()) == 1
    assert stopped.call_args.kwargs["grid"] == {"algorithm.model": ["[1,0.5]", "[1]"]}


def test_all_selects_the_methods_that_the_configuration_allows(
    tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {
        name: register_algorithm[name]
        for name in ("fedmd", "fedgkt", "fedavg", "centralized", "local")
    }
    monkeypatch.setattr(register_algorithm, "_known", few)
    shares = ["parameters", "predictions"]
    source = small(data__proxy__size=0, clients__defaults__shares=shares)
    # features of an mlp cannot be shared with other models
    source["clients"]["groups"][0]["model"] = "mlp"
    compare(source, "ALL", out=tmp_path / "out")
    assert in_process == ["fedavg-seed0", "centralized-seed0", "local-seed0"]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "- **Without FedMD:** algorithm.name=fedmd cannot be combined with" in text
    assert (
        "- **Without FedGKT:** algorithm.name=fedgkt requires clients that share features" in text
    )
    assert "left out fedmd: " in (tmp_path / "out" / "log.txt").read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    figures = [float(row["global_last_accuracy"]) for row in rows]
    assert figures == sorted(figures, reverse=True)


@pytest.mark.slow
def test_variants_can_be_added_to_all(
    tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        register_algorithm,
        "_known",
        {name: register_algorithm[name] for name in ("local", "fedavg", "fedprox")},
    )
    compare(small(), "all, fedprox:mu=1, fedprox", out=tmp_path / "out")
    assert in_process == [
        "local-seed0",
        "fedavg-seed0",
        "fedprox-seed0",
        "fedprox_mu=1-seed0",
    ]
    with pytest.raises(UserError, match="mu"):
        compare(small(), ["all", "fedprox:mu=-1"], out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_all_raises_if_no_method_can_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        compare(small(data__path=str(tmp_path / "nowhere.npz")), "all", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
