"""What a comparison shows, and in which order: columns that fit the task, methods that compete and those that bound them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hetero_fl.metrics import SMALLER_IS_BETTER
from hetero_fl.reporting.methods import is_baseline, is_bound
from hetero_fl.reporting.wording import READINGS, metric_name, sentence
from hetero_fl.task import Task

Row = Mapping[str, Any]

_WANTED: dict[str, list[tuple[str, str]]] = {
    "binary": [
        ("global", "balanced_accuracy"),
        ("global", "auroc"),
        ("global", "accuracy"),
        ("personal", "accuracy"),
        ("server", "balanced_accuracy"),
    ],
    "multiclass": [
        ("global", "accuracy"),
        ("global", "balanced_accuracy"),
        ("global", "auroc"),
        ("personal", "accuracy"),
        ("server", "accuracy"),
    ],
    "rare": [
        ("global", "auroc"),
        ("global", "average_precision"),
        ("personal", "auroc"),
        ("personal", "average_precision"),
        ("server", "auroc"),
    ],
    "many": [
        ("global", "accuracy"),
        ("global", "top3_accuracy"),
        ("global", "perplexity"),
        ("personal", "accuracy"),
        ("personal", "top3_accuracy"),
        ("server", "accuracy"),
    ],
    "multilabel": [
        ("global", "auroc"),
        ("global", "average_precision"),
        ("global", "balanced_accuracy"),
        ("personal", "auroc"),
        ("server", "auroc"),
    ],
    "regression": [("global", "mae"), ("global", "rmse"), ("global", "r2"), ("personal", "mae"), ("server", "mae")],
}


@dataclass(frozen=True)
class Column:
    """A metric column: where its values stand in a row, what it is called, which metric it is."""

    key: str
    title: str
    metric: str


@dataclass(frozen=True)
class Entrants:
    """Labels of the methods in the order in which they are shown: those that compete, then the bounds."""

    federated: tuple[str, ...]
    bounds: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """The one after the other."""
        return self.federated + self.bounds

    @property
    def baseline(self) -> str | None:
        """The line to beat, if it takes part."""
        return next((label for label in self.federated if is_baseline(label)), None)


def entrants(rows: Sequence[Row]) -> Entrants:
    """The methods of these rows, in their order."""
    labels = list(dict.fromkeys(str(row["algorithm"]) for row in rows))
    return Entrants(tuple(a for a in labels if not is_bound(a)), tuple(a for a in labels if is_bound(a)))


def ranked(rows: Sequence[Row], task: Task) -> list[Row]:
    """The rows with the best method first, by the mean of the tables' first column in the last round; ties as they were."""
    found = columns_of(rows, task, "last")
    if not found:
        return list(rows)
    key, sign = found[0].key, 1 if found[0].metric in SMALLER_IS_BETTER else -1
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(str(row["algorithm"]), []).extend([sign * row[key]] if row.get(key) is not None else [])
    place = {a: (not v, fmean(v) if v else 0.0) for a, v in values.items()}
    return sorted(rows, key=lambda row: place[str(row["algorithm"])])


def _kind(task: Task) -> str:
    if task.kind != "multiclass":
        return task.kind
    return "rare" if task.rare is not None else "many" if task.many else "binary" if task.outputs == 2 else "multiclass"


def columns_of(rows: Sequence[Row], task: Task, moment: str) -> tuple[Column, ...]:
    """The columns that fit the task and that any row has a value for."""
    columns = []
    for reading, metric in _WANTED[_kind(task)]:
        key, name = f"{reading}_{moment}_{metric}", metric_name(metric)
        title = f"Server's {name}" if reading == "server" else f"{sentence(name)} {READINGS[reading]}"
        columns.append(Column(key, title, metric))
        if reading == "personal":
            columns.append(Column(f"{key}_worst", f"Worst client {READINGS[reading]}", metric))
    return tuple(c for c in columns if any(row.get(c.key) is not None for row in rows))
