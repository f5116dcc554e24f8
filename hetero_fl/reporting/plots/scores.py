"""Plots of errors: confusion matrices, calibration and forecasts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
"""Maximum number of panels in a figure: all clients together and those with the lowest scores."""

MAX_LABELS = 16
"""Maximum number of labels of a multilabel task that have a confusion matrix."""

ALL = "all clients"


def plot_confusion(summary: Json, details: Json) -> Figure | None:
    """Plot confusion matrices after the last round, normalized by true class.

    The figure shows a matrix for all clients together and the matrices of up to 11 clients, lowest
    scores first, on the global test or, without a global test, on the local test. For multilabel
    tasks, it shows a matrix for each of the first 16 labels, for all clients together.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.

    Returns:
        The figure, or None for tasks without classes.
    """
    by_client = details["confusion"]
    matrices = _confusion_matrices(by_client, "global") or _confusion_matrices(
        by_client, "personal"
    )
    if not matrices:
        return None
    names = details["labels"]
    total = np.sum(list(matrices.values()), axis=0)
    if total.ndim == 3:
        by_label = dict(zip(names[:MAX_LABELS], total, strict=False))
        return _draw_matrices(by_label, ["absent", "present"])
    weakest = {client: matrices[client] for client in _weakest(matrices, summary, details)}
    return _draw_matrices({ALL: total} | weakest, names)


def _confusion_matrices(by_client: Mapping[str, Json], test: str) -> dict[str, np.ndarray]:
    """Return the confusion matrices of the clients with rows of a test, keyed by client id."""
    return {
        client_id: np.array(found[test], dtype=float)
        for client_id, found in by_client.items()
        if found.get(test)
    }


def _weakest(clients: Iterable[str], summary: Json, details: Json) -> list[str]:
    """Return the clients that have a panel of their own, those with the lowest scores first.

    The scores are those on the global test, or on the local test if there is no global test.
    Clients without a score come last. A single client has no panel besides that of all clients.

    Args:
        clients: Ids of the clients with values to plot.
        summary: Content of `summary.json`.
        details: Content of `details.json`.
    """
    test = "global" if summary["global"] else "personal"
    metric = shown_metrics(task_of(summary, details)).selection
    known = set(clients)
    scores = {
        row["id"]: client_score(row, test, metric)
        for row in summary["clients"]
        if row["id"] in known
    }
    ranked = sorted(scores, key=lambda client: (scores[client] is None, scores[client] or 0.0))
    return ranked[: PANELS - 1] if len(ranked) > 1 else []


def _draw_matrices(matrices: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Draw a panel for each matrix of counts `[true, predicted]`, keyed by title."""
    figure, grid = _grid(len(matrices), 1.35, 0.3, xlabel="predicted class", ylabel="true class")
    for axes, (title, matrix) in zip(grid, matrices.items(), strict=True):
        axes.set_title(style.shorten(title, 14), fontsize=8, loc="center")
        _draw_matrix(axes, matrix, names)
    size = {"fraction": 0.03, "pad": 0.015, "aspect": 30}
    label = "fraction of the true class"
    bar = style.add_colorbar(figure, grid[0].images[0], grid, label, **size)
    bar.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _grid(
    count: int, side: float, between: float, *, xlabel: str, ylabel: str
) -> tuple[Figure, list[Axes]]:
    """Create a figure with a grid of square panels, with labels at its left and lower border.

    Args:
        count: Number of panels.
        side: Side of a panel in inches.
        between: Space between rows in inches.
        xlabel: Label of the x axes.
        ylabel: Label of the y axes.
    """
    columns = min(4, count)
    rows = -(-count // columns)
    width = min(style.WIDTH, columns * (side + 0.2) + 1.0)
    figure = style.figure(rows * (side + between) + 1.0, width)
    # The compressed layout removes the space between square panels.
    figure.set_layout_engine("compressed")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for index, axes in enumerate(grid):
        axes.set_visible(index < count)
        is_left = index % columns == 0
        is_lowest = index + columns >= count
        axes.tick_params(labelleft=is_left, labelbottom=is_lowest)
        axes.set(xlabel=xlabel if is_lowest else "", ylabel=ylabel if is_left else "")
    return figure, grid[:count]


def _draw_matrix(axes: Axes, matrix: np.ndarray, names: Sequence[str]) -> None:
    classes = len(names)
    totals = matrix.sum(1, keepdims=True)
    # The share is NaN for classes without test rows, so that they do not look like 0%.
    share = np.where(totals > 0, matrix / np.maximum(totals, 1), np.nan)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    style.remove_axes(axes)
    axes.set_facecolor(style.NO_DATA)
    if classes <= 4:
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": style.MIN_FONT_SIZE}
        for (row, column), part in np.ndenumerate(share):
            is_known = np.isfinite(part)
            text = f"{100 * part:.0f}%\n{matrix[row, column]:.0f}" if is_known else "no\nrows"
            color = style.text_color(part) if is_known else style.INK
            axes.text(column, row, text, linespacing=1.15, color=color, **look)
    shown = list(style.evenly_spaced_positions(classes, 10))
    labels = [style.shorten(names[c], 11) for c in shown]
    longest = max(map(len, labels))
    rotation: dict[str, Any] = {}
    if classes > 4 and longest > 2:
        rotation = {"rotation": 90}
    elif longest > 7:
        rotation = style.SLANTED
    axes.set_yticks(shown, labels, fontsize=style.MIN_FONT_SIZE)
    axes.set_xticks(shown, labels, fontsize=style.MIN_FONT_SIZE, **rotation)


def plot_calibration(summary: Json, details: Json) -> Figure | None:
    """Plot reliability diagrams with the expected calibration error (ECE) of each test.

    The figure shows the predictions of all clients together, and those of up to 11 clients, lowest
    scores first. The area of a point is proportional to the number of predictions in its bin. Bins
    with a single prediction are drawn as hollow points that are not part of the curve.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.

    Returns:
        The figure, or None for tasks without classes.
    """
    bins_of = {
        client: {test: bins for test, bins in by_test.items() if bins["ece"] is not None}
        for client, by_test in details["calibration"].items()
    }
    bins_of = {client: by_test for client, by_test in bins_of.items() if by_test}
    if not bins_of:
        return None
    tested = local_test_rows(details)
    tested[ALL] = sum(tested.values())
    panels = {ALL: _pool_calibration(list(bins_of.values()))}
    panels |= {client: bins_of[client] for client in _weakest(bins_of, summary, details)}
    figure, grid = _grid(len(panels), 1.5, 0.62, xlabel="confidence", ylabel="accuracy")
    for axes, (name, by_test) in zip(grid, panels.items(), strict=True):
        _draw_reliability(axes, by_test, tested[name])
        axes.set_title(style.shorten(name, 18), fontsize=8, pad=25)
    handles: list[Line2D] = [
        Line2D(
            [],
            [],
            color=style.TEST_COLORS[test],
            marker=style.TEST_MARKERS[test],
            label=TEST_NAMES[test],
        )
        for test in panels[ALL]
    ]
    dashed: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (4, 3))}
    handles.append(Line2D([], [], color=style.GREY, label="perfectly calibrated", **dashed))
    if any(1 in bins["count"] for by_test in panels.values() for bins in by_test.values()):
        hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "linestyle": "none"}
        label = "single prediction"
        handles.append(Line2D([], [], markeredgecolor=style.GREY, label=label, **hollow))
    columns = {1: 1, 2: 2}.get(len(panels), len(handles))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)
    return figure


