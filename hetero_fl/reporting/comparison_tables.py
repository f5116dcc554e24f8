"""The tables of a comparison: which columns, mean and spread over seeds, the best, paired p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from hetero_fl.reporting.comparison_columns import Column, Entrants, Row, columns_of, entrants
from hetero_fl.reporting.comparison_notes import caption_of, p_value, seconds_note
from hetero_fl.reporting.methods import is_bound, needed
from hetero_fl.reporting.wording import MISSING, algorithm_name, better, digits
from hetero_fl.task import Task

BELOW = "↓"
"""Marks figures below the line to beat."""


@dataclass(frozen=True)
class Cell:
    """One algorithm in one column: mean and sample standard deviation over seeds, None where there are none; `below`: worse
    than the line to beat."""

    mean: float | None
    deviation: float | None
    text: str
    best: bool = False
    below: bool = False


@dataclass(frozen=True)
class Line:
    """One algorithm's line: its cells, its p-value against the best, megabytes and seconds a run, what it needs."""

    algorithm: str
    name: str
    bound: bool
    cells: tuple[Cell, ...]
    p: str
    megabytes: str
    seconds: str
    needs: str


@dataclass(frozen=True)
class Table:
    """A table of a comparison; the first column is the one that p-values are about, the bounds come last."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    caption: str
    tested: bool
    jobs: int | None

    @property
    def header(self) -> list[str]:
        """Names of all columns."""
        return ["Method", *(column.title for column in self.columns), *self.others]

    @property
    def others(self) -> list[str]:
        """Names of the columns after the metrics."""
        shared = f" ({self.jobs} runs at a time)" if self.jobs is not None and self.jobs > 1 else ""
        return [*(["p"] if self.tested else []), "MB", f"Seconds{shared}", "Needs"]

    @property
    def groups(self) -> list[tuple[str, list[str]]]:
        """Test sets in the order of the columns, each with the titles of its columns."""
        by_group = groupby(self.columns, key=lambda column: column.group)
        return [(group, [column.short for column in columns]) for group, columns in by_group]


def make_table(rows: Sequence[Row], task: Task, moment: str, jobs: int | None = None, home: str = "") -> Table:
    """The table of the `last` round or of the one selected by validation (`best`).

    `jobs`: so many runs shared the machine (None: unknown). `home`: a sentence on the local test rows.
    """
    columns, shown = columns_of(rows, task, moment), entrants(rows)
    algorithms, federated = list(shown.all), list(shown.federated)
    seeds = sorted({row["seed"] for row in rows})
    several = len(seeds) > 1
    values = {
        a: {c.key: {r["seed"]: float(r[c.key]) for r in _of(rows, a) if r.get(c.key) is not None} for c in columns}
        for a in algorithms
    }
    cells = {a: [_cell(list(values[a][c.key].values()), c.metric, several) for c in columns] for a in algorithms}
    for place, column in enumerate(columns):
        _mark_best(cells, federated, place, column.metric)
        _mark_below(cells, shown, place, column.metric)
    leader = _leader(cells, federated, columns[0].metric) if columns else None
    lines = []
    for a in algorithms:
        own = _of(rows, a)
        p = ""
        if leader is not None and several and not is_bound(a):
            first = columns[0].key
            p = "best" if a == leader else p_value(values[a][first], values[leader][first])
        short = f" ({len(own)} of {len(seeds)} seeds)" if len(own) < len(seeds) else ""
        total = [(row["up_bytes"] + row["down_bytes"]) / 1e6 for row in own]
        lines.append(
            Line(
                a,
                algorithm_name(a) + short,
                is_bound(a),
                tuple(cells[a]),
                p,
                _megabytes(float(np.mean(total))),
                digits(float(np.mean([row["seconds_total"] for row in own]))),
                needed(a) or MISSING,
            )
        )
    title = "Last round" if moment == "last" else "Round selected by validation"
    tested = any(line.p not in ("", "best") for line in lines)
    first, bounds = columns[0].title if columns else "", len(federated) < len(algorithms)
    caption = caption_of(first, seeds, [line.p for line in lines], bounds, task)
    if any(cell.below for line in lines for cell in line.cells):
        caption += f" {BELOW} worse than {algorithm_name(str(shown.baseline))}."
    if any(column.key.startswith("personal") for column in columns) and home:
        caption += f" {home}"
    return Table(title, columns, tuple(lines), f"{caption} {seconds_note(jobs)}", tested, jobs)


def _of(rows: Sequence[Row], algorithm: str) -> list[Row]:
    return sorted((row for row in rows if row["algorithm"] == algorithm), key=lambda row: row["seed"])


def _cell(values: list[float], metric: str, several: bool) -> Cell:
    if not values:
        return Cell(None, None, MISSING)
    mean = float(np.mean(values))
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    text = _number(mean, metric)
    return Cell(
        mean, deviation, f"{text} ± {_number(deviation, metric)}" if several and deviation is not None else text
    )


def _megabytes(value: float) -> str:
    return digits(value, 3 if value >= 1 else 2) if value else "0"


def single(value: float | None, metric: str) -> str:
    """One run's value as the tables print it."""
    return MISSING if value is None else _number(value, metric)


def _number(value: float, metric: str) -> str:
    if metric in ("loss", "perplexity", "mae", "rmse"):
        return digits(value)
    return f"{value:.3f}" if metric == "r2" else f"{100 * value:.1f}"


def _mark_best(cells: dict[str, list[Cell]], algorithms: list[str], place: int, metric: str) -> None:
    """Mark the best of a column, and whatever prints the same."""
    leader = _leader(cells, algorithms, metric, place)
    if leader is None or len(algorithms) < 2:
        return
    top = cells[leader][place].mean
    for a in algorithms:
        cell = cells[a][place]
        if cell.mean is not None and top is not None and _number(cell.mean, metric) == _number(top, metric):
            cells[a][place] = replace(cell, best=True)


def _mark_below(cells: dict[str, list[Cell]], shown: Entrants, place: int, metric: str) -> None:
    """Mark in a column whatever competes and is worse, as printed, than the line to beat."""
    line = cells[shown.baseline][place].mean if shown.baseline else None
    for a in shown.federated:
        cell = cells[a][place]
        if cell.mean is None or line is None or _number(cell.mean, metric) == _number(line, metric):
            continue
        if better(metric, line, cell.mean):
            cells[a][place] = replace(cell, below=True)


def _leader(cells: Mapping[str, Sequence[Cell]], algorithms: list[str], metric: str, place: int = 0) -> str | None:
    found: str | None = None
    for a in algorithms:
        mean = cells[a][place].mean
        top = cells[found][place].mean if found is not None else None
        if mean is not None and (top is None or better(metric, mean, top)):
            found = a
    return found
