"""Plots over rounds: metrics, traffic, privacy budget and simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hetero_fl.reporting.formatting import (
    TEST_DESCRIPTIONS,
    TEST_NAMES,
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


def plot_curves(summary: Json, records: Sequence[Json], details: Json) -> Figure:
    """Plot the selection metric and a second metric against the round, on all tests.

    Curves are means over clients. Bands are one standard deviation over clients.

    Args:
        summary: Content of `summary.json`.
        records: Records of the rounds.
        details: Content of `details.json`.
    """
    figure = style.figure(3.1)
    rounds = [r for r in records if r.get("personal") or r.get("global")]
    names = shown_metrics(task_of(summary, details)).curves
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, names, strict=True):
        _draw_tests(axes, name, [r["round"] for r in rounds], rounds, summary=summary)
        axes.set(title=capitalize_first(metric_name(name, details.get("unit", ""))), xlabel="round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(style.ticks())
        if not axes.lines:
            axes.text(
                0.5,
                0.5,
                "undefined in all rounds:\ntest rows lack a class",
                transform=axes.transAxes,
                ha="center",
            )
        if len(rounds) == 1:
            only = rounds[0]["round"]
            axes.set(xlim=(only - 1, only + 1), xticks=[only])
    tests_legend(figure, summary, bands=True)
    return figure


def plot_communication(summary: Json, records: Sequence[Json], details: Json) -> Figure | None:
    """Plot the selection metric against the cumulative number of exchanged bytes.

    Args:
        summary: Content of `summary.json`.
        records: Records of the rounds.
        details: Content of `details.json`.

    Returns:
        The figure, or None if no bytes were exchanged.
    """
    total = list(accumulate(r["up_bytes"] + r["down_bytes"] for r in records))
    if not total or not total[-1]:
        return None
    factor, unit = byte_unit(total[-1])
    kept = [
        (r, t / factor)
        for r, t in zip(records, total, strict=True)
        if r.get("personal") or r.get("global")
    ]
    name = shown_metrics(task_of(summary, details)).selection
    figure = style.figure(3.4, style.COLUMN)
    axes = figure.subplots()
    x = [exchanged for _, exchanged in kept]
    _draw_tests(axes, name, x, [r for r, _ in kept], summary=summary, band=False)
    axes.set(
        xlabel=f"cumulative communication ({unit})",
        ylabel=metric_name(name, details.get("unit", "")),
        xlim=(0, 1.04 * total[-1] / factor),
    )
    axes.xaxis.set_major_locator(style.ticks())
    axes.yaxis.set_major_locator(style.ticks())
    tests_legend(figure, summary, bands=False)
    return figure


def _draw_tests(
    axes: Axes,
    metric: str,
    x: Sequence[float],
    rounds: Sequence[Json],
    *,
    summary: Json,
    band: bool = True,
) -> None:
    """Draw a curve for each test, with markers at the last and the selected round.

    Args:
        axes: Axes to draw on.
        metric: Name of the metric. Rounds in which the metric is undefined are omitted.
        x: Position of each round on the x axis.
        rounds: Records of the rounds.
        summary: Content of `summary.json`.
        band: Whether to draw the standard deviation over clients.
    """
    for test in TEST_NAMES:
        points = [
            (at, record["round"], record[test])
            for at, record in zip(x, rounds, strict=True)
            if record.get(test) and record[test].get(metric) is not None
        ]
        if not points:
            continue
        color = style.TEST_COLORS[test]
        at = [p[0] for p in points]
        mean = np.array([p[2][metric] for p in points])
        marker = style.TEST_MARKERS[test]
        axes.plot(at, mean, color=color, marker=marker, markersize=2.2, linewidth=1.5)
        deviation = [p[2].get(f"{metric}_std") for p in points]
        if band and None not in deviation:
            low = mean - deviation
            high = mean + deviation
            if metric not in ("mae", "rmse", "perplexity"):
                high = high.clip(max=1.0)
            if len(at) > 1:
                axes.fill_between(at, low, high, color=color, alpha=0.13, linewidth=0)
            else:
                # A filled area would be empty.
                axes.vlines(at, low, high, color=color, alpha=0.35, linewidth=5)
        axes.plot(at[-1:], mean[-1:], "o", markersize=6, color=color, zorder=4, clip_on=False)
        selected = (summary[test] or {}).get("best_by_validation", {}).get("round")
        for position, round_idx, scores in points:
            if round_idx == selected:
                axes.plot([position], [scores[metric]], **_SELECTED, markeredgecolor=color)
    if is_percentage(metric) or metric in ("auroc", "average_precision", "ndcg_10"):
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


def tests_legend(figure: Figure, summary: Json, bands: bool, more: Sequence[Artist] = ()) -> None:
    """Add a legend of the tests below a figure.

    Args:
        figure: Figure to which the legend is added.
        summary: Content of `summary.json`.
        bands: Whether the figure has bands of one standard deviation.
        more: Additional entries.
    """
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
    if bands:
        handles.append(
            Patch(
                color=style.GREY,
                alpha=0.2,
                linewidth=0,
                label="± one standard deviation over clients",
            )
        )
    handles.append(
        Line2D(
            [], [], color=style.GREY, marker="o", linestyle="none", markersize=6, label="last round"
        )
    )
    handles.append(
        Line2D([], [], markeredgecolor=style.GREY, label="selected by validation", **_SELECTED)
    )
    handles += more
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3 if figure.get_figwidth() > 6 else 1
    )


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
    points = [
        (0, 0.0),
        *((r["round"], r["privacy"]["epsilon"]) for r in records if r.get("privacy")),
    ]
    figure = style.figure(2.6, style.COLUMN)
    axes = figure.subplots()
    axes.plot(
        *zip(*points, strict=True),
        color=style.TEST_COLORS["global"],
        marker="o",
        markersize=2.6,
        linewidth=1.5,
    )
    axes.set(
        xlabel="round",
        ylabel=f"ε spent, at δ = {summary['privacy']['delta']:g}",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


OUTCOMES = {
    "arrived": style.CATEGORIES[0],
    "late": style.CATEGORIES[1],
    "failed": style.CATEGORIES[2],
}


def timed_records(records: Sequence[Json]) -> list[Json]:
    """Return the records with simulated time, or an empty list if no simulated time passed."""
    timed = [r for r in records if r.get("simulated")]
    return timed if timed and timed[-1]["simulated"]["end"] > 0 else []


def plot_time(summary: Json, records: Sequence[Json], details: Json) -> Figure | None:
    """Plot the selection metric against simulated time, and client outcomes against the round.

    Args:
        summary: Content of `summary.json`.
        records: Records of the rounds.
        details: Content of `details.json`.

    Returns:
        The figure, or None for runs without simulated time.
    """
    timed = timed_records(records)
    if not timed:
        return None
    factor, unit = time_unit(timed[-1]["simulated"]["end"])
    figure = style.figure(3.2)
    left, right = figure.subplots(1, 2)
    name = shown_metrics(task_of(summary, details)).selection
    evaluated = [r for r in timed if r.get("personal") or r.get("global")]
    ends = [r["simulated"]["end"] / factor for r in evaluated]
    _draw_tests(left, name, ends, evaluated, summary=summary)
    left.set(
        title=capitalize_first(metric_name(name, details.get("unit", ""))),
        xlabel=f"simulated {unit}",
        xlim=(0, 1.04 * timed[-1]["simulated"]["end"] / factor),
    )
    left.xaxis.set_major_locator(style.ticks())
    _draw_outcomes(right, timed)
    tests_legend(figure, summary, bands=True, more=_outcome_handles(timed))
    return figure


def _draw_outcomes(axes: Axes, records: Sequence[Json]) -> None:
    rounds = [r["round"] for r in records]
    below = [0] * len(records)
    for outcome, color in OUTCOMES.items():
        counts = [r["counts"][outcome] for r in records]
        axes.bar(
            rounds,
            counts,
            1.0 if len(records) > 60 else 0.8,
            bottom=below,
            color=color,
            linewidth=0,
        )
        below = [a + b for a, b in zip(below, counts, strict=True)]
    skipped = [r["round"] for r in records if r.get("skipped")]
    top = max(below)
    axes.plot(skipped, [1.05 * top] * len(skipped), "x", color=style.INK, markersize=4)
    axes.set(ylim=(0, 1.12 * top), title="Invited clients", xlabel="round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="x", visible=False)


def _outcome_handles(records: Sequence[Json]) -> list[Patch | Line2D]:
    marks: list[Patch | Line2D] = [
        Patch(color=color, label=outcome)
        for outcome, color in OUTCOMES.items()
        if any(record["counts"][outcome] for record in records)
    ]
    if any(r.get("skipped") for r in records):
        cross: dict[str, Any] = {
            "marker": "x",
            "color": style.INK,
            "linestyle": "none",
            "markersize": 4,
        }
        marks.append(Line2D([], [], label="too few uploads: no update", **cross))
    return marks
