"""The metrics that progress lines, plots, reports and comparisons show for each kind of task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hetero_fl.config.schema import STATISTIC_SUFFIXES
from hetero_fl.core.metrics import MANY, RANKING, REGRESSION
from hetero_fl.core.task import Task


@dataclass(frozen=True)
class ShownMetrics:
    """The metrics that are shown for one kind of task.

    Attributes:
        curves: The metric that selects the best round, and the second metric of learning curves.
        clients: The metric that selects the best round, and the second metric of plots of single
            clients, whose test rows may lack a class.
        table: The metrics of tables. Methods are ranked by the first one.
        line: The metrics of one-line summaries.
        client: The metric that compares single clients on their local tests.
    """

    curves: tuple[str, str]
    clients: tuple[str, str]
    table: tuple[str, ...]
    line: tuple[str, ...]
    client: str

    @property
    def selection(self) -> str:
        """The metric that selects the best round and comes first in reports and plots."""
        return self.curves[0]


_BALANCED = ("balanced_accuracy", "auroc")
_RARE = ("auroc", "average_precision")
_RANKING = ("ndcg_10", "hit_rate_10")
_MANY = ("accuracy", "top3_accuracy", "perplexity")

_SHOWN = {
    "binary": ShownMetrics(
        curves=_BALANCED,
        clients=("balanced_accuracy", "accuracy"),
        table=("balanced_accuracy", "auroc", "accuracy"),
        line=_BALANCED,
        client="accuracy",
    ),
    "multiclass": ShownMetrics(
        curves=_BALANCED,
        clients=("balanced_accuracy", "accuracy"),
        table=("accuracy", "balanced_accuracy", "auroc"),
        line=_BALANCED,
        client="accuracy",
    ),
    "rare": ShownMetrics(curves=_RARE, clients=_RARE, table=_RARE, line=_RARE, client="auroc"),
    "many": ShownMetrics(
        curves=("accuracy", "perplexity"),
        clients=("accuracy", "top3_accuracy"),
        table=_MANY,
        line=_MANY,
        client="accuracy",
    ),
    "ranking": ShownMetrics(
        curves=_RANKING, clients=_RANKING, table=_RANKING, line=_RANKING, client="ndcg_10"
    ),
    "multilabel": ShownMetrics(
        curves=("auroc", "balanced_accuracy"),
        clients=("auroc", "balanced_accuracy"),
        table=("auroc", "average_precision", "balanced_accuracy"),
        line=_BALANCED,
        client="auroc",
    ),
    "regression": ShownMetrics(
        curves=("mae", "r2"),
        clients=("mae", "rmse"),
        table=("mae", "rmse", "r2"),
        line=("mae",),
        client="mae",
    ),
}


def shown_metrics(task: Task) -> ShownMetrics:
    """Return the metrics that are shown for a task.

    Example:
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.reporting.shown_metrics import shown_metrics
        >>> shown_metrics(Task("regression", 1)).table
        ('mae', 'rmse', 'r2')
    """
    if task.kind != "multiclass":
        return _SHOWN[task.kind]
    if task.is_ranking:
        return _SHOWN["ranking"]
    if task.rare is not None:
        return _SHOWN["rare"]
    if task.has_many_classes:
        return _SHOWN["many"]
    return _SHOWN["binary" if task.outputs == 2 else "multiclass"]


def is_metric(name: str) -> bool:
    """Return whether a key of the scores is a metric, not a statistic over the clients."""
    return name != "round" and not name.endswith(STATISTIC_SUFFIXES)


def own_metrics(names: Iterable[str]) -> list[str]:
    """Return the metrics of the user among the keys of scores (see `evaluation.metrics`).

    Tables show them after those of `ShownMetrics.table`.
    """
    built_in = (*RANKING, *MANY, *REGRESSION)
    return [name for name in dict.fromkeys(names) if is_metric(name) and name not in built_in]


def metrics_of_line(scores: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the metrics of a one-line summary of scores, which tell the kind of the task.

    Args:
        scores: Scores of a test, as in `metrics.jsonl`.
    """
    if "mae" in scores:
        return _SHOWN["regression"].line
    if "ndcg_10" in scores:
        return _SHOWN["ranking"].line
    if "top3_accuracy" in scores:
        return _SHOWN["many"].line
    # The scores of a task with a rare class begin with the AUROC.
    return _SHOWN["rare" if next(iter(scores)) == "auroc" else "binary"].line
