"""Write the results of a comparison: CSV, Markdown, LaTeX, PNG and HTML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hetero_fl.algorithms.requirements import SINGLE_UPLOADS
from hetero_fl.core.metrics import metric_names
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison import facts, plots
from hetero_fl.reporting.comparison.gains import Gains, client_gains, describe_gains, mean_gains
from hetero_fl.reporting.comparison.result import DIFFERENCES
from hetero_fl.reporting.comparison.runs import ComparedRuns, Row
from hetero_fl.reporting.comparison.significance import MIN_SEEDS
from hetero_fl.reporting.comparison.tables import (
    TEXT_COLUMNS,
    Candidate,
    difference_table,
    paired_differences,
    score_table,
    tuning_table,
)
from hetero_fl.reporting.formatting import TEST_NAMES
from hetero_fl.reporting.methods import describe_methods, format_needs
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.shown_metrics import is_metric


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
) -> None:
    """Write the tables, the plots and the report of a comparison.

    Methods are listed in the order of the rows, with references last. The arguments and the number
    of parallel runs are read from `comparison.json`, and facts about the runs from the folders in
    `runs/` that the rows name.

    Args:
        out_dir: Folder of the comparison.
        rows: One row for each run, from `comparison_row`. The value of `algorithm` may contain
            settings (`hybrid:teacher=mean`), and that of `run` is the name of the run's folder.
        title: Title of the report.
        note: A sentence about the tuning, shown below the title and in LaTeX captions.
        task: Task of the runs.
        missing: Reasons why methods or runs are not among the rows, keyed by method or run.
        tried: Candidates of a tuning grid.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    out = RunDirectory(out_dir)
    out.path.mkdir(parents=True, exist_ok=True)
    record = facts.read_record(out.path)
    runs = ComparedRuns(
        pd.DataFrame(rows, columns=csv_columns(rows, task)), task, record.get("jobs")
    )
    of_clients = client_gains(rows, runs)
    gains = mean_gains(of_clients, runs)
    differences = paired_differences(runs)
    _write_csv_files(out, rows, runs, of_clients, differences)
    directories = facts.open_runs(out.path, rows)
    about = facts.gather_facts([run for found in directories.values() for run in found])
    tables = [
        score_table(runs, "last", about),
        difference_table(differences, runs),
        *(one.table() for one in gains),
        score_table(runs, "best", about),
        tuning_table(tried, task),
    ]
    shown = [table for table in tables if table is not None]
    tex = [table.latex(note) for table in shown if table.label]
    out.write_text("comparison.tex", "\n\n".join(["% needs \\usepackage{booktabs,graphicx}", *tex]))
    about |= facts.argument_facts(record, runs)
    about |= {f"Without {name}": reason for name, reason in (missing or {}).items()}
    first_runs = {label: found[0] for label, found in directories.items()}
    content = {
        "title": title,
        "about": about,
        "paragraphs": [note, facts.simulation_note(first_runs), describe_gains(gains)],
        "tables": shown,
        "table_notes": _table_notes(runs, has_differences=not differences.empty),
        "settings": facts.settings_of_methods(first_runs),
        "notes": facts.notes_of_methods(first_runs),
        "methods": describe_methods(runs.methods),
    }
    out.write_text("comparison.md", render("comparison.md", **content))
    page = render(
        "comparison.html",
        **content,
        rows=rows,
        runs=runs,
        text_columns=TEXT_COLUMNS,
        columns=runs.columns()[:3],
        pictures=_write_pictures(out.path, runs, gains),
        reports={path.parent.name for path in out.path.glob("runs/*/report.html")},
    )
    out.write_text("report.html", page)


def csv_columns(rows: Sequence[Row], task: Task) -> list[str]:
    """Return the columns of `comparison.csv`, without gains.

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


def _write_csv_files(
    out: RunDirectory,
    rows: Sequence[Row],
    runs: ComparedRuns,
    of_clients: pd.DataFrame,
    differences: pd.DataFrame,
) -> None:
    """Write `comparison.csv`, and `differences.csv` if methods were tested."""
    gains = of_clients.pivot_table("gain", ["algorithm", "seed"], "column", sort=False)
    # Whole numbers remain whole numbers if other runs have no value.
    frame = pd.DataFrame(rows, columns=csv_columns(rows, runs.task), dtype=object)
    frame = frame.merge(gains.reset_index(), how="left")
    out.write_text("comparison.csv", frame.to_csv(index=False, lineterminator="\n"))
    (out.path / DIFFERENCES).unlink(missing_ok=True)
    if not differences.empty:
        tested = differences.dropna().astype({"seeds": int})
        out.write_text(DIFFERENCES, tested.to_csv(index=False, lineterminator="\n"))


def _write_pictures(out: Path, runs: ComparedRuns, gains: Sequence[Gains]) -> dict[str, Any]:
    """Write `comparison.png`, and `gains.png` if there are gains, and return them for the page."""
    with style.plot_style():
        pictures = {"comparison": style.to_png(plots.draw_comparison(runs))}
        if gains:
            pictures["gains"] = style.to_png(plots.draw_gains(gains, runs))
    (out / "gains.png").unlink(missing_ok=True)
    for name, picture in pictures.items():
        (out / f"{name}.png").write_bytes(picture)
    return {name: style.embed_picture(picture) for name, picture in pictures.items()}


def _table_notes(runs: ComparedRuns, *, has_differences: bool) -> list[str]:
    """Return the notes below the tables."""
    notes = []
    if not has_differences and len(runs.methods) > 1:
        notes.append(f"Paired differences with p-values need at least {MIN_SEEDS} seeds.")
    if any(SINGLE_UPLOADS in format_needs(label) for label in runs.methods):
        notes.append(
            "Single uploads: the server must see each client's upload, "
            "so neither secure aggregation nor homomorphic encryption is possible."
        )
    return notes
