"""The tables of `replication.py`: scores of finished runs next to published ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.science.published import Row, Table
from benchmarks.science.replication_runs import Job


def spread(values: Sequence[float]) -> str:
    """Format mean ± standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "not run"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def difference(row: Row, ours: Sequence[float]) -> str:
    """Return the difference to the paper and whether it is within two standard deviations."""
    if row.mean is None or not ours:
        return ""
    distance = statistics.mean(ours) - row.mean
    deviation = row.deviation or (statistics.stdev(ours) if len(ours) > 1 else None)
    if deviation is None:
        return f"{distance:+.2f}"
    return f"{distance:+.2f} ({'within' if abs(distance) <= 2 * deviation else 'outside'} 2σ)"


def given(mean: float | None, deviation: float | None) -> str:
    """Format the score of a paper."""
    return "" if mean is None else f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation else "")


def against(row: Row, held: Sequence[float]) -> list[str]:
    """Compare the evaluation of the authors' code with published and corrected scores."""
    mean, deviation = row.mended or (None, None)
    again = replace(row, mean=mean, deviation=deviation)
    return [difference(row, held), given(mean, deviation), difference(again, held)]


def score_table(table: Table, jobs: Sequence[Job]) -> str:
    """Return the scores of a table's runs in Markdown."""
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
        other = [figures["held" if table.held else "best_test_round"] for figures in done]
        cells = [
            row.method,
            published,
            spread(last),
            spread([figures["selected"] for figures in done]) if done else "",
            difference(row, last),
            spread(other) if done else "",
            *(against(row, other) if table.held else []),
            ", ".join(str(figures["seed"]) for figures in done),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(jobs: Sequence[Job], out: Path) -> str:
    """Write all tables to `replication.md` and return them."""
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
