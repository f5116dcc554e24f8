"""How every picture looks: a paper's sizes, colours that colour-blind readers tell apart, one way to save."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from hetero_fl.core.metrics import SMALLER_IS_BETTER

WIDTH = 7.2
COLUMN = 3.5
"""Inches: the text width of most journals, and the width of one of two columns. Figures are printed at the size they have."""

SMALLEST = 7.0
"""Points: no smaller type in any figure."""

DPI = 300

# Okabe and Ito's palette (2008), less its yellow, which white paper swallows.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
# For classes, splits and models: none of the readings' colours, which mean a reading wherever they appear.
CATEGORIES = ("#56B4E9", "#E69F00", "#CC79A7", "#8C8C8C", "#000000")
READING_COLOURS = {"personal": BLUE, "global": VERMILION, "server": GREEN}
READING_MARKERS = {"personal": "o", "global": "s", "server": "^"}
GREY = "#6B6B6B"
LIGHT = "#C9CDD2"
INK, BAND = "#222222", "#F4F5F7"

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E6E9",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def plot_style() -> Iterator[None]:
    """Within it figures take this style; matplotlib's settings are as before afterwards."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure (inches) that draws into memory; pyplot and its windows are not involved."""
    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(made)
    return made


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, cropped to what is drawn, without the version stamp: equal figures give equal bytes."""
    buffer = BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=DPI,
        bbox_inches="tight",
        pad_inches=0.06,
        metadata={"Software": None},
    )
    return buffer.getvalue()


def embed_picture(picture: bytes) -> dict[str, Any]:
    """Return the data of a PNG for an HTML page, and the width at which it is shown.

    At that width type is one and a half times as large as on paper.
    """
    width = int.from_bytes(picture[16:20], "big")
    return {"data": b64encode(picture).decode("ascii"), "width": round(width * 140 / DPI)}


def shorten(text: str, length: int = 18) -> str:
    """A label that fits. Cut in the middle: names of one family differ at their ends."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def ticks(most: int = 5) -> MaxNLocator:
    """At most so many steps between ticks, each 1, 2 or 5 times a power of ten."""
    return MaxNLocator(most, steps=[1, 2, 5, 10])


def remove_axes(axes: Axes) -> None:
    """No grid and no frame: for pictures made of cells."""
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def text_color(shade: float) -> str:
    """The colour of writing on a cell of the map `Blues` at this shade (0 to 1)."""
    return "white" if shade > 0.55 else INK


SLANTED: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
"""Properties of tick labels that would run into each other otherwise."""


def draw_band(
    axes: Axes,
    x: Sequence[float],
    mean: np.ndarray,
    deviation: np.ndarray,
    metric: str,
    color: str,
    alpha: float,
) -> None:
    """Draw a band of one standard deviation around a curve.

    Args:
        axes: Where the curve is.
        x: Its positions.
        mean: Its values.
        deviation: Their standard deviations.
        metric: What they measure; bands of shares stay within 0 and 1.
        color: The color of the curve.
        alpha: Opacity of the band.
    """
    low = mean - deviation
    high = mean + deviation
    if metric not in SMALLER_IS_BETTER and metric != "r2":
        low = low.clip(0, 1)
        high = high.clip(0, 1)
    axes.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0)


def add_colorbar(figure: Figure, image: AxesImage, axes: Any, label: str, **place: Any) -> Axes:
    """Add a color bar without a frame, and return its axes.

    Args:
        figure: The figure.
        image: The image whose colors it explains.
        axes: The axes, or all axes, that make room for it.
        label: What the colors stand for.
        place: Size and padding, as `Figure.colorbar` takes them.
    """
    bar = figure.colorbar(image, ax=axes, **place)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar.ax


def thin_labels(count: int, most: int) -> range:
    """Positions of at most `most` labels, evenly apart, of `count`."""
    return range(0, count, -(-count // most))
