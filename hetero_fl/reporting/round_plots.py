"""What happened over the rounds: `curves` (metrics by round) and `communication` (metrics by bytes exchanged)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hetero_fl.reporting import style
from hetero_fl.reporting.wording import (
    READING_WORDS,
    READINGS,
    byte_unit,
    headline_metrics,
    metric_name,
    selection,
    sentence,
)

Json = dict[str, Any]


def curves(summary: Json, records: Sequence[Json], details: Json) -> Figure:
    """The selection metric and one more by round: mean over clients on local and global test (band: ± std), and the server's."""
    figure = style.figure(3.1)
    rounds = [r for r in records if r.get("personal") or r.get("global")]
    names = headline_metrics(summary, details)
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, names, strict=True):
        for reading in READINGS:
            line(axes, reading, name, [r["round"] for r in rounds], rounds, summary)
        axes.set_title(sentence(metric_name(name, details.get("unit", ""))))
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(style.ticks())
        if not axes.lines:
            axes.text(0.5, 0.5, "undefined in every round:\na class is missing", transform=axes.transAxes, ha="center")
        if len(rounds) == 1:
            axes.set_xlim(rounds[0]["round"] - 1, rounds[0]["round"] + 1)
            axes.set_xticks([rounds[0]["round"]])
        headroom(axes, name)
    readings_legend(figure, summary, bands=True)
    return figure


def communication(summary: Json, records: Sequence[Json], details: Json) -> Figure | None:
    """The selection metric against all bytes exchanged so far, up and down; None if nothing was exchanged."""
    total = list(accumulate(r["up_bytes"] + r["down_bytes"] for r in records))
    if not total or not total[-1]:
        return None
    factor, unit = byte_unit(total[-1])
    kept = [(r, t / factor) for r, t in zip(records, total, strict=True) if r.get("personal") or r.get("global")]
    name = selection(summary, details)
    figure = style.figure(3.4, style.COLUMN)
    axes = figure.subplots()
    for reading in READINGS:
        line(axes, reading, name, [x for _, x in kept], [r for r, _ in kept], summary, band=False)
    axes.set_xlabel(f"exchanged by all clients, up and down ({unit})")
    axes.set_ylabel(metric_name(name, details.get("unit", "")))
    axes.xaxis.set_major_locator(style.ticks())
    axes.yaxis.set_major_locator(style.ticks())
    axes.set_xlim(left=0, right=1.04 * total[-1] / factor)
    headroom(axes, name)
    readings_legend(figure, summary, bands=False)
    return figure


def line(
    axes: Axes, reading: str, name: str, x: list[float], rounds: list[Json], summary: Json, band: bool = True
) -> None:
    """One reading's curve, its band, and its last and selected rounds; undefined rounds are left out."""
    points = [(at, r["round"], r[reading]) for at, r in zip(x, rounds, strict=True) if r.get(reading)]
    points = [p for p in points if p[2].get(name) is not None]
    if not points:
        return
    colour = style.READING_COLOURS[reading]
    at, mean = [p[0] for p in points], [p[2][name] for p in points]
    axes.plot(at, mean, color=colour, marker=style.READING_MARKERS[reading], markersize=2.2, linewidth=1.5)
    deviation = [p[2].get(f"{name}_std") for p in points]
    if band and all(d is not None for d in deviation):
        low = [m - d for m, d in zip(mean, deviation, strict=True)]
        high = [m + d for m, d in zip(mean, deviation, strict=True)]
        if name not in ("mae", "rmse", "perplexity"):
            high = [min(h, 1.0) for h in high]
        if len(at) > 1:
            axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
        else:  # one round has no area
            axes.vlines(at, low, high, color=colour, alpha=0.35, linewidth=5)
    axes.plot(at[-1:], mean[-1:], marker="o", markersize=6, color=colour, linestyle="none", zorder=4, clip_on=False)
    chosen = (summary[reading] or {}).get("best_by_validation", {}).get("round")
    for place, number, scores in points:
        if number == chosen:
            axes.plot([place], [scores[name]], **_SELECTED, markeredgecolor=colour)


_SELECTED: dict[str, Any] = {
    "marker": "D",
    "markersize": 7.5,
    "markerfacecolor": "none",
    "markeredgewidth": 1.4,
    "linestyle": "none",
    "zorder": 5,
    "clip_on": False,
}


def headroom(axes: Axes, name: str) -> None:
    """Shares stay within 0 and 1, and a flat curve is not magnified."""
    low, high = axes.get_ylim()
    if name in ("accuracy", "top3_accuracy", "balanced_accuracy", "auroc", "average_precision"):
        axes.set_ylim(max(0.0, low), min(1.0, max(high, low + 0.1)))


def readings_legend(figure: Figure, summary: Json, bands: bool, more: Sequence[Artist] = ()) -> None:
    """Below a figure of readings: which is which. `more`: entries after those."""
    handles: list[Artist] = [
        Line2D([], [], color=style.READING_COLOURS[r], marker=style.READING_MARKERS[r], markersize=4, label=text)
        for r, text in READING_WORDS.items()
        if summary[r]
    ]
    if bands:
        handles.append(Patch(color=style.GREY, alpha=0.2, linewidth=0, label="± one standard deviation over clients"))
    handles.append(Line2D([], [], color=style.GREY, marker="o", linestyle="none", markersize=6, label="last round"))
    handles.append(Line2D([], [], markeredgecolor=style.GREY, label="selected by validation", **_SELECTED))
    handles += more
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if figure.get_figwidth() > 6 else 1)
