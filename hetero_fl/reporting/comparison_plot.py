"""The picture of a comparison: every method at home and in common, and what it exchanged."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hetero_fl.reporting import style
from hetero_fl.reporting.comparison_tables import Row, is_bound
from hetero_fl.reporting.wording import METRICS, algorithm_name, byte_unit, sentence, size
from hetero_fl.task import Task

_WORDS = {"personal": "at home", "global": "in common", "server": "server's own model"}


def draw(rows: Sequence[Row], task: Task) -> Figure:
    """A line a method: mean and standard deviation over seeds at the last round, seeds as faint points, and bytes.

    The two metrics are those that the tables begin with. Bounds stand below a rule.
    """
    algorithms = list(dict.fromkeys(str(row["algorithm"]) for row in rows))
    federated = [a for a in algorithms if not is_bound(a)]
    algorithms = [*federated, *(a for a in algorithms if is_bound(a))]
    names = {"regression": ("mae", "r2"), "multilabel": ("auroc", "balanced_accuracy")}
    shown = names.get(task.kind, ("balanced_accuracy", "auroc") if task.outputs == 2 else ("accuracy", "auroc"))
    labels = [textwrap.fill(algorithm_name(a), 24, max_lines=3, placeholder=" …") for a in algorithms]
    figure = style.figure(1.2 + 0.2 * len(algorithms) + 0.14 * sum(label.count("\n") + 1 for label in labels))
    present = [r for r in _WORDS if any(row.get(f"{r}_last_{m}") is not None for row in rows for m in shown)]
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    for axes, metric in zip(panels[:2], shown, strict=True):
        for place, reading in enumerate(present):
            _dots(axes, rows, algorithms, reading, metric, 0.2 * (place - (len(present) - 1) / 2))
        axes.set_title(sentence(METRICS[metric]))
    _bytes(panels[2], rows, algorithms)
    panels[0].set_yticks(range(len(algorithms)), labels)
    panels[0].set_ylim(len(algorithms) - 0.4, -0.6)
    for axes in panels:
        axes.grid(axis="y", visible=False)
        if 0 < len(federated) < len(algorithms):
            axes.axhline(len(federated) - 0.5, color=style.GREY, linewidth=0.8, linestyle=(0, (3, 3)))
    handles = []
    for reading in present:
        look: dict[str, Any] = {"color": style.READING_COLOURS[reading], "marker": style.READING_MARKERS[reading]}
        handles.append(Line2D([], [], markersize=5, linestyle="none", label=_WORDS[reading], **look))
    if len({row["seed"] for row in rows}) > 1:
        handles.append(Line2D([], [], color=style.GREY, linewidth=1.3, label="± std over seeds"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _dots(axes: Axes, rows: Sequence[Row], algorithms: Sequence[str], reading: str, metric: str, offset: float) -> None:
    key, colour = f"{reading}_last_{metric}", style.READING_COLOURS[reading]
    for place, algorithm in enumerate(algorithms):
        values = [row[key] for row in rows if row["algorithm"] == algorithm and row.get(key) is not None]
        if not values:
            continue
        if len(values) > 1:
            axes.plot(values, [place + offset] * len(values), ".", markersize=5, color=colour, alpha=0.35, mew=0)
        axes.errorbar(
            float(np.mean(values)),
            place + offset,
            xerr=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            color=colour,
            marker=style.READING_MARKERS[reading],
            markersize=5,
            elinewidth=1.2,
            markerfacecolor="white" if is_bound(algorithm) else colour,
        )


def _bytes(axes: Axes, rows: Sequence[Row], algorithms: Sequence[str]) -> None:
    means = []
    for algorithm in algorithms:
        totals = [row["up_bytes"] + row["down_bytes"] for row in rows if row["algorithm"] == algorithm]
        means.append(float(np.mean(totals)))
    factor, unit = byte_unit(max(means))
    axes.barh(range(len(algorithms)), [m / factor for m in means], 0.6, color=style.LIGHT)
    for place, mean in enumerate(means):
        axes.annotate(
            size(mean) if mean else "nothing",
            (mean / factor, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.set_xlim(0, 1.45 * max(means) / factor or 1)
    axes.set_title(f"Exchanged ({unit})" if max(means) else "Exchanged")
