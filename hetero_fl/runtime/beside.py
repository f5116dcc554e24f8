"""What a report shows besides scores: what simple rules reach on the same rows, and a stretch of truth and forecast."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hetero_fl.data.base import Examples
from hetero_fl.metrics import Scores, score
from hetero_fl.task import Task

STRETCH = 168  # rows of a forecast that are kept for a picture: a week of hours


def baseline_scores(task: Task, rows: Examples, y: Tensor) -> dict[str, Scores]:
    """The scores of the baselines of these rows, by name."""
    return {name: score(task, said, y, rows.unit) for name, said in rows.baselines.items()}


def forecast(task: Task, rows: Examples, y: Tensor, predicted: Tensor) -> dict[str, Any]:
    """Truth, prediction and baselines of the last rows in time, for each output, in the target's unit; empty if not dated."""
    if rows.time is None or task.kind != "regression":
        return {}
    order = rows.time.argsort(stable=True)[-STRETCH:]
    by = 1.0 if rows.unit is None else rows.unit[order, None].double()

    def told(values: Tensor) -> list[list[float]]:
        return [[round(v, 6) for v in column] for column in (values.detach().cpu()[order].double() * by).T.tolist()]

    said = {name: told(outputs) for name, outputs in rows.baselines.items()}
    return {"time": rows.time[order].tolist(), "truth": told(y), "predicted": told(predicted), "baselines": said}
