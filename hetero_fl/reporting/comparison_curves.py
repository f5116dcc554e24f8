"""How the methods of a comparison get where they are: the figure in common against rounds, mean and spread over seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hetero_fl.metrics import SMALLER_IS_BETTER, selection_metric
from hetero_fl.reporting import style
from hetero_fl.reporting.methods import is_bound
from hetero_fl.reporting.wording import METRICS, READINGS, algorithm_name, sentence
from hetero_fl.task import Task

History = Sequence[Mapping[str, Any]]  # the records of one run
MANY = 10
"""Of more methods there are too many lines to follow; no picture is made."""
COLOURS = (style.BLUE, style.VERMILION, style.GREEN, *style.CATEGORIES)


def write_curves(path: Path, histories: Mapping[str, Sequence[History]], task: Task) -> None:
    """Write the picture if there is something to draw: methods that are few, and read in more than one round."""
    metric = "accuracy" if task.kind == "multiclass" and task.outputs > 2 else selection_metric(task)[0]
    lines = {label: _line(runs, metric) for label, runs in histories.items()}
    if len(lines) <= MANY and any(len(line) > 1 for line in lines.values()):
        with style.drawing():
            path.write_bytes(style.png(_draw(lines, metric)))


def _line(runs: Sequence[History], metric: str) -> list[tuple[int, list[float]]]:
    """(round, values of the seeds) for each round that any was read in."""
    values: dict[int, list[float]] = {}
    for history in runs:
        for record in history:
            found = (record.get("global") or {}).get(metric)
            if found is not None:
                values.setdefault(record["round"], []).append(found)
    return sorted(values.items())


def _draw(lines: Mapping[str, list[tuple[int, list[float]]]], metric: str) -> Figure:
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
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(style.ticks(8))
    axes.set_title(f"{sentence(METRICS[metric])} {READINGS['global']}")
    figure.legend(loc="outside right center")
    return figure
