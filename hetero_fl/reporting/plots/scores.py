"""Plots of errors: confusion matrices, calibration and forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from hetero_fl.reporting.formatting import (
    TEST_NAMES,
    client_score,
    format_metric,
    local_test_rows,
    task_of,
)
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.shown_metrics import shown_metrics

Json = dict[str, Any]

PANELS = 12
"""Maximum number of panels in a figure.

With more clients, the figure shows all clients together and the clients with the lowest scores.
"""

MAX_LABELS = 16
"""Maximum number of labels of a multilabel task that have a confusion matrix."""

ALL = "all clients"


def plot_confusion(summary: Json, details: Json) -> Figure | None:
    """Plot confusion matrices after the last round, normalized by true class.

    For up to 12 clients, the figure shows a matrix for the global test of each client. With more
    clients, it shows a matrix for all clients together and the matrices of the 11 clients with the
    lowest scores. Without a global test, the local test is used. For multilabel tasks, the figure
    shows a matrix for each of the first 16 labels, for all clients together.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.

    Returns:
        The figure, or None for tasks without classes.
    """
    by_client = _order_clients(details["confusion"], summary)
    matrices = _confusion_matrices(by_client, "global") or _confusion_matrices(
        by_client, "personal"
    )
    if not matrices:
        return None
    names = details["labels"]
    total = np.sum(list(matrices.values()), axis=0)
    if total.ndim == 3:
        by_label = dict(zip(names[:MAX_LABELS], total, strict=False))
        return _matrices(by_label, ["absent", "present"])
    return _matrices(_with_all(matrices, summary, details, np.add), names)


def _confusion_matrices(by_client: Mapping[str, Json], test: str) -> dict[str, np.ndarray]:
    """Return the confusion matrices of the clients with rows of a test, keyed by client id."""
    return {
        client_id: np.array(found[test], dtype=float)
        for client_id, found in by_client.items()
        if found.get(test)
    }


def _matrices(panels: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Draw a panel for each matrix of counts `[true, predicted]`, keyed by title."""
    columns = min(4, len(panels))
    figure, grid = _grid(len(panels), columns, 1.35, between=0.3, around=1.0)
    for index, (axes, (title, matrix)) in enumerate(zip(grid, panels.items(), strict=True)):
        left = index % columns == 0
        below = index + columns >= len(panels)
        axes.set_title(style.shorten(title, 14), fontsize=8, loc="center")
        _matrix(axes, matrix, names, left=left, below=below)
        if left:
            axes.set_ylabel("true class", fontsize=8)
        if below:
            axes.set_xlabel("predicted class", fontsize=8)
    size = {"fraction": 0.03, "pad": 0.015, "aspect": 30}
    bar = style.add_colorbar(
        figure, grid[0].images[0], grid, "fraction of rows of the true class", **size
    )
    bar.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _grid(
    count: int, columns: int, side: float, between: float, around: float
) -> tuple[Figure, list[Axes]]:
    """Create a figure with a grid of square panels.

    Args:
        count: Number of panels.
        columns: Number of columns.
        side: Side of a panel in inches.
        between: Space between rows in inches.
        around: Space around the grid in inches.
    """
    rows = -(-count // columns)
    figure = style.figure(
        rows * (side + between) + around, min(style.WIDTH, columns * (side + 0.2) + around)
    )
    # The compressed layout removes the space between square panels.
    figure.set_layout_engine("compressed")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _matrix(
    axes: Axes, matrix: np.ndarray, names: Sequence[str], *, left: bool, below: bool
) -> None:
    classes = len(names)
    totals = matrix.sum(1, keepdims=True)
    # The share is NaN for classes without test rows, so that they do not look like 0%.
    share = np.where(totals > 0, matrix / np.maximum(totals, 1), np.nan)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    style.remove_axes(axes)
    axes.set_facecolor(style.NO_DATA)
    if classes <= 4:
        for row, column in np.ndindex(classes, classes):
            is_known = np.isfinite(share[row, column])
            text = (
                f"{100 * share[row, column]:.0f}%\n{matrix[row, column]:.0f}"
                if is_known
                else "no\nrows"
            )
            color = style.text_color(share[row, column]) if is_known else style.INK
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=style.MIN_FONT_SIZE,
                linespacing=1.15,
                color=color,
            )
    shown = list(style.evenly_spaced_positions(classes, 10))
    labels = [style.shorten(names[c], 11) for c in shown]
    hidden = [""] * len(shown)
    axes.set_yticks(shown, labels if left else hidden, fontsize=style.MIN_FONT_SIZE)
    longest = max(map(len, labels))
    rotation: dict[str, Any] = {}
    if classes > 4 and longest > 2:
        rotation = {"rotation": 90}
    elif longest > 7:
        rotation = style.SLANTED
    axes.set_xticks(shown, labels if below else hidden, fontsize=style.MIN_FONT_SIZE, **rotation)


