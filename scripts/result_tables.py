#!/usr/bin/env python3
"""Write the result tables of the documentation, and plots of comparisons.

Tables of the benchmark come from docs/benchmark, all others from the runs archived in docs/results.

    python scripts/result_tables.py                            # write tables and plots
    python scripts/result_tables.py --archive comparisons/survey=runs/survey   # archive runs first
    python scripts/result_tables.py --check                    # exit status 1 if a page is outdated
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.league.results import BenchmarkResults  # noqa: E402
from benchmarks.record import MEASUREMENTS, archivable_commit  # noqa: E402
from benchmarks.science import published  # noqa: E402
from benchmarks.science.attack_tables import attack_tables  # noqa: E402
from benchmarks.science.benchmark_tables import archive_table  # noqa: E402
from benchmarks.science.comparison_tables import (  # noqa: E402
    TABLES as COMPARISON_TABLES,
    comparison_table,
)
from benchmarks.science.replication_runs import jobs_of, read_record  # noqa: E402
from benchmarks.science.replication_tables import (  # noqa: E402
    draw_scores,
    replicated_rows,
    score_table,
)
from hetero_fl.core.task import Task  # noqa: E402
from hetero_fl.reporting.comparison import plots  # noqa: E402
from hetero_fl.reporting.comparison.runs import ComparedRuns  # noqa: E402
from hetero_fl.reporting.plots import style  # noqa: E402
from hetero_fl.reporting.rendering import markdown_table  # noqa: E402
from hetero_fl.reporting.run_directory import RunDirectory  # noqa: E402

ARCHIVE = ROOT / "docs" / "results"
BENCHMARK = ROOT / "configs" / "benchmark"
BENCHMARK_ARCHIVE = ROOT / "docs" / "benchmark"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PICTURES = {
    "comparisons/driving_hetero": Task("regression", 1, unit="degrees"),
    "comparisons/finance_hetero": Task("multiclass", 2, rare=1),
    "comparisons/medical_hetero": Task("multiclass", 2),
    "comparisons/recommendation_hetero": Task("multiclass", 200, is_ranking=True),
    "comparisons/sensors_hetero": Task("multiclass", 6),
    "comparisons/speech_hetero": Task("multiclass", 10),
    "comparisons/survey": Task("multiclass", 10),
    "comparisons/text_hetero": Task("multiclass", 199),
}
"""Task of each archived comparison of which docs/images shows the methods at their defaults."""
TEXT = ("algorithm", "commit")
Row = dict[str, Any]


def archive(folders: Sequence[Path], commit: str, name: str = "", client_metric: str = "") -> None:
    """Copy the results of a comparison to docs/results. The rows of failed runs have no scores.

    Args:
        folders: Folders of finished comparisons with the same columns, whose runs are archived in
            one file.
        commit: Commit of the runs, which is written to the last column, after the threads.
        name: Name of the archive. If empty, the name of the configuration is used.
        client_metric: Metric of which a column is added for the local test of each client.
    """
    config = RunDirectory.open(sorted((folders[0] / "runs").iterdir())[0]).config()
    name = name or config["name"]
    run = {"threads": config["runtime"]["threads"], "commit": commit}
    rows = []
    failed: list[Row] = []
    for folder in folders:
        with open(folder / "comparison.csv", newline="", encoding="utf-8") as file:
            found = [{**row, **run, "folder": folder} for row in csv.DictReader(file)]
        finished = {(row["algorithm"], row["seed"]) for row in found}
        plan = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        planned = itertools.product(plan["algorithms"], map(str, plan["seeds"]))
        missing = [pair for pair in planned if pair not in finished]
        failed += [{"algorithm": label, "seed": seed, **run} for label, seed in missing]
        rows += found
    rules: list[Row] = []
    for row in rows:
        # The name of the run directory is not archived.
        directory = RunDirectory.open(row.pop("folder") / "runs" / row.pop("run", ""))
        summary = directory.summary()
        if "attacks" in summary:
            row["attack_success"] = summary["attacks"]["success"]
        if client_metric:
            for client in summary["clients"]:
                key = f"personal_last_{client_metric}:{client['id']}"
                row[key] = client["personal"][client_metric]
            if row["algorithm"] == rows[0]["algorithm"]:
                rules += _rules(directory.details(), row, client_metric)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key, "") for key in columns} for row in [*rules, *rows, *failed]]
    path = ARCHIVE / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _rules(details: Row, row: Row, metric: str) -> list[Row]:
    """Return rows with the clients' scores of simple rules, such as the forecast `persistence`.

    Args:
        details: Details of a run.
        row: Row of the run, of which the seed, the threads and the commit are copied.
        metric: The metric.
    """
    scores: dict[str, Row] = {}
    for client, tests in details.get("baselines", {}).items():
        for rule, found in tests["personal"].items():
            scores.setdefault(rule, {})[f"personal_last_{metric}:{client}"] = found[metric]
    shared = {key: row[key] for key in ("seed", "threads", "commit")}
    return [{"algorithm": rule, **shared, **found} for rule, found in scores.items()]


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


def replication(name: str) -> str:
    """Format the replicated table with the given name, from the recorded runs."""
    table = published.TABLES[name]
    record = read_record(ARCHIVE / "replication.json")
    return score_table(table, jobs_of([table], None, "", ARCHIVE, record))


def draw_replication() -> bytes:
    """Plot the replicated scores of all tables against the published ones, as a PNG file."""
    record = read_record(ARCHIVE / "replication.json")
    scores = {
        table.title: replicated_rows(table, jobs_of([table], None, "", ARCHIVE, record))
        for table in published.TABLES.values()
    }
    return style.to_png(draw_scores({title: found for title, found in scores.items() if found}))


def output(name: str) -> str:
    """Format the archived output of a benchmark as a code block."""
    text = (MEASUREMENTS / f"{name}.txt").read_text(encoding="utf-8").strip("\n")
    return f"```text\n{text}\n```"


def printed(name: str) -> str:
    """Return the Markdown that a benchmark or a command printed.

    Headings become bold lines, because a page may contain the same heading several times.
    """
    lines = (MEASUREMENTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    # The command and the machine precede the output.
    text = "\n".join(lines[2:]).strip("\n")
    return re.sub("^#+ (.+)$", r"**\1**", text, flags=re.MULTILINE)


def htfllib(name: str) -> str:
    """Format the table of an archived comparison with HtFLlib."""
    _, _, text = output(name).partition("percent\n")
    table, _, _ = text.partition("\n\n")
    columns, *rows = (re.split(r" {2,}", line) for line in table.splitlines())
    alignment = ["left", *["right"] * (len(columns) - 1)]
    return markdown_table(columns, rows, alignment)


def attacks(name: str) -> str:
    """Format the tables of an archived comparison of rules under attacks."""
    return attack_tables(archived(f"comparisons/{name}"))


def comparison(name: str) -> str:
    """Format a table of archived comparisons."""
    return comparison_table(COMPARISON_TABLES[name], lambda one: archived(f"comparisons/{one}"))


KINDS: dict[str, Callable[[str], str]] = {
    "benchmark": lambda name: archive_table(BenchmarkResults(BENCHMARK, BENCHMARK_ARCHIVE), name),
    "comparison": comparison,
    "replication": replication,
    "output": output,
    "printed": printed,
    "htfllib": htfllib,
    "attacks": attacks,
}
"""Functions that format a table of the archive, keyed by the first word of its mark."""


def written(text: str) -> str:
    """Return the text of a page in which all marked tables are updated from the archive."""
    return re.sub(
        rf"(?P<begin><!-- (?P<kind>{'|'.join(KINDS)}): (?P<name>.+?) \(written.*?-->)"
        r"\n.*?(?P<end><!-- end of results -->)",
        lambda match: "\n".join(
            [match["begin"], KINDS[match["kind"]](match["name"]), match["end"]]
        ),
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
        metavar="[NAME=]FOLDER[,FOLDER...]",
        help="folders of finished comparisons; they are copied to docs/results before the tables "
        "are written, several in one file (default of NAME: name of the configuration)",
    )
    parser.add_argument(
        "--clients", metavar="METRIC", default="", help="archive this metric of each client, too"
    )
    parser.add_argument("--commit", help="commit of the archived runs (default: current commit)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="do not write tables; exit with status 1 if a page is outdated",
    )
    options = parser.parse_args()
    for argument in options.archive:
        name, _, folders = argument.rpartition("=")
        commit = archivable_commit(options.commit or "HEAD")
        archive([Path(each) for each in folders.split(",")], commit, name, options.clients)
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    updated = {page: written(text) for page, text in texts.items()}
    if options.check:
        return int(updated != texts)
    for page, text in updated.items():
        page.write_text(text, encoding="utf-8")
    images = ROOT / "docs" / "images"
    with style.plot_style():
        for name, task in PICTURES.items():
            # Tables name variants of a method in a few words, which a picture has no room for.
            defaults = [row for row in archived(name) if ":" not in row["algorithm"]]
            runs = ComparedRuns(pd.DataFrame(defaults), task)
            picture = style.to_png(plots.draw_comparison(runs))
            (images / f"{Path(name).name}.png").write_bytes(picture)
        (images / "replication.png").write_bytes(draw_replication())
    return 0


if __name__ == "__main__":
    sys.exit(main())
