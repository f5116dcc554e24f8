"""Plots over rounds: metrics, traffic, privacy budget and simulated time."""

from __future__ import annotations

from collections import Counter
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
    READING_WORDS,
    READINGS,
    byte_unit,
    capitalize_first,
    headline_metrics,
    metric_name,
    selection_metric_of,
    time_unit,
)
from hetero_fl.reporting.plots import style
from hetero_fl.utils.ordering import natural_order

# What happened over the rounds: `curves` (metrics by round) and `communication` (metrics by bytes
# exchanged).

Json = dict[str, Any]


def plot_curves(summary: Json, records: Sequence[Json], details: Json) -> Figure:
    """The selection metric and one more by round: mean over clients on local and global test (band: ± std), and the server's."""
    figure = style.figure(3.1)
    rounds = [r for r in records if r.get("personal") or r.get("global")]
    names = headline_metrics(summary, details)
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, names, strict=True):
        _draw_readings(axes, name, [r["round"] for r in rounds], rounds, summary)
        axes.set(title=capitalize_first(metric_name(name, details.get("unit", ""))), xlabel="round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(style.ticks())
        if not axes.lines:
            axes.text(
                0.5,
                0.5,
                "undefined in every round:\na class is missing",
                transform=axes.transAxes,
                ha="center",
            )
        if len(rounds) == 1:
            only = rounds[0]["round"]
            axes.set(xlim=(only - 1, only + 1), xticks=[only])
    readings_legend(figure, summary, bands=True)
    return figure


def plot_communication(summary: Json, records: Sequence[Json], details: Json) -> Figure | None:
    """The selection metric against all bytes exchanged so far, up and down; None if nothing was exchanged."""
    total = list(accumulate(r["up_bytes"] + r["down_bytes"] for r in records))
    if not total or not total[-1]:
        return None
    factor, unit = byte_unit(total[-1])
    kept = [
        (r, t / factor)
        for r, t in zip(records, total, strict=True)
        if r.get("personal") or r.get("global")
    ]
    name = selection_metric_of(summary, details)
    figure = style.figure(3.4, style.COLUMN)
    axes = figure.subplots()
    x = [exchanged for _, exchanged in kept]
    _draw_readings(axes, name, x, [r for r, _ in kept], summary, band=False)
    axes.set(
        xlabel=f"exchanged by all clients, up and down ({unit})",
        ylabel=metric_name(name, details.get("unit", "")),
        xlim=(0, 1.04 * total[-1] / factor),
    )
    axes.xaxis.set_major_locator(style.ticks())
    axes.yaxis.set_major_locator(style.ticks())
    readings_legend(figure, summary, bands=False)
    return figure


def _draw_readings(
    axes: Axes,
    metric: str,
    x: Sequence[float],
    rounds: Sequence[Json],
    summary: Json,
    band: bool = True,
) -> None:
    """Draw a curve for each test set, with its band and its last and selected rounds.

    Args:
        axes: Where they are drawn.
        metric: The metric; rounds in which it is undefined are left out.
        x: The position of each round.
        rounds: Records of the rounds.
        summary: Content of `summary.json`.
        band: Whether the standard deviation over clients is drawn.
    """
    for reading in READINGS:
        points = [
            (at, record["round"], record[reading])
            for at, record in zip(x, rounds, strict=True)
            if record.get(reading) and record[reading].get(metric) is not None
        ]
        if not points:
            continue
        colour = style.READING_COLOURS[reading]
        at = [p[0] for p in points]
        mean = np.array([p[2][metric] for p in points])
        marker = style.READING_MARKERS[reading]
        axes.plot(at, mean, color=colour, marker=marker, markersize=2.2, linewidth=1.5)
        deviation = [p[2].get(f"{metric}_std") for p in points]
        if band and None not in deviation:
            low = mean - deviation
            high = mean + deviation
            if metric not in ("mae", "rmse", "perplexity"):
                high = high.clip(max=1.0)
            if len(at) > 1:
                axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
            else:  # one round has no area
                axes.vlines(at, low, high, color=colour, alpha=0.35, linewidth=5)
        axes.plot(at[-1:], mean[-1:], "o", markersize=6, color=colour, zorder=4, clip_on=False)
        chosen = (summary[reading] or {}).get("best_by_validation", {}).get("round")
        for place, number, scores in points:
            if number == chosen:
                axes.plot([place], [scores[metric]], **_SELECTED, markeredgecolor=colour)
    if metric in ("accuracy", "top3_accuracy", "balanced_accuracy", "auroc", "average_precision"):
        # shares stay within 0 and 1, and a flat curve is not magnified
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


def readings_legend(
    figure: Figure, summary: Json, bands: bool, more: Sequence[Artist] = ()
) -> None:
    """Below a figure of readings: which is which. `more`: entries after those."""
    handles: list[Artist] = [
        Line2D(
            [],
            [],
            color=style.READING_COLOURS[r],
            marker=style.READING_MARKERS[r],
            markersize=4,
            label=text,
        )
        for r, text in READING_WORDS.items()
        if summary[r]
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


# What a private run has spent: `privacy` (ε by round).


def plot_privacy(summary: Json, records: Sequence[Json]) -> Figure | None:
    """The largest ε of any client after each round, at the run's δ; None where nothing was protected."""
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
        color=style.READING_COLOURS["global"],
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


# A run in simulated time: `time` (metrics by hours, and what came of the invitations), `tasks` (who
# was at it when) and, of an asynchronous one, `staleness` (how old uploads were).

OUTCOMES = {
    "arrived": style.CATEGORIES[0],
    "late": style.CATEGORIES[1],
    "failed": style.CATEGORIES[2],
}
SHOWN = 30  # clients of whom a row is legible
ROUNDS = 15  # the first ones, whose tasks are wide enough to see


def timed_records(records: Sequence[Json]) -> list[Json]:
    """The records that tell of simulated time; none where no time passed."""
    told = [r for r in records if r.get("simulated")]
    return told if told and told[-1]["simulated"]["end"] > 0 else []


def plot_time(summary: Json, records: Sequence[Json], details: Json) -> Figure | None:
    """The selection metric by simulated time, and each round's arrivals; None if no time was simulated."""
    told = timed_records(records)
    if not told:
        return None
    factor, unit = time_unit(told[-1]["simulated"]["end"])
    figure = style.figure(3.2)
    left, right = figure.subplots(1, 2)
    name = selection_metric_of(summary, details)
    read = [r for r in told if r.get("personal") or r.get("global")]
    ends = [r["simulated"]["end"] / factor for r in read]
    _draw_readings(left, name, ends, read, summary)
    left.set(
        title=capitalize_first(metric_name(name, details.get("unit", ""))),
        xlabel=f"simulated {unit}",
        xlim=(0, 1.04 * told[-1]["simulated"]["end"] / factor),
    )
    left.xaxis.set_major_locator(style.ticks())
    _counts(right, told)
    readings_legend(figure, summary, bands=True, more=_outcomes(told))
    return figure


def _counts(axes: Axes, records: Sequence[Json]) -> None:
    rounds = [r["round"] for r in records]
    below = [0] * len(records)
    for what, colour in OUTCOMES.items():
        counts = [r["counts"][what] for r in records]
        axes.bar(
            rounds,
            counts,
            1.0 if len(records) > 60 else 0.8,
            bottom=below,
            color=colour,
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


def _outcomes(records: Sequence[Json]) -> list[Patch | Line2D]:
    marks: list[Patch | Line2D] = [
        Patch(color=colour, label=what)
        for what, colour in OUTCOMES.items()
        if any(record["counts"][what] for record in records)
    ]
    if any(r.get("skipped") for r in records):
        cross: dict[str, Any] = {
            "marker": "x",
            "color": style.INK,
            "linestyle": "none",
            "markersize": 4,
        }
        marks.append(Line2D([], [], label="too few: nothing changed", **cross))
    return marks


def plot_tasks(summary: Json, records: Sequence[Json], details: Json) -> Figure | None:
    """A Gantt chart: the tasks of up to SHOWN clients, those most often invited, in the first ROUNDS rounds; None if no time was
    simulated."""
    told = timed_records(records)[:ROUNDS]
    rows = [row for record in told for row in record["tasks"]]
    if not rows:
        return None
    often = Counter(client for client, *_ in rows)
    ids = [id for id, _ in often.most_common(SHOWN)]
    turn = {id: place for place, id in enumerate(natural_order(ids))}
    factor, unit = time_unit(told[-1]["simulated"]["end"])
    figure = style.figure(1.1 + 0.16 * max(4, len(ids)))
    axes = figure.subplots()
    for what, colour in OUTCOMES.items():
        bars = [
            (turn[client], start / factor, end / factor)
            for client, start, end, outcome in rows
            if client in turn and outcome == what
        ]
        places, starts, stops = np.array(bars).reshape(-1, 3).T
        look: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": 0.2}
        axes.barh(places, stops - starts, 0.7, left=starts, **look)
    ends: dict[str, Any] = {"color": style.GREY, "linewidth": 0.6, "linestyle": (0, (2, 2))}
    for record in told:
        axes.axvline(record["simulated"]["end"] / factor, zorder=0, **ends)
    axes.set_yticks(range(len(turn)), [style.shorten(id) for id in turn], fontsize=style.SMALLEST)
    axes.set(
        xlim=(0, 1.01 * told[-1]["simulated"]["end"] / factor),
        ylim=(len(turn) - 0.4, -0.6),
        xlabel=f"simulated {unit}",
    )
    axes.grid(visible=False)
    figure.legend(
        handles=[
            *_outcomes([{**r, "skipped": False} for r in told]),
            Line2D([], [], label="a round ends", **ends),
        ],
        loc="outside lower center",
        ncols=4,
    )
    return figure


def plot_staleness(summary: Json, records: Sequence[Json], details: Json) -> Figure | None:
    """How many versions the server had made before each upload was taken; None of a synchronous run."""
    found = Counter[int]()
    for record in records:
        found.update(
            {int(versions): count for versions, count in record.get("staleness", {}).items()}
        )
    if not found:
        return None
    figure = style.figure(2.6, style.COLUMN)
    axes = figure.subplots()
    mean = sum(versions * count for versions, count in found.items()) / found.total()
    axes.bar(list(found), list(found.values()), 0.9, color=style.CATEGORIES[0], linewidth=0)
    axes.axvline(
        mean, color=style.INK, linewidth=0.9, linestyle=(0, (4, 2)), label=f"mean {mean:.1f}"
    )
    axes.set(xlabel="versions made since the task was given out", ylabel="uploads taken")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False)
    return figure
