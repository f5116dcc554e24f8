"""Plots of clients: scores on the local and the global test, and label distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hetero_fl.reporting.formatting import (
    FEW_ROWS,
    TEST_DESCRIPTIONS,
    TEST_NAMES,
    capitalize_first,
    client_score,
    format_range,
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


def plot_client_scores(summary: Json, details: Json) -> Figure:
    """Plot two metrics of each client's model after the last round, on the local and global test.

    Up to 40 clients are plotted as lines between two points, labeled with the number n of local
    test rows. With more clients, a scatter plot shows global against local test scores. Clients
    with fewer than 20 local test rows have hollow points.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.
    """
    rows = summary["clients"]
    tested = local_test_rows(details)
    task = task_of(summary, details)
    pair = shown_metrics(task).clients
    if len(rows) > FEW:
        return _scatter(rows, pair, tested, task.unit)
    figure = style.figure(1.35 + 0.21 * len(rows))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, pair, strict=True):
        _dumbbells(axes, rows, name, tested)
        axes.set_title(capitalize_first(metric_name(name, task.unit)))
    panels[0].set_yticks(
        range(len(rows)), [f"{style.shorten(row['id'])} (n = {tested[row['id']]})" for row in rows]
    )
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    if hollow := _hollow_handle(tested):
        handles = [*handles, hollow]
        labels = [*labels, str(hollow.get_label())]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _has_few_rows(rows: list[Json], tested: dict[str, int]) -> np.ndarray:
    return np.array([tested[row["id"]] < FEW_ROWS for row in rows])


def _hollow_handle(tested: dict[str, int]) -> Line2D | None:
    if not any(0 < count < FEW_ROWS for count in tested.values()):
        return None
    look: dict[str, Any] = {
        "marker": "o",
        "markerfacecolor": "white",
        "markeredgecolor": style.GREY,
    }
    return Line2D(
        [], [], linestyle="none", label=f"uncertain: n < {FEW_ROWS} local test rows", **look
    )


def _dumbbells(axes: Axes, rows: list[Json], name: str, tested: dict[str, int]) -> None:
    values = np.array(
        [[client_score(row, test, name) for test in ("personal", "global")] for row in rows],
        dtype=float,
    )
    positions = np.arange(len(rows))
    few = _has_few_rows(rows, tested)
    axes.hlines(positions, *values.T, color=style.LIGHT, linewidth=2.5, zorder=1)
    for column, test in enumerate(("personal", "global")):
        color = style.TEST_COLORS[test]
        look: dict[str, Any] = {
            "linestyle": "none",
            "marker": style.TEST_MARKERS[test],
            "markersize": 6,
        }
        axes.plot(values[:, column], positions, color=color, label=TEST_DESCRIPTIONS[test], **look)
        if test == "personal" and few.any():
            axes.plot(
                values[few, column], positions[few], color=color, markerfacecolor="white", **look
            )
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(style.ticks())
    if not np.isfinite(values).any():
        axes.text(0.5, 0.5, "undefined for every client", transform=axes.transAxes, ha="center")


def _scatter(rows: list[Json], pair: tuple[str, str], tested: dict[str, int], unit: str) -> Figure:
    figure = style.figure(3.8)
    models = sorted({row["model"] for row in rows})
    colors = (
        dict(zip(models, style.CATEGORIES, strict=False))
        if len(models) <= len(style.CATEGORIES)
        else {}
    )
    panels = figure.subplots(1, 2)
    few = _has_few_rows(rows, tested)
    for axes, name in zip(panels, pair, strict=True):
        values = np.array(
            [[client_score(row, test, name) for test in ("personal", "global")] for row in rows],
            dtype=float,
        )
        for model in models if colors else [None]:
            of_model = np.array([model in (None, row["model"]) for row in rows])
            color = colors.get(model or "", style.GREY)
            axes.scatter(
                *values[of_model & ~few].T, s=15, alpha=0.75, linewidth=0, color=color, label=model
            )
            axes.scatter(
                *values[of_model & few].T, s=12, linewidth=0.9, facecolor="none", edgecolor=color
            )
        if np.isfinite(values).any():
            ends = [np.nanmin(values), np.nanmax(values)]
            axes.plot(ends, ends, color=style.GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axes.set(
            title=capitalize_first(metric_name(name, unit)),
            xlabel=f"{TEST_NAMES['personal']} (n = {format_range(tested.values())})",
            ylabel=TEST_NAMES["global"],
        )
        axes.xaxis.set_major_locator(style.ticks())
        axes.yaxis.set_major_locator(style.ticks())
        axes.set_aspect("equal", adjustable="datalim")
    handles: list[Artist] = [
        Line2D([], [], linestyle="none", marker="o", color=color, label=style.shorten(model, 30))
        for model, color in colors.items()
    ]
    if hollow := _hollow_handle(tested):
        handles.append(hollow)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    return figure


def plot_labels(summary: Json, details: Json) -> Figure:
    """Plot the fraction of each label in the training rows of each client as a heat map.

    Of more than 20 labels, the 20 most frequent ones are shown. Without classes or label counts,
    the heat map shows the number of rows in each split. The numbers of rows are written into the
    cells for up to 12 clients.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.
    """
    counts = details["label_counts"]
    if task_of(summary, details).kind == "regression" or not counts:
        splits = ["train", "validation", "test"]
        ids = list(details["rows"])
        rows = np.array([[details["rows"][client][split] for split in splits] for client in ids])
        return _heat_map(ids, rows, rows, splits, "rows")
    names = details["labels"]
    table = np.array(list(counts.values()))
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    kept = np.arange(len(names))
    if len(names) > MAX_LABELS:
        kept = np.argsort(-table.sum(0), kind="stable")[:MAX_LABELS]
    shown = [names[label] for label in kept]
    unit = "fraction of training rows"
    figure = _heat_map(list(counts), table[:, kept], share[:, kept], shown, unit)
    if len(names) > MAX_LABELS:
        figure.axes[0].set_title(f"The {MAX_LABELS} most frequent of {len(names)} labels")
    return figure


def _heat_map(
    ids: list[str], counts: np.ndarray, shades: np.ndarray, names: list[str], unit: str
) -> Figure:
    """Draw a heat map with a column for each client.

    Args:
        ids: Ids of the clients.
        counts: Numbers of rows, shape `[clients, names]`.
        shades: Values that the colors show, of the same shape.
        names: Names of the rows of the heat map.
        unit: Label of the color bar.
    """
    clients = len(ids)
    # Neighboring clients have the same most frequent label, which makes the label skew visible.
    order = np.lexsort((-shades.max(1), shades.argmax(1)))
    figure = style.figure(1.6 + 0.14 * max(8, len(names)))
    axes = figure.subplots()
    image = axes.imshow(
        shades[order].T, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest"
    )
    style.remove_axes(axes)
    axes.set_yticks(range(len(names)), [style.shorten(name, 14) for name in names])
    if clients <= FEW:
        axes.set_xticks(range(clients), [style.shorten(ids[i], 14) for i in order], rotation=90)
    else:
        axes.set(xticks=[], xlabel=f"{pluralize(clients, 'client')}, similar ones side by side")
    if clients <= MAX_COUNTED:
        depth = np.asarray(image.norm(shades[order]))
        for (column, row), count in np.ndenumerate(counts[order]):
            color = style.text_color(depth[column, row])
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7.5, color=color)
    bar = style.add_colorbar(figure, image, axes, unit, pad=0.01, aspect=30)
    bar.yaxis.set_major_locator(style.ticks())
    return figure
