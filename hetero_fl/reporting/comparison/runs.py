"""The finished runs of a comparison: their methods, score columns and means over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.core.task import Task
from hetero_fl.reporting.formatting import TEST_NAMES, metric_name, tested_metric
from hetero_fl.reporting.methods import is_baseline, is_reference
from hetero_fl.reporting.shown_metrics import own_metrics, shown_metrics

Row = Mapping[str, Any]
"""The results of one run (see `hetero_fl.reporting.comparison.report.comparison_row`)."""


@dataclass(frozen=True)
class ScoreColumn:
    """A column of scores.

    Attributes:
        key: Name of the column in `comparison.csv`.
        metric: Name of the metric.
        title: Title of the column in tables.
    """

    key: str
    metric: str
    title: str


@dataclass(frozen=True)
class ComparedRuns:
    """The finished runs of a comparison.

    Attributes:
        frame: One row for each run, with the columns of `comparison.csv`.
        task: Task of the runs.
        jobs: Number of runs that were executed in parallel, or None if unknown.
    """

    frame: pd.DataFrame
    task: Task
    jobs: int | None = None

    @property
    def methods(self) -> list[str]:
        """Labels of the methods in the order of the rows, with references last."""
        return sorted(dict.fromkeys(self.frame["algorithm"]), key=is_reference)

    @property
    def federated(self) -> list[str]:
        """Labels of the methods that are no references."""
        return [label for label in self.methods if not is_reference(label)]

    @property
    def baseline(self) -> str | None:
        """Label of the baseline without federation, or None if no baseline was compared."""
        return next((label for label in self.federated if is_baseline(label)), None)

    @property
    def seeds(self) -> list[int]:
        """The seeds in ascending order."""
        return sorted(set(self.frame["seed"]))

    def metrics(self, moment: str = "last") -> list[str]:
        """Return the metrics of tables, including those of the user."""
        start = f"global_{moment}_"
        names = [str(key).removeprefix(start) for key in self.frame if str(key).startswith(start)]
        return [*shown_metrics(self.task).table, *own_metrics(names)]

    def columns(self, moment: str = "last") -> list[ScoreColumn]:
        """Return the columns with scores, without columns that are empty in all rows.

        Args:
            moment: `last`, or `best` for the round selected by validation.
        """
        shown = shown_metrics(self.task)
        columns = [
            ScoreColumn(f"{test}_{moment}_{metric}", metric, tested_metric(test, metric))
            for test in ("global", "personal")
            for metric in self.metrics(moment)
        ]
        name = metric_name(shown.client)
        columns += [
            ScoreColumn(
                f"personal_{moment}_{shown.client}_worst",
                shown.client,
                f"Worst client's {TEST_NAMES['personal']} {name}",
            ),
            ScoreColumn(
                f"server_{moment}_{shown.table[0]}",
                shown.table[0],
                f"Server's {metric_name(shown.table[0])}",
            ),
        ]
        return [column for column in columns if self.has_scores(column.key)]

    def has_scores(self, key: str) -> bool:
        """Return whether any run has a value in a column."""
        return key in self.frame and bool(self.frame[key].notna().any())

    def scores(self, key: str) -> pd.DataFrame:
        """Return the scores of a column, with one row for each method and one column per seed."""
        scores = self.frame.assign(score=self.frame[key].astype(float))
        table = scores.pivot_table("score", "algorithm", "seed", dropna=False)
        return table.reindex(index=self.methods)

    def best_method(self, column: ScoreColumn) -> str | None:
        """Return the method with the best mean that is no reference, or None without scores."""
        means = self.scores(column.key).mean(axis=1)[self.federated].dropna()
        if means.empty:
            return None
        return str(means.idxmin() if column.metric in SMALLER_IS_BETTER else means.idxmax())

    def ranked_methods(self) -> list[str]:
        """Return the methods sorted by their mean in the first column, best first.

        Methods without a score come last. Without columns, the order is that of the rows.
        """
        labels = list(dict.fromkeys(self.frame["algorithm"]))
        columns = self.columns()
        if not columns:
            return labels
        means = self.scores(columns[0].key).mean(axis=1)[labels]
        is_ascending = columns[0].metric in SMALLER_IS_BETTER
        return list(means.sort_values(ascending=is_ascending, kind="stable").index)


def rank_methods(rows: Sequence[Row], task: Task) -> list[Row]:
    """Sort rows by the mean score of the method in the first column of the tables, best first."""
    order = ComparedRuns(pd.DataFrame(rows), task).ranked_methods()
    return sorted(rows, key=lambda row: order.index(row["algorithm"]))
