"""Write the results of a comparison: CSV, Markdown, LaTeX, PNG and HTML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from hetero_fl.algorithms.requirements import SINGLE_UPLOADS
from hetero_fl.core.metrics import metric_names
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison import plots
from hetero_fl.reporting.comparison.differences import make_difference_table
from hetero_fl.reporting.comparison.facts import Row, UsedSettings, compared_methods, gather_facts
from hetero_fl.reporting.comparison.gains import client_gains, describe_gains, make_gain_tables
from hetero_fl.reporting.comparison.result import DIFFERENCES
from hetero_fl.reporting.comparison.significance import MIN_SEEDS
from hetero_fl.reporting.comparison.tables import (
    BELOW,
    Candidate,
    format_single,
    make_table,
    make_tuning_table,
    seconds_note,
)
from hetero_fl.reporting.formatting import MISSING, TEST_NAMES, is_metric
from hetero_fl.reporting.methods import describe_methods
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.run_directory import RunDirectory

DIFFERENCES_NOTE = f"Paired differences with p-values need at least {MIN_SEEDS} seeds."
NEEDS_NOTE = (
    "Single uploads: the server must see each client's upload, "
    "so neither secure aggregation nor homomorphic encryption is possible."
)


def comparison_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a run in a comparison.

    The keys are `algorithm`, `seed`, `{personal,global,server}_{last,best}_{metric}` for existing
    scores, `personal_{last,best}_{metric}_worst` for the worst client, `up_bytes`, `down_bytes`,
    `seconds_total`, `clients` with the entries of the summary and, for runs with simulated time,
    `simulated_hours`.

    Args:
        summary: Content of the run's `summary.json`.
    """
    row: dict[str, Any] = {"algorithm": summary["algorithm"], "seed": summary["seed"]}
    for test in TEST_NAMES:
        for moment, name in (("last", "last"), ("best", "best_by_validation")):
            for metric, value in ((summary[test] or {}).get(name) or {}).items():
                of_worst = test == "personal" and metric.endswith("_worst")
                if is_metric(metric) or of_worst:
                    row[f"{test}_{moment}_{metric}"] = value
    exchanged = summary["communication"]
    row["up_bytes"] = exchanged["up_bytes"]
    row["down_bytes"] = exchanged["down_bytes"]
    row["seconds_total"] = summary["seconds"]["total"]
    row["clients"] = summary["clients"]
    if simulated := summary.get("simulated"):
        row["simulated_hours"] = simulated["seconds"] / 3600
    return row


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
    """Write the tables, the plot and the report of a comparison.

    Methods are listed in the order of the rows, with references last. Information about the runs is
    read from `runs/` and `log.txt` in `out_dir` if they exist.

    Args:
        out_dir: Folder of the comparison.
        rows: One row for each run, from `comparison_row`. The value of `algorithm` may contain
            settings (`hybrid:teacher=mean`).
        title: Title of the report.
        note: A sentence about the tuning, shown below the title and in LaTeX captions.
        task: Task of the runs.
        missing: Reasons why methods or runs are not among the rows, keyed by method or run.
        tried: Candidates of a tuning grid.
        settings: Settings of the methods that differ from the defaults. If None, the report does
            not list settings.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    out = RunDirectory(out_dir)
    out.path.mkdir(parents=True, exist_ok=True)
    found = client_gains(rows, task)
    frame = pd.DataFrame(rows, columns=csv_columns(rows, task), dtype=object).merge(
        found.pivot_table("gain", ["algorithm", "seed"], "column", sort=False).reset_index(),
        how="left",
    )
    out.write_text("comparison.csv", frame.to_csv(index=False, lineterminator="\n"))
    known = gather_facts(out.path, rows, missing)
    last = make_table(rows, task, "last", known.jobs, known.local_test_note)
    selected = make_table(rows, task, "best", known.jobs, known.local_test_note)
    differences = make_difference_table(rows, task)
    tex = [last.latex("comparison-last", note), selected.latex("comparison-selected", note)]
    (out.path / DIFFERENCES).unlink(missing_ok=True)
    if differences is not None:
        tex.append(differences.latex("comparison-differences"))
        out.write_text(DIFFERENCES, differences.csv())
    out.write_text(
        "comparison.tex", "% needs \\usepackage{booktabs,graphicx}\n" + "\n\n".join(tex) + "\n"
    )
    gains = make_gain_tables(found, rows, task)
    methods = list(dict.fromkeys(str(row["algorithm"]) for row in rows))
    with style.plot_style():
        pictures = {"comparison": style.to_png(plots.draw_comparison(rows, task, known.jobs))}
        if gains:
            pictures["gains"] = style.to_png(plots.draw_gains(gains, methods))
    (out.path / "gains.png").unlink(missing_ok=True)
    for name, picture in pictures.items():
        (out.path / f"{name}.png").write_bytes(picture)
    shown = compared_methods(rows)
    content: dict[str, Any] = {
        "title": title,
        "note": note,
        "about": known,
        "tables": (last, selected),
        "differences": differences,
        "differences_note": "" if differences or len(shown.all_labels) < 2 else DIFFERENCES_NOTE,
        "gains": gains,
        "answer": describe_gains(gains, rows, known.jobs),
        "grid": make_tuning_table(tried, task),
        "settings": settings,
        "methods": describe_methods(shown.all_labels),
        "needs_note": NEEDS_NOTE if any(SINGLE_UPLOADS in x.needs for x in last.lines) else "",
    }
    out.write_text("comparison.md", render("comparison.md", **content))
    page = render(
        "comparison.html",
        **content,
        shown=shown,
        rows=rows,
        columns=last.columns[:3],
        score=format_single,
        pictures={name: style.embed_picture(picture) for name, picture in pictures.items()},
        several=len({row["seed"] for row in rows}) > 1,
        reports={path.parent.name for path in out.path.glob("runs/*/report.html")},
        below=BELOW,
        missing=MISSING,
        seconds=seconds_note(known.jobs),
    )
    out.write_text("report.html", page)


def csv_columns(rows: Sequence[Row], task: Task) -> list[str]:
    """Return the columns of `comparison.csv`.

    The standard columns for the task come first, followed by all other keys of the rows.
    """
    names = ["algorithm", "seed"]
    names += [
        f"{test}_{moment}_{metric}"
        for test in TEST_NAMES
        for moment in ("last", "best")
        for metric in metric_names(task)
    ]
    names += ["up_bytes", "down_bytes", "seconds_total"]
    return list(dict.fromkeys([*names, *(k for row in rows for k in row if k != "clients")]))
