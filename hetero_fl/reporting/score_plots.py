"""How models err: `confusion` (which class is taken for which) and `calibration` (confidence against accuracy)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hetero_fl.reporting import style
from hetero_fl.reporting.wording import READINGS, reached

Json = dict[str, Any]

PANELS = 12
"""So many clients fit one figure; of more, the weakest in common are shown after all together."""

ALL = "all clients"


def confusion(summary: Json, details: Json) -> Figure | None:
    """Confusion matrices after the last round, each row as shares of its true class; None for targets without classes.

    Up to six clients: at home above, in common below. Up to twelve: in common. More: all clients together, then the
    eleven weakest. Multilabel targets: all clients together in common, a matrix a label (the first sixteen).
    """
    by_client = details["confusion"]
    matrices = {
        r: {i: np.array(m[r], dtype=float) for i, m in by_client.items() if m.get(r)} for r in ("personal", "global")
    }
    common, home, names = matrices["global"], matrices["personal"], details["labels"]
    if not common and not home:
        return None
    whole = np.sum(list((common or home).values()), axis=0)
    lefts, side = [], 1.35
    if whole.ndim == 3:
        columns, panels, titles = 4, list(whole[:16]), names[:16]
        names = ["absent", "present"]
    elif len(by_client) <= 6:
        columns, titles = len(by_client), [*by_client, *[""] * len(by_client)]
        panels = [group.get(i) for group in (home, common) for i in by_client]
        lefts, side = ["at home", "in common"], 1.02 if columns > 4 else 1.35
    else:
        shown = _with_all(common or home, summary, np.add)
        columns, panels, titles = 4, list(shown.values()), list(shown)
    figure, grid = _grid(len(panels), columns, side, between=0.3, around=1.0)
    for place, (axes, matrix, title) in enumerate(zip(grid, panels, titles, strict=True)):
        left, below = place % columns == 0, place + columns >= len(panels)
        axes.set_title(style.shorten(title, 14), fontsize=8.5, loc="center")
        _matrix(axes, matrix, names, left, below)
        if left:
            axes.set_ylabel("\n".join([*lefts[place // columns :][:1], "true class"]), fontsize=8)
        if below:
            axes.set_xlabel("predicted class", fontsize=8)
    return figure


def _grid(count: int, columns: int, side: float, between: float, around: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` square panels of that side (inches), with room for titles between and labels around."""
    rows = -(-count // columns)
    figure = style.figure(rows * (side + between) + around, min(style.WIDTH, columns * (side + 0.2) + around))
    figure.set_layout_engine("compressed")  # square panels stand close
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _matrix(axes: Axes, matrix: np.ndarray | None, names: Sequence[str], left: bool, below: bool) -> None:
    classes = len(names)
    if matrix is None:  # a client without test rows of its own
        matrix = np.zeros((classes, classes))
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    style.bare(axes)
    if classes <= 4:
        for row, column in np.ndindex(classes, classes):
            text = f"{100 * share[row, column]:.0f}%\n{matrix[row, column]:.0f}" if matrix[row].sum() else "none"
            colour = style.ink(share[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, linespacing=1.15, color=colour)
    shown = list(style.thinned(classes, 10))
    words = [style.shorten(names[c], 11) for c in shown]
    axes.set_yticks(shown, words if left else [""] * len(shown), fontsize=6.5)
    axes.set_xticks(shown, words if below else [""] * len(shown), fontsize=6.5)
    longest = max(map(len, words))
    if classes > 4 and longest > 2:
        axes.tick_params(axis="x", rotation=90)
    elif longest > 7:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")


def calibration(summary: Json, details: Json) -> Figure | None:
    """Reliability diagrams: accuracy of the predictions made with each confidence, and the error (ECE) by reading.

    The size of a point shows how many predictions it stands for. More than twelve clients: all together, then the
    eleven weakest. None if there are none.
    """
    found = {i: c for i, c in details["calibration"].items() if c}
    if not found:
        return None
    group = _with_all(found, summary, _merged)
    columns = 3 if len(group) in (5, 6) else min(4, len(group))
    figure, grid = _grid(len(group), columns, 1.5, between=0.5, around=0.9)
    for place, (axes, (name, readings)) in enumerate(zip(grid, group.items(), strict=True)):
        _reliability(axes, readings)
        axes.set_title(style.shorten(name, 16), fontsize=8.5, pad=27)
        left, below = place % columns == 0, place + columns >= len(group)
        axes.tick_params(labelleft=left, labelbottom=below)
        axes.set_xlabel("confidence" if below else "")
        axes.set_ylabel("accuracy" if left else "")
    handles: list[Line2D] = [
        Line2D([], [], color=style.READING_COLOURS[r], marker=style.READING_MARKERS[r], label=READINGS[r])
        for r in ("personal", "global")
    ]
    handles.append(Line2D([], [], color=style.GREY, linewidth=0.9, linestyle=(0, (4, 3)), label="perfectly calibrated"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3 if columns > 1 else 1)
    return figure


def _reliability(axes: Axes, readings: Mapping[str, Json]) -> None:
    axes.plot([0, 1], [0, 1], color=style.GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    lines = []
    for reading in ("personal", "global"):
        found = readings.get(reading)
        if found is None or found["ece"] is None:
            continue
        count = np.array(found["count"], dtype=float)
        kept = count > 0
        x = np.array(found["confidence"], dtype=float)[kept]
        y = np.array(found["accuracy"], dtype=float)[kept]
        colour = style.READING_COLOURS[reading]
        axes.plot(x, y, color=colour, linewidth=1.1, zorder=2)
        area = 4 + 50 * count[kept] / count.sum()
        axes.scatter(
            x, y, s=area, marker=style.READING_MARKERS[reading], color=colour, linewidth=0, zorder=3, clip_on=False
        )
        lines.append((f"ECE {READINGS[reading]} {found['ece']:.3f}", colour))
    for place, (text, colour) in enumerate(reversed(lines)):
        axes.text(0, 1.055 + 0.1 * place, text, transform=axes.transAxes, fontsize=7, color=colour)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])


def _merged(a: Mapping[str, Json], b: Mapping[str, Json]) -> dict[str, Json]:
    """Both clients' predictions in the same bins."""
    both = {reading: _merged_bins(a[reading], b[reading]) for reading in a if reading in b}
    return {**a, **b, **both}


def _merged_bins(a: Json, b: Json) -> Json:
    counts = np.array([a["count"], b["count"]], dtype=float)
    total = counts.sum(0)
    found: Json = {"count": total.tolist()}
    for name in ("confidence", "accuracy"):
        values = np.nan_to_num(np.array([a[name], b[name]], dtype=float))
        found[name] = ((values * counts).sum(0) / np.maximum(total, 1)).tolist()
    gap = np.abs(np.array(found["confidence"]) - np.array(found["accuracy"]))
    found["ece"] = float((gap * total).sum() / total.sum()) if total.sum() else None
    return found


def _with_all(by_client: Mapping[str, Any], summary: Json, join: Any) -> dict[str, Any]:
    """All clients if they fit; else their sum, then the weakest on the common test set (without one, at home)."""
    if len(by_client) <= PANELS:
        return dict(by_client)
    whole: Any = None
    for found in by_client.values():
        whole = found if whole is None else join(whole, found)
    judged = "global" if summary["global"] else "personal"
    scores = {row["id"]: reached(row, judged, "balanced_accuracy") for row in summary["clients"]}
    weakest = sorted(by_client, key=lambda i: (scores[i] is None, scores[i] or 0.0))[: PANELS - 1]
    return {ALL: whole} | {i: by_client[i] for i in weakest}
