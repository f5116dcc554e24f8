"""Truth and forecast over time: `forecasts`, for regressions whose rows have dates."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from hetero_fl.reporting import style
from hetero_fl.reporting.wording import figure as told

Json = dict[str, Any]

PANELS = 8
"""So many clients are shown, the first ones."""

FROM = 315_532_800
"""Times from here on (1980, in seconds) are dates; smaller ones are counts."""

TO = 253_402_300_799
"""The end of the year 9999, after which there are no dates."""


def forecasts(summary: Json, details: Json) -> Figure | None:
    """Each client's own test rows, the last in time: truth, forecast, and of the simple rules the nearest. The output that is
    furthest ahead, which is the last. None without dates."""
    found = details.get("forecast", {})
    shown = [row["id"] for row in summary["clients"] if found.get(row["id"], {}).get("time")][:PANELS]
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
    time, truth, said = np.array(found["time"]), np.array(found["truth"][-1]), np.array(found["predicted"][-1])
    dated = bool(((time >= FROM) & (time <= TO)).all())
    places: Any = time.astype("datetime64[s]") if dated else time
    rules = {name: np.array(outputs[-1]) for name, outputs in found["baselines"].items()}
    axes.plot(places, truth, color=style.INK, linewidth=1.1, label="truth")
    axes.plot(places, said, color=style.BLUE, linewidth=1.4, label="forecast")
    text = f"{client}, {details['labels'][-1]}: mean absolute error here {_error(said, truth)}"
    if rules:
        rule = min(rules, key=lambda name: float(np.abs(rules[name] - truth).mean()))
        axes.plot(
            places, rules[rule], color=style.CATEGORIES[1], linewidth=0.9, linestyle=(0, (3, 2)), label="simple rule"
        )
        text += f", “{rule}” {_error(rules[rule], truth)}"
    axes.set_title(text, fontsize=8)
    axes.yaxis.set_major_locator(style.ticks(3))
    axes.margins(x=0.01)
    if dated:
        locator = AutoDateLocator(minticks=4, maxticks=9)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _error(said: np.ndarray, truth: np.ndarray) -> str:
    return told(float(np.abs(said - truth).mean()), "mae")
