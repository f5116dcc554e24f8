"""Tables of the benchmark `replication`, with scores of finished runs and published scores."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.common import mean_text
from benchmarks.science.published import Row, Table
from benchmarks.science.replication_runs import Job
from hetero_fl.reporting.plots import style


def difference(row: Row, ours: Sequence[float]) -> str:
    """Describe the difference of a mean score from the published score.

    The text states whether the difference is within two standard deviations, which are those of the
    paper or else those over the seeds. The text is empty if there is no published score or no run.

    Args:
        row: Row of the table.
        ours: Scores for each seed.
    """
    if row.mean is None or not ours:
        return ""
    distance = statistics.mean(ours) - row.mean
    deviation = row.deviation or (statistics.stdev(ours) if len(ours) > 1 else None)
    if deviation is None:
        return f"{distance:+.2f}"
    return f"{distance:+.2f} ({'within' if abs(distance) <= 2 * deviation else 'outside'} 2σ)"


def given(mean: float | None, deviation: float | None) -> str:
    """Format the score of a paper, which is empty if `mean` is None."""
    return "" if mean is None else f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation else "")


def against(row: Row, held: Sequence[float]) -> list[str]:
    """Compare scores of the authors' evaluation with published and corrected scores.

    Args:
        row: Row of the table.
        held: Accuracies on the clients' own classes, for each seed.

    Returns:
        Three table cells: the difference from the published score, the corrected score, and the
        difference from the corrected score.
    """
    mean, deviation = row.mended or (None, None)
    again = replace(row, mean=mean, deviation=deviation)
    return [difference(row, held), given(mean, deviation), difference(again, held)]


def score_table(table: Table, jobs: Sequence[Job]) -> str:
    """Format the scores of a table in Markdown.

    Args:
        table: The table.
        jobs: Runs of the table. Only finished runs are included in the scores.
    """
    extra = "own classes, last" if table.held else "best test round"
    head = ["method", "published", "last", "selected", "last − published", extra]
    head += (
        ["own − published", "corrected", "own − corrected", "seeds"] if table.held else ["seeds"]
    )
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in dict.fromkeys(job.row for job in jobs):
        done = [job.figures for job in jobs if job.row == row and job.finished]
        last = [figures["last"] for figures in done]
        published = given(row.mean, row.deviation)
        other = [figures[table.third_figure] for figures in done]
        cells = [
            row.method,
            published,
            mean_text(last) if last else "not run",
            mean_text([figures["selected"] for figures in done]) if done else "",
            difference(row, last),
            mean_text(other) if done else "",
            *(against(row, other) if table.held else []),
            ", ".join(str(figures["seed"]) for figures in done),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


ReplicatedRow = tuple[Row, list[float]]
"""A published row, and the accuracy of each seed in percent, evaluated as in the paper."""


def replicated_rows(table: Table, jobs: Sequence[Job]) -> list[ReplicatedRow]:
    """Return the rows of a table that are published and repeated, after the last round.

    Args:
        table: The table.
        jobs: Runs of the table. Runs that are not finished are left out.
    """
    key = table.third_figure if table.held else "last"
    scores = {
        row: [job.figures[key] for job in jobs if job.row == row and job.finished]
        for row in table.rows
        if row.mean is not None
    }
    return [(row, found) for row, found in scores.items() if found]


def draw_scores(tables: Mapping[str, Sequence[ReplicatedRow]]) -> Figure:
    """Plot repeated scores against published scores, with standard deviations.

    Args:
        tables: The rows of each table, keyed by title.
    """
    figure = style.figure(4.2)
    axes = figure.subplots()
    for (title, rows), marker in zip(tables.items(), cycle("osD^v"), strict=False):
        axes.errorbar(
            [row.mean for row, _ in rows],
            [statistics.mean(scores) for _, scores in rows],
            xerr=[row.deviation or 0.0 for row, _ in rows],
            yerr=[statistics.stdev(scores) if len(scores) > 1 else 0.0 for _, scores in rows],
            fmt=marker,
            elinewidth=0.8,
            label=title,
        )
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    axes.axline((low, low), slope=1, color=style.GREY, linewidth=0.9, linestyle=":")
    axes.set_xlabel("Published accuracy (%)")
    axes.set_ylabel("Accuracy here (%)")
    axes.legend(loc="upper left")
    return figure


def write(jobs: Sequence[Job], out: Path) -> str:
    """Write the tables of all runs to `replication.md` in a folder, and return the tables."""
    tables = dict.fromkeys(job.table for job in jobs)
    text = "\n".join(
        f"## {table.title}\n\n{score_table(table, [job for job in jobs if job.table is table])}\n"
        for table in tables
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "replication.md").write_text(
        "# Replication\n\nAccuracy in percent.\n\n" + text, encoding="utf-8"
    )
    return text
