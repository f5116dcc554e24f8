"""Style of all plots, with sizes for printing and colors for color-blind readers."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
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


def add_legend(figure: Figure, columns: int = 3) -> None:
    """Add one legend below a figure for the labels of all panels."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    place: Any = "outside lower center"
    figure.legend(list(handles.values()), list(handles), loc=place, ncols=columns)


def draw_band(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    mean: np.ndarray,
    deviation: np.ndarray,
    *,
    metric: str,
    color: str,
    alpha: float,
    label: str = "",
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
        label: Text of the legend.
    """
    limits = np.stack([mean - deviation, mean + deviation])
    if metric not in SMALLER_IS_BETTER and metric != "r2":
        limits = limits.clip(0, 1)
    # A band at a single point has no area, so it is drawn as a thick line.
    width = 0 if len(x) > 1 else 5
    axes.fill_between(x, *limits, color=color, alpha=alpha, linewidth=width, label=label)


def draw_grid(count: int, side: float, xlabel: str, ylabel: str) -> tuple[Figure, list[Axes]]:
    """Create a figure with a grid of square panels, with labels at its left and lower border.

    Args:
        count: Number of panels.
        side: Side of a panel in inches, with its title.
        xlabel: Label of the x axes.
        ylabel: Label of the y axes.
    """
    columns = min(4, count)
    rows = -(-count // columns)
    made = figure(rows * side + 1.0, min(WIDTH, columns * side + 1.0))
    # The compressed layout removes the space between square panels.
    made.set_layout_engine("compressed")
    grid = [made.add_subplot(rows, columns, position) for position in range(1, count + 1)]
    for index, axes in enumerate(grid):
        is_left = index % columns == 0
        is_lowest = index + columns >= count
        axes.set_box_aspect(1)
        axes.tick_params(labelleft=is_left, labelbottom=is_lowest)
        axes.set(xlabel=xlabel if is_lowest else "", ylabel=ylabel if is_left else "")
    return made, grid


def draw_heat_map(
    axes: Axes,
    shades: np.ndarray,
    names: Sequence[str],
    columns: Sequence[str],
    *,
    texts: Sequence[Sequence[str]] = (),
    largest: float | None = None,
    max_labels: int = 40,
) -> AxesImage:
    """Draw a matrix as a heat map with labels.

    Args:
        axes: Axes to draw on.
        shades: The matrix. NaN is drawn in gray.
        names: Labels of the rows.
        columns: Labels of the columns.
        texts: Texts of the cells, row by row. If empty, the cells have no text.
        largest: Value of the darkest color. If None, the maximum of the matrix.
        max_labels: Maximum number of labels of the rows and of the columns. Of more labels, every
            second, third, ... one is shown.
    """
    image = axes.imshow(
        shades, aspect="auto", cmap="Blues", vmin=0, vmax=largest, interpolation="nearest"
    )
    remove_axes(axes)
    axes.set_facecolor(NO_DATA)
    depth = np.asarray(image.norm(shades))
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": MIN_FONT_SIZE}
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            # The relative depth of NaN is not above 0.55, so that its text is dark.
            is_dark = depth[row, column] > 0.55
            axes.text(column, row, text, color="white" if is_dark else INK, **look)
    for axis, labels in ((axes.xaxis, columns), (axes.yaxis, names)):
        shown = range(0, len(labels), -(-len(labels) // max_labels))
        axis.set_ticks(shown, [shorten(labels[i], 14) for i in shown], fontsize=MIN_FONT_SIZE)
    is_narrow = len(columns) * max(map(len, columns)) > 20
    axes.tick_params(axis="x", rotation=90 if is_narrow else 0)
    return image


def add_colorbar(figure: Figure, image: AxesImage, label: str) -> Axes:
    """Add a color bar without a frame at the right of a figure."""
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.03, pad=0.015, aspect=30)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(ticks())
    return bar.ax
