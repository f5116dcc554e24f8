"""Gain or loss of each client against training alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.reporting.comparison.result import GAIN
from hetero_fl.reporting.comparison.runs import ComparedRuns
from hetero_fl.reporting.comparison.tables import Table
from hetero_fl.reporting.formatting import (
    algorithm_name,
    client_score,
    format_difference,
    format_score,
    tested_metric,
)
from hetero_fl.reporting.methods import is_baseline, is_reference
from hetero_fl.reporting.rendering import render_line
from hetero_fl.reporting.shown_metrics import shown_metrics

MAX_LISTED = 20
"""Maximum number of clients in a table."""


@dataclass(frozen=True)
class Gains:
    """The gain of each client over the baseline on one test, mean over seeds.

    A positive gain is better, also for errors.

    Attributes:
        test: `global` or `personal`.
        metric: Name of the metric.
        baseline: Label of the baseline.
        best: Label of the best method, in the first column of the table of the last round.
        alone: Score of each client with the baseline.
        frame: Gain of each client (rows) with each other method (columns), NaN if undefined.
        listed: The clients of the table.
        unit: Unit of the gains as they are shown.
    """

    test: str
    metric: str
    baseline: str
    best: str
    alone: pd.Series
    frame: pd.DataFrame
    listed: list[str]
    unit: str

    @property
    def text(self) -> pd.DataFrame:
        """The gains as text."""
        return self.frame.map(lambda gain: format_difference(gain, self.metric))

    def gaining(self, label: str) -> str:
        """Return how many clients gain with a method, such as "5 of 6"."""
        return f"{self.text[label].str.startswith('+').sum()} of {len(self.frame)}"

    def table(self) -> Table:
        """Return the table of the gains. The last row counts the clients that gain."""
        cells = self.text.loc[self.listed].rename(columns=algorithm_name)
        alone = [format_score(self.alone[client], self.metric) for client in self.listed]
        cells.insert(0, algorithm_name(self.baseline), alone)
        cells.loc["clients that gain"] = ["", *(self.gaining(str(label)) for label in self.frame)]
        name = algorithm_name(self.baseline)
        title = f"Gain of each client over {name}: {tested_metric(self.test, self.metric)}"
        caption = render_line("gain_caption.txt", gains=self)
        return Table(title, cells.rename_axis("Client").reset_index(), caption)


def client_gains(rows: Sequence[Mapping[str, Any]], runs: ComparedRuns) -> pd.DataFrame:
    """Return the gain of each client over the baseline with the same seed, for other methods.

    Args:
        rows: One row for each run, with the scores of the clients as in `summary.json`.
        runs: The same runs.

    Returns:
        One row for each run, test and client, with the columns `algorithm`, `seed`, `test`,
        `metric`, `client`, `score`, `alone` (the score with the baseline), `gain` and `column` (the
        name of the gain in `comparison.csv`). Undefined scores are left out.
    """
    key = ["seed", "test", "metric", "client"]
    shown = shown_metrics(runs.task)
    scores = [
        (*(row["algorithm"], row["seed"], test, metric, client["id"]), score)
        for row in rows
        for test, metric in (("global", shown.table[0]), ("personal", shown.client))
        for client in row.get("clients", ())
        if (score := client_score(client, test, metric)) is not None
    ]
    frame = pd.DataFrame(scores, columns=["algorithm", *key, "score"])
    is_alone = frame["algorithm"] == runs.baseline
    alone = frame[is_alone].set_index(key)["score"].rename("alone")
    frame = frame[~is_alone].merge(alone, on=key)
    return frame.assign(
        gain=(frame["score"] - frame["alone"]) * (1 - 2 * frame["metric"].isin(SMALLER_IS_BETTER)),
        column=frame["test"] + "_last_" + frame["metric"] + GAIN + frame["client"],
    )


def mean_gains(found: pd.DataFrame, runs: ComparedRuns) -> list[Gains]:
    """Return the gains on the global and the local test, or none without gains.

    Args:
        found: The result of `client_gains`.
        runs: The runs.
    """
    methods = [label for label in runs.methods if label in set(found["algorithm"])]
    ranked = [label for label in runs.ranked_methods() if label in methods]
    best = next((x for x in ranked if not (is_baseline(x) or is_reference(x))), "")
    unit = runs.task.unit if runs.task.kind == "regression" else "percentage points"
    gains: list[Gains] = []
    for (test, metric), own in found.groupby(["test", "metric"], sort=False) if best else ():
        # Each seed counts once, also if methods have finished with different seeds.
        alone = (
            own.drop_duplicates(["seed", "client"]).groupby("client", sort=False)["alone"].mean()
        )
        means = own.pivot_table("gain", "client", "algorithm").reindex(alone.index, columns=methods)
        # All clients, or those of many that gain least and most.
        rank = means[best].rank(method="first", na_option="top")
        edges = (rank <= MAX_LISTED // 2) | (rank > len(rank) - MAX_LISTED // 2)
        listed = gains[0].listed if gains else list(rank.index[edges])
        gains.append(
            Gains(str(test), str(metric), str(runs.baseline), best, alone, means, listed, unit)
        )
    return gains


def describe_gains(gains: Sequence[Gains]) -> str:
    """Return a sentence on the gains with the best method, which is empty without gains."""
    return render_line("gain_answer.txt", tables=gains)
