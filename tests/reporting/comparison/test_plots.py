"""The plot of a comparison: legible with thirty methods, values as in the rows."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hetero_fl.algorithms import register_algorithm
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.plots import draw_comparison
from hetero_fl.reporting.comparison.runs import ComparedRuns
from hetero_fl.reporting.formatting import algorithm_name
from hetero_fl.reporting.plots import style
from tests.reporting.plots.test_layout import texts
from tests.support.figures import drawn

ALL = [
    name
    for name in register_algorithm
    if register_algorithm[name].__module__.startswith("hetero_fl.")
]
LONG = [
    "local",
    "hybrid",
    "hybrid:distill_at=client:teacher=entropy:heads=take:replay_weight=0.25",
    "centralized",
]


def make_rows(names: list[str], seeds: int, scale: float = 1.0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for place, name in enumerate(names):
            row: dict[str, Any] = {
                "algorithm": name,
                "seed": seed,
                "seconds_total": 4000.0 * scale + 60 * place,
            }
            for test in ("personal", "global", "server"):
                for metric in ("accuracy", "auroc", "balanced_accuracy", "mae", "r2"):
                    row[f"{test}_last_{metric}"] = float(rng.uniform(0.2, 1.0))
            row |= {
                "up_bytes": 0 if name == "local" else int(10 ** rng.uniform(3, 9)),
                "down_bytes": 0,
            }
            rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]], task: Task, jobs: int | None = None) -> Figure:
    return drawn(draw_comparison, ComparedRuns(pd.DataFrame(rows), task, jobs))


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    "names", [ALL, LONG, ["local", "fedavg"]], ids=["all", "long names", "two"]
)
@pytest.mark.parametrize(
    "task",
    [Task("multiclass", 10), Task("multiclass", 2), Task("regression", 1)],
    ids=lambda t: t.kind,
)
def test_labels_do_not_overlap(names: list[str], seeds: int, task: Task) -> None:
    figure = plot(make_rows(names, seeds), task, 2)
    # The height of a page, A4.
    assert figure.get_figwidth() <= style.WIDTH and figure.get_figheight() < 11.7
    shown = texts(figure)
    assert all(t.get_fontsize() >= style.MIN_FONT_SIZE for t in shown)
    boxes = [(t.get_text(), t.get_window_extent().padded(1)) for t in shown]
    for (first, a), (second, b) in combinations(boxes, 2):
        assert not a.overlaps(b), (first, second)


def test_plot_shows_every_method_with_references_last() -> None:
    found = panels(plot(make_rows(ALL, 1), Task("multiclass", 10), 1))

    assert list(found) == ["Accuracy", "Balanced\naccuracy", "AUROC", "Bytes", "Time"]
    labels = [t.get_text() for t in found["Accuracy"].get_yticklabels()]
    assert sorted(labels) == sorted(map(algorithm_name, ALL))
    assert labels[-2:] == ["Ensemble", "Centralized"]


def test_metrics_of_the_user_have_a_panel() -> None:
    rows = [row | {"global_last_regret": 0.5} for row in make_rows(["local", "fedavg"], 1)]

    assert "Regret" in panels(plot(rows, Task("multiclass", 10), 1))


def test_score_that_a_seed_lacks_is_left_out() -> None:
    rows = make_rows(["local", "fedavg"], 2)
    rows[-1]["global_last_auroc"] = None
    found = panels(plot(rows, Task("multiclass", 10), 1))
    assert len(found["Accuracy"].containers) - len(found["AUROC"].containers) == 1


def test_labels_omit_the_section_of_client_settings() -> None:
    names = ["local", "fedmd:teacher=contrast:clients.defaults.logit_adjustment=true"]
    figure = plot(make_rows(names, 1), Task("multiclass", 10), 1)
    labels = [t.get_text() for t in panels(figure)["Accuracy"].get_yticklabels()]
    assert labels == ["Local", "FedMD\n(teacher = contrast,\nlogit_adjustment = true)"]


def test_baseline_is_drawn_in_all_panels() -> None:
    rows = make_rows(["fedavg", "local"], 3)
    figure = plot(rows, Task("multiclass", 10))
    axes = panels(figure)["Accuracy"]
    for test in ("personal", "global"):
        mean = np.mean(
            [row[f"{test}_last_accuracy"] for row in rows if row["algorithm"] == "local"]
        )
        positions = [
            line.get_xdata() for line in axes.lines if line.get_color() == style.TEST_COLORS[test]
        ]
        assert [mean, mean] in [list(x) for x in positions if len(x) == 2]
    assert "Local, the baseline" in [t.get_text() for t in figure.legends[0].get_texts()]
    single = plot(
        [row for row in rows if row["algorithm"] != "local"],
        Task("multiclass", 10),
    )
    assert not any("beat" in t.get_text() for t in single.legends[0].get_texts())