def plot_calibration(summary: Json, details: Json) -> Figure | None:
    """Plot reliability diagrams with the expected calibration error (ECE) of each test.

    The area of a point is proportional to the number of predictions in its bin. Bins with a single
    prediction are drawn as hollow points that are not part of the curve. With more than 12 clients,
    the figure shows all clients together and the 11 clients with the lowest scores.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.

    Returns:
        The figure, or None for tasks without classes.
    """
    found = {
        client_id: by_test
        for client_id, by_test in _order_clients(details["calibration"], summary).items()
        if by_test
    }
    if not found:
        return None
    group = _with_all(found, summary, details, _merge_calibrations)
    tested = local_test_rows(details)
    tested[ALL] = sum(tested.values())
    columns = 3 if len(group) in (5, 6) else min(4, len(group))
    figure, grid = _grid(len(group), columns, 1.5, between=0.62, around=0.9)
    for index, (axes, (name, by_test)) in enumerate(zip(grid, group.items(), strict=True)):
        _reliability(axes, by_test, tested[name])
        axes.set_title(style.shorten(name, 18), fontsize=8, pad=25)
        left = index % columns == 0
        below = index + columns >= len(group)
        axes.tick_params(labelleft=left, labelbottom=below)
        axes.set(xlabel="confidence" if below else "", ylabel="accuracy" if left else "")
    handles: list[Line2D] = [
        Line2D(
            [],
            [],
            color=style.TEST_COLORS[test],
            marker=style.TEST_MARKERS[test],
            label=TEST_NAMES[test],
        )
        for test in ("personal", "global")
    ]
    handles.append(
        Line2D(
            [],
            [],
            color=style.GREY,
            linewidth=0.9,
            linestyle=(0, (4, 3)),
            label="perfectly calibrated",
        )
    )
    if any(1 in bins["count"] for by_test in group.values() for bins in by_test.values()):
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker="o",
                markerfacecolor="white",
                markeredgecolor=style.GREY,
                label="single prediction",
            )
        )
    figure.legend(
        handles=handles, loc="outside upper center", ncols={1: 1, 2: 2}.get(columns, len(handles))
    )
    return figure


def _reliability(axes: Axes, by_test: Mapping[str, Json], num_rows: int) -> None:
    axes.plot([0, 1], [0, 1], color=style.GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    lines = []
    for test in ("personal", "global"):
        found = by_test.get(test)
        if found is None or found["ece"] is None:
            continue
        count = np.array(found["count"], dtype=float)
        kept = count > 0
        x = np.array(found["confidence"], dtype=float)[kept]
        y = np.array(found["accuracy"], dtype=float)[kept]
        color = style.TEST_COLORS[test]
        # The accuracy of a single prediction is 0 or 1, which would distort the curve.
        joined = count[kept] > 1
        axes.plot(x[joined], y[joined], color=color, linewidth=1.1, zorder=2)
        area = 4 + 50 * count[kept] / count.sum()
        axes.scatter(
            x,
            y,
            s=area,
            marker=style.TEST_MARKERS[test],
            facecolor=np.where(joined, color, "white"),
            edgecolor=color,
            linewidth=np.where(joined, 0, 0.8),
            zorder=3,
            clip_on=False,
        )
        rows = f" (n = {num_rows})" if test == "personal" else ""
        lines.append((f"{TEST_NAMES[test]} ECE {found['ece']:.3f}{rows}", color))
    # Offsets in points keep a distance between the text and the title at any size.
    for line_idx, (text, color) in enumerate(reversed(lines)):
        at: dict[str, Any] = {
            "xycoords": "axes fraction",
            "xytext": (0, 5 + 9.5 * line_idx),
            "textcoords": "offset points",
        }
        axes.annotate(text, (0, 1), fontsize=style.MIN_FONT_SIZE, color=color, **at)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])


def _merge_calibrations(a: Mapping[str, Json], b: Mapping[str, Json]) -> dict[str, Json]:
    """Merge the bins of two clients."""
    both = {test: _merge_bins(a[test], b[test]) for test in a if test in b}
    return {**a, **b, **both}


