"""Plots of clients: scores, labels and errors of each client, and forecasts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from hetero_fl.reporting.formatting import (
    FEW_ROWS,
    TEST_DESCRIPTIONS,
    TEST_NAMES,
    capitalize_first,
    client_score,
    format_metric,
    local_test_rows,
    metric_name,
    task_of,
)
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.shown_metrics import shown_metrics
from hetero_fl.utils.text import pluralize

Json = dict[str, Any]

FEW = 40
"""Maximum number of clients that are plotted with their ids."""

MAX_COUNTED = 12
"""Maximum number of clients whose numbers of rows are written into a heat map."""

MAX_LABELS = 20
"""Maximum number of labels in a heat map."""

PANELS = 12
"""Maximum number of panels in a figure: all clients together and those with the lowest scores."""

ALL = "all clients"


def plot_client_scores(summary: Json, details: Json) -> Figure:
    """Plot two metrics of each client's model after the last round, on the local and global test.

    Clients are labeled with the number n of local test rows. More than 40 clients are not labeled
    and in the order of their local scores. Clients with fewer than 20 local test rows have hollow
    points.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.
    """
    rows = summary["clients"]
    tested = local_test_rows(details)
    task = task_of(summary, details)
    pair = shown_metrics(task).clients
    is_many = len(rows) > FEW
    if is_many:
        rows = sorted(rows, key=lambda row: client_score(row, "personal", pair[0]) or 0.0)
    figure = style.figure(1.35 + 0.21 * min(len(rows), FEW))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(panels, pair, strict=True):
        for test in ("personal", "global"):
            _draw_points(axes, rows, test, metric, tested)
        axes.set_title(capitalize_first(metric_name(metric, task.unit)))
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(style.ticks())
        if not axes.lines:
            axes.text(0.5, 0.5, "undefined for every client", transform=axes.transAxes, ha="center")
    labels = [f"{style.shorten(row['id'])} (n = {tested[row['id']]})" for row in rows]
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    if is_many:
        panels[0].set(yticks=[], ylabel=f"{pluralize(len(rows), 'client')}, by local test score")
    else:
        panels[0].set_yticks(range(len(rows)), labels)
    style.add_legend(figure)
    return figure


def _draw_points(
    axes: Axes, rows: Sequence[Json], test: str, metric: str, tested: Mapping[str, int]
) -> None:
    """Draw a point for each client with a score, which is hollow if the score is uncertain."""
    values = np.array([client_score(row, test, metric) for row in rows], dtype=float)
    is_few = np.array([test == "personal" and tested[row["id"]] < FEW_ROWS for row in rows])
    look: dict[str, Any] = {"color": style.TEST_COLORS[test], "linestyle": "none"}
    look |= {"marker": style.TEST_MARKERS[test], "markersize": 6 if len(rows) <= FEW else 2.5}
    uncertain = f"uncertain: n < {FEW_ROWS} local test rows"
    for kept, label, face in (
        (np.isfinite(values) & ~is_few, TEST_DESCRIPTIONS[test], look["color"]),
        (np.isfinite(values) & is_few, uncertain, "white"),
    ):
        if kept.any():
            axes.plot(values[kept], kept.nonzero()[0], label=label, markerfacecolor=face, **look)


def plot_labels(summary: Json, details: Json) -> Figure:
    """Plot the fraction of each label in the training rows of each client as a heat map.

    Of more than 20 labels, the 20 most frequent ones are shown. Without classes or label counts,
    the heat map shows the number of rows in each split. The numbers of rows are written into the
    cells for up to 12 clients.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.
    """
    names = details["labels"]
    counts = details["label_counts"]
    unit = "fraction of training rows"
    shows_rows = task_of(summary, details).kind == "regression" or not counts
    if shows_rows:
        names = ["train", "validation", "test"]
        counts = {
            client: [rows[split] for split in names] for client, rows in details["rows"].items()
        }
        unit = "rows"
    table = np.array(list(counts.values()))
    shades = table if shows_rows else table / np.maximum(table.sum(1, keepdims=True), 1)
    shown = np.arange(len(names))
    if len(names) > MAX_LABELS:
        shown = np.argsort(-table.sum(0), kind="stable")[:MAX_LABELS]
    # Neighboring clients have the same most frequent label, which makes the label skew visible.
    shades = shades[:, shown]
    order = np.lexsort((-shades.max(1), shades.argmax(1)))
    clients = np.array(list(counts))[order]
    texts = table[order][:, shown].T.astype(str)
    figure = style.figure(1.6 + 0.14 * max(8, len(shown)))
    axes = figure.subplots()
    image = style.draw_heat_map(
        axes,
        shades[order].T,
        [names[label] for label in shown],
        clients.tolist(),
        texts=texts.tolist() if len(clients) <= MAX_COUNTED else (),
    )
    if len(names) > MAX_LABELS:
        axes.set_title(f"The {MAX_LABELS} most frequent of {len(names)} labels")
    style.add_colorbar(figure, image, unit)
    return figure


def plot_confusion(summary: Json, details: Json) -> Figure | None:
    """Plot confusion matrices after the last round, normalized by true class.

    The figure shows a matrix for all clients together and the matrices of up to 11 clients, lowest
    scores first, on the global test or, without a global test, on the local test. For multilabel
    tasks, it shows a matrix for each of the first 12 labels, for all clients together.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.

    Returns:
        The figure, or None for tasks without classes.
    """
    matrices: dict[str, np.ndarray] = {}
    for test in ("personal", "global"):
        found = {client: tests.get(test) for client, tests in details["confusion"].items()}
        matrices = {client: np.array(m) for client, m in found.items() if m} or matrices
    if not matrices:
        return None
    names = details["labels"]
    total = np.sum(list(matrices.values()), axis=0)
    panels = {ALL: total}
    panels |= {client: matrices[client] for client in _weakest(matrices, summary, details)}
    if total.ndim == 3:
        panels = dict(zip(names, total[:PANELS], strict=False))
        names = ["absent", "present"]
    figure, grid = style.draw_grid(len(panels), 1.65, "predicted class", "true class")
    for axes, (title, matrix) in zip(grid, panels.items(), strict=True):
        rows = matrix.sum(1, keepdims=True)
        # The share is NaN for classes without test rows, so that they do not look like 0%.
        share = np.where(rows > 0, matrix / np.maximum(rows, 1), np.nan)
        texts = [
            [f"{part:.0%}" if np.isfinite(part) else "no\nrows" for part in line] for line in share
        ]
        if len(names) > 4:
            texts = []
        image = style.draw_heat_map(
            axes, share, names, names, texts=texts, largest=1.0, max_labels=10
        )
        axes.set_title(style.shorten(title, 14), fontsize=8, fontweight="normal", loc="center")
    style.add_colorbar(figure, image, "fraction of the true class")
    return figure


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


def plot_calibration(summary: Json, details: Json) -> Figure | None:
    """Plot reliability diagrams with the expected calibration error (ECE) of each test.

    The figure shows the predictions of all clients together, and those of up to 11 clients, lowest
    scores first. The area of a point is proportional to the number of predictions in its bin. Bins
    with a single prediction are not shown, because their accuracy is 0 or 1.

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
    figure, grid = style.draw_grid(len(panels), 2.2, "confidence", "accuracy")
    for axes, (name, by_test) in zip(grid, panels.items(), strict=True):
        axes.axline((0, 0), slope=1, color=style.GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        title = [style.shorten(name, 18)]
        for test, bins in sorted(by_test.items()):
            _draw_reliability(axes, test, bins)
            rows = f" (n = {tested[name]})" if test == "personal" else ""
            title.append(f"{TEST_NAMES[test]} ECE {bins['ece']:.3f}{rows}")
        axes.set_title("\n".join(title), fontsize=style.MIN_FONT_SIZE, fontweight="normal")
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    style.add_legend(figure, columns=min(2, len(panels)))
    return figure


def _draw_reliability(axes: Axes, test: str, bins: Json) -> None:
    """Draw the accuracy of the bins with two or more predictions against the confidence."""
    count = np.array(bins["count"], dtype=float)
    kept = count > 1
    x = np.array(bins["confidence"], dtype=float)[kept]
    y = np.array(bins["accuracy"], dtype=float)[kept]
    color = style.TEST_COLORS[test]
    axes.plot(x, y, color=color, linewidth=1.1, label=TEST_NAMES[test])
    area = 4 + 50 * count[kept] / count.sum()
    axes.scatter(x, y, area, color=color, marker=style.TEST_MARKERS[test], clip_on=False, zorder=3)


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
    timed = [row["id"] for row in summary["clients"] if found.get(row["id"], {}).get("time")]
    shown = timed[:FORECAST_PANELS]
    if not shown:
        return None
    figure = style.figure(0.9 + 1.25 * len(shown))
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, client in zip(panels, shown, strict=True):
        title = _draw_forecast(axes, found[client])
        axes.set_title(f"{client}, {details['labels'][-1]}: {title}", fontsize=8)
    style.add_legend(figure)
    figure.supylabel(details.get("unit") or "target", fontsize=8.5)
    return figure


def _draw_forecast(axes: Axes, found: Json) -> str:
    """Draw the last output of a forecast and of the best simple rule, and return their errors."""
    truth = np.array(found["truth"][-1])
    forecast = np.array(found["predicted"][-1])
    rules = {name: np.array(outputs[-1]) for name, outputs in found["baselines"].items()}
    errors = {name: float(np.abs(values - truth).mean()) for name, values in rules.items()}
    x = np.array(found["time"])
    if ((x >= FIRST_DATE) & (x <= LAST_DATE)).all():
        x = x.astype("datetime64[s]")
        locator = AutoDateLocator(minticks=4, maxticks=9)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.plot(x, truth, color=style.INK, linewidth=1.1, label="target")
    axes.plot(x, forecast, color=style.BLUE, linewidth=1.4, label="forecast")
    error = float(np.abs(forecast - truth).mean())
    text = f"mean absolute error {format_metric(error, 'mae')}"
    if errors:
        rule = min(errors, key=lambda name: errors[name])
        dashed: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (3, 2))}
        axes.plot(x, rules[rule], color=style.CATEGORIES[1], label="simple rule", **dashed)
        text += f", “{rule}” {format_metric(errors[rule], 'mae')}"
    axes.yaxis.set_major_locator(style.ticks(3))
    axes.margins(x=0.01)
    return text
