"""Plots of a benchmark: critical differences of ranks, and scores against costs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.league.scores import CostPoint, Effect
from hetero_fl.reporting.plots import style


def draw_ranks(ranks: Mapping[str, float], critical: float) -> Figure:
    """Plot mean ranks with a critical difference diagram (Demšar 2006, figure 1).

    Methods that are connected by a bar do not differ significantly in the Nemenyi test.

    Args:
        ranks: Mean rank of each method, keyed by title.
        critical: The critical difference of two mean ranks.
    """
    ordered = sorted(ranks, key=lambda title: ranks[title])
    half = (len(ordered) + 1) // 2
    groups = _groups([ranks[title] for title in ordered], critical)
    top = 0.9 + 0.22 * len(groups)
    figure = style.figure(0.7 + 0.2 * half + 0.16 * len(groups))
    axes = figure.subplots()
    best = 1.0
    worst = float(len(ordered))
    axes.set_xlim(best - 0.35 * (worst - 1), worst + 0.35 * (worst - 1))
    axes.set_ylim(-(top + half), 1.6)
    axes.axis("off")
    axes.plot([best, worst], [0, 0], color=style.INK, linewidth=0.9)
    for rank in range(1, len(ordered) + 1):
        axes.plot([rank, rank], [0, 0.18], color=style.INK, linewidth=0.9)
        axes.text(rank, 0.3, str(rank), ha="center", va="bottom", fontsize=7.5)
    end = min(best + critical, worst)
    axes.plot([best, end], [1.3, 1.3], color=style.GREY, linewidth=1.6)
    axes.text(
        end + 0.02 * worst,
        1.3,
        f"critical difference {critical:.2f}",
        va="center",
        fontsize=7.5,
        color=style.GREY,
    )
    for place, (begin, end) in enumerate(groups):
        y = -0.35 - 0.28 * place
        axes.plot([begin - 0.05, end + 0.05], [y, y], color=style.VERMILION, linewidth=2.4)
    for place, title in enumerate(ordered):
        is_left = place < half
        row = place if is_left else len(ordered) - 1 - place
        y = -(top + row)
        edge = best - 0.1 * (worst - 1) if is_left else worst + 0.1 * (worst - 1)
        axes.plot([ranks[title], ranks[title], edge], [0, y, y], color=style.INK, linewidth=0.7)
        text = f"{title}  {ranks[title]:.2f}" if is_left else f"{ranks[title]:.2f}  {title}"
        gap = -0.02 * worst if is_left else 0.02 * worst
        axes.text(edge + gap, y, text, ha="right" if is_left else "left", va="center", fontsize=8)
    return figure


def _groups(ranks: Sequence[float], critical: float) -> list[tuple[float, float]]:
    """Return the ends of the longest runs of sorted ranks within the critical difference."""
    found: list[tuple[float, float]] = []
    for begin in ranks:
        end = max(rank for rank in ranks if begin <= rank <= begin + critical)
        if end > begin and not (found and found[-1][1] >= end):
            found.append((begin, end))
    return found


PALETTE = (style.VERMILION, style.BLUE, style.GREEN, *style.CATEGORIES)
"""Colors of methods."""
KINDS: tuple[dict[str, Any], ...] = (
    {"marker": "o", "markerfacecolor": "white"},
    {"marker": "o"},
    {"marker": "^"},
    {"marker": "s"},
    {"marker": "D"},
)
"""Markers of the kinds of settings, in the order of their first points."""
TITLE_WIDTH = 28
"""Maximum number of characters of a panel's title on one line."""


def draw_costs(
    panels: Mapping[str, Sequence[CostPoint]], methods: Sequence[str], x_label: str, y_label: str
) -> Figure:
    """Plot scores against costs on a logarithmic axis, one panel for each federation.

    Args:
        panels: The points of each panel, keyed by title.
        methods: Titles of the methods that have a color. Other methods are gray.
        x_label: Label of the costs.
        y_label: Label of the scores.
    """
    figure, grid = _make_grid(len(panels))
    colors = dict(zip(methods, PALETTE, strict=False))
    points = [point for found in panels.values() for point in found]
    kinds = dict(zip(dict.fromkeys(point.kind for point in points), KINDS, strict=False))
    for axes, (title, found) in zip(grid.flat, panels.items(), strict=False):
        for point in sorted(found, key=lambda point: point.method in colors):
            _draw_point(axes, point, colors.get(point.method, style.LIGHT), kinds[point.kind])
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=8)
    _label_grid(figure, x_label, y_label)
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 4.5}
    handles = [
        *(Line2D([], [], color=color, label=name, **dot) for name, color in colors.items()),
        Line2D([], [], color=style.LIGHT, label="other methods", **dot),
        *(
            Line2D([], [], color=style.GREY, label=kind, **{**dot, **marker})
            for kind, marker in kinds.items()
        ),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=7.5)
    return figure


def draw_effects(
    panels: Mapping[str, Sequence[Effect]], methods: Sequence[str], x_label: str, y_label: str
) -> Figure:
    """Plot the effect of settings on two metrics as arrows, one panel for each federation.

    Args:
        panels: The effects of each panel, keyed by title.
        methods: Titles of the methods, which determine the colors.
        x_label: Label of the first metric.
        y_label: Label of the second metric.
    """
    figure, grid = _make_grid(len(panels))
    colors = dict(zip(methods, PALETTE, strict=False))
    for axes, (title, effects) in zip(grid.flat, panels.items(), strict=False):
        for effect in effects:
            color = colors[effect.method]
            axes.annotate(
                "",
                xy=effect.after,
                xytext=effect.before,
                arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.2},
            )
            axes.plot(*effect.before, "o", color=color, markerfacecolor="white", markersize=4.5)
            axes.plot(*effect.after, "o", color=color, markersize=4.5)
        axes.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=8)
    _label_grid(figure, x_label, y_label)
    handles = [Line2D([], [], color=colors[name], marker="o", label=name) for name in methods]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(methods), fontsize=7.5)
    return figure


def _make_grid(num_panels: int) -> tuple[Figure, Any]:
    """Return a figure with up to three panels in a line, and its axes, some of which are hidden."""
    columns = min(3, num_panels)
    lines = -(-num_panels // columns)
    figure = style.figure(0.9 + 2.0 * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in list(grid.flat)[num_panels:]:
        axes.set_visible(False)
    return figure, grid


def _label_grid(figure: Figure, x_label: str, y_label: str) -> None:
    figure.supxlabel(x_label, fontsize=8.5)
    figure.supylabel(y_label, fontsize=8.5)


def _draw_point(axes: Axes, point: CostPoint, color: str, marker: Mapping[str, Any]) -> None:
    axes.errorbar(
        point.cost,
        point.score,
        yerr=point.deviation,
        color=color,
        markersize=4.5,
        linewidth=0.8,
        **marker,
    )
