"""Plots of errors: confusion matrices, calibration, forecasts."""

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
    READINGS,
    client_score,
    local_test_rows,
    selection_metric_of,
)
from hetero_fl.reporting.formatting import format_metric as told
from hetero_fl.reporting.plots import style

# How models err: `confusion` (which class is taken for which) and `calibration` (confidence against
# accuracy).

Json = dict[str, Any]

PANELS = 12
"""So many clients fit one figure; of more, the weakest on the global test are shown after all together."""

ALL = "all clients"


def plot_confusion(summary: Json, details: Json) -> Figure | None:
    """Confusion matrices after the last round, each row as shares of its true class; None for targets without classes.

    Classes stand in the task's order everywhere, and one colour scale (0 to 100%) serves all matrices. Up to six
    clients: local test, with the number n of rows, above global test. Up to twelve: global test. More: all clients
    together, then the eleven weakest. Multilabel targets: all clients together, global test, a matrix a label (the first
    sixteen).
    """
    by_client = _order_clients(details["confusion"], summary)
    matrices = {
        r: {i: np.array(m[r], dtype=float) for i, m in by_client.items() if m.get(r)}
        for r in ("personal", "global")
    }
    common = matrices["global"]
    home = matrices["personal"]
    names = details["labels"]
    if not common and not home:
        return None
    whole = np.sum(list((common or home).values()), axis=0)
    if whole.ndim == 3:
        panels = [(name, "", matrix) for name, matrix in zip(names[:16], whole, strict=False)]
        return _matrices(panels, ["absent", "present"], 4, 1.35)
    if len(by_client) > 6:
        shown = _with_all(common or home, summary, details, np.add)
        return _matrices([(name, "", matrix) for name, matrix in shown.items()], names, 4, 1.35)
    tested = local_test_rows(details)
    ids = list(by_client)
    panels = []
    roomy = len(names) > 4 or max(map(len, names)) > 11  # six in a row leave no room for these
    columns = -(-len(ids) // 2) if roomy and len(ids) > 3 else len(ids)
    # above narrow panels there is no room for more words
    count = "n" if columns > 4 else "local test n"
    rows = {i: f"\n{count} = {tested[i]}" if home else "" for i in ids}
    for first in range(0, len(ids), columns):
        block: list[str | None] = [*ids[first : first + columns]]
        block += [None] * (columns - len(block))
        for reading, words in ((home, READINGS["personal"]), (common, READINGS["global"])):
            if reading:
                below = reading is common and bool(home)
                titles = ["" if below or i is None else f"{i}{rows[i]}" for i in block]
                panels += [
                    (t, words, reading.get(i) if i else None)
                    for t, i in zip(titles, block, strict=True)
                ]
    return _matrices(
        panels, names, columns, 1.0 if columns > 4 else 1.35 if len(names) <= 4 else 1.75
    )


Panel = tuple[str, str, "np.ndarray | None"]
"""Title (a second line after a break), what stands at its row's left, counts `[true, predicted]`."""


def _matrices(panels: list[Panel], names: Sequence[str], columns: int, side: float) -> Figure:
    figure, grid = _grid(len(panels), columns, side, between=0.3, around=1.0)
    narrow = side < 1.2
    for place, (axes, (title, words, matrix)) in enumerate(zip(grid, panels, strict=True)):
        left = place % columns == 0
        below = place + columns >= len(panels)
        name, *more = title.split("\n")
        room = 14 if side < 1.5 else 18  # a panel is about as wide as so many letters
        axes.set_title(
            "\n".join([style.shorten(name, room), *more]), fontsize=7 if narrow else 8, loc="center"
        )
        _matrix(axes, matrix, names, left, below)
        if left:
            axes.set_ylabel("\n".join([*([words] if words else []), "true class"]), fontsize=8)
        if below:
            axes.set_xlabel("predicted class", fontsize=8)
    size = {"fraction": 0.03, "pad": 0.015, "aspect": 30}
    bar = style.add_colorbar(figure, grid[0].images[0], grid, "share of the true class", **size)
    bar.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _grid(
    count: int, columns: int, side: float, between: float, around: float
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` square panels of that side (inches), with room for titles between and labels around."""
    rows = -(-count // columns)
    figure = style.figure(
        rows * (side + between) + around, min(style.WIDTH, columns * (side + 0.2) + around)
    )
    figure.set_layout_engine("compressed")  # square panels stand close
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _matrix(
    axes: Axes, matrix: np.ndarray | None, names: Sequence[str], left: bool, below: bool
) -> None:
    classes = len(names)
    if matrix is None:  # a client without test rows of its own
        matrix = np.zeros((classes, classes))
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    style.remove_axes(axes)
    if classes <= 4:
        for row, column in np.ndindex(classes, classes):
            text = (
                f"{100 * share[row, column]:.0f}%\n{matrix[row, column]:.0f}"
                if matrix[row].sum()
                else "none"
            )
            colour = style.text_color(share[row, column])
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=style.SMALLEST,
                linespacing=1.15,
                color=colour,
            )
    shown = list(style.thin_labels(classes, 10))
    words = [style.shorten(names[c], 11) for c in shown]
    axes.set_yticks(shown, words if left else [""] * len(shown), fontsize=style.SMALLEST)
    longest = max(map(len, words))
    turned: dict[str, Any] = {}
    if classes > 4 and longest > 2:
        turned = {"rotation": 90}
    elif longest > 7:
        turned = style.SLANTED
    labels = words if below else [""] * len(shown)
    axes.set_xticks(shown, labels, fontsize=style.SMALLEST, **turned)


def plot_calibration(summary: Json, details: Json) -> Figure | None:
    """Reliability diagrams: accuracy of the predictions made with each confidence, and the error (ECE) by reading.

    The size of a point shows how many predictions it stands for. More than twelve clients: all together, then the
    eleven weakest. None if there are none.
    """
    found = {i: c for i, c in _order_clients(details["calibration"], summary).items() if c}
    if not found:
        return None
    group = _with_all(found, summary, details, _merge_calibrations)
    tested = local_test_rows(details)
    tested[ALL] = sum(tested.values())
    columns = 3 if len(group) in (5, 6) else min(4, len(group))
    figure, grid = _grid(len(group), columns, 1.5, between=0.62, around=0.9)
    for place, (axes, (name, readings)) in enumerate(zip(grid, group.items(), strict=True)):
        _reliability(axes, readings, tested[name])
        axes.set_title(style.shorten(name, 18), fontsize=8, pad=25)
        left = place % columns == 0
        below = place + columns >= len(group)
        axes.tick_params(labelleft=left, labelbottom=below)
        axes.set(xlabel="confidence" if below else "", ylabel="accuracy" if left else "")
    handles: list[Line2D] = [
        Line2D(
            [],
            [],
            color=style.READING_COLOURS[r],
            marker=style.READING_MARKERS[r],
            label=READINGS[r],
        )
        for r in ("personal", "global")
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
    figure.legend(handles=handles, loc="outside upper center", ncols=3 if columns > 1 else 1)
    return figure


def _reliability(axes: Axes, readings: Mapping[str, Json], tested: int) -> None:
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
            x,
            y,
            s=area,
            marker=style.READING_MARKERS[reading],
            color=colour,
            linewidth=0,
            zorder=3,
            clip_on=False,
        )
        rows = f" (n = {tested})" if reading == "personal" else ""
        lines.append((f"ECE {READINGS[reading]} {found['ece']:.3f}{rows}", colour))
    # in points, so that they keep off the title at any size
    for place, (text, colour) in enumerate(reversed(lines)):
        at: dict[str, Any] = {
            "xycoords": "axes fraction",
            "xytext": (0, 5 + 9.5 * place),
            "textcoords": "offset points",
        }
        axes.annotate(text, (0, 1), fontsize=style.SMALLEST, color=colour, **at)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])


def _merge_calibrations(a: Mapping[str, Json], b: Mapping[str, Json]) -> dict[str, Json]:
    """Both clients' predictions in the same bins."""
    both = {reading: _merge_bins(a[reading], b[reading]) for reading in a if reading in b}
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
    """In the order of the clients, as every figure and table has them."""
    return {row["id"]: by_client[row["id"]] for row in summary["clients"] if row["id"] in by_client}


def _with_all(
    by_client: Mapping[str, Any], summary: Json, details: Json, join: Any
) -> dict[str, Any]:
    """All clients if they fit; else their sum, then the weakest on the global test set (without one, on local tests)."""
    if len(by_client) <= PANELS:
        return dict(by_client)
    whole: Any = None
    for found in by_client.values():
        whole = found if whole is None else join(whole, found)
    judged = "global" if summary["global"] else "personal"
    scores = {
        row["id"]: client_score(row, judged, selection_metric_of(summary, details))
        for row in summary["clients"]
    }
    weakest = sorted(by_client, key=lambda i: (scores[i] is None, scores[i] or 0.0))[: PANELS - 1]
    return {ALL: whole} | {i: by_client[i] for i in weakest}


# Truth and forecast over time: `forecasts`, for regressions whose rows have dates.

FORECAST_PANELS = 8
"""So many clients are shown, the first ones."""

FROM = 315_532_800
"""Times from here on (1980, in seconds) are dates; smaller ones are counts."""

TO = 253_402_300_799
"""The end of the year 9999, after which there are no dates."""


def plot_forecasts(summary: Json, details: Json) -> Figure | None:
    """Each client's own test rows, the last in time: truth, forecast, and of the simple rules the nearest. The output that is
    furthest ahead, which is the last. None without dates."""
    found = details.get("forecast", {})
    shown = [row["id"] for row in summary["clients"] if found.get(row["id"], {}).get("time")][
        :FORECAST_PANELS
    ]
    if not shown:
        return None
    figure = style.figure(0.9 + 1.25 * len(shown))
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, client in zip(panels, shown, strict=True):
        _panel(axes, client, found[client], details)
    handles, words = panels[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=3)
    figure.supylabel(details.get("unit") or "target", fontsize=8.5)
    return figure


def _panel(axes: Axes, client: str, found: Json, details: Json) -> None:
    time = np.array(found["time"])
    truth = np.array(found["truth"][-1])
    said = np.array(found["predicted"][-1])
    dated = bool(((time >= FROM) & (time <= TO)).all())
    places: Any = time.astype("datetime64[s]") if dated else time
    rules = {name: np.array(outputs[-1]) for name, outputs in found["baselines"].items()}
    axes.plot(places, truth, color=style.INK, linewidth=1.1, label="truth")
    axes.plot(places, said, color=style.BLUE, linewidth=1.4, label="forecast")
    text = f"{client}, {details['labels'][-1]}: mean absolute error here {_error(said, truth)}"
    if rules:
        rule = min(rules, key=lambda name: float(np.abs(rules[name] - truth).mean()))
        axes.plot(
            places,
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
    if dated:
        locator = AutoDateLocator(minticks=4, maxticks=9)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _error(prediction: np.ndarray, truth: np.ndarray) -> str:
    return told(float(np.abs(prediction - truth).mean()), "mae")
