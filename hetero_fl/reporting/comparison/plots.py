"""Plots of a comparison: scores of all methods, and learning curves."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.facts import ComparedMethods, Row, compared_methods
from hetero_fl.reporting.comparison.gains import GainTable
from hetero_fl.reporting.formatting import (
    TEST_DESCRIPTIONS,
    TEST_NAMES,
    algorithm_name,
    capitalize_first,
    format_bytes,
    format_duration,
    metric_name,
    tested_metric,
)
from hetero_fl.reporting.methods import is_reference, method_needs
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.shown_metrics import shown_metrics

LABEL_WIDTH = 25
"""Maximum number of characters of a method's name on one line."""

MANY = 16
"""Number of methods above which the rows of the plot are closer together."""


def draw_comparison(rows: Sequence[Row], task: Task, jobs: int | None = None) -> Figure:
    """Plot the scores, bytes, time and requirements of each method.

    Scores are from the last round and are shown as mean and standard deviation over seeds. Faint
    points are single seeds. A score that is undefined in some seed of a method is left out. A
    dotted line marks the baseline. References are below a dashed line.

    Args:
        rows: One row for each run.
        task: Task of the runs.
        jobs: Number of runs that were executed in parallel, or None if unknown.
    """
    shown = compared_methods(rows)
    metrics = [
        m
        for m in shown_metrics(task).table
        if any(row.get(f"{test}_last_{m}") is not None for row in rows for test in TEST_NAMES)
    ]
    labels = [_wrap_name(label) for label in shown.all_labels]
    wanted = Counter(
        word for label in shown.all_labels for need in method_needs(label) for word in need
    )
    needed = [word for word, _ in wanted.most_common()]
    pitch, line = (0.2, 0.14) if len(labels) <= MANY else (0.12, 0.13)
    height = 1.2 + pitch * len(labels) + line * sum(label.count("\n") + 1 for label in labels)
    figure = style.figure(height + (0.07 * max(map(len, needed)) if needed else 0))
    present = [
        test
        for test in TEST_NAMES
        if any(row.get(f"{test}_last_{m}") is not None for row in rows for m in metrics)
    ]
    # The last panel is at least as wide as its title.
    widths = [*(2.4 for _ in metrics), 1.7, 1.7, max(1.0, 0.34 * len(needed))]
    panels = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
    *scores, exchanged, time, needs_axes = panels
    for axes, metric in zip(scores, metrics, strict=True):
        for place, test in enumerate(present):
            offset = 0.2 * (place - (len(present) - 1) / 2)
            _draw_scores(axes, rows, shown, test=test, metric=metric, offset=offset)
        axes.set_title(_wrap_title(capitalize_first(metric_name(metric, task.unit))))
        axes.xaxis.set_major_locator(style.ticks(3))
        axes.tick_params(axis="x", labelsize=8 if len(metrics) < 4 else style.MIN_FONT_SIZE)
    _bars(
        exchanged,
        [
            [row["up_bytes"] + row["down_bytes"] for row in _rows_of_label(rows, label)]
            for label in shown.all_labels
        ],
        format_bytes,
    )
    exchanged.set_title("Bytes")
    _bars(
        time,
        [
            [row["seconds_total"] for row in _rows_of_label(rows, label)]
            for label in shown.all_labels
        ],
        format_duration,
    )
    time.set_title("Time" if jobs == 1 else "Time\n(shared)")
    needs = [method_needs(label) for label in shown.all_labels]
    _draw_needs(needs_axes, needs, needed)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    for axes in panels:
        axes.set_title(axes.get_title("left"), fontsize=8)
        axes.grid(axis="y", visible=False)
        for place in range(1, len(labels), 2):
            axes.axhspan(place - 0.5, place + 0.5, color=style.BAND, linewidth=0, zorder=0)
        if shown.federated and shown.references:
            axes.axhline(
                len(shown.federated) - 0.5, color=style.GREY, linewidth=0.8, linestyle=(0, (3, 3))
            )
        if axes is not panels[0]:
            axes.tick_params(axis="y", length=0)
    # The vertical labels of the requirements leave space for a legend at the top.
    handles = _handles(rows, shown, present)
    if any(len(alternatives) > 1 for need in needs for alternatives in need):
        label = "needs one of these"
        handles.append(Line2D([], [], markerfacecolor="white", label=label, **DOT))
    if needed:
        figure.legend(handles=handles, loc="upper left", ncols=2)
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def _wrap_title(title: str) -> str:
    """Wrap the title of a panel, with longer lines if the title would be higher than the legend."""
    lines = textwrap.wrap(title, 12)
    return "\n".join(lines if len(lines) < 3 else textwrap.wrap(title, 17))


