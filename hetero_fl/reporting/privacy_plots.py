"""What a private run has spent: `privacy` (ε by round)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hetero_fl.reporting import style

Json = dict[str, Any]


def privacy(summary: Json, records: Sequence[Json]) -> Figure | None:
    """The largest ε of any client after each round, at the run's δ; None where nothing was protected."""
    if not summary.get("privacy"):
        return None
    points = [(0, 0.0), *((r["round"], r["privacy"]["epsilon"]) for r in records if r.get("privacy"))]
    figure = style.figure(2.6, style.COLUMN)
    axes = figure.subplots()
    axes.plot(
        *zip(*points, strict=True), color=style.READING_COLOURS["global"], marker="o", markersize=2.6, linewidth=1.5
    )
    axes.set_xlabel("round")
    axes.set_ylabel(f"ε spent, at δ = {summary['privacy']['delta']:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return figure
