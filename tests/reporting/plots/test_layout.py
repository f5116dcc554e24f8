"""Texts of figures do not overlap and are large enough for all kinds of federations."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from hetero_fl.reporting.plots import PLOTS, style
from hetero_fl.reporting.run_directory import RunDirectory

LONG = "university_hospital_of_north_rhine_"


def test_content_outside_of_a_figure_is_not_cut() -> None:
    figure = style.figure(height=1.0, width=2.0)
    figure.text(0.5, 0.1, "inside")
    figure.text(0.5, 1.5, "above")

    height = int.from_bytes(style.to_png(figure)[20:24], "big")

    assert height > 1.3 * style.DPI


def named(run: RunDirectory) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Return the run's files with long names of clients and classes."""
    content = json.dumps([run.summary(), run.metrics(), run.details()])
    content = content.replace('"hospital_', f'"{LONG}').replace('"clinic_', f'"{LONG}')
    content = content.replace('"normal"', '"no finding whatsoever"').replace(
        '"pneumonia"', '"bacterial pneumonia"'
    )
    summary, records, details = json.loads(content)
    return summary, records, details


def texts(figure: Figure) -> list[Text]:
    """Return visible texts except rotated ones, whose bounding boxes overlap wrongly."""
    with style.plot_style():
        FigureCanvasAgg(figure).draw()
    found = [
        t
        for t in figure.findobj(Text)
        if isinstance(t, Text) and t.get_visible() and t.get_text().strip()
    ]
    hidden = [t for axes in figure.axes if not axes.get_visible() for t in axes.findobj(Text)]
    ticks = [t for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for t in _outside(axis)]
    return [t for t in found if t not in hidden and t not in ticks and t.get_rotation() % 180 == 0]


def _outside(axis: Any) -> list[Text]:
    """Return tick labels outside the axis limits, which are not drawn."""
    drawn = axis._update_ticks()
    return [
        t
        for tick in [*axis.majorTicks, *axis.minorTicks]
        if tick not in drawn
        for t in (tick.label1, tick.label2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("clients", [6, 20, 60])
@pytest.mark.parametrize(
    ("classes", "kind"), [(2, "binary"), (10, "multiclass")], ids=["two", "ten"]
)
def test_labels_do_not_overlap(
    made_run: Callable[..., RunDirectory], clients: int, classes: int, kind: str, long: bool
) -> None:
    run = made_run(clients=clients, classes=classes, kind=kind, rounds=1 if long else 12)
    summary, records, details = (
        named(run) if long else (run.summary(), run.metrics(), run.details())
    )
    names = ("curves", "clients", "labels", "communication", "confusion", "calibration")
    with style.plot_style():
        figures = {name: PLOTS[name](summary, records, details) for name in names}
    for name, figure in figures.items():
        assert figure is not None and figure.get_figwidth() <= style.WIDTH
        shown = texts(figure)
        assert all(t.get_fontsize() >= style.MIN_FONT_SIZE for t in shown), name
        boxes = [(t.get_text(), t.get_window_extent().padded(-1.5)) for t in shown]
        if name == "confusion":
            (bar,) = (axes for axes in figure.axes if not axes.images and axes.get_visible())
            boxes.append(("the color bar", bar.get_window_extent()))
        for (first, a), (second, b) in combinations(boxes, 2):
            assert not a.overlaps(b), (name, first, second)


def test_similar_method_names_stay_distinct() -> None:
    short = [style.shorten(f"{LONG}{k}") for k in range(3)]
    assert len(set(short)) == 3 and max(map(len, short)) == 18
    assert style.shorten("hospital_1") == "hospital_1"
