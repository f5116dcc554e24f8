"""The tables of benchmarks/science/replication.py: configurations, results and records."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hetero_fl.config.population import expand_population
from hetero_fl.experiment.configuration import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def replication() -> SimpleNamespace:
    names = ("published", "replication_runs", "replication_tables", "replication")
    return SimpleNamespace(
        **{
            k: v
            for name in names
            for k, v in vars(importlib.import_module(f"benchmarks.science.{name}")).items()
        }
    )


@pytest.mark.slow
def test_every_row_is_a_valid_configuration(replication: SimpleNamespace, tmp_path: Path) -> None:
    jobs = replication.jobs_of(list(replication.TABLES.values()), None, "", tmp_path)
    assert len({job.path for job in jobs}) == len(jobs)
    for job in jobs:
        config = load_config(
            replication.CONFIGS / f"{job.table.config}.yaml", job.overrides(tmp_path)
        )
        assert config.data.path == str(tmp_path / job.table.file) and config.seed == job.seed
        assert len(expand_population(config.clients)) in (10, 16, 20)
        assert replication.FILE not in str(config.model_dump())


def finish(job: object, last: float, class_scores: list[list[int]]) -> None:
    """Write a finished run: an accuracy, and a confusion matrix of one client's first classes."""
    path = job.path  # type: ignore[attr-defined]
    path.mkdir(parents=True)
    figures = {"last": {"accuracy": last}, "best_by_validation": {"accuracy": last - 0.01}}
    summary = dict.fromkeys(("personal", "global", "server"), figures) | {"seconds": {"total": 600}}
    (path / "summary.json").write_text(json.dumps(summary))
    details = {"label_counts": {"a": [5, 0]}, "confusion": {"a": {"global": class_scores}}}
    (path / "details.json").write_text(json.dumps(details))
    records = [
        {"round": 1, "server": {"accuracy": last + 0.02}},
        {"round": 2, "server": None},
        {"round": 3, "server": {"accuracy": last}},
    ]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))


def test_results_of_finished_runs(replication: SimpleNamespace, tmp_path: Path) -> None:
    fedgen, niid = (replication.TABLES[name] for name in ("fedgen", "niid"))
    jobs = replication.jobs_of([fedgen], [0, 1, 2], "FedGen, α 0.1", tmp_path)
    assert [job.seed for job in jobs] == [0, 1, 2]
    for job, last in zip(jobs[:2], (0.93, 0.94), strict=True):
        finish(job, last, [[30, 10], [0, 99]])
    (line,) = (
        line
        for line in replication.write(jobs, tmp_path).splitlines()
        if line.startswith("| FedGen")
    )
    assert line == (
        "| FedGen, α 0.1 | 93.03 ± 0.32 | 93.50 ± 0.71 | 92.50 ± 0.71 | +0.47 (within 2σ) "
        "| 75.00 ± 0.00 | -18.03 (outside 2σ) | 95.68 ± 0.20 | -20.68 (outside 2σ) | 0, 1 |"
    )
    assert replication.estimate(jobs) == "fedgen: 1 of 3 runs to do, about 10 minutes"
    jobs = replication.jobs_of([niid], None, "", tmp_path)
    finish(jobs[0], 0.95, [])
    text = replication.write(jobs, tmp_path)
    assert "| FedAvg | 98.89 | 95.00 | 94.00 | -3.89 | 97.00 | 0 |" in text
    assert (
        "| SCAFFOLD | 99.07 | not run |  |  |  |  |" in text
        and text in (tmp_path / "replication.md").read_text()
    )


def test_difference_is_compared_with_deviation(
    replication: SimpleNamespace,
) -> None:
    row = replication.Row("x", (), 90.0, 1.0)
    assert replication.difference(row, [92.5, 92.6]) == "+2.55 (outside 2σ)"
    assert (
        replication.difference(replication.Row("x", (), 90.0), [91.0, 93.0]) == "+2.00 (within 2σ)"
    )
    assert replication.difference(replication.Row("x", (), 90.0), [91.0]) == "+1.00"
    assert replication.difference(replication.Row("x", ()), [91.0]) == ""


def test_recorded_runs_are_not_repeated(replication: SimpleNamespace, tmp_path: Path) -> None:
    niid, file = replication.TABLES["niid"], tmp_path / "record.json"
    first = replication.jobs_of([niid], None, "", tmp_path / "runs", replication.read_record(file))
    finish(first[0], 0.95, [])
    replication.write_record(file, first)
    elsewhere = replication.jobs_of(
        [niid], None, "", tmp_path / "none", replication.read_record(file)
    )
    assert [job.finished for job in elsewhere] == [True, False, False]
    assert "| FedAvg | 98.89 | 95.00 | 94.00 | -3.89 | 97.00 | 0 |" in replication.write(
        elsewhere, tmp_path
    )
    assert "2 of 3 runs to do" in replication.estimate(elsewhere)
    finish(elsewhere[1], 0.5, [])
    replication.write_record(file, elsewhere)
    assert list(replication.read_record(file)) == ["niid: FedAvg, seed 0", "niid: SCAFFOLD, seed 0"]


def test_record_contains_only_existing_rows(replication: SimpleNamespace, tmp_path: Path) -> None:
    keys = {
        job.key
        for job in replication.jobs_of(list(replication.TABLES.values()), None, "", tmp_path)
    }
    assert set(replication.read_record(ROOT / "docs" / "results" / "replication.json")) <= keys