def _wrap_name(label: str) -> str:
    """Wrap the name of a method to at most three lines, without line breaks within settings."""
    name = _short_name(label).replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    lines = textwrap.wrap(name, LABEL_WIDTH, max_lines=3, placeholder=" …")
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _short_name(label: str) -> str:
    """Return the display name of a method, with short keys of client settings."""
    return algorithm_name(label).replace("clients.defaults.", "")


def _rows_of_label(rows: Sequence[Row], label: str) -> list[Row]:
    return [row for row in rows if row["algorithm"] == label]


def _draw_scores(
    axes: Axes,
    rows: Sequence[Row],
    shown: ComparedMethods,
    *,
    test: str,
    metric: str,
    offset: float,
) -> None:
    key = f"{test}_last_{metric}"
    color = style.TEST_COLORS[test]
    for place, label in enumerate(shown.all_labels):
        runs = _rows_of_label(rows, label)
        values = [row[key] for row in runs if row.get(key) is not None]
        if len(values) < len(runs):
            continue
        mean = float(np.mean(values))
        if label == shown.baseline:
            axes.axvline(mean, color=color, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)
        if len(values) > 1:
            axes.plot(
                values,
                [place + offset] * len(values),
                ".",
                markersize=5,
                color=color,
                alpha=0.35,
                mew=0,
            )
        axes.errorbar(
            mean,
            place + offset,
            xerr=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            color=color,
            marker=style.TEST_MARKERS[test],
            markersize=5,
            elinewidth=1.2,
            markerfacecolor="white" if label in shown.references else color,
        )


def _bars(
    axes: Axes, values: Sequence[Sequence[float]], format_value: Callable[[float], str]
) -> None:
    """Draw the mean of each method as a bar, labeled with the value."""
    means = [float(np.mean(v)) for v in values]
    axes.barh(range(len(means)), means, 0.6, color=style.LIGHT)
    for place, mean in enumerate(means):
        text = format_value(mean) if mean else "none"
        axes.annotate(
            text, (mean, place), xytext=(2, 0), textcoords="offset points", va="center", fontsize=7
        )
    axes.set_xlim(0, 2.5 * max(means) or 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


DOT: dict[str, Any] = {
    "marker": "o",
    "markersize": 4.5,
    "color": style.INK,
    "mew": 0.9,
    "linestyle": "none",
}


def _draw_needs(
    axes: Axes, needs: Sequence[Sequence[tuple[str, ...]]], needed: Sequence[str]
) -> None:
    """Draw a dot for each requirement of a method, which is hollow if there are alternatives."""
    for row, needs_of_method in enumerate(needs):
        for need in needs_of_method:
            for word in need:
                face = "white" if len(need) > 1 else style.INK
                axes.plot(needed.index(word), row, markerfacecolor=face, **DOT)
    axes.set_xlim(-0.6, max(len(needed), 1) - 0.4)
    axes.set_xticks(range(len(needed)), needed, rotation=90)
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0, labelsize=7.5)
    axes.set_title("Needs" if needed else "")
    axes.spines["bottom"].set_visible(False)


def _handles(rows: Sequence[Row], shown: ComparedMethods, present: Sequence[str]) -> list[Line2D]:
    handles = [
        Line2D(
            [],
            [],
            color=style.TEST_COLORS[test],
            marker=style.TEST_MARKERS[test],
            markersize=5,
            linestyle="none",
            label=TEST_DESCRIPTIONS[test],
        )
        for test in present
    ]
    if len({row["seed"] for row in rows}) > 1:
        handles.append(
            Line2D([], [], color=style.GREY, linewidth=1.3, label="± standard deviation over seeds")
        )
    if shown.baseline and len(shown.all_labels) > 1:
        dotted: dict[str, Any] = {"color": style.GREY, "linewidth": 0.9, "linestyle": (0, (1, 1.5))}
        handles.append(
            Line2D([], [], label=f"{algorithm_name(shown.baseline)}, the baseline", **dotted)
        )
    return handles


def draw_gains(tables: Sequence[GainTable], methods: Sequence[str]) -> Figure:
    """Plot the gain of each client over the baseline with each method, one panel for each test.

    Args:
        tables: The tables of the tests, which list the same clients.
        methods: Labels of all methods of the comparison, in the order of the learning curves, so
            that a method has the same color in both plots.
    """
    looks = dict(zip(methods, (cycler(marker="os^") * cycler(color=COLORS))(), strict=False))
    clients = tables[0].listed
    figure = style.figure(1.3 + 0.3 * len(clients))
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, table in zip(panels, tables, strict=True):
        # The methods of a client lie below each other.
        offsets = np.linspace(-0.2, 0.2, table.gains.shape[1])
        for offset, (method, gains) in zip(offsets, table.gains.loc[clients].items(), strict=True):
            axes.plot(
                gains,
                np.arange(len(clients)) + offset,
                linestyle="",
                markersize=5,
                label=_short_name(str(method)),
                **looks[str(method)],
            )
        axes.axvline(0, color=style.GREY, linewidth=0.9, zorder=1)
        axes.set(
            title=tested_metric(table.test, table.metric),
            xlabel=f"gain over {algorithm_name(table.baseline)}, {table.unit}",
            yticks=range(len(clients)),
            yticklabels=clients,
            ylim=(len(clients) - 0.5, -0.5),
        )
        axes.xaxis.set_major_locator(style.ticks(5))
        axes.xaxis.set_major_formatter(lambda gain, _, table=table: table.format(gain))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


