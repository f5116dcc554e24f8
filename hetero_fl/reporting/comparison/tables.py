"""Tables of a comparison: means, best values and tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from hetero_fl.core.metrics import SMALLER_IS_BETTER, selection_metric
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.facts import (
    Column,
    ComparedMethods,
    Row,
    columns_of,
    compared_methods,
)
from hetero_fl.reporting.formatting import (
    MISSING,
    algorithm_name,
    capitalize_first,
    format_significant,
    is_better,
    metric_name,
    tested_metric,
)
from hetero_fl.reporting.methods import format_needs, is_reference
from hetero_fl.reporting.rendering import markdown_table, render, render_line
from hetero_fl.reporting.shown_metrics import shown_metrics

if TYPE_CHECKING:
    import pandas as pd

UNDEFINED_WITHOUT_A_CLASS = ("auroc", "average_precision")
"""Metrics that are undefined if the test rows lack a class."""

BELOW = "↓"
"""Mark of scores that are worse than the score of the baseline."""


def seconds_note(jobs: int | None) -> str:
    """Return a sentence that explains what the column “Seconds” measures.

    Args:
        jobs: Number of runs that were executed in parallel, or None if unknown.
    """
    return render_line("seconds.txt", jobs=jobs)


@dataclass(frozen=True)
class TableCell:
    """The score of a method in a column.

    Attributes:
        mean: Mean over seeds, or None without scores.
        deviation: Sample standard deviation over seeds, or None with fewer than two scores.
        text: Mean and standard deviation as text.
        best: Whether the score is the best in its column.
        below: Whether the score is worse than the score of the baseline.
    """

    mean: float | None
    deviation: float | None
    text: str
    best: bool = False
    below: bool = False

    @property
    def markdown(self) -> str:
        """The text in Markdown, with the best score in bold."""
        if self.best:
            return f"**{self.text}**"
        return f"{self.text} {BELOW}" if self.below else self.text


@dataclass(frozen=True)
class TableLine:
    """A row of a comparison table.

    Attributes:
        algorithm: Label of the method.
        name: Display name of the method.
        is_reference: Whether the method is a reference, which is not ranked with other methods.
        cells: Scores, in the order of the columns.
        megabytes: Megabytes exchanged per run.
        seconds: Seconds per run.
        needs: Requirements of the method.
    """

    algorithm: str
    name: str
    is_reference: bool
    cells: tuple[TableCell, ...]
    megabytes: str
    seconds: str
    needs: str


@dataclass(frozen=True)
class ComparisonTable:
    """A table of a comparison.

    Attributes:
        title: Title of the table.
        columns: Columns with scores.
        lines: Rows of the table, references last.
        caption: Text below the table.
        jobs: Number of runs that were executed in parallel, or None if unknown.
    """

    title: str
    columns: tuple[Column, ...]
    lines: tuple[TableLine, ...]
    caption: str
    jobs: int | None

    @property
    def header(self) -> list[str]:
        """Titles of all columns."""
        return ["Method", *(column.title for column in self.columns), *self.others]

    @property
    def others(self) -> list[str]:
        """Titles of the columns that follow the scores."""
        shared = f" ({self.jobs} runs at a time)" if self.jobs is not None and self.jobs > 1 else ""
        return ["MB", f"Seconds{shared}", "Needs"]

    @property
    def groups(self) -> list[tuple[str, list[str]]]:
        """Names of the tests in the order of the columns, each with the titles of its columns."""
        by_group = groupby(self.columns, key=lambda column: column.group)
        return [(group, [column.short for column in columns]) for group, columns in by_group]

    def markdown(self) -> str:
        """Return the table in GitHub Markdown, with a subheading above the references."""
        rows = []
        for line in self.lines:
            if line.is_reference and ["*References*"] not in rows:
                rows.append(["*References*"])
            cells = [cell.markdown for cell in line.cells]
            rows.append([line.name, *cells, line.megabytes, line.seconds, line.needs])
        numbers = ["right"] * (len(self.header) - 2)
        return markdown_table(self.header, rows, ("left", *numbers, "left"))

    def latex(self, label: str, note: str = "") -> str:
        """Return the table in LaTeX, which requires the packages booktabs and graphicx.

        Args:
            label: Label for references, without the prefix `tab:`.
            note: An additional sentence in the caption.
        """
        return render("comparison.tex", table=self, label=label, note=note, below=BELOW)


def make_table(
    rows: Sequence[Row],
    task: Task,
    moment: str,
    jobs: int | None = None,
    local_test_note: str = "",
) -> ComparisonTable:
    """Return the table for the last round or for the round selected by validation.

    Args:
        rows: One row for each run.
        task: Task of the runs.
        moment: `last`, or `best` for the selected round.
        jobs: Number of runs that were executed in parallel, or None if unknown.
        local_test_note: A sentence about the local test rows, for the caption.
    """
    # Imported here because a run of a joining client needs only the formats of this module.
    import pandas as pd

    columns = columns_of(rows, task, moment)
    shown = compared_methods(rows)
    frame = pd.DataFrame(rows).set_index("algorithm").sort_values("seed", kind="stable")
    seeds = sorted(set(frame["seed"]))
    by_method = frame[[column.key for column in columns]].astype(float).groupby(level=0)
    means = by_method.mean()
    deviations = by_method.std(ddof=1)
    cells = [
        _make_column(column, means[column.key], deviations[column.key], shown) for column in columns
    ]
    lines = []
    for index, label in enumerate(shown.all_labels):
        own = frame.loc[[label]]
        short = f" ({len(own)} of {len(seeds)} seeds)" if len(own) < len(seeds) else ""
        lines.append(
            TableLine(
                label,
                algorithm_name(label) + short,
                is_reference(label),
                tuple(column[index] for column in cells),
                _format_megabytes((own["up_bytes"] + own["down_bytes"]).mean() / 1e6),
                format_significant(own["seconds_total"].mean()),
                format_needs(label) or MISSING,
            )
        )
    caption = render_line(
        "table_caption.txt",
        task=task,
        columns=columns,
        needs_classes=UNDEFINED_WITHOUT_A_CLASS,
        moment=moment,
        seeds=seeds,
        references=shown.references,
        baseline=algorithm_name(str(shown.baseline)),
        below=BELOW if any(cell.below for line in lines for cell in line.cells) else "",
        undefined=_undefined_titles(rows, task, moment),
        personal=local_test_note if any(c.key.startswith("personal") for c in columns) else "",
        seconds=seconds_note(jobs),
    )
    title = "Last round" if moment == "last" else "Round selected by validation"
    return ComparisonTable(title, columns, tuple(lines), caption, jobs)


def _undefined_titles(rows: Sequence[Row], task: Task, moment: str) -> list[str]:
    """Return the titles of local test columns that are omitted because all values are undefined.

    AUROC and average precision are undefined if the test rows lack a class.
    """
    if task.kind == "regression" or not any(f"personal_{moment}_loss" in row for row in rows):
        return []
    keys = {metric: f"personal_{moment}_{metric}" for metric in shown_metrics(task).table}
    return [
        tested_metric("personal", metric)
        for metric, key in keys.items()
        if metric in UNDEFINED_WITHOUT_A_CLASS and all(row.get(key) is None for row in rows)
    ]


def _make_column(
    column: Column, means: pd.Series, deviations: pd.Series, shown: ComparedMethods
) -> list[TableCell]:
    """Return the cells of a column.

    Scores that round to the best score are also marked as best.
    """
    metric = column.metric
    best = best_method(column, means, shown)
    best_mean = math.nan if best is None else float(means[best])
    baseline = float(means[shown.baseline]) if shown.baseline else math.nan
    cells = []
    for label in shown.all_labels:
        mean = float(means[label])
        deviation = float(deviations[label])
        if math.isnan(mean):
            cells.append(TableCell(None, None, MISSING))
            continue
        printed = format_score(mean, metric)
        has_spread = not math.isnan(deviation)
        is_ranked = label in shown.federated
        cells.append(
            TableCell(
                mean,
                deviation if has_spread else None,
                f"{printed} ± {format_score(deviation, metric)}" if has_spread else printed,
                best=is_ranked
                and len(shown.federated) > 1
                and printed == format_score(best_mean, metric),
                below=is_ranked
                and is_better(metric, baseline, mean)
                and printed != format_score(baseline, metric),
            )
        )
    return cells


def best_method(column: Column, means: pd.Series, shown: ComparedMethods) -> str | None:
    """Return the federated method with the best mean in a column, or None without scores."""
    known = means[list(shown.federated)].dropna()
    if known.empty:
        return None
    return str(known.idxmin() if column.metric in SMALLER_IS_BETTER else known.idxmax())


def _format_megabytes(value: float) -> str:
    return format_significant(value, 3 if value >= 1 else 2) if value else "0"


def format_single(value: float | None, metric: str) -> str:
    """Format the score of one run as in the tables, or return a dash if the score is None."""
    return MISSING if value is None else format_score(value, metric)


def format_score(value: float, metric: str) -> str:
    """Format a score as in the tables, in percent except for errors, losses and R²."""
    if metric in ("loss", "perplexity", "mae", "rmse"):
        return format_significant(value)
    return f"{value:.3f}" if metric == "r2" else f"{100 * value:.1f}"


def format_difference(value: float, metric: str) -> str:
    """Format a difference of two scores as in the tables, with a sign unless it rounds to 0."""
    text = format_score(abs(value), metric)
    return text if not text.strip("0.") else f"{'−' if value < 0 else '+'}{text}"


@dataclass(frozen=True)
class Candidate:
    """A point of the tuning grid of a method, or a trial of a search.

    Attributes:
        algorithm: Label of the method.
        point: Settings in the format `key=value`.
        score: Mean validation score over seeds. Larger is better. None if the candidate has not
            finished with every seed.
        chosen: Whether the candidate was chosen.
        stopped_after: Round after which a search stopped the candidate, or None.
    """

    algorithm: str
    point: tuple[str, ...]
    score: float | None
    chosen: bool
    stopped_after: int | None = None


@dataclass(frozen=True)
class TuningTable:
    """The table of tuning candidates.

    Attributes:
        title: Title of the table.
        header: Titles of the columns.
        lines: One tuple for each candidate, which consists of the method, the settings, the
            validation score and whether the candidate was chosen.
        caption: Text below the table.
    """

    title: str
    header: tuple[str, str, str]
    lines: tuple[tuple[str, str, str, bool], ...]
    caption: str

    def markdown(self) -> str:
        """Return the candidates in GitHub Markdown, with the chosen ones in bold."""
        rows = [
            [name, values, f"**{text}**" if chosen else text]
            for name, values, text, chosen in self.lines
        ]
        return markdown_table(self.header, rows, ("left", "left", "right"))


def make_tuning_table(candidates: Sequence[Candidate], task: Task) -> TuningTable | None:
    """Return the table of tuning candidates, or None if there are no candidates."""
    if not candidates:
        return None
    metric, sign = selection_metric(task)
    lines = []
    for c in candidates:
        known = c.score is not None and math.isfinite(c.score)
        text = format_single(sign * c.score, metric) if c.score is not None and known else MISSING
        if c.score is None and c.stopped_after is None:
            text = "failed with a seed"
        elif c.stopped_after is not None:
            text = f"{text} (stopped after round {c.stopped_after})"
        lines.append((algorithm_name(c.algorithm), ", ".join(c.point), text, c.chosen))
    caption = render_line(
        "tuning_caption.txt",
        metric=capitalize_first(metric_name(metric)),
        has_stopped=any(c.stopped_after is not None for c in candidates),
    )
    return TuningTable(
        "Tuning candidates", ("Method", "Values", "Validation"), tuple(lines), caption
    )
