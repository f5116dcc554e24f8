#!/usr/bin/env python3
"""Write the result tables of the documentation and the plot of the main example.

README.md contains a summary of a few methods, and docs/results/medical.md contains the tables of
all methods. The tables of Hybrid and its components are in docs/results/hybrid.md and
docs/explanation/label_skew.md, and the replicated tables are in docs/results/replication.md. The
runs are archived in docs/results.

    python scripts/result_tables.py                            # write tables and plot
    python scripts/result_tables.py --archive runs/readme ...  # archive comparisons first
    python scripts/result_tables.py --archive components/ablation_medical=runs/ablation
    python scripts/result_tables.py --check                    # exit status 1 if a page is outdated
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.science import published  # noqa: E402
from benchmarks.science.component_tables import TABLES, component_table  # noqa: E402
from benchmarks.science.replication_runs import jobs_of, read_record  # noqa: E402
from benchmarks.science.replication_tables import score_table  # noqa: E402
from hetero_fl.core.task import Task  # noqa: E402
from hetero_fl.reporting.comparison import plots  # noqa: E402
from hetero_fl.reporting.comparison.tables import (  # noqa: E402
    ComparisonTable,
    TableCell,
    TableLine,
    make_table,
)
from hetero_fl.reporting.formatting import MISSING, algorithm_base, algorithm_name  # noqa: E402
from hetero_fl.reporting.methods import is_bound  # noqa: E402
from hetero_fl.reporting.plots import style  # noqa: E402
from hetero_fl.reporting.run_directory import RunDirectory  # noqa: E402
from hetero_fl.utils.text import split_top_level  # noqa: E402

ARCHIVE = ROOT / "docs" / "results"
PAGES = (
    ROOT / "README.md",
    ARCHIVE / "medical.md",
    ARCHIVE / "hybrid.md",
    ARCHIVE / "replication.md",
    ROOT / "docs" / "explanation" / "label_skew.md",
)
PICTURES = {"medical_hetero": ROOT / "docs" / "images" / "medical_hetero.png"}
TASK = Task("multiclass", 2)
SHORT = {"logit_adjustment=true": "LA", "teacher=contrast": "contrast teacher"}
ADJUSTED = "*With LA*"
BOUNDS = "*Bounds*"
WORST = "Worst client, local test"
TEXT = ("algorithm", "commit")
# Columns and methods of the summary in README.md. The methods include FedAvg, and FedDF with a
# contrast teacher, which are better than Hybrid in some columns.
SUMMARY_COLUMNS = tuple(
    f"{test}_last_{metric}"
    for test in ("global", "personal")
    for metric in ("balanced_accuracy", "auroc")
)
SUMMARY_METHODS = (
    "local",
    "fedavg",
    "fedavg:logit_adjustment=true",
    "fedmd:logit_adjustment=true",
    "feddf:logit_adjustment=true",
    "feddf:logit_adjustment=true:teacher=contrast",
    "hybrid",
    "centralized:logit_adjustment=true",
)

Row = dict[str, Any]


def archive(folder: Path, commit: str, name: str = "") -> None:
    """Copy the results of a comparison to docs/results.

    Args:
        folder: Folder of a finished comparison.
        commit: Commit of the runs, which is written to the last column, after the threads.
        name: Name of the archive. If empty, the name of the configuration is used.
    """
    config = RunDirectory.open(sorted((folder / "runs").iterdir())[0]).config()
    name = name or config["name"]
    run = {"threads": config["runtime"]["threads"], "commit": commit}
    with open(folder / "comparison.csv", newline="", encoding="utf-8") as file:
        rows = [{**row, **run} for row in csv.DictReader(file)]
    for row in rows:
        # The name of the run directory, which is not archived.
        row.pop("run", None)
    path = ARCHIVE / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def archived(name: str) -> list[Row]:
    """Read the rows of an archived comparison. Missing numbers are None."""
    with open(ARCHIVE / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [
            {key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)
        ]


def _value(key: str, text: str) -> Any:
    if key in TEXT:
        return text
    if key == "seed":
        return int(text)
    return float(text) if text else None


def section(rows: list[Row]) -> str:
    """Format the table of the last round, followed by a line with the p-values and the commit.

    The columns are those of `comparison.md`, except the columns for the server's model, p-values,
    seconds and needs, so that the table fits the width of a GitHub page. Methods with logit
    adjustment form a separate group, which distinguishes the effect of this component from the
    effect of a method.

    Args:
        rows: Rows of an archived comparison.
    """
    table = make_table(rows, TASK, "last")
    kept = [
        place for place, column in enumerate(table.columns) if not column.key.startswith("server")
    ]
    titles = [table.columns[place].title for place in kept]
    header = ["Method", *(WORST if title.startswith("Worst") else title for title in titles), "MB"]
    lines = [_joined(header), _joined(["---", *("---:" for _ in header[1:])])]
    groups: dict[str, list[TableLine]] = {"": [], ADJUSTED: [], BOUNDS: []}
    for line in table.lines:
        groups[
            BOUNDS if is_bound(line.algorithm) else ADJUSTED if _is_adjusted(line.algorithm) else ""
        ].append(line)
    for title, members in groups.items():
        if title and members:
            lines.append(_joined([title, *("" for _ in header[1:])]))
        for line in members:
            cells = [_cell(line.cells[place], table.columns[place].key) for place in kept]
            lines.append(_joined([_name(line.algorithm), *cells, line.megabytes]))
    return "\n".join([*lines, "", _origin(table, rows)])


def summary(rows: list[Row]) -> str:
    """Format the table for README.md, with the scores and traffic of `SUMMARY_METHODS`.

    A score is bold if it is the best of all methods, including methods that are not shown.

    Args:
        rows: Rows of an archived comparison.
    """
    table = make_table(rows, TASK, "last")
    kept = [
        place
        for key in SUMMARY_COLUMNS
        for place, column in enumerate(table.columns)
        if column.key == key
    ]
    header = ["Method", *(table.columns[place].title for place in kept), "MB"]
    lines = [_joined(header), _joined(["---", *("---:" for _ in header[1:])])]
    by_label = {line.algorithm: line for line in table.lines}
    for label in SUMMARY_METHODS:
        line = by_label[label]
        cells = [_cell(line.cells[place], table.columns[place].key) for place in kept]
        name = f"{_name(label)} (bound)" if is_bound(label) else _name(label)
        lines.append(_joined([name, *cells, line.megabytes]))
    return "\n".join(lines)


def replication(name: str) -> str:
    """Format the replicated table with the given name, from the recorded runs."""
    table = published.TABLES[name]
    record = read_record(ARCHIVE / "replication.json")
    return score_table(table, jobs_of([table], None, "", ARCHIVE, record))


def _joined(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: TableCell, key: str) -> str:
    text = cell.text.replace(" ± ", "±")
    if key.endswith("_worst") and cell.mean is not None and cell.deviation is not None:
        # A single client may have as few as 18 rows, so decimals are not significant.
        text = f"{100 * cell.mean:.0f}±{100 * cell.deviation:.0f}"
    return f"**{text}**" if cell.best else text


def _name(label: str) -> str:
    """Return the name of a method with abbreviated settings, such as `FedDF + LA`."""
    base = algorithm_base(label)
    settings = split_top_level(label[len(base) + 1 :], ":")
    if all(setting in SHORT for setting in settings):
        return " + ".join([algorithm_name(base), *(SHORT[setting] for setting in settings)])
    return algorithm_name(label)


def _is_adjusted(label: str) -> bool:
    """Return whether a method trains with logit adjustment, by a setting or by default."""
    return "logit_adjustment=true" in label or label.startswith("hybrid")


def _origin(table: ComparisonTable, rows: list[Row]) -> str:
    best = next((line for line in table.lines if line.p == "best"), None)
    parts = []
    if best is not None and table.tested:
        found = ", ".join(
            f"{_name(line.algorithm)} {line.p}"
            for line in table.lines
            if line.p not in ("", "best")
        )
        first = table.columns[0].title
        parts.append(
            f"p (two-sided t-test on “{first}”, paired by seed, uncorrected, against "
            f"{_name(best.algorithm)}): {found}."
        )
    commits = ", ".join(dict.fromkeys(f"`{row['commit']}`" for row in rows))
    parts.append(f"Commit {commits}; every run: [CSV]({{name}}.csv).")
    return " ".join(parts).replace(f" {MISSING}", " too few seeds")


def written(text: str) -> str:
    """Return the text of a page in which all marked tables are updated from the archive."""

    def replaced(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        if kind == "replication":
            table = replication(name)
        elif kind == "components":
            table = component_table(TABLES[name], lambda name: archived(f"components/{name}"))
        else:
            table = summary(archived(name)) if kind == "summary" else section(archived(name))
        return f"{match['begin']}\n{table.replace('{name}', name)}\n{match['end']}"

    return re.sub(
        r"(?P<begin><!-- (?P<kind>results|summary|components|replication): (?P<name>\w+) .*?-->)"
        r"\n.*?"
        r"(?P<end><!-- end of results -->)",
        replaced,
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    """Archive comparisons, and write the pages, or check them with `--check`.

    Returns:
        The exit status, which is 1 if a checked page is outdated and 0 otherwise.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--archive",
        nargs="+",
        default=[],
        metavar="[NAME=]FOLDER",
        help="folders of finished comparisons; they are copied to docs/results before the tables "
        "are written (default of NAME: name of the configuration)",
    )
    parser.add_argument("--commit", help="commit of the archived runs (default: current commit)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="do not write tables; exit with status 1 if a page is outdated",
    )
    options = parser.parse_args()
    for argument in options.archive:
        name, _, folder = argument.rpartition("=")
        archive(Path(folder), options.commit or _current_commit(), name)
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    updated = {page: written(text) for page, text in texts.items()}
    if options.check:
        return int(updated != texts)
    for page, text in updated.items():
        page.write_text(text, encoding="utf-8")
    for name, path in PICTURES.items():
        with style.plot_style():
            path.write_bytes(style.to_png(plots.draw_comparison(archived(name), TASK)))
    return 0


def _current_commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