def _draw_reliability(axes: Axes, by_test: Mapping[str, Json], num_rows: int) -> None:
    axes.plot([0, 1], [0, 1], color=style.GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    lines = []
    for test in ("global", "personal"):
        if test not in by_test:
            continue
        found = by_test[test]
        count = np.array(found["count"], dtype=float)
        kept = count > 0
        x = np.array(found["confidence"], dtype=float)[kept]
        y = np.array(found["accuracy"], dtype=float)[kept]
        color = style.TEST_COLORS[test]
        # The accuracy of a single prediction is 0 or 1, which would distort the curve.
        joined = count[kept] > 1
        axes.plot(x[joined], y[joined], color=color, linewidth=1.1, zorder=2)
        axes.scatter(
            x,
            y,
            s=4 + 50 * count[kept] / count.sum(),
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
    at: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    for line_idx, (text, color) in enumerate(lines):
        place = (0, 5 + 9.5 * line_idx)
        axes.annotate(text, (0, 1), xytext=place, fontsize=style.MIN_FONT_SIZE, color=color, **at)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])


def _pool_calibration(clients: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    """Merge the bins of several clients, for each test."""
    pooled: dict[str, Json] = {}
    for test in ("personal", "global"):
        found = [by_test[test] for by_test in clients if test in by_test]
        if not found:
            continue
        count = np.array([bins["count"] for bins in found], dtype=float)
        total = count.sum(0)
        confidence, accuracy = (
            (np.nan_to_num(np.array([bins[name] for bins in found], dtype=float)) * count).sum(0)
            / np.maximum(total, 1)
            for name in ("confidence", "accuracy")
        )
        pooled[test] = {
            "ece": (np.abs(confidence - accuracy) * total).sum() / total.sum(),
            "confidence": confidence,
            "accuracy": accuracy,
            "count": total,
        }
    return pooled


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
