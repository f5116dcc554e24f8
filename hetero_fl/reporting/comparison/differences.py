"""Paired differences between the methods of a comparison and the best of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.facts import Column, Row, columns_of, compared_methods
from hetero_fl.reporting.comparison.significance import (
    MIN_SEEDS,
    holm,
    paired_difference,
)
from hetero_fl.reporting.comparison.tables import best_method, format_difference
from hetero_fl.reporting.formatting import MISSING, algorithm_name, format_significant
from hetero_fl.reporting.rendering import markdown_table, render, render_line


@dataclass(frozen=True)
class DifferenceTable:
    """The table of paired differences.

    Attributes:
        best: Label of the best method.
        column: The column of the scores.
        frame: One row for each other method, in the order of display, with the columns of
            `differences.csv`. The numbers are NaN if the two methods share too few seeds.
        caption: Text below the table.
    """

    best: str
    column: Column
    frame: pd.DataFrame
    caption: str

    @property
    def title(self) -> str:
        """Title of the table."""
        return f"Differences from {algorithm_name(self.best)}"

    @property
    def header(self) -> tuple[str, ...]:
        """Titles of the columns."""
        return ("Method", self.column.title, "95% interval", "p", "p (Holm)")

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """The cells of each row as text."""
        return [self._cells(row) for row in self.frame.to_dict("records")]

    def _cells(self, row: Mapping[Hashable, Any]) -> tuple[str, ...]:
        name = algorithm_name(row["algorithm"])
        if pd.isna(row["p"]):
            return (name, *[MISSING] * 4)
        mean, low, high = (
            format_difference(row[key], self.column.metric) for key in ("difference", "low", "high")
        )
        return (name, mean, f"{low} to {high}", format_p(row["p"]), format_p(row["p_holm"]))

    def markdown(self) -> str:
        """Return the table in GitHub Markdown."""
        return markdown_table(self.header, self.lines, ("left", *["right"] * 4))

    def latex(self, label: str) -> str:
        """Return the table in LaTeX, which requires the package booktabs.

        Args:
            label: Label for references, without the prefix `tab:`.
        """
        return render("differences.tex", table=self, label=label)

    def csv(self) -> str:
        """Return the numbers of the methods with a test, with scores as fractions."""
        return self.frame.dropna().astype({"seeds": int}).to_csv(index=False, lineterminator="\n")


def format_p(p: float) -> str:
    """Format a p-value with two significant digits, or as `<0.001`."""
    return "<0.001" if p < 0.001 else format_significant(p, 2)


def make_difference_table(rows: Sequence[Row], task: Task) -> DifferenceTable | None:
    """Compare each method with the best one, in the first column of the table of the last round.

    Args:
        rows: One row for each run.
        task: Task of the runs.

    Returns:
        The table, or None if no two methods share `MIN_SEEDS` seeds.
    """
    columns = columns_of(rows, task, "last")
    shown = compared_methods(rows)
    if not columns:
        return None
    scores = _scores_by_seed(rows, columns[0].key)
    best = best_method(columns[0], pd.DataFrame(scores).mean(), shown)
    if best is None:
        return None
    found = {
        label: paired_difference(scores.get(label, {}), scores[best])
        for label in shown.federated
        if label != best
    }
    tested = {label: one for label, one in found.items() if one is not None}
    if not tested:
        return None
    corrected = holm([one.p for one in tested.values()])
    rows_of_tests = [
        {
            "algorithm": label,
            "difference": one.mean,
            "low": one.low,
            "high": one.high,
            "p": one.p,
            "p_holm": p_holm,
            "seeds": one.num_seeds,
        }
        for (label, one), p_holm in zip(tested.items(), corrected, strict=True)
    ]
    frame = pd.DataFrame(rows_of_tests).set_index("algorithm").reindex(list(found)).reset_index()
    caption = render_line(
        "difference_caption.txt",
        first=columns[0].title,
        num_tests=len(tested),
        incomplete=len(tested) < len(found),
        least=MIN_SEEDS,
    )
    return DifferenceTable(best, columns[0], frame, caption)


def _scores_by_seed(rows: Sequence[Row], key: str) -> Mapping[str, dict[int, float]]:
    """Return the scores of a column, keyed by method and seed, without missing scores."""
    scores: dict[str, dict[int, float]] = {}
    for row in rows:
        own = scores.setdefault(str(row["algorithm"]), {})
        if row.get(key) is not None:
            own[row["seed"]] = float(row[key])
    return scores
