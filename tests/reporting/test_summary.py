"""Selection of rounds by validation, and descriptions of settings."""

from __future__ import annotations

from typing import Any

from hetero_fl.core.task import Task
from hetero_fl.reporting.summary import BestRounds, format_fields
from tests.support.cases import each_case


@each_case(
    ("task", "metric", "figures"),
    [
        (Task("multiclass", 3), "balanced_accuracy", [0.5, 0.8, None, 0.7]),
        (Task("regression", 1), "mae", [3.0, 1.0, None, 2.0]),
        # The earlier of equal scores.
        (Task("multilabel", 2), "auroc", [0.5, 0.9, 0.9]),
    ],
)
def test_best_round_has_the_best_score(
    task: Task, metric: str, figures: list[float | None]
) -> None:
    records: list[dict[str, Any]] = [
        {"round": i, "global": {metric: 0.0}, "validation": {"global": {metric: figure}}}
        for i, figure in enumerate(figures, 1)
    ]

    assert BestRounds(task, records).rounds == {"global": 2}


def test_preprocessing_lists_few_constants_and_describes_many() -> None:
    few = {"mean": (0.5, 0.25, 0.125), "std": 0.1239, "raw": (3, 8, 8), "missing": None}
    many = {"mean": tuple(i / 100 for i in range(3456)), "columns": tuple("abcdefghij")}

    assert format_fields(few) == "mean (0.5, 0.25, 0.125), std 0.124"
    assert format_fields(many) == (
        "mean 0 to 34.5 (3,456 values), columns (a, b, c, d, e, f, g, h and 2 more)"
    )
