"""Plots of a comparison: scores of all methods, gains of clients, and learning curves."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.gains import Gains
from hetero_fl.reporting.comparison.runs import ComparedRuns
from hetero_fl.reporting.formatting import (
    TEST_DESCRIPTIONS,
    TEST_NAMES,
    algorithm_name,
    capitalize_first,
    format_bytes,
    format_difference,
    format_duration,
    metric_name,
    tested_metric,
)
from hetero_fl.reporting.methods import is_reference
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.shown_metrics import shown_metrics

LABEL_WIDTH = 25
"""Maximum number of characters of a method's name on one line."""

MANY = 16
"""Number of methods above which the rows of the plot are closer together."""

MANY_CURVES = 10
"""Number of methods above which no plot of learning curves is written."""

COLORS = (style.BLUE, style.VERMILION, style.GREEN, *style.CATEGORIES)

History = Sequence[Mapping[str, Any]]
"""Records of the rounds of one run."""


def draw_comparison(runs: ComparedRuns) -> Figure:
    """Plot the scores, bytes and time of each method.

    Scores are from the last round and are shown as mean and standard deviation over seeds. Faint
    points are single seeds. A score that is undefined in some seed of a method is left out. A
    dotted line marks the baseline. References are below a dashed line.

    Args:
        runs: The runs.
    """
    tests = {metric: _tests_with(runs, metric) for metric in runs.metrics()}
    tests = {metric: found for metric, found in tests.items() if found}
    present = [test for test in TEST_NAMES if any(test in found for found in tests.values())]
    labels = [_wrap_name(label) for label in runs.methods]
    pitch, line = (0.2, 0.14) if len(labels) <= MANY else (0.12, 0.13)
    num_lines = sum(label.count("\n") + 1 for label in labels)
    figure = style.figure(1.2 + pitch * len(labels) + line * num_lines)
    widths = [*(2.4 for _ in tests), 1.7, 1.7]
    panels = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
    for axes, (metric, found) in zip(panels, tests.items(), strict=False):
        for test in found:
            offset = 0.2 * (present.index(test) - (len(present) - 1) / 2)
            _draw_scores(axes, runs, f"{test}_last_{metric}", test, offset)
        name = capitalize_first(metric_name(metric, runs.task.unit))
        axes.set_title(textwrap.fill(name, 12))
        axes.xaxis.set_major_locator(style.ticks(3))
        axes.tick_params(axis="x", labelsize=8 if len(tests) < 4 else style.MIN_FONT_SIZE)
    frame = runs.frame.assign(bytes=runs.frame["up_bytes"] + runs.frame["down_bytes"])
    means = frame.groupby("algorithm")[["bytes", "seconds_total"]].mean().loc[runs.methods]
    _draw_bars(panels[-2], means["bytes"], format_bytes)
    panels[-2].set_title("Bytes")
    _draw_bars(panels[-1], means["seconds_total"], format_duration)
    panels[-1].set_title("Time" if runs.jobs == 1 else "Time\n(shared)")
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    for axes in panels:
        axes.set_title(axes.get_title("left"), fontsize=8)
        axes.grid(axis="y", visible=False)
        for place in range(1, len(labels), 2):
            axes.axhspan(place - 0.5, place + 0.5, color=style.BAND, linewidth=0, zorder=0)
        if 0 < len(runs.federated) < len(labels):
            edge = len(runs.federated) - 0.5
            axes.axhline(edge, color=style.GREY, linewidth=0.8, linestyle=(0, (3, 3)))
        if axes is not panels[0]:
            axes.tick_params(axis="y", length=0)
    entries: dict[str, Artist] = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(map(str, names), handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=5)
    return figure


def _tests_with(runs: ComparedRuns, metric: str) -> list[str]:
    """Return the tests on which any run has a score of a metric."""
    return [test for test in TEST_NAMES if runs.has_scores(f"{test}_last_{metric}")]


