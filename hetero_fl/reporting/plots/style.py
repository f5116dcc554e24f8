"""Style of all plots, with sizes for printing and colors for color-blind readers."""

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
from matplotlib.transforms import Bbox
from PIL import Image

from hetero_fl.core.metrics import SMALLER_IS_BETTER

WIDTH = 7.2
"""Width of a figure in inches, the text width of most journals."""

COLUMN = 3.5
"""Width of a figure in inches that fits one of two columns."""

MIN_FONT_SIZE = 7.0
"""Smallest font size in points."""

DPI = 300
MARGIN = 0.06
"""Width of the white margin around a picture, in inches."""

# The palette of Okabe and Ito (2008) without yellow, which is hard to see on white.
BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
# Colors of classes, splits and models, which differ from the colors of test sets.
CATEGORIES = ("#56B4E9", "#E69F00", "#CC79A7", "#8C8C8C", "#000000")
TEST_COLORS = {"personal": BLUE, "global": VERMILION, "server": GREEN}
TEST_MARKERS = {"personal": "o", "global": "s", "server": "^"}
GREY = "#6B6B6B"
LIGHT = "#C9CDD2"
INK = "#222222"
BAND = "#F4F5F7"
# Cells without data, clearly darker than 0% in the color map `Blues`.
NO_DATA = "#DDDDDD"

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
    """Apply this style to figures in a context.

    Matplotlib's settings are restored on exit.
    """
    with matplotlib.rc_context(_SETTINGS):
        yield


def figure(height: float, width: float = WIDTH) -> Figure:
    """Create an empty figure without pyplot.

    Args:
        height: Height in inches.
        width: Width in inches.
    """
    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(made)
    return made


def to_png(figure: Figure) -> bytes:
    """Render a figure as a PNG, cropped to its content and a margin.

    Equal figures result in equal bytes.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    content, page = figure.get_tightbbox(), figure.bbox_inches
    buffer = BytesIO()
    if np.array_equal(Bbox.union([content, page]).extents, page.extents):
        visible = Bbox.intersection(content.padded(MARGIN), page) or page
        left, bottom, right, top = visible.extents * DPI
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        cropped = picture.crop((left, picture.height - top, right, picture.height - bottom))
        cropped.save(buffer, "png", dpi=(DPI, DPI))
    else:
        # Parts are outside of the figure, such as a wide legend, so it is drawn on a larger canvas.
        options: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": MARGIN}
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, **options)
    return buffer.getvalue()


def embed_picture(picture: bytes) -> dict[str, Any]:
    """Return the base64 data and the width in CSS pixels of a PNG for an HTML page."""
    width = int.from_bytes(picture[16:20], "big")
    return {"data": b64encode(picture).decode("ascii"), "width": round(width * 140 / DPI)}


def shorten(text: str, length: int = 18) -> str:
    """Shorten a label with more than `length` characters in the middle.

    The end is kept, because similar names often differ only at the end.
    """
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def ticks(most: int = 5, integer: bool = False) -> MaxNLocator:
    """Return a tick locator for at most `most` intervals of 1, 2 or 5 times a power of ten.

    With `integer`, all ticks are integers.
    """
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=integer, min_n_ticks=1 if integer else 2)


def remove_axes(axes: Axes) -> None:
    """Remove the grid, the frame and the tick marks, for plots of matrices."""
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def text_color(shade: float) -> str:
    """Return a readable color for text on a cell of the color map `Blues`.

    Args:
        shade: Position of the cell in the color map, in [0, 1].
    """
    return "white" if shade > 0.55 else INK


SLANTED: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
"""Properties of slanted tick labels, which do not overlap."""


def draw_band(
    axes: Axes,
    x: Sequence[float],
    mean: np.ndarray,
    deviation: np.ndarray,
    *,
    metric: str,
    color: str,
    alpha: float,
) -> None:
    """Draw a band of one standard deviation around a curve.

    Args:
        axes: Axes of the curve.
        x: Positions of the points on the x axis.
        mean: Values of the curve.
        deviation: Standard deviations.
        metric: Name of the metric. The band is clipped to [0, 1], except for `r2` and the metrics
            in `SMALLER_IS_BETTER`.
        color: Color of the curve.
        alpha: Opacity of the band.
    """
    limits = np.stack([mean - deviation, mean + deviation])
    if metric not in SMALLER_IS_BETTER and metric != "r2":
        limits = limits.clip(0, 1)
    # A band at a single point has no area, so it is drawn as a thick line.
    width = 0 if len(x) > 1 else 5
    axes.fill_between(x, *limits, color=color, alpha=alpha, linewidth=width)


def add_colorbar(figure: Figure, image: AxesImage, axes: Any, label: str, **place: Any) -> Axes:
    """Add a color bar without a frame to a figure.

    Args:
        figure: Figure that contains the axes.
        image: Image whose colors the color bar explains.
        axes: The axes, or a list of axes, next to which the color bar is placed.
        label: Label of the color bar.
        **place: Size and padding, passed to `Figure.colorbar`.

    Returns:
        The axes of the color bar.
    """
    bar = figure.colorbar(image, ax=axes, **place)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar.ax


def evenly_spaced_positions(count: int, max_labels: int) -> range:
    """Return at most `max_labels` evenly spaced positions that start at 0 and are below `count`.

    Both arguments must be positive.
    """
    return range(0, count, -(-count // max_labels))