def _merge_bins(a: Json, b: Json) -> Json:
    counts = np.array([a["count"], b["count"]], dtype=float)
    total = counts.sum(0)
    found: Json = {"count": total.tolist()}
    for name in ("confidence", "accuracy"):
        values = np.nan_to_num(np.array([a[name], b[name]], dtype=float))
        found[name] = ((values * counts).sum(0) / np.maximum(total, 1)).tolist()
    gap = np.abs(np.array(found["confidence"]) - np.array(found["accuracy"]))
    found["ece"] = float((gap * total).sum() / total.sum()) if total.sum() else None
    return found


def _order_clients(by_client: Mapping[str, Any], summary: Json) -> dict[str, Any]:
    """Sort a dictionary of clients in the order of the summary."""
    return {row["id"]: by_client[row["id"]] for row in summary["clients"] if row["id"] in by_client}


def _with_all(
    by_client: Mapping[str, Any], summary: Json, details: Json, merge: Any
) -> dict[str, Any]:
    """Return the values to plot, keyed by the name of the panel.

    For up to 12 clients, there is a panel for each client. With more clients, there is a panel with
    the merged values of all clients, and a panel for each of the 11 clients with the lowest scores.
    The scores are those on the global test, or on the local test if there is no global test.

    Args:
        by_client: Values to plot, keyed by client id.
        summary: Content of `summary.json`.
        details: Content of `details.json`.
        merge: Function that merges the values of two clients.
    """
    if len(by_client) <= PANELS:
        return dict(by_client)
    total: Any = None
    for found in by_client.values():
        total = found if total is None else merge(total, found)
    ranked_by = "global" if summary["global"] else "personal"
    metric = shown_metrics(task_of(summary, details)).selection
    scores = {row["id"]: client_score(row, ranked_by, metric) for row in summary["clients"]}
    weakest = sorted(by_client, key=lambda client: (scores[client] is None, scores[client] or 0.0))[
        : PANELS - 1
    ]
    return {ALL: total} | {client_id: by_client[client_id] for client_id in weakest}


FORECAST_PANELS = 8
"""Maximum number of clients in the plot of forecasts. The first clients are shown."""

FIRST_DATE = 315_532_800
"""Start of the year 1980 in Unix time. Smaller values are counts of steps, not dates."""

LAST_DATE = 253_402_300_799
"""End of the year 9999 in Unix time, the last date that can be represented."""


def plot_forecasts(summary: Json, details: Json) -> Figure | None:
    """Plot targets and forecasts on the latest local test rows of up to 8 clients.

    The plot shows the last output of each model, which has the longest forecast horizon, and the
    forecast of the simple baseline rule with the smallest error.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.

    Returns:
        The figure, or None for data without timestamps.
    """
    found = details.get("forecast", {})
    shown = [row["id"] for row in summary["clients"] if found.get(row["id"], {}).get("time")][
        :FORECAST_PANELS
    ]
    if not shown:
        return None
    figure = style.figure(0.9 + 1.25 * len(shown))
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, client in zip(panels, shown, strict=True):
        _forecast_panel(axes, client, found[client], details)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.supylabel(details.get("unit") or "target", fontsize=8.5)
    return figure


def _forecast_panel(axes: Axes, client: str, found: Json, details: Json) -> None:
    time = np.array(found["time"])
    truth = np.array(found["truth"][-1])
    predicted = np.array(found["predicted"][-1])
    has_dates = bool(((time >= FIRST_DATE) & (time <= LAST_DATE)).all())
    x: Any = time.astype("datetime64[s]") if has_dates else time
    rules = {name: np.array(outputs[-1]) for name, outputs in found["baselines"].items()}
    axes.plot(x, truth, color=style.INK, linewidth=1.1, label="target")
    axes.plot(x, predicted, color=style.BLUE, linewidth=1.4, label="forecast")
    text = f"{client}, {details['labels'][-1]}: mean absolute error {_error(predicted, truth)}"
    if rules:
        rule = min(rules, key=lambda name: float(np.abs(rules[name] - truth).mean()))
        axes.plot(
            x,
            rules[rule],
            color=style.CATEGORIES[1],
            linewidth=0.9,
            linestyle=(0, (3, 2)),
            label="simple rule",
        )
        text += f", “{rule}” {_error(rules[rule], truth)}"
    axes.set_title(text, fontsize=8)
    axes.yaxis.set_major_locator(style.ticks(3))
    axes.margins(x=0.01)
    if has_dates:
        locator = AutoDateLocator(minticks=4, maxticks=9)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _error(prediction: np.ndarray, truth: np.ndarray) -> str:
    return format_metric(float(np.abs(prediction - truth).mean()), "mae")
