"""A comparison of algorithms over seeds: `comparison.csv`, `.md`, `.tex`, `.png` and `report.html`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hetero_fl.algorithms.requirements import ONE_BY_ONE
from hetero_fl.core.metrics import metric_names
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison import plots
from hetero_fl.reporting.comparison import tables as comparison_tables
from hetero_fl.reporting.comparison.facts import (
    TITLE,
    ComparisonFacts,
    Row,
    UsedSettings,
    compared_methods,
    gather_facts,
)
from hetero_fl.reporting.comparison.tables import (
    Candidate,
    ComparisonTable,
    TuningTable,
    make_tuning_table,
)
from hetero_fl.reporting.formatting import (
    METRICS,
    MISSING,
    READINGS,
    algorithm_name,
    format_bytes,
    format_duration,
)
from hetero_fl.reporting.methods import describe_methods
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.report import embed_picture, render
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
    """Write table, figure and report of a comparison; one row a run, as `comparison_row` makes it.

    `algorithm` is a name, or one with settings of its own (`hybrid:teacher=mean`). Tables and picture keep the order of
    the rows, the bounds last. What it is about is read from `runs/` and `log.txt` in `out_dir`, as far as they are there.
    `missing`: why a method, or a run of it, is not among the rows. `tried`: the candidates of a grid, where there was one;
    `note`: what was chosen among them, which stands below the title and in the captions in LaTeX. `settings`: those of each
    method that are not its defaults. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("a comparison needs at least one run")
    out = RunDirectory(out_dir)
    out.path.mkdir(parents=True, exist_ok=True)
    out.write_text("comparison.csv", _csv(rows, task))
    known = gather_facts(out.path, rows, missing)
    tables = [
        comparison_tables.make_table(rows, task, moment, known.jobs, known.local_test_note)
        for moment in ("last", "best")
    ]
    grid = make_tuning_table(tried, task)
    out.write_text("comparison.md", _markdown(tables, rows, known, title, note, grid, settings))
    labels = ("comparison-last", "comparison-selected")
    tex = [
        comparison_tables.latex(table, label, note)
        for table, label in zip(tables, labels, strict=True)
    ]
    out.write_text(
        "comparison.tex", "% needs \\usepackage{booktabs,graphicx}\n" + "\n\n".join(tex) + "\n"
    )
    with style.plot_style():
        picture = style.to_png(plots.draw_comparison(rows, task, known.jobs))
    (out.path / "comparison.png").write_bytes(picture)
    out.write_text("report.html", _html(tables, rows, known, picture, title, note, grid, settings))


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


def _csv(rows: Sequence[Row], task: Task) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, csv_columns(rows, task), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _markdown(
    tables: Sequence[ComparisonTable],
    rows: Sequence[Row],
    known: ComparisonFacts,
    title: str,
    note: str,
    grid: TuningTable | None,
    settings: UsedSettings | None,
) -> str:
    parts = [f"# {title}", *([note] if note else []), *([known.warning] if known.warning else [])]
    parts += [
        "\n".join(f"- **{name}:** {text}" for name, text in known.facts),
        f"Made by `{known.command}`",
    ]
    for table in tables:
        parts += [f"## {table.title}", comparison_tables.markdown(table), table.caption]
    if grid:
        parts += [f"## {grid.title}", comparison_tables.markdown_tuning(grid), grid.caption]
    if settings:
        parts += [f"## {TITLE}", *([settings.note] if settings.note else [])]
        parts += ["\n".join(f"- **{methods}:** {text}" for methods, text in settings.lines())]
    methods = describe_methods(compared_methods(rows).all_labels)
    parts += [
        "## The methods",
        "\n".join(f"- **{name}:** {' '.join(filter(None, told))}" for name, *told in methods),
    ]
    return "\n\n".join(parts) + "\n"


def _html(
    tables: Sequence[ComparisonTable],
    rows: Sequence[Row],
    known: ComparisonFacts,
    picture: bytes,
    title: str,
    note: str,
    grid: TuningTable | None,
    settings: UsedSettings | None,
) -> str:
    shown = compared_methods(rows)
    first = tables[0].columns[:3]
    runs = [
        {
            "name": algorithm_name(str(row["algorithm"])),
            "seed": row["seed"],
            "values": [comparison_tables.format_single(row.get(c.key), c.metric) for c in first],
            "exchanged": format_bytes(row["up_bytes"] + row["down_bytes"]),
            "time": format_duration(row["seconds_total"]),
        }
        for row in rows
    ]
    return render(
        "comparison.html",
        title=title,
        note=note,
        tables=tables,
        grid=grid,
        settings=settings,
        picture=embed_picture(picture),
        several=len({row["seed"] for row in rows}) > 1,
        bounds=bool(shown.bounds),
        baseline=algorithm_name(shown.baseline)
        if shown.baseline and len(shown.all_labels) > 1
        else "",
        below=comparison_tables.BELOW,
        missing=MISSING,
        one_by_one=any(ONE_BY_ONE in line.needs for line in tables[0].lines),
        about=known,
        seconds=comparison_tables.seconds_note(known.jobs),
        methods=describe_methods(shown.all_labels),
        run_columns=[c.title for c in first],
        runs=runs,
    )
