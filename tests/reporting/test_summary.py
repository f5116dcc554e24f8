"""Tests of the selection of rounds by validation."""

from __future__ import annotations

from typing import Any

from hetero_fl.core.task import Task
from hetero_fl.reporting.summary import best_round


def history(metric: str, figures: list[float | None]) -> list[dict[str, Any]]:
    return [
        {"round": i, "global": {metric: 0.0}, "validation": {"global": {metric: figure}}}
        for i, figure in enumerate(figures, 1)
    ]


def test_best_round_of_a_classification_has_the_largest_score() -> None:
    records = history("balanced_accuracy", [0.5, 0.8, None, 0.7])

    best = best_round(Task("multiclass", 3), records, "global")

    assert best is records[1]


def test_best_round_of_a_regression_has_the_smallest_error() -> None:
    records = history("mae", [3.0, 1.0, None, 2.0])

    best = best_round(Task("regression", 1), records, "global")

    assert best is records[1]


def test_best_round_prefers_the_earlier_of_equal_scores() -> None:
    records = history("auroc", [0.5, 0.9, 0.9])

    best = best_round(Task("multilabel", 2), records, "global")

    assert best is records[1]
