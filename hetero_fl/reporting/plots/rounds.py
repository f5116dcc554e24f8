"""Plots over rounds: metrics, outcomes of invitations and the privacy budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    if not positions.any():
        return None
    task = task_of(summary, details)
    figure = style.figure(3.1)
    for axes, metric in zip(figure.subplots(1, 2), shown_metrics(task).curves, strict=True):
        axes.set(title=capitalize_first(metric_name(metric, task.unit)), xlabel=label)
        axes.set_xlim(0, 1.04 * positions[-1])
        axes.xaxis.set_major_locator(style.ticks(8, integer=x == "round"))
        axes.yaxis.set_major_locator(style.ticks())
        for test in style.TEST_COLORS:
            selected = (summary[test] or {}).get("best_by_validation", {}).get("round")
            draw_curve(axes, records, positions, test=test, metric=metric, selected=selected)
        if not axes.lines:
            text = "undefined in all rounds:\ntest rows lack a class"
            axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center")
        elif is_percentage(metric) or metric in ("auroc", "average_precision", "ndcg_10"):
            # The scale stays within [0, 1], and small changes are not magnified.
            bottom, top = axes.get_ylim()
            axes.set_ylim(max(0.0, bottom), min(1.0, max(top, bottom + 0.1)))
    style.add_legend(figure)
    return figure


def _x_axis(records: Sequence[Json], x: str) -> tuple[np.ndarray, str]:
    """Return the position of each round on the x axis, and the label of the axis."""
    if x == "round":
        return np.array([record["round"] for record in records]), "round"
    if x == "bytes":
        total = np.cumsum([record["up_bytes"] + record["down_bytes"] for record in records])
        factor, unit = byte_unit(max(total, default=0))
        return total / factor, f"cumulative communication ({unit})"
    ends = np.array([record.get("simulated", {"end": 0.0})["end"] for record in records])
    factor, unit = time_unit(max(ends, default=0.0))
    return ends / factor, f"simulated {unit}"


def draw_curve(
    axes: Axes,
    records: Sequence[Json],
    positions: np.ndarray,
    *,
    test: str,
    metric: str,
    selected: int | None,
) -> None:
    """Draw a metric on one test as a curve with a band, and mark the selected round.

    Args:
        axes: Axes to draw on.
        records: Records of the rounds.
        positions: Position of each round on the x axis.
        test: Key of the test. Nothing is drawn if the metric is undefined in all rounds.
        metric: Name of the metric. Rounds in which the metric is undefined are omitted.
        selected: The round that validation selects, or None.
    """
    mean = _series(records, test, metric)
    known = np.isfinite(mean)
    if not known.any():
        return
    color = style.TEST_COLORS[test]
    look: dict[str, Any] = {"color": color, "marker": style.TEST_MARKERS[test], "markersize": 2.5}
    axes.plot(positions[known], mean[known], label=TEST_DESCRIPTIONS[test], **look)
    deviation = _series(records, test, f"{metric}_std")[known]
    if np.isfinite(deviation).all():
        band: dict[str, Any] = {"label": "± one standard deviation over clients", "alpha": 0.13}
        style.draw_band(
            axes, positions[known], mean[known], deviation, metric=metric, color=color, **band
        )
    if selected is not None and known[selected - 1]:
        place = slice(selected - 1, selected)
        ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": color, "zorder": 5}
        label = "selected by validation"
        axes.plot(positions[place], mean[place], "D", markersize=7.5, label=label, **ring)


def _series(records: Sequence[Json], test: str, name: str) -> np.ndarray:
    """Return a score in each round, which is NaN if it is undefined."""
    return np.array([(record.get(test) or {}).get(name) for record in records], dtype=float)


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
    spent = {
        record["round"]: record["privacy"]["epsilon"] for record in records if record.get("privacy")
    }
    figure = style.figure(2.6, style.COLUMN)
    axes = figure.subplots()
    axes.plot(
        [0, *spent], [0.0, *spent.values()], color=style.VERMILION, marker="o", markersize=2.6
    )
    axes.set(xlabel="round", ylabel=f"ε spent, at δ = {summary['privacy']['delta']:g}")
    axes.set(xlim=(0, None), ylim=(0, None))
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
    rounds, label = _x_axis(records, "round")
    if not _x_axis(records, "time")[0].any():
        return None
    figure = style.figure(2.6, style.COLUMN)
    axes = figure.subplots()
    below = np.zeros(len(rounds))
    for outcome, color in OUTCOMES.items():
        counts = np.array([record["counts"][outcome] for record in records])
        axes.bar(rounds, counts, bottom=below, color=color, linewidth=0, label=outcome)
        below += counts
    skipped = np.array([bool(record.get("skipped")) for record in records])
    if skipped.any():
        text = "too few uploads: no update"
        axes.plot(rounds[skipped], below[skipped], "x", color=style.INK, label=text)
    axes.set(ylabel="invited clients", xlabel=label)
    axes.xaxis.set_major_locator(style.ticks(8, integer=True))
    axes.yaxis.set_major_locator(style.ticks(integer=True))
    style.add_legend(figure, columns=2)
    return figure