def _wrap_name(label: str) -> str:
    """Wrap the name of a method to at most three lines, without line breaks within settings."""
    name = _short_name(label).replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    lines = textwrap.wrap(name, LABEL_WIDTH, max_lines=3, placeholder=" …")
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _short_name(label: str) -> str:
    """Return the display name of a method, with short keys of client settings."""
    return algorithm_name(label).replace("clients.defaults.", "")


def _draw_scores(axes: Axes, runs: ComparedRuns, key: str, test: str, offset: float) -> None:
    """Draw the mean, the deviation and the seeds of each method that has a score in all runs."""
    color = style.TEST_COLORS[test]
    scores = runs.scores(key)
    num_runs = runs.frame.groupby("algorithm").size()
    for place, label in enumerate(runs.methods):
        known = scores.loc[label].dropna()
        if len(known) < num_runs[label]:
            continue
        if label == runs.baseline:
            name = f"{algorithm_name(label)}, the baseline"
            dotted = (0, (1, 1.5))
            axes.axvline(
                known.mean(), color=color, zorder=1, linewidth=0.9, linestyle=dotted, label=name
            )
        if len(known) > 1:
            positions = [place + offset] * len(known)
            axes.plot(known, positions, ".", markersize=5, color=color, alpha=0.35, mew=0)
        axes.errorbar(
            known.mean(),
            place + offset,
            xerr=known.std() if len(known) > 1 else None,
            color=color,
            marker=style.TEST_MARKERS[test],
            markersize=5,
            elinewidth=1.2,
            markerfacecolor="white" if is_reference(label) else color,
            label=TEST_DESCRIPTIONS[test],
        )


