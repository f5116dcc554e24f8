"""A comparison of algorithms over seeds: `comparison.csv`, `.md`, `.tex`, `.png` and `report.html`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from hetero_fl.algorithms.requirements import ONE_BY_ONE
from hetero_fl.core.metrics import metric_names
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison import plots
from hetero_fl.reporting.comparison.facts import Row, UsedSettings, compared_methods, gather_facts
from hetero_fl.reporting.comparison.tables import (
    BELOW,
    Candidate,
    format_single,
    make_table,
    make_tuning_table,
    seconds_note,
)
from hetero_fl.reporting.formatting import METRICS, MISSING, READINGS
from hetero_fl.reporting.methods import describe_methods
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.run_directory import RunDirectory


def comparison_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A run's row, from its `summary.json`.

    Keys: `algorithm`, `seed`; `{personal,global,server}_{last,best}_{metric}`, where there is such a reading, and for
    the worst client on local tests `personal_{last,best}_{metric}_worst`; `up_bytes`, `down_bytes`, `seconds_total`;
    `simulated_hours` where time was simulated.
    """
    row: dict[str, Any] = {"algorithm": summary["algorithm"], "seed": summary["seed"]}
    for reading in READINGS:
        for moment, name in (("last", "last"), ("best", "best_by_validation")):
            for metric, value in ((summary[reading] or {}).get(name) or {}).items():
                of_worst = reading == "personal" and metric.endswith("_worst")
                if metric in METRICS or of_worst:
                    row[f"{reading}_{moment}_{metric}"] = value
    exchanged = summary["communication"]
    return row | {
        "up_bytes": exchanged["up_bytes"],
        "down_bytes": exchanged["down_bytes"],
        "seconds_total": summary["seconds"]["total"],
        **(
            {"simulated_hours": told["seconds"] / 3600}
            if (told := summary.get("simulated"))
            else {}
        ),
    }


def write_comparison(
    out_dir: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    title: str,
    note: str,
    task: Task,
    missing: Mapping[str, str] | None = None,
    tried: Sequence[Candidate] = (),
    settings: UsedSettings | None = None,
) -> None:
    """Write table, figure and report of a comparison.

    Tables and picture keep the order of the rows, the bounds last. What the comparison is about is read from `runs/` and
    `log.txt` in `out_dir`, as far as they exist.

    Args:
        out_dir: Folder of the comparison.
        rows: One row for each run, from `comparison_row`; `algorithm` is a name, or one with settings of its own
            (`hybrid:teacher=mean`).
        title: Title of the page.
        note: What was chosen among the candidates of a grid; below the title, and in the captions in LaTeX.
        task: What the runs learn.
        missing: Why a method, or a run of it, is not among the rows.
        tried: The candidates of a grid.
        settings: Those of each method that are not its defaults.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("a comparison needs at least one run")
    out = RunDirectory(out_dir)
    out.path.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows, columns=csv_columns(rows, task), dtype=object)
    out.write_text("comparison.csv", frame.to_csv(index=False, lineterminator="\n"))
    known = gather_facts(out.path, rows, missing)
    last, selected = (
        make_table(rows, task, moment, known.jobs, known.local_test_note)
        for moment in ("last", "best")
    )
    tex = [last.latex("comparison-last", note), selected.latex("comparison-selected", note)]
    out.write_text(
        "comparison.tex", "% needs \\usepackage{booktabs,graphicx}\n" + "\n\n".join(tex) + "\n"
    )
    with style.plot_style():
        picture = style.to_png(plots.draw_comparison(rows, task, known.jobs))
    (out.path / "comparison.png").write_bytes(picture)
    shown = compared_methods(rows)
    content: dict[str, Any] = {
        "title": title,
        "note": note,
        "about": known,
        "tables": (last, selected),
        "grid": make_tuning_table(tried, task),
        "settings": settings,
        "methods": describe_methods(shown.all_labels),
    }
    out.write_text("comparison.md", render("comparison.md", **content))
    page = render(
        "comparison.html",
        **content,
        shown=shown,
        rows=rows,
        columns=last.columns[:3],
        score=format_single,
        picture=style.embed_picture(picture),
        several=len({row["seed"] for row in rows}) > 1,
        below=BELOW,
        missing=MISSING,
        one_by_one=any(ONE_BY_ONE in line.needs for line in last.lines),
        seconds=seconds_note(known.jobs),
    )
    out.write_text("report.html", page)


def csv_columns(rows: Sequence[Row], task: Task) -> list[str]:
    """The columns of `comparison.csv`; keys of the rows that are not among the contract's come last."""
    names = ["algorithm", "seed"]
    names += [
        f"{r}_{m}_{metric}"
        for r in READINGS
        for m in ("last", "best")
        for metric in metric_names(task)
    ]
    names += ["up_bytes", "down_bytes", "seconds_total"]
    return list(dict.fromkeys([*names, *(key for row in rows for key in row)]))
