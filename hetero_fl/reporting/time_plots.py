"""A run in simulated time: `time` (metrics by hours, and what came of the invitations), `tasks` (who was at it when) and, of an
asynchronous one, `staleness` (how old uploads were)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hetero_fl.order import in_order
from hetero_fl.reporting import style
from hetero_fl.reporting.round_plots import headroom, line, readings_legend
from hetero_fl.reporting.wording import READINGS, metric_name, selection, sentence, time_unit

Json = dict[str, Any]

OUTCOMES = {"arrived": style.CATEGORIES[0], "late": style.CATEGORIES[1], "failed": style.CATEGORIES[2]}
SHOWN = 30  # clients of whom a row is legible
ROUNDS = 15  # the first ones, whose tasks are wide enough to see


def simulated(records: Sequence[Json]) -> list[Json]:
    """The records that tell of simulated time; none where no time passed."""
    told = [r for r in records if r.get("simulated")]
    return told if told and told[-1]["simulated"]["end"] > 0 else []


def time(summary: Json, records: Sequence[Json], details: Json) -> Figure | None:
    """The selection metric by simulated time, and each round's arrivals; None if no time was simulated."""
    told = simulated(records)
    if not told:
        return None
    factor, unit = time_unit(told[-1]["simulated"]["end"])
    figure = style.figure(3.2)
    left, right = figure.subplots(1, 2)
    name = selection(summary, details)
    read = [r for r in told if r.get("personal") or r.get("global")]
    for reading in READINGS:
        line(left, reading, name, [r["simulated"]["end"] / factor for r in read], read, summary)
    left.set_title(sentence(metric_name(name, details.get("unit", ""))))
    left.set_xlabel(f"simulated {unit}")
    left.xaxis.set_major_locator(style.ticks())
    left.set_xlim(0, 1.04 * told[-1]["simulated"]["end"] / factor)
    headroom(left, name)
    _counts(right, told)
    readings_legend(figure, summary, bands=True, more=_outcomes(told))
    return figure


def _counts(axes: Axes, told: Sequence[Json]) -> None:
    rounds, below = [r["round"] for r in told], [0] * len(told)
    for what, colour in OUTCOMES.items():
        counts = [r["counts"][what] for r in told]
        axes.bar(rounds, counts, 1.0 if len(told) > 60 else 0.8, bottom=below, color=colour, linewidth=0)
        below = [a + b for a, b in zip(below, counts, strict=True)]
    skipped = [r["round"] for r in told if r.get("skipped")]
    top = max(below)
    axes.plot(skipped, [1.05 * top] * len(skipped), "x", color=style.INK, markersize=4)
    axes.set_ylim(0, 1.12 * top)
    axes.set_title("Invited clients")
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="x", visible=False)


def _outcomes(told: Sequence[Json]) -> list[Patch | Line2D]:
    marks: list[Patch | Line2D] = [
        Patch(color=colour, label=what) for what, colour in OUTCOMES.items() if _any(told, what)
    ]
    if any(r.get("skipped") for r in told):
        cross: dict[str, Any] = {"marker": "x", "color": style.INK, "linestyle": "none", "markersize": 4}
        marks.append(Line2D([], [], label="too few: nothing changed", **cross))
    return marks


def _any(told: Sequence[Json], what: str) -> bool:
    return any(r["counts"][what] for r in told)


def tasks(summary: Json, records: Sequence[Json], details: Json) -> Figure | None:
    """A Gantt chart: the tasks of up to SHOWN clients, those most often invited, in the first ROUNDS rounds; None if no time was
    simulated."""
    told = simulated(records)[:ROUNDS]
    rows = [row for record in told for row in record["tasks"]]
    if not rows:
        return None
    often = Counter(client for client, *_ in rows)
    ids = [id for id, _ in often.most_common(SHOWN)]
    turn = {id: place for place, id in enumerate(in_order(ids))}
    factor, unit = time_unit(told[-1]["simulated"]["end"])
    figure = style.figure(1.1 + 0.16 * max(4, len(ids)))
    axes = figure.subplots()
    for what, colour in OUTCOMES.items():
        bars = [(turn[c], a / factor, b / factor) for c, a, b, found in rows if c in turn and found == what]
        places, starts, widths = [b[0] for b in bars], [b[1] for b in bars], [b[2] - b[1] for b in bars]
        axes.barh(places, widths, 0.7, left=starts, color=colour, edgecolor="white", linewidth=0.2)
    for record in told:
        axes.axvline(
            record["simulated"]["end"] / factor, color=style.GREY, linewidth=0.6, linestyle=(0, (2, 2)), zorder=0
        )
    axes.set_yticks(range(len(turn)), [style.shorten(id) for id in turn], fontsize=style.SMALLEST)
    axes.set_ylim(len(turn) - 0.4, -0.6)
    axes.set_xlim(0, 1.01 * told[-1]["simulated"]["end"] / factor)
    axes.set_xlabel(f"simulated {unit}")
    axes.grid(visible=False)
    ends: dict[str, Any] = {"color": style.GREY, "linewidth": 0.6, "linestyle": (0, (2, 2))}
    figure.legend(
        handles=[*_outcomes([{**r, "skipped": False} for r in told]), Line2D([], [], label="a round ends", **ends)],
        loc="outside lower center",
        ncols=4,
    )
    return figure


def staleness(summary: Json, records: Sequence[Json], details: Json) -> Figure | None:
    """How many versions the server had made before each upload was taken; None of a synchronous run."""
    found = Counter[int]()
    for record in records:
        found.update({int(versions): count for versions, count in record.get("staleness", {}).items()})
    if not found:
        return None
    figure = style.figure(2.6, style.COLUMN)
    axes = figure.subplots()
    mean = sum(versions * count for versions, count in found.items()) / found.total()
    axes.bar(list(found), list(found.values()), 0.9, color=style.CATEGORIES[0], linewidth=0)
    axes.axvline(mean, color=style.INK, linewidth=0.9, linestyle=(0, (4, 2)), label=f"mean {mean:.1f}")
    axes.set_xlabel("versions made since the task was given out")
    axes.set_ylabel("uploads taken")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False)
    return figure