def _draw_bars(axes: Axes, means: pd.Series, format_value: Callable[[float], str]) -> None:
    """Draw the mean of each method as a bar, labeled with the value."""
    bars = axes.barh(range(len(means)), means, 0.6, color=style.LIGHT)
    texts = [format_value(mean) if mean else "none" for mean in means]
    axes.bar_label(bars, texts, padding=2, fontsize=7)
    axes.set_xlim(0, 2.5 * means.max() or 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def draw_gains(gains: Sequence[Gains], runs: ComparedRuns) -> Figure:
    """Plot the gain of each client over the baseline with each method, one panel for each test.

    Args:
        gains: The gains on the tests, which list the same clients.
        runs: The runs, whose order determines the colors as in the plot of learning curves.
    """
    methods = list(dict.fromkeys(runs.frame["algorithm"]))
    # Another marker for each repetition of the colors.
    looks = dict(zip(methods, itertools.product("os^", COLORS), strict=False))
    clients = gains[0].listed
    figure = style.figure(1.3 + 0.3 * len(clients))
    panels = figure.subplots(1, len(gains), sharey=True, squeeze=False)[0]
    for axes, one in zip(panels, gains, strict=True):
        # The methods of a client lie below each other.
        offsets = np.linspace(-0.2, 0.2, one.frame.shape[1])
        for offset, (method, column) in zip(offsets, one.frame.loc[clients].items(), strict=True):
            axes.plot(
                column,
                np.arange(len(clients)) + offset,
                looks[str(method)][0],
                markersize=5,
                label=_short_name(str(method)),
                color=looks[str(method)][1],
            )
        axes.axvline(0, color=style.GREY, linewidth=0.9, zorder=1)
        axes.set(
            title=tested_metric(one.test, one.metric),
            xlabel=f"gain over {algorithm_name(one.baseline)}, {one.unit}",
            yticks=range(len(clients)),
            yticklabels=clients,
            ylim=(len(clients) - 0.5, -0.5),
        )
        axes.xaxis.set_major_locator(style.ticks(5))
        axes.xaxis.set_major_formatter(
            lambda gain, _, metric=one.metric: format_difference(gain, metric)
        )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _learning_curves(histories: Mapping[str, Sequence[History]], metric: str) -> pd.DataFrame:
    """Return the global test scores of all runs.

    Returns:
        One row for each evaluated round, with the columns `method`, `run` (index of the run of the
        method), `round`, `hours` (simulated time, NaN if unknown) and `score`.
    """
    columns = ["method", "run", "round", "hours", "score"]
    rows = []
    for method, runs in histories.items():
        for index, records in enumerate(runs):
            for record in records:
                score = (record.get("global") or {}).get(metric)
                hours = record.get("simulated", {}).get("end", math.nan) / 3600
                rows.append((method, index, record["round"], hours, score))
    return pd.DataFrame(rows, columns=columns).astype({"score": float}).dropna(subset="score")


def hours_to_reach(histories: Sequence[History], task: Task) -> list[dict[str, float]]:
    """Return the simulated hours until each run reaches a target score on the global test.

    The target is the best score of the worst run, rounded down to two decimals.

    Args:
        histories: Records of each run.
        task: Task of the runs.

    Returns:
        A dictionary for each run that contains the hours, keyed by the column name, such as
        `simulated_hours_to_accuracy_0.80`. All dictionaries are empty if any run has no simulated
        time or no scores.
    """
    metric = shown_metrics(task).table[0]
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    timed = _learning_curves({"": histories}, metric).dropna()
    best = (sign * timed["score"]).groupby(timed["run"]).max()
    if not histories or len(best) < len(histories):
        return [{} for _ in histories]
    target = math.floor(100 * best.min() + 1e-9) / 100
    reached = timed[sign * timed["score"] >= target].groupby("run")["hours"].first()
    name = f"simulated_hours_to_{metric}_{abs(target):.2f}"
    return [{name: float(hours)} for hours in reached]


def write_curves(
    path: Path, histories: Mapping[str, Sequence[History]], task: Task, timed: bool = False
) -> None:
    """Write a plot of the global test score of each method against the round or simulated time.

    The curves are the mean and standard deviation over seeds. Nothing is written if there are more
    than 10 methods, or if no method was evaluated in several rounds.

    Args:
        path: Path of the PNG file.
        histories: Records of the runs of each method, keyed by label.
        task: Task of the runs.
        timed: Whether the x axis is simulated hours instead of rounds.
    """
    metric = shown_metrics(task).table[0]
    curves = _learning_curves(histories, metric)
    if timed:
        curves = curves.dropna()
    drawn = curves["method"].unique() if timed else list(histories)
    num_points = curves.groupby("method")["round"].nunique()
    if len(drawn) > MANY_CURVES or not (num_points > 1).any():
        return
    with style.plot_style():
        path.write_bytes(style.to_png(_draw_curves(curves, list(histories), metric, timed)))


def _draw_curves(curves: pd.DataFrame, methods: Sequence[str], metric: str, timed: bool) -> Figure:
    """Plot mean learning curves, with the colors of the methods of the comparison."""
    figure = style.figure(3.2)
    axes = figure.subplots()
    for place, label in enumerate(methods):
        rounds = curves[curves["method"] == label].groupby("round")
        mean = rounds["score"].mean()
        if mean.empty:
            continue
        x = rounds["hours"].mean() if timed else mean.index
        color = COLORS[place % len(COLORS)]
        dashed = (0, (4, 2)) if is_reference(label) or place >= len(COLORS) else "-"
        name = textwrap.fill(_short_name(label), 44, max_lines=2, placeholder=" …")
        axes.plot(x, mean, color=color, linestyle=dashed, label=name)
        spread = rounds["score"].std().fillna(0).to_numpy()
        style.draw_band(axes, x, mean.to_numpy(), spread, metric=metric, color=color, alpha=0.15)
    axes.set_xlabel("simulated hours" if timed else "round")
    axes.xaxis.set_major_locator(
        style.ticks(8) if timed else MaxNLocator(8, integer=True, min_n_ticks=1)
    )
    axes.set_title(tested_metric("global", metric))
    handles: list[Artist] = [*axes.get_legend_handles_labels()[0]]
    if curves["run"].nunique() > 1:
        label = "± standard deviation\nover seeds"
        handles.append(Patch(color=style.GREY, alpha=0.2, linewidth=0, label=label))
    figure.legend(handles=handles, loc="outside right center")
    return figure
