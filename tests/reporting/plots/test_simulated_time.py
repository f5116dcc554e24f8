"""Plots and metrics of runs in simulated time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.plots import hours_to_reach, write_curves
from hetero_fl.reporting.formatting import format_arrivals, time_unit
from hetero_fl.reporting.plots import rounds, write_plots
from hetero_fl.reporting.report import write_report
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.summary import timing_summary
from tests.support.figures import drawn

MakeRun = Callable[..., RunDirectory]


def timed(run: RunDirectory, each: float = 40.0) -> RunDirectory:
    """Add simulated time to a run: the last client is late, the first fails every third round."""
    records, now = run.metrics(), 0.0
    for record in records:
        ids, fails = record["cohort"], record["round"] % 3 == 0
        outcomes = ["failed" if fails else "arrived", *["arrived"] * (len(ids) - 2), "late"]
        record["tasks"] = [
            [c, now, now + each * (i + 1) / len(ids), w]
            for i, (c, w) in enumerate(zip(ids, outcomes, strict=True))
        ]
        record["counts"] = {
            "invited": len(ids),
            **{w: outcomes.count(w) for w in ("arrived", "failed", "late")},
        }
        record["failed"] = {ids[0]: "upload lost"} if fails else {}
        record["simulated"] = {"start": now, "end": now + each}
        now += each
    records[1]["skipped"] = True
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run.write_json("summary.json", {**run.summary(), **timing_summary(records)})
    return run


@pytest.mark.slow
@pytest.mark.parametrize("clients", [3, 60])
def test_run_in_simulated_time_has_plots_and_report(made_run: MakeRun, clients: int) -> None:
    run = timed(made_run(clients=clients, rounds=20))
    names = [path.stem for path in write_plots(run.path)]
    assert names[names.index("communication") + 1 : names.index("confusion")] == [
        "time",
        "outcomes",
    ]
    text = write_report(run.path).read_text()
    assert "Simulated time" in text and "13 min 20 s" in text and "1 round with too few" in text
    assert "Clients dropped in" not in text
    assert f"{20 * clients:,} invited" in text


def test_plots_show_simulated_hours_and_invited_clients(made_run: MakeRun) -> None:
    run = timed(made_run(clients=60, rounds=20), each=7200.0)
    summary, records, details = run.summary(), run.metrics(), run.details()
    curves = drawn(rounds.plot_curves, summary, records, details, "time")
    outcomes = drawn(rounds.plot_outcomes, records)
    assert curves.axes[0].get_xlabel() == "simulated hours"
    assert curves.axes[0].lines[0].get_xdata()[-1] == pytest.approx(40)
    assert sum(bar.get_height() for bar in outcomes.axes[0].patches) == 20 * 60
    words = [text.get_text() for text in outcomes.legends[0].texts]
    assert sorted(words) == ["arrived", "failed", "late", "too few uploads: no update"]


@pytest.mark.slow
def test_no_plot_over_time_without_simulated_time(made_run: MakeRun) -> None:
    run = made_run(rounds=2)
    assert rounds.plot_curves(run.summary(), run.metrics(), run.details(), "time") is None
    assert rounds.plot_outcomes(run.metrics()) is None
    assert "Simulated time" not in write_report(run.path).read_text()


def test_format_arrivals_and_time_units() -> None:
    assert (
        format_arrivals({})
        == format_arrivals({"counts": {"invited": 3, "arrived": 3, "failed": 0, "late": 0}})
        == ""
    )
    record: dict[str, Any] = {
        "counts": {"invited": 3, "arrived": 1, "failed": 0, "late": 2},
        "skipped": True,
    }
    assert format_arrivals(record) == "3 invited, 1 arrived, 2 late; too few uploads, no update"
    assert [time_unit(s)[1] for s in (10, 400, 4000, 200000)] == [
        "seconds",
        "minutes",
        "hours",
        "days",
    ]


def history(*values: float, each: float) -> list[dict[str, Any]]:
    return [
        {
            "round": i + 1,
            "global": {"accuracy": v, "mae": v},
            "simulated": {"start": i * each, "end": (i + 1) * each},
        }
        for i, v in enumerate(values)
    ]


def test_time_to_accuracy_uses_a_score_that_every_run_reaches(tmp_path: Path) -> None:
    classes, number = Task("multiclass", 10), Task("regression", 1)
    slow, quick = history(0.2, 0.716, 0.7, each=3600), history(0.3, 0.71, 0.9, each=1800)
    name = "simulated_hours_to_accuracy_0.71"
    assert hours_to_reach([slow, quick], classes) == [{name: 2.0}, {name: 1.0}]
    assert hours_to_reach([slow, [{"round": 1, "global": {"accuracy": 0.5}}]], classes) == [{}, {}]
    errors = [history(5.0, 3.333, each=3600), history(3.335, 3.0, each=3600)]
    name = "simulated_hours_to_mae_3.34"  # rounded so that the worst run reaches it
    assert hours_to_reach(errors, number) == [{name: 2.0}, {name: 1.0}]
    write_curves(tmp_path / "curves.png", {"a": [slow], "b": [quick]}, classes, timed=True)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    write_curves(
        tmp_path / "none.png",
        {"a": [[{"round": 1, "global": {"accuracy": 0.5}}]]},
        classes,
        timed=True,
    )
    assert not (tmp_path / "none.png").exists()