History = Sequence[Mapping[str, Any]]
"""Records of the rounds of one run."""

MANY_CURVES = 10
"""Maximum number of methods in a plot of learning curves.

With more methods, no plot is written.
"""

COLORS = (style.BLUE, style.VERMILION, style.GREEN, *style.CATEGORIES)


def write_curves(
    path: Path, histories: Mapping[str, Sequence[History]], task: Task, timed: bool = False
) -> None:
    """Write a plot of the global test score of each method against the round or simulated time.

    The curves are the mean and standard deviation over seeds. Nothing is written if there are more
    than 10 methods, or if no method was evaluated in several rounds.

    Args:
        path: Path of the PNG file.
        histories: Records of the runs of each method, keyed by label.
        task: Task of the runs.
        timed: Whether the x axis is simulated hours instead of rounds.
    """
    metric = shown_metrics(task).table[0]
    lines = {
        label: line
        for label, runs in histories.items()
        if (line := _curve_points(runs, metric, timed)) or not timed
    }
    if len(lines) <= MANY_CURVES and any(len(line) > 1 for line in lines.values()):
        with style.plot_style():
            path.write_bytes(
                style.to_png(
                    _draw_curves(
                        lines, list(histories), metric, "simulated hours" if timed else "round"
                    )
                )
            )


def hours_to_reach(histories: Sequence[History], task: Task) -> list[dict[str, float]]:
    """Return the simulated hours until each run reaches a target score on the global test.

    The target is the best score of the worst run, rounded down to two decimals.

    Args:
        histories: Records of each run.
        task: Task of the runs.

    Returns:
        A dictionary for each run that contains the hours, keyed by the column name, such as
        `simulated_hours_to_accuracy_0.80`. All dictionaries are empty if any run has no simulated
        time or no scores.
    """
    metric = shown_metrics(task).table[0]
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    curves = [
        [(x, values[0]) for x, values in _curve_points([history], metric, timed=True)]
        for history in histories
    ]
    if not curves or not all(curves):
        return [{} for _ in histories]
    worst = min(max(sign * value for _, value in curve) for curve in curves)
    target = math.floor(100 * worst + 1e-9) / 100
    name = f"simulated_hours_to_{metric}_{abs(target):.2f}"
    return [{name: next(x for x, value in curve if sign * value >= target)} for curve in curves]


def _curve_points(
    runs: Sequence[History], metric: str, timed: bool = False
) -> list[tuple[float, list[float]]]:
    """Return the points of a learning curve, each with the scores of all seeds.

    Args:
        runs: Records of the runs of a method.
        metric: Name of the metric.
        timed: Whether the position of a point is the mean of the simulated hours, not the round.
    """
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
    return [(float(np.mean(hours[round_idx])), values[round_idx]) for round_idx in sorted(values)]


def _draw_curves(
    lines: Mapping[str, list[tuple[float, list[float]]]],
    methods: Sequence[str],
    metric: str,
    axis: str,
) -> Figure:
    """Plot the points of the lines, with the colors of the methods of the comparison."""
    figure = style.figure(3.2)
    axes = figure.subplots()
    for label, line in lines.items():
        place = methods.index(label)
        x = [position for position, _ in line]
        mean = np.array([np.mean(values) for _, values in line])
        spread = np.array(
            [np.std(values, ddof=1) if len(values) > 1 else 0.0 for _, values in line]
        )
        color = COLORS[place % len(COLORS)]
        dashed = (0, (4, 2)) if is_reference(label) or place >= len(COLORS) else "-"
        name = textwrap.fill(_short_name(label), 44, max_lines=2, placeholder=" …")
        axes.plot(x, mean, color=color, linestyle=dashed, label=name)
        style.draw_band(axes, x, mean, spread, metric=metric, color=color, alpha=0.15)
    axes.set_xlabel(axis)
    axes.xaxis.set_major_locator(
        MaxNLocator(8, integer=True, min_n_ticks=1) if axis == "round" else style.ticks(8)
    )
    axes.set_title(tested_metric("global", metric))
    handles: list[Artist] = [*axes.get_legend_handles_labels()[0]]
    if any(len(values) > 1 for line in lines.values() for _, values in line):
        handles.append(
            Patch(
                color=style.GREY,
                alpha=0.2,
                linewidth=0,
                label="± standard deviation\nover seeds",
            )
        )
    figure.legend(handles=handles, loc="outside right center")
    return figure
