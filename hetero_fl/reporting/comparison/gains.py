"""Gain or loss of each client against training alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.facts import (
    Row,
    compared_methods,
    rank_methods,
)
from hetero_fl.reporting.comparison.result import GAIN
from hetero_fl.reporting.comparison.tables import format_difference, format_score
from hetero_fl.reporting.formatting import MISSING, algorithm_name, client_score, tested_metric
from hetero_fl.reporting.methods import is_baseline, is_reference
from hetero_fl.reporting.rendering import markdown_table, render_line
from hetero_fl.reporting.shown_metrics import shown_metrics

MAX_LISTED = 20
"""Maximum number of clients in a table."""


@dataclass(frozen=True)
class GainTable:
    """The gain of each client over the baseline on one test, mean over seeds.

    A positive gain is better, also for errors.

    Attributes:
        test: `global` or `personal`.
        metric: Name of the metric.
        baseline: Label of the baseline.
        best: Label of the best method, in the first column of the table of the last round.
        scores: Score of each client with the baseline.
        gains: Gain of each client (rows) with each other method (columns), NaN if undefined.
        listed: The clients of the table.
        unit: Unit of the gains as they are shown.
    """

    test: str
    metric: str
    baseline: str
    best: str
    scores: pd.Series
    gains: pd.DataFrame
    listed: list[str]
    unit: str

    @property
    def title(self) -> str:
        """Title of the table."""
        return (
            f"Gain of each client over {algorithm_name(self.baseline)}: "
            f"{tested_metric(self.test, self.metric)}"
        )

    @property
    def header(self) -> list[str]:
        """Titles of the columns."""
        return ["Client", *map(algorithm_name, (self.baseline, *self.gains.columns))]

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """The cells of each row as text. The last row counts the clients that gain."""
        return [
            *(
                (client, format_score(self.scores[client], self.metric), *map(self.format, gains))
                for client, *gains in self.gains.loc[self.listed].itertuples()
            ),
            ("clients that gain", "", *map(self.gaining, self.gains.columns)),
        ]

    @property
    def caption(self) -> str:
        """Text below the table."""
        return render_line("gain_caption.txt", table=self)

    def gaining(self, label: str) -> str:
        """Return how many clients gain with a method, such as "5 of 6"."""
        gains = self.gains[label].map(self.format).str.startswith("+")
        return f"{gains.sum()} of {len(gains)}"

    def format(self, gain: float) -> str:
        """Format a gain, which is NaN if a score is undefined."""
        return MISSING if pd.isna(gain) else format_difference(gain, self.metric)

    def markdown(self) -> str:
        """Return the table in GitHub Markdown."""
        return markdown_table(self.header, self.lines, ("left", *["right"] * len(self.header[1:])))


def client_gains(rows: Sequence[Row], task: Task) -> pd.DataFrame:
    """Return the gain of each client over the baseline with the same seed, for other methods.

    Args:
        rows: One row for each run, with the scores of the clients as in `summary.json`.
        task: Task of the runs.

    Returns:
        One row for each run, test and client, with the columns `algorithm`, `seed`, `test`,
        `metric`, `client`, `score`, `alone` (the score with the baseline), `gain` and `column` (the
        name of the gain in `comparison.csv`). Undefined scores are left out.
    """
    key = ["seed", "test", "metric", "client"]
    shown = shown_metrics(task)
    scores = [
        (*(row["algorithm"], row["seed"], test, metric, client["id"]), score)
        for row in rows
        for test, metric in (("global", shown.table[0]), ("personal", shown.client))
        for client in row.get("clients", ())
        if (score := client_score(client, test, metric)) is not None
    ]
    frame = pd.DataFrame(scores, columns=["algorithm", *key, "score"])
    is_alone = frame["algorithm"] == compared_methods(rows).baseline
    alone = frame[is_alone].set_index(key)["score"].rename("alone")
    frame = frame[~is_alone].merge(alone, on=key)
    return frame.assign(
        gain=(frame["score"] - frame["alone"]) * (1 - 2 * frame["metric"].isin(SMALLER_IS_BETTER)),
        column=frame["test"] + "_last_" + frame["metric"] + GAIN + frame["client"],
    )


def make_gain_tables(gains: pd.DataFrame, rows: Sequence[Row], task: Task) -> list[GainTable]:
    """Return the tables of the global and the local test, or none without gains.

    Args:
        gains: The result of `client_gains`.
        rows: One row for each run.
        task: Task of the runs.
    """
    methods = [x for x in compared_methods(rows).all_labels if x in set(gains["algorithm"])]
    ranked = [str(row["algorithm"]) for row in rank_methods(rows, task)]
    best = next((x for x in ranked if x in methods and not (is_baseline(x) or is_reference(x))), "")
    baseline = str(compared_methods(rows).baseline)
    unit = task.unit if task.kind == "regression" else "percentage points"
    tables: list[GainTable] = []
    for (test, metric), own in gains.groupby(["test", "metric"], sort=False) if best else ():
        # Each seed counts once, also if methods have finished with different seeds.
        alone = (
            own.drop_duplicates(["seed", "client"]).groupby("client", sort=False)["alone"].mean()
        )
        means = own.pivot_table("gain", "client", "algorithm").reindex(alone.index, columns=methods)
        # All clients, or those of many that gain least and most.
        rank = means[best].rank(method="first", na_option="top")
        edges = (rank <= MAX_LISTED // 2) | (rank > len(rank) - MAX_LISTED // 2)
        listed = tables[0].listed if tables else list(rank.index[edges])
        tables.append(GainTable(str(test), str(metric), baseline, best, alone, means, listed, unit))
    return tables


def describe_gains(tables: Sequence[GainTable], rows: Sequence[Row], jobs: int | None) -> str:
    """Return sentences on the gains with the best method, and their price in bytes and time.

    Args:
        tables: The tables of `make_gain_tables`. Without tables, the text is empty.
        rows: One row for each run.
        jobs: Number of runs at a time, or None if it is unknown.
    """
    means = pd.DataFrame(rows).groupby("algorithm").mean(numeric_only=True)
    return render_line("gain_answer.txt", tables=tables, means=means.T.to_dict(), jobs=jobs)
