"""How the methods of a comparison get where they are: global test figures against rounds, mean and spread over seeds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hetero_fl.metrics import SMALLER_IS_BETTER, selection_metric
from hetero_fl.reporting import style
from hetero_fl.reporting.methods import is_bound
from hetero_fl.reporting.wording import algorithm_name, tested_metric
from hetero_fl.task import Task

History = Sequence[Mapping[str, Any]]  # the records of one run
MANY = 10
"""Of more methods there are too many lines to follow; no picture is made."""
COLOURS = (style.BLUE, style.VERMILION, style.GREEN, *style.CATEGORIES)


def write_curves(path: Path, histories: Mapping[str, Sequence[History]], task: Task, timed: bool = False) -> None:
    """Write the picture if there is something to draw: methods that are few, and read in more than one round.

    `timed`: by simulated hours in place of rounds, of the runs that have them.
    """
    metric = _metric(task)
    lines = {label: line for label, runs in histories.items() if (line := _line(runs, metric, timed)) or not timed}
    if len(lines) <= MANY and any(len(line) > 1 for line in lines.values()):
        with style.drawing():
            path.write_bytes(style.png(_draw(lines, metric, "simulated hours" if timed else "round")))


def hours_to_reach(histories: Sequence[History], task: Task) -> list[dict[str, float]]:
    """Return for each run the simulated hours until its global test figure is what every run reaches.

    That is the best figure of the worst run, cut to two decimals. Empty if a run has no simulated time or no such figure.
    """
    metric = _metric(task)
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    curves = [[(x, values[0]) for x, values in _line([history], metric, timed=True)] for history in histories]
    if not curves or not all(curves):
        return [{} for _ in histories]
    worst = min(max(sign * value for _, value in curve) for curve in curves)
    target = math.floor(100 * worst + 1e-9) / 100
    name = f"simulated_hours_to_{metric}_{abs(target):.2f}"
    return [{name: next(x for x, value in curve if sign * value >= target)} for curve in curves]


def _metric(task: Task) -> str:
    return "accuracy" if task.kind == "multiclass" and task.outputs > 2 else selection_metric(task)[0]


def _line(runs: Sequence[History], metric: str, timed: bool = False) -> list[tuple[float, list[float]]]:
    """(round, values of the seeds) for each round that any was read in; `timed`: (mean simulated hours of the seeds, values)."""
    values: dict[int, list[float]] = {}
    hours: dict[int, list[float]] = {}
    for history in runs:
        for record in history:
            found = (record.get("global") or {}).get(metric)
            if found is not None and (not timed or "simulated" in record):
                values.setdefault(record["round"], []).append(found)
                hours.setdefault(record["round"], []).append(
                    record["simulated"]["end"] / 3600 if timed else record["round"]
                )
    return [(float(np.mean(hours[round])), values[round]) for round in sorted(values)]


def _draw(lines: Mapping[str, list[tuple[float, list[float]]]], metric: str, axis: str) -> Figure:
    figure = style.figure(3.2)
    axes = figure.subplots()
    for place, (label, line) in enumerate(lines.items()):
        rounds = [round for round, _ in line]
        mean = np.array([np.mean(values) for _, values in line])
        spread = np.array([np.std(values, ddof=1) if len(values) > 1 else 0.0 for _, values in line])
        colour, dashed = COLOURS[place % len(COLOURS)], (0, (4, 2)) if is_bound(label) or place >= len(COLOURS) else "-"
        name = textwrap.fill(algorithm_name(label), 44, max_lines=2, placeholder=" …")
        axes.plot(rounds, mean, color=colour, linestyle=dashed, label=name)
        low, high = mean - spread, mean + spread
        if metric not in SMALLER_IS_BETTER and metric != "r2":
            low, high = low.clip(0, 1), high.clip(0, 1)  # shares
        axes.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(axis)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1) if axis == "round" else style.ticks(8))
    axes.set_title(tested_metric("global", metric))
    figure.legend(loc="outside right center")
    return figure
