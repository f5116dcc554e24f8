"""Plots over rounds: metrics, outcomes of invitations and the privacy budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hetero_fl.reporting.formatting import (
    TEST_DESCRIPTIONS,
    byte_unit,
    capitalize_first,
    is_percentage,
    metric_name,
    task_of,
    time_unit,
)
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.shown_metrics import shown_metrics

Json = dict[str, Any]


def plot_curves(
    summary: Json, records: Sequence[Json], details: Json, x: Literal["round", "bytes", "time"]
) -> Figure | None:
    """Plot the selection metric and a second metric on all tests.

    Curves are means over clients. Bands are one standard deviation over clients.

    Args:
        summary: Content of `summary.json`.
        records: Records of the rounds.
        details: Content of `details.json`.
        x: The x axis: the round, the cumulative bytes exchanged, or the simulated time.

    Returns:
        The figure, or None if no bytes were exchanged or no simulated time passed.
    """
    positions, label = _x_axis(records, x)
    end = positions[-1] if positions else 0.0
    if not end:
        return None
    task = task_of(summary, details)
    figure = style.figure(3.1)
    for axes, metric in zip(figure.subplots(1, 2), shown_metrics(task).curves, strict=True):
        axes.set(
            title=capitalize_first(metric_name(metric, task.unit)),
            xlabel=label,
            xlim=(0, 1.04 * end),
        )
        axes.xaxis.set_major_locator(style.ticks(8, integer=x == "round"))
        axes.yaxis.set_major_locator(style.ticks())
        _draw_tests(axes, metric, positions, records, summary)
    figure.legend(handles=_tests_legend(summary), loc="outside lower center", ncols=3)
    return figure


def _x_axis(records: Sequence[Json], x: str) -> tuple[list[float], str]:
    """Return the position of each round on the x axis, and the label of the axis."""
    if x == "round" or not records:
        return [record["round"] for record in records], "round"
    if x == "bytes":
        total = np.cumsum([record["up_bytes"] + record["down_bytes"] for record in records])
        factor, unit = byte_unit(total[-1])
        return list(total / factor), f"cumulative communication ({unit})"
    ends = np.array([record.get("simulated", {"end": 0.0})["end"] for record in records])
    factor, unit = time_unit(ends[-1])
    return list(ends / factor), f"simulated {unit}"


def _draw_tests(
    axes: Axes, metric: str, positions: Sequence[float], records: Sequence[Json], summary: Json
) -> None:
    """Draw a curve for each test, with markers at the last and the selected round.

    Args:
        axes: Axes to draw on.
        metric: Name of the metric. Rounds in which the metric is undefined are omitted.
        positions: Position of each round on the x axis.
        records: Records of the rounds.
        summary: Content of `summary.json`.
    """
    for test, color in style.TEST_COLORS.items():
        points = [
            (position, record["round"], record[test])
            for position, record in zip(positions, records, strict=True)
            if (record.get(test) or {}).get(metric) is not None
        ]
        if not points:
            continue
        x, rounds, scores = zip(*points, strict=True)
        mean = np.array([score[metric] for score in scores])
        marker = style.TEST_MARKERS[test]
        axes.plot(x, mean, color=color, marker=marker, markersize=2.2, linewidth=1.5)
        deviation = [score.get(f"{metric}_std") for score in scores]
        if None not in deviation:
            style.draw_band(
                axes, x, mean, np.array(deviation), metric=metric, color=color, alpha=0.13
            )
        axes.plot(x[-1:], mean[-1:], "o", markersize=6, color=color, zorder=4, clip_on=False)
        selected = (summary[test] or {}).get("best_by_validation", {}).get("round")
        if selected in rounds:
            place = rounds.index(selected)
            axes.plot(x[place], mean[place], **_SELECTED, markeredgecolor=color)
    if not axes.lines:
        text = "undefined in all rounds:\ntest rows lack a class"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center")
    elif is_percentage(metric) or metric in ("auroc", "average_precision", "ndcg_10"):
        # The scale stays within [0, 1], and small changes are not magnified.
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(0.0, bottom), min(1.0, max(top, bottom + 0.1)))


_SELECTED: dict[str, Any] = {
    "marker": "D",
    "markersize": 7.5,
    "markerfacecolor": "none",
    "markeredgewidth": 1.4,
    "linestyle": "none",
    "zorder": 5,
    "clip_on": False,
}


def _tests_legend(summary: Json) -> list[Artist]:
    """Return the entries of a legend of the tests."""
    handles: list[Artist] = [
        Line2D(
            [],
            [],
            color=style.TEST_COLORS[test],
            marker=style.TEST_MARKERS[test],
            markersize=4,
            label=text,
        )
        for test, text in TEST_DESCRIPTIONS.items()
        if summary[test]
    ]
    band = "± one standard deviation over clients"
    handles.append(Patch(color=style.GREY, alpha=0.2, linewidth=0, label=band))
    last: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 6}
    handles.append(Line2D([], [], color=style.GREY, label="last round", **last))
    selected = "selected by validation"
    handles.append(Line2D([], [], markeredgecolor=style.GREY, label=selected, **_SELECTED))
    return handles


def plot_privacy(summary: Json, records: Sequence[Json]) -> Figure | None:
    """Plot the largest ε of any client against the round.

    Args:
        summary: Content of `summary.json`.
        records: Records of the rounds.

    Returns:
        The figure, or None for runs without differential privacy.
    """
    if not summary.get("privacy"):
        return None
    spent = [record for record in records if record.get("privacy")]
    rounds = [0, *(record["round"] for record in spent)]
    epsilon = [0.0, *(record["privacy"]["epsilon"] for record in spent)]
    figure = style.figure(2.6, style.COLUMN)
    axes = figure.subplots()
    axes.plot(rounds, epsilon, color=style.VERMILION, marker="o", markersize=2.6, linewidth=1.5)
    axes.set(
        xlabel="round",
        ylabel=f"ε spent, at δ = {summary['privacy']['delta']:g}",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.xaxis.set_major_locator(style.ticks(8, integer=True))
    return figure


OUTCOMES = {
    "arrived": style.CATEGORIES[0],
    "late": style.CATEGORIES[1],
    "failed": style.CATEGORIES[2],
}


def plot_outcomes(records: Sequence[Json]) -> Figure | None:
    """Plot the outcomes for the clients invited in each round.

    Args:
        records: Records of the rounds.

    Returns:
        The figure, or None for runs without simulated time.
    """
    if not any(_x_axis(records, "time")[0]):
        return None
    figure = style.figure(2.6, style.COLUMN)
    axes = figure.subplots()
    rounds = [record["round"] for record in records]
    width = 1.0 if len(rounds) > 60 else 0.8
    below = np.zeros(len(rounds))
    for outcome, color in OUTCOMES.items():
        counts = np.array([record["counts"][outcome] for record in records])
        label = outcome if counts.any() else ""
        axes.bar(rounds, counts, width, below, color=color, linewidth=0, label=label)
        below += counts
    top = max(below)
    if skipped := [record["round"] for record in records if record.get("skipped")]:
        marks = [1.05 * top] * len(skipped)
        label = "too few uploads: no update"
        axes.plot(skipped, marks, "x", color=style.INK, markersize=4, label=label)
    axes.set(ylim=(0, 1.12 * top), ylabel="invited clients", xlabel="round")
    axes.xaxis.set_major_locator(style.ticks(8, integer=True))
    axes.yaxis.set_major_locator(style.ticks(integer=True))
    axes.grid(axis="x", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
