"""Paired differences between the methods of a comparison and the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.facts import Column, Row, columns_of, compared_methods
from hetero_fl.reporting.comparison.significance import (
    MIN_SEEDS,
    PairedDifference,
    holm,
    paired_difference,
)
from hetero_fl.reporting.comparison.tables import best_method, format_difference
from hetero_fl.reporting.formatting import MISSING, algorithm_name, format_significant
from hetero_fl.reporting.rendering import markdown_table, render, render_line


@dataclass(frozen=True)
class MethodDifference:
    """The difference of a method from the best method.

    Attributes:
        algorithm: Label of the method.
        difference: The difference, or None if the two methods share too few seeds.
        p_holm: p-value with Holm's correction for all tests of the table, or None without a test.
    """

    algorithm: str
    difference: PairedDifference | None
    p_holm: float | None


@dataclass(frozen=True)
class DifferenceTable:
    """The table of paired differences.

    Attributes:
        best: Label of the best method.
        column: The column of the scores.
        differences: The differences of the other methods, in the order of display.
        caption: Text below the table.
    """

    best: str
    column: Column
    differences: tuple[MethodDifference, ...]
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
        return [self._cells(one) for one in self.differences]

    def _cells(self, one: MethodDifference) -> tuple[str, ...]:
        found = one.difference
        name = algorithm_name(one.algorithm)
        if found is None or one.p_holm is None:
            return (name, *[MISSING] * 4)
        mean, low, high = (
            format_difference(value, self.column.metric)
            for value in (found.mean, found.low, found.high)
        )
        return (name, mean, f"{low} to {high}", format_p(found.p), format_p(one.p_holm))

    def markdown(self) -> str:
        """Return the table in GitHub Markdown."""
        return markdown_table(self.header, self.lines, ("left", *["right"] * 4))

    def latex(self, label: str) -> str:
        """Return the table in LaTeX, which requires the package booktabs.

        Args:
            label: Label for references, without the prefix `tab:`.
        """
        return render("differences.tex", table=self, label=label)

    def frame(self) -> pd.DataFrame:
        """Return the numbers of the table, with one row for each method and scores as fractions."""
        rows = [
            {
                "algorithm": one.algorithm,
                "difference": one.difference.mean,
                "low": one.difference.low,
                "high": one.difference.high,
                "p": one.difference.p,
                "p_holm": one.p_holm,
                "seeds": one.difference.num_seeds,
            }
            for one in self.differences
            if one.difference is not None
        ]
        return pd.DataFrame(rows)


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
    tested = [label for label, difference in found.items() if difference is not None]
    if not tested:
        return None
    p_values = [one.p for one in found.values() if one is not None]
    corrected = dict(zip(tested, holm(p_values), strict=True))
    caption = render_line(
        "difference_caption.txt",
        first=columns[0].title,
        num_tests=len(tested),
        incomplete=len(tested) < len(found),
        least=MIN_SEEDS,
    )
    return DifferenceTable(
        best,
        columns[0],
        tuple(MethodDifference(label, one, corrected.get(label)) for label, one in found.items()),
        caption,
    )


def _scores_by_seed(rows: Sequence[Row], key: str) -> Mapping[str, dict[int, float]]:
    """Return the scores of a column, keyed by method and seed, without missing scores."""
    scores: dict[str, dict[int, float]] = {}
    for row in rows:
        own = scores.setdefault(str(row["algorithm"]), {})
        if row.get(key) is not None:
            own[row["seed"]] = float(row[key])
    return scores
