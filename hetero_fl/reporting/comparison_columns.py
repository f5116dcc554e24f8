"""What a comparison shows, and in which order: columns that fit the task, methods that compete and those that bound them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hetero_fl.metrics import SMALLER_IS_BETTER
from hetero_fl.reporting.methods import is_baseline, is_bound
from hetero_fl.reporting.wording import READINGS, metric_name, sentence, tested_metric
from hetero_fl.task import Task

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Shown:
    """Metrics shown for a kind of task: on both test sets, for the worst client, and for the server's model."""

    metrics: tuple[str, ...]
    worst: str
    server: str


_SHOWN = {
    "binary": _Shown(("balanced_accuracy", "auroc", "accuracy"), "accuracy", "balanced_accuracy"),
    "multiclass": _Shown(("accuracy", "balanced_accuracy", "auroc"), "accuracy", "accuracy"),
    "rare": _Shown(("auroc", "average_precision"), "auroc", "auroc"),
    "many": _Shown(("accuracy", "top3_accuracy", "perplexity"), "accuracy", "accuracy"),
    "multilabel": _Shown(("auroc", "average_precision", "balanced_accuracy"), "auroc", "auroc"),
    "regression": _Shown(("mae", "rmse", "r2"), "mae", "mae"),
}


@dataclass(frozen=True)
class Column:
    """A metric column: where its values are in a row, its title, its metric; its test set and its title below that."""

    key: str
    title: str
    metric: str
    group: str
    short: str


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


def metrics_of(task: Task) -> tuple[str, ...]:
    """Return the metrics that a comparison shows, each on global and local tests."""
    return _SHOWN[_kind(task)].metrics


def columns_of(rows: Sequence[Row], task: Task, moment: str) -> tuple[Column, ...]:
    """Return the columns that fit the task and that any row has a value for.

    Args:
        rows: One row for each run.
        task: What the runs learn.
        moment: `last` or `best`.
    """
    shown = _SHOWN[_kind(task)]
    columns = []
    for reading in ("global", "personal"):
        for metric in shown.metrics:
            columns.append(_column(f"{reading}_{moment}_{metric}", reading, metric))
    name = metric_name(shown.worst)
    worst = f"Worst client's {READINGS['personal']} {name}", f"Worst client's {name}"
    group = sentence(READINGS["personal"])
    columns.append(Column(f"personal_{moment}_{shown.worst}_worst", worst[0], shown.worst, group, worst[1]))
    columns.append(_column(f"server_{moment}_{shown.server}", "server", shown.server))
    return tuple(c for c in columns if any(row.get(c.key) is not None for row in rows))


def _column(key: str, reading: str, metric: str) -> Column:
    name, group = metric_name(metric), sentence(READINGS[reading])
    title = f"Server's {name}" if reading == "server" else tested_metric(reading, metric)
    return Column(key, title, metric, group, sentence(name))
