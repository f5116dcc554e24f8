"""Interactive plots of the documentation site, from the archives of the results.

On the site, these plots replace the pictures of the same name (see site_hooks.py). They show names
and values under the mouse pointer, and methods can be hidden by a click on the legend.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots
from plotly.utils import PlotlyJSONEncoder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.science import published  # noqa: E402
from benchmarks.science.replication_runs import jobs_of, read_record  # noqa: E402
from benchmarks.science.replication_tables import replicated_scores  # noqa: E402
from hetero_fl.experiment.benchmark.protocol import MAIN_GROUP  # noqa: E402
from hetero_fl.experiment.benchmark.results import (  # noqa: E402
    COSTS,
    EFFECT_METRICS,
    METRICS,
    PLAIN,
    BenchmarkResults,
)

WIDE_COLUMNS = 2
"""Number of panels next to each other, except on narrow screens, which have one column."""
PANEL_HEIGHT = 320
SCRIPT = "assets/plotly.min.js"
"""Path of the plotting library in the site."""
COLORS = ("#d55e00", "#0072b2", "#009e73", "#56b4e9", "#e69f00", "#b65fa5", "#8c6d46")
SHAPES = ("circle", "square", "diamond", "triangle-up", "pentagon")
GRAYS = ("#9a9a9a", "#6b6b6b")
"""Colors of methods that are not highlighted, which differ in shape."""
TICKS = tuple(digit * 10.0**power for power in range(-3, 9) for digit in (1, 2, 5))
"""Ticks of logarithmic axes."""


@cache
def benchmark() -> BenchmarkResults:
    """Return the archive of the benchmark."""
    return BenchmarkResults(ROOT / "configs" / "benchmark", ROOT / "docs" / "benchmark")


def draw_costs(name: str, columns: int = WIDE_COLUMNS) -> go.Figure | None:
    """Plot balanced accuracy against a cost, with a panel for each federation.

    Args:
        name: Name of the cost, `computation` or `bytes`.
        columns: Number of panels next to each other.

    Returns:
        The figure, or None if the archive has no runs.
    """
    results = benchmark()
    cost, label = COSTS[name]
    federations = results.groups[MAIN_GROUP]
    if not federations:
        return None
    figure = _panels([federation.title for federation in federations], columns)
    for place, federation in enumerate(federations):
        for point in results.cost_points(federation.name, cost):
            title = f"{point.method}, {point.kind}"
            figure.add_scatter(
                x=[point.cost],
                y=[point.score],
                error_y={"array": [point.deviation], "thickness": 1},
                name=point.method,
                legendgroup=point.method,
                showlegend=not any(trace.name == point.method for trace in figure.data),
                mode="markers",
                marker=_marker(point.method, point.kind),
                hovertemplate=f"{title}<br>%{{y:.1f}} ± {point.deviation:.1f}<br>%{{x:.3g}}"
                "<extra></extra>",
                row=place // columns + 1,
                col=place % columns + 1,
            )
    figure.update_xaxes(
        type="log", title=label, tickvals=TICKS, ticktext=[f"{tick:,g}" for tick in TICKS]
    )
    figure.update_yaxes(title="Balanced accuracy, global test (%)")
    return figure


def draw_effects(columns: int = WIDE_COLUMNS) -> go.Figure | None:
    """Plot the effect of components on AUROC and balanced accuracy, as lines between both rows.

    Args:
        columns: Number of panels next to each other.

    Returns:
        The figure, or None if the archive has no runs.
    """
    panels = benchmark().effects()
    if not panels:
        return None
    figure = _panels(list(panels), columns)
    for place, effects in enumerate(panels.values()):
        for effect in effects:
            (x0, y0), (x1, y1) = effect.before, effect.after
            figure.add_scatter(
                x=[x0, x1],
                y=[y0, y1],
                text=["without components", "with components"],
                name=effect.method,
                legendgroup=effect.method,
                showlegend=place == 0,
                mode="lines+markers",
                line={"color": _marker(effect.method)["color"]},
                marker={
                    **_marker(effect.method),
                    "symbol": [
                        _marker(effect.method, kind)["symbol"] for kind in (PLAIN, COMPONENTS)
                    ],
                },
                hovertemplate=f"{effect.method}, %{{text}}<br>%{{x:.1f}}, %{{y:.1f}}"
                "<extra></extra>",
                row=place // columns + 1,
                col=place % columns + 1,
            )
    x_title, y_title = (METRICS[metric] for metric in EFFECT_METRICS)
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title)
    return figure


def draw_replication() -> go.Figure:
    """Plot replicated accuracies against published accuracies, with a color for each table."""
    archive = ROOT / "docs" / "results"
    record = read_record(archive / "replication.json")
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 100], y=[0, 100], mode="lines", line={"color": "gray", "dash": "dot"}, name="equal"
    )
    for place, table in enumerate(published.TABLES.values()):
        scores = replicated_scores(table, jobs_of([table], None, "", archive, record))
        figure.add_scatter(
            x=[score.published for score in scores],
            y=[score.mean for score in scores],
            error_x={"array": [score.deviation for score in scores], "thickness": 1},
            error_y={"array": [score.spread for score in scores], "thickness": 1},
            text=[score.method for score in scores],
            name=table.title,
            mode="markers",
            marker=_style(place),
            hovertemplate="%{text}<br>published %{x:.2f}, here %{y:.2f}<extra></extra>",
        )
    figure.update_layout(height=480, legend={"orientation": "h", "y": -0.2}, **_LAYOUT)
    figure.update_xaxes(title="Published accuracy (%)", range=[55, 100], **_AXIS)
    figure.update_yaxes(title="Accuracy here (%)", range=[55, 100], **_AXIS)
    return figure


class Plot(NamedTuple):
    """An interactive plot.

    Args:
        draw: Function that draws the plot with a number of columns, or returns None without data.
        note: Sentence below the plot.
    """

    draw: Callable[[int], go.Figure | None]
    note: str = ""


COMPONENTS = "components"
"""Title of the rows with components."""
COMPONENTS_NOTE = "Hollow: without components. Filled: with components."
KINDS_NOTE = f"{COMPONENTS_NOTE} Hollow with a dot: other settings, which the pointer shows."
PLOTS = {
    "benchmark/computation.png": Plot(partial(draw_costs, "computation"), KINDS_NOTE),
    "benchmark/bytes.png": Plot(partial(draw_costs, "bytes"), KINDS_NOTE),
    "benchmark/effects.png": Plot(draw_effects, COMPONENTS_NOTE),
    "images/replication.png": Plot(lambda _: draw_replication()),
}
"""The interactive plots, keyed by the path of the picture in `docs` that they replace."""

# Transparent, so that the plots fit both color schemes of the site; site.js sets the text color.
_LAYOUT = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(128,128,128,0.07)",
    "font": {"color": "gray"},
    "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
}
_AXIS = dict.fromkeys(("gridcolor", "zerolinecolor"), "rgba(128,128,128,0.25)")


def plot_html(path: str) -> str | None:
    """Return an interactive plot as HTML, which docs/assets/site.js shows.

    The HTML contains a layout for wide and one for narrow screens, which share the data.

    Args:
        path: Path of the picture that the plot replaces, a key of `PLOTS`.

    Returns:
        The HTML, or None if the archive has no data for the plot.
    """
    plot = PLOTS[path]
    wide = plot.draw(WIDE_COLUMNS)
    narrow = plot.draw(1)
    if wide is None or narrow is None:
        return None
    figure = wide.to_plotly_json()
    layouts = {"wide": figure["layout"], "narrow": narrow.to_plotly_json()["layout"]}
    content = json.dumps({"data": figure["data"], **layouts}, cls=PlotlyJSONEncoder)
    note = f"\n<p>{plot.note}</p>" if plot.note else ""
    return (
        f'<div class="plot"><script type="application/json">{content}</script>'
        f'<div id="plot-{Path(path).stem}"></div>{note}</div>'
    )


def script() -> str:
    """Return the plotting library."""
    text: str = get_plotlyjs()
    return text


def _panels(titles: list[str], columns: int) -> go.Figure:
    rows = -(-len(titles) // columns)
    height = 120 + PANEL_HEIGHT * rows
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=titles, vertical_spacing=110 / height
    )
    figure.update_layout(height=height, legend={"orientation": "h", "y": -90 / height}, **_LAYOUT)
    figure.update_xaxes(**_AXIS)
    figure.update_yaxes(**_AXIS)
    return figure


@cache
def _methods() -> tuple[str, ...]:
    """Return the titles of all methods."""
    results = benchmark()
    # Local exchanges no bytes, so that only the plot of computation has all methods.
    cost, _ = COSTS["computation"]
    points = [
        point.method
        for federation in results.groups[MAIN_GROUP]
        for point in results.cost_points(federation.name, cost)
    ]
    return tuple(dict.fromkeys(points))


def _marker(method: str, kind: str = COMPONENTS) -> dict[str, Any]:
    """Return the marker of a method, whose color and shape are the same in all plots.

    Args:
        method: Title of the method.
        kind: Title of its settings.
    """
    suffix = {PLAIN: "-open", COMPONENTS: ""}.get(kind, "-open-dot")
    highlighted = benchmark().highlighted
    if method in highlighted:
        return _style(highlighted.index(method), suffix)
    others = [other for other in _methods() if other not in highlighted]
    place = others.index(method) if method in others else 0
    return {**_style(place, suffix), "color": GRAYS[place // len(SHAPES) % len(GRAYS)]}


def _style(place: int, suffix: str = "") -> dict[str, Any]:
    """Return the marker of the method or table at a place.

    Args:
        place: Index of its color and shape.
        suffix: Variant of the shape in Plotly, such as `-open`.
    """
    return {
        "color": COLORS[place % len(COLORS)],
        "symbol": SHAPES[place % len(SHAPES)] + suffix,
        "size": 9,
        "line": {"width": 1.5 if suffix else 0},
    }
