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
    is_regression,
    last_scores,
    local_test_rows,
    metric_name,
    selection_metric_of,
    target_kind,
)
from hetero_fl.reporting.plots import style
from hetero_fl.utils.text import pluralize

Json = dict[str, Any]

FEW = 40
"""Maximum number of clients that are plotted with their ids."""

MAX_LABELS = 20
"""Maximum number of labels that are plotted with their names."""


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
    first = selection_metric_of(summary, details)
    # AUROC is not used as the second metric, because it is undefined if test rows lack a class.
    second = {
        "mae": "rmse",
        "auroc": "balanced_accuracy",
        "accuracy": "top3_accuracy",
        "ndcg_10": "hit_rate_10",
    }
    pair = (first, second.get(first, "accuracy"))
    if details.get("rare") is not None:
        pair = first, "average_precision"
    if len(rows) > FEW:
        return _scatter(rows, pair, tested, details.get("unit", ""))
    figure = style.figure(1.35 + 0.21 * len(rows))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, pair, strict=True):
        _dumbbells(axes, rows, name, tested)
        axes.set_title(capitalize_first(metric_name(name, details.get("unit", ""))))
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
    """Plot the label distribution of each client.

    Up to 4 classes are shown as stacked bars, or as stacked areas for more than 40 clients. Up to
    20 classes are shown as bubbles, or as a heat map for more than 40 clients. Of more than 20
    classes, the 20 most frequent ones are shown as a heat map. Without classes or label counts, the
    plot shows the number of rows in each split.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.
    """
    counts = details["label_counts"]
    names = details["labels"]
    if is_regression(last_scores(summary)) or not counts:
        return _plot_split_sizes(details["rows"])
    table = np.array(list(counts.values()), dtype=float)
    ids = list(counts)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    if len(names) <= 4:
        return _plot_few_labels(ids, table, share, tuple(names))
    if len(names) <= MAX_LABELS and len(ids) <= FEW:
        kind = "label" if target_kind(summary, details) == "multilabel" else "class"
        return _bubbles(ids, table, names, kind)
    if len(names) <= MAX_LABELS:
        return _label_heat_map(ids, share, names)
    most = np.argsort(-table.sum(0), kind="stable")[:MAX_LABELS]
    figure = _label_heat_map(ids, share[:, most], [names[c] for c in most])
    figure.axes[0].set_title(f"The {MAX_LABELS} most frequent of {len(names)} labels")
    return figure


def _plot_split_sizes(rows: dict[str, dict[str, int]]) -> Figure:
    splits = ("train", "validation", "test")
    table = np.array([[counts[split] for split in splits] for counts in rows.values()], dtype=float)
    if len(table) <= FEW:
        return _stacked_bars(list(rows), table, splits, "rows")
    order = np.argsort(-table.sum(1), kind="stable")
    return _stacked_areas(table, splits, "rows", order, "largest first")


def _plot_few_labels(
    ids: list[str], table: np.ndarray, share: np.ndarray, names: tuple[str, ...]
) -> Figure:
    if len(ids) <= FEW:
        return _stacked_bars(ids, table, names, "training rows")
    order = np.lexsort(share.T[::-1])
    unit = "fraction of the client's training rows"
    return _stacked_areas(share, names, unit, order, f"ordered by their fraction of {names[0]}")


def _stacked_bars(ids: list[str], table: np.ndarray, names: tuple[str, ...], unit: str) -> Figure:
    figure = style.figure(1.35 + 0.24 * len(ids))
    axes = figure.subplots()
    positions = np.arange(len(ids))
    start = np.cumsum(table, 1) - table
    min_labeled = 0.05 * table.sum(1).max()
    for c, name in enumerate(names):
        axes.barh(
            positions,
            table[:, c],
            0.72,
            left=start[:, c],
            color=style.CATEGORIES[c],
            label=style.shorten(name, 20),
        )
        for row, (count, left) in enumerate(zip(table[:, c], start[:, c], strict=True)):
            if count > min_labeled:
                axes.text(
                    left + count / 2, row, f"{count:.0f}", ha="center", va="center", fontsize=7.5
                )
    axes.set_yticks(positions, [style.shorten(i) for i in ids])
    axes.set(ylim=(len(ids) - 0.4, -0.6), xlabel=unit)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=len(names))
    return figure


def _stacked_areas(
    table: np.ndarray, names: tuple[str, ...], unit: str, order: np.ndarray, order_text: str
) -> Figure:
    figure = style.figure(3.0)
    axes = figure.subplots()
    edges = np.arange(len(table) + 1) - 0.5
    top = np.cumsum(table[order], 1)
    for c, name in enumerate(names):
        base = top[:, c - 1] if c else 0.0
        axes.stairs(
            top[:, c],
            edges,
            baseline=base,
            fill=True,
            color=style.CATEGORIES[c],
            label=style.shorten(name, 20),
            linewidth=0,
        )
    axes.set(
        xlabel=f"{pluralize(len(table), 'client')}, {order_text}",
        ylabel=unit,
        xlim=(edges[0], edges[-1]),
        ylim=(0, top.max()),
        xticks=[],
    )
    figure.legend(loc="outside lower center", ncols=len(names))
    return figure


def _bubbles(ids: list[str], table: np.ndarray, names: list[str], kind: str) -> Figure:
    clients, classes = table.shape
    figure = style.figure(1.15 + 0.29 * clients)
    axes = figure.subplots()
    rows, columns = np.nonzero(table)
    area = 330 * table[rows, columns] / table.max()
    axes.scatter(
        columns, rows, s=area, color=style.CATEGORIES[3], alpha=0.8, linewidth=0, clip_on=False
    )
    if table.size <= 150:
        for row, column, bubble in zip(rows, columns, area, strict=True):
            axes.annotate(
                f"{table[row, column]:.0f}",
                (column, row),
                xytext=((bubble / np.pi) ** 0.5 + 2.5, 0),
                textcoords="offset points",
                ha="left",
                va="center",
                fontsize=style.MIN_FONT_SIZE,
                color=style.GREY,
            )
    labels = [style.shorten(name, 12) for name in names]
    slant = style.SLANTED if sum(map(len, labels)) > 75 else {}
    axes.set_xticks(range(classes), labels, **slant)
    axes.set_yticks(range(clients), [style.shorten(i) for i in ids])
    style.remove_axes(axes)
    axes.grid(True)
    axes.set(
        xlim=(-0.5, classes - 0.3),
        ylim=(clients - 0.4, -0.6),
        title=f"Number of training rows by {kind}",
        xlabel=kind,
    )
    return figure


def _label_heat_map(ids: list[str], share: np.ndarray, names: list[str]) -> Figure:
    clients, classes = share.shape
    # Neighboring clients have the same most frequent label, which makes the label skew visible.
    order = np.lexsort((-share.max(1), share.argmax(1)))
    figure = style.figure(4.4)
    axes = figure.subplots()
    image = axes.imshow(
        share[order].T, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest"
    )
    style.remove_axes(axes)
    axes.set_yticks(range(classes), [style.shorten(name, 14) for name in names])
    if clients <= FEW:
        axes.set_xticks(range(clients), [style.shorten(ids[i], 14) for i in order], rotation=90)
    else:
        axes.set(xticks=[], xlabel=f"{pluralize(clients, 'client')}, ordered by main label")
    label = "fraction of the client's training rows"
    bar = style.add_colorbar(figure, image, axes, label, pad=0.01, aspect=30)
    bar.yaxis.set_major_locator(style.ticks())
    return figure
