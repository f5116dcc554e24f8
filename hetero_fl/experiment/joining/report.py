"""Files with the results of a joining client: `join.json`, `join.md` and `join.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hetero_fl.algorithms.distillation import TEACHER
from hetero_fl.algorithms.hybrid import BACKBONE, BOTH, SCRATCH
from hetero_fl.core.metrics import SMALLER_IS_BETTER, metric_names
from hetero_fl.core.task import Task
from hetero_fl.reporting.formatting import METRICS, capitalize_first, format_score
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.rendering import markdown_table, render
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.shown_metrics import shown_metrics

WORDS = {
    SCRATCH: "from scratch",
    BACKBONE: "shared backbone",
    TEACHER: "consensus teacher",
    BOTH: "backbone and teacher",
}
COLORS = {SCRATCH: style.GREY, BACKBONE: style.BLUE, TEACHER: style.VERMILION, BOTH: style.GREEN}
MARKERS = {SCRATCH: "o", BACKBONE: "s", TEACHER: "^", BOTH: "D"}
Json = dict[str, Any]


def write_join(out: Path, content: Json, task: Task) -> None:
    """Write `join.json`, `join.md` and `join.png`.

    Args:
        out: The folder to write to.
        content: The results of `hetero_fl.join`. The entry `table` is added in place.
        task: The task of the run.
    """
    directory = RunDirectory(out)
    content["table"] = summarize_seeds(content, task)
    directory.write_json("join.json", content)
    directory.write_text("join.md", join_markdown(content, task))
    with style.plot_style():
        (out / "join.png").write_bytes(style.to_png(draw_join(content, task)))


def summarize_seeds(content: Mapping[str, Any], task: Task) -> list[Json]:
    """Compute the mean and standard deviation of each metric over the seeds.

    Args:
        content: The results of `hetero_fl.join`.
        task: The task of the run.

    Returns:
        One dictionary for each starting point and number of labels. A value is None if the metric
        is undefined. A standard deviation, with the suffix `_std`, is None if there are fewer than
        two seeds.
    """
    table = []
    for way in dict.fromkeys(row["begins"] for row in content["rows"]):
        for count in content["patients"]:
            rows = [r for r in content["rows"] if (r["begins"], r["patients"]) == (way, count)]
            entry: Json = {"begins": way, "patients": count}
            for metric in metric_names(task):
                values = [float(r[metric]) for r in rows if r[metric] is not None]
                entry[metric] = float(np.mean(values)) if values else None
                entry[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
            table.append(entry)
    return table


def defined_metrics(content: Mapping[str, Any], task: Task) -> list[str]:
    """Return the metrics to show for a task, except metrics that are undefined in all results."""
    return [
        metric
        for metric in shown_metrics(task).table
        if any(row[metric] is not None for row in content["rows"])
    ]


def join_markdown(content: Json, task: Task) -> str:
    """Format the results as Markdown, with a table for each metric."""
    return render(
        "join.md",
        **content,
        in_percent=task.kind != "regression",
        sections=[
            {
                "metric": capitalize_first(METRICS[metric]),
                "table": _metric_table(content, metric),
                "consensus": format_score(content["consensus"][metric], metric),
            }
            for metric in defined_metrics(content, task)
        ],
    )


def _metric_table(content: Json, metric: str) -> str:
    ways = dict.fromkeys(row["begins"] for row in content["rows"])
    rows = []
    for count in content["patients"]:
        cells = {e["begins"]: e for e in content["table"] if e["patients"] == count}
        rows.append(
            [str(count), *(_format_cell(cells[way], cells[SCRATCH], metric) for way in ways)]
        )
    columns = ["labeled", *(WORDS[way] for way in ways)]
    return markdown_table(columns, rows, ["right"] * len(columns))


def is_clearly_better(entry: Mapping[str, Any], scratch: Mapping[str, Any], metric: str) -> bool:
    """Return whether a starting point is clearly better than training from scratch.

    The difference of the means must exceed the sum of the standard deviations. The result is False
    if one of these values is None.

    Args:
        entry: Means and standard deviations for the starting point.
        scratch: Means and standard deviations for training from scratch.
        metric: The metric to compare.
    """
    values = [entry[metric], entry[f"{metric}_std"], scratch[metric], scratch[f"{metric}_std"]]
    if any(value is None for value in values):
        return False
    gain = values[2] - values[0] if metric in SMALLER_IS_BETTER else values[0] - values[2]
    return bool(gain > values[1] + values[3])


def _format_cell(entry: Json, scratch: Json, metric: str) -> str:
    text = format_score(entry[metric], metric)
    if entry[f"{metric}_std"] is not None:
        text += f" ± {format_score(entry[f'{metric}_std'], metric)}"
    return f"**{text}**" if is_clearly_better(entry, scratch, metric) else text


def draw_join(content: Json, task: Task) -> Figure:
    """Plot the mean and standard deviation of each metric over the number of labels."""
    metrics = defined_metrics(content, task)
    figure = style.figure(2.7)
    panels: Sequence[Axes] = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for way in dict.fromkeys(row["begins"] for row in content["rows"]):
            known = [e for e in content["table"] if e["begins"] == way and e[metric] is not None]
            x = [e["patients"] for e in known]
            y = np.array([e[metric] for e in known])
            spread = np.array([e[f"{metric}_std"] or 0.0 for e in known])
            axes.plot(x, y, marker=MARKERS[way], color=COLORS[way], label=WORDS[way])
            style.draw_band(axes, x, y, spread, metric=metric, color=COLORS[way], alpha=0.18)
        if content["consensus"][metric] is not None:
            axes.axhline(
                content["consensus"][metric],
                color=style.INK,
                linewidth=0.9,
                linestyle=(0, (1, 1.5)),
                label="the run's consensus, no labels",
            )
        axes.set_xscale("log")
        axes.set_xticks(content["patients"], [f"{n:,}" for n in content["patients"]])
        axes.minorticks_off()
        axes.set(xlabel=f"labeled {content['unit']}", title=capitalize_first(METRICS[metric]))
    handles, words = panels[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=5)
    return figure
