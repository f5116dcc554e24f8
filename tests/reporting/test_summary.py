"""Selection of rounds by validation, and descriptions of settings."""

from __future__ import annotations

from typing import Any

from hetero_fl.core.task import Task
from hetero_fl.reporting.summary import best_round, format_fields


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


def test_preprocessing_lists_few_constants_and_describes_many() -> None:
    few = {"mean": (0.5, 0.25, 0.125), "std": 0.1239, "raw": (3, 8, 8), "missing": None}
    many = {"mean": tuple(i / 100 for i in range(3456)), "columns": tuple("abcdefghij")}

    assert format_fields(few) == "mean (0.5, 0.25, 0.125), std 0.124"
    assert format_fields(many) == (
        "mean 0 to 34.5 (3,456 values), columns (a, b, c, d, e, f, g, h and 2 more)"
    )
