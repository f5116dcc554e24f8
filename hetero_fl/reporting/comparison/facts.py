"""Facts about a comparison: columns, data and the settings of each method.

A row contains the results of one run (see `hetero_fl.reporting.comparison.report.comparison_row`).
A label consists of the name of a method and optional settings, such as `hybrid:teacher=mean`.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.core.task import Task
from hetero_fl.reporting.formatting import (
    TEST_NAMES,
    algorithm_base,
    algorithm_name,
    capitalize_first,
    format_range,
    local_test_rows,
    metric_name,
    population,
    small_test_note,
    task_of,
    tested_metric,
)
from hetero_fl.reporting.methods import is_baseline, is_reference
from hetero_fl.reporting.rendering import render_line
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.shown_metrics import shown_metrics
from hetero_fl.utils.errors import PACKAGE, UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of scores in a comparison table.

    Attributes:
        key: Key of the values in a row.
        title: Title of the column.
        metric: Name of the metric.
        group: Name of the test, shown above several columns.
        short: Title below the name of the test.
    """

    key: str
    title: str
    metric: str
    group: str
    short: str


@dataclass(frozen=True)
class ComparedMethods:
    """Labels of the compared methods, in the order of display.

    Attributes:
        federated: Labels of all methods except references.
        references: Labels of methods that need the rows or models of all clients in
            one place.
    """

    federated: tuple[str, ...]
    references: tuple[str, ...]

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Labels of all methods."""
        return self.federated + self.references

    @property
    def baseline(self) -> str | None:
        """Label of the baseline without federation, or None if no baseline was compared."""
        return next((label for label in self.federated if is_baseline(label)), None)


def compared_methods(rows: Sequence[Row]) -> ComparedMethods:
    """Return the methods of the rows, in the order of the rows."""
    labels = list(dict.fromkeys(str(row["algorithm"]) for row in rows))
    return ComparedMethods(
        tuple(label for label in labels if not is_reference(label)),
        tuple(label for label in labels if is_reference(label)),
    )


def rank_methods(rows: Sequence[Row], task: Task) -> list[Row]:
    """Sort rows by the mean score of the method in the first column of the tables, best first.

    Rows of methods without a score come last. If there are no columns, the order is unchanged.
    """
    columns = columns_of(rows, task, "last")
    if not columns:
        return list(rows)
    key = columns[0].key
    sign = 1 if columns[0].metric in SMALLER_IS_BETTER else -1
    values: dict[str, list[float]] = {str(row["algorithm"]): [] for row in rows}
    for row in rows:
        if row.get(key) is not None:
            values[str(row["algorithm"])].append(sign * row[key])
    rank = {a: (not v, fmean(v) if v else 0.0) for a, v in values.items()}
    return sorted(rows, key=lambda row: rank[str(row["algorithm"])])


def columns_of(rows: Sequence[Row], task: Task, moment: str) -> tuple[Column, ...]:
    """Return the columns with scores for a task, without columns that are empty in all rows.

    Args:
        rows: One row for each run.
        task: Task of the runs.
        moment: `last`, or `best` for the round selected by validation.
    """
    shown = shown_metrics(task)
    columns = [
        _make_column(f"{test}_{moment}_{metric}", test, metric)
        for test in ("global", "personal")
        for metric in shown.table
    ]
    name = metric_name(shown.client)
    columns.append(
        Column(
            f"personal_{moment}_{shown.client}_worst",
            title=f"Worst client's {TEST_NAMES['personal']} {name}",
            metric=shown.client,
            group=capitalize_first(TEST_NAMES["personal"]),
            short=f"Worst client's {name}",
        )
    )
    columns.append(_make_column(f"server_{moment}_{shown.table[0]}", "server", shown.table[0]))
    return tuple(c for c in columns if any(row.get(c.key) is not None for row in rows))


def _make_column(key: str, test: str, metric: str) -> Column:
    name = metric_name(metric)
    group = capitalize_first(TEST_NAMES[test])
    title = f"Server's {name}" if test == "server" else tested_metric(test, metric)
    return Column(key, title, metric, group, capitalize_first(name))


DEFAULTS = "defaults"


@dataclass(frozen=True)
class Setting:
    """A setting that a comparison lists for a method.

    Attributes:
        key: Key of the setting.
        value: Value as text.
        origin: Place where the setting was defined, such as `grid` for a tuning grid.
    """

    key: str
    value: str
    origin: str


@dataclass(frozen=True)
class UsedSettings:
    """The settings of the methods of a comparison.

    Attributes:
        methods: The label of each method and its listed settings: settings that differ from their
            defaults, client options that the method enables by default, and settings of other
            sections that the method's variant or the tuning grid sets.
        note: A sentence about the settings in the section `algorithm` of the configuration. Empty
            if the section has no settings.
    """

    methods: tuple[tuple[str, tuple[Setting, ...]], ...] = ()
    note: str = ""

    def lines(self) -> list[tuple[str, str]]:
        """Return the names and the settings of methods as text.

        Methods without listed settings share the first line.
        """
        default = [algorithm_name(label) for label, settings in self.methods if not settings]
        tuned = [
            (algorithm_name(label), format_settings(settings))
            for label, settings in self.methods
            if settings
        ]
        return [*([(", ".join(default), DEFAULTS)] if default else []), *tuned]


def format_settings(settings: Sequence[Setting]) -> str:
    """Format settings grouped by origin, such as `a = 1, b = 2 (variant); c = 3 (grid)`."""
    parts = []
    for origin, found in groupby(settings, key=lambda setting: setting.origin):
        parts.append(f"{', '.join(f'{s.key} = {s.value}' for s in found)} ({origin})")
    return "; ".join(parts)


Json = dict[str, Any]

NAMED = 6
"""Maximum number of clients with the same model that are listed without omissions."""


@dataclass(frozen=True)
class ComparisonFacts:
    """Facts about a comparison.

    Attributes:
        facts: Pairs of a name and a text, such as "Seeds" and "0, 1, 2".
        warning: A sentence about simulated data, or an empty string for real data.
        command: The command line or the Python call.
        jobs: Number of runs that were executed in parallel, or None if unknown.
        local_test_note: A sentence about the number of local test rows, or an empty string if there
            are none.
        notes: Pairs of the names of methods and a note on their runs.
    """

    facts: tuple[tuple[str, str], ...]
    warning: str
    command: str
    jobs: int | None
    local_test_note: str
    notes: tuple[tuple[str, str], ...]


def gather_facts(
    out: Path, rows: Sequence[Row], missing: Mapping[str, str] | None = None
) -> ComparisonFacts:
    """Gather the facts about a comparison from the rows and the files of the runs.

    If there are no run files, only facts that follow from the rows are included.

    Args:
        out: The folder of the comparison.
        rows: One row for each run.
        missing: Reasons why methods or runs are not among the rows, keyed by method or run.
    """
    runs = _finished_runs(out, rows)
    labels = list(dict.fromkeys(str(row["algorithm"]) for row in rows))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    jobs = _parallel_runs(out)
    facts = {}
    local_test_note = ""
    warning = ""
    if runs:
        summary = runs[0].summary()
        details = runs[0].details()
        about = details.get("about", "")
        facts["Data"] = render_line("comparison_data.txt", data=summary["data"], about=about)
        facts["Clients"] = _describe_clients(summary, details, runs[0].config())
        if note := _local_test_note([local_test_rows(run.details()) for run in runs]):
            facts["Local test rows"] = note
            local_test_note = f"Local test: {note}"
        completed = {run.summary()["rounds_completed"] for run in runs}
        stopped = " (some runs stopped early)" if len(completed) > 1 else ""
        facts["Rounds"] = format_range(completed) + stopped
        if rules := summary.get("baselines"):
            facts["Simple rules"] = render_line(
                "simple_rules.txt",
                rules=rules,
                metric=shown_metrics(task_of(summary, details)).selection,
                unit=details.get("unit", ""),
                test_names=TEST_NAMES,
            )
        if summary["data"]["simulated"]:
            warning = "The data is simulated, not real. The scores say nothing about real data."
    facts["Seeds"] = ", ".join(map(str, seeds))
    if jobs is not None:
        facts["Parallel runs"] = str(jobs)
    facts |= {f"Without {name}": why for name, why in (missing or {}).items()}
    command = _command_line() or _python_call(labels, seeds)
    notes = tuple(_notes_of_methods(out, rows))
    return ComparisonFacts(tuple(facts.items()), warning, command, jobs, local_test_note, notes)


def _notes_of_methods(out: Path, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the notes on the first run of each method, with the names of the methods."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(str(row["algorithm"]), row)
    methods: dict[str, list[str]] = {}
    for label, row in first.items():
        if "run" in row:
            for note in RunDirectory(out / "runs" / row["run"]).details().get("notes", []):
                methods.setdefault(note, []).append(algorithm_name(label))
    return [
        ("All methods" if 1 < len(names) == len(first) else ", ".join(names), note)
        for note, names in methods.items()
    ]


def _local_test_note(tested: Sequence[Mapping[str, int]]) -> str:
    """Return text about the number of local test rows, or an empty string if there are none."""
    counts = [count for rows in tested for count in rows.values()]
    if not any(counts):
        return ""
    fewest = {
        client: min(rows.get(client, count) for rows in tested)
        for client, count in tested[0].items()
    }
    note = f"n = {format_range(counts)} rows per client."
    return f"{note} {small_test_note(fewest)}".strip()


def _finished_runs(out: Path, rows: Sequence[Row]) -> list[RunDirectory]:
    """Return the directories of the finished runs of the rows, with references last."""
    wanted = {(algorithm_base(str(row["algorithm"])), row["seed"]) for row in rows}
    found = []
    for folder in sorted((out / "runs").glob("*")):
        try:
            run = RunDirectory.open(folder)
            summary = run.summary()
            run.details()
        except UserError:
            # The run failed.
            continue
        if (summary["algorithm"], summary["seed"]) in wanted:
            found.append((is_reference(summary["algorithm"]), run))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def _describe_clients(summary: Json, details: Json, config: Json) -> str:
    clients_by_model: dict[str, list[str]] = {}
    for client in summary["clients"]:
        clients_by_model.setdefault(_own_model(client, details), []).append(client["id"])
    return render_line(
        "comparison_clients.txt",
        clients_by_model=clients_by_model,
        population=population(summary, details),
        evaluated=len(summary["clients"]),
        sampled=(config.get("clients") or {}).get("per_round"),
        named=NAMED,
    )


def _own_model(client: Json, details: Json) -> str:
    """Return the configured model of a client, which the method may have replaced."""
    configured = details["clients"].get(client["id"], {}).get("settings", {}).get("model")
    return str(configured[0]["name"] if configured else client["model"])


def _parallel_runs(out: Path) -> int | None:
    """Return the largest number of parallel runs in the log, or None if the log has no number."""
    try:
        text = (out / "log.txt").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [
        min(int(runs), int(jobs or 1))
        for runs, jobs in re.findall(r"  (\d+) runs?(?:, (\d+) at a time)?$", text, re.MULTILINE)
    ]
    return max(found, default=None)


def _command_line() -> str:
    """Return the command line of a comparison, for the current working directory.

    The result is empty if this process was not started as a comparison.
    """
    program = next(iter(sys.argv), "")
    rest = sys.argv[1:]
    path = Path(program).resolve()
    package = PACKAGE.resolve()
    arguments = [_relative_path(argument) for argument in rest]
    if path == package.parent / "scripts" / "compare.py":
        return shlex.join(["python", "scripts/compare.py", *arguments])
    # Options such as `--quiet` may precede the command.
    command = next((argument for argument in rest if not argument.startswith("-")), "")
    if command != "compare":
        return ""
    if path in (package / "__main__.py", package / "cli" / "__main__.py"):
        return shlex.join(["python", "-m", "hetero_fl", *arguments])
    if path.name in ("hetero-fl", "hetero-fl.exe"):
        return shlex.join(["hetero-fl", *arguments])
    return ""


def _relative_path(argument: str) -> str:
    """Return an argument such as `path` or `key=path` with a relative path if that is shorter.

    Only a path in the working directory becomes relative to it.
    """
    key, equals, value = argument.rpartition("=")
    path = Path(value).expanduser()
    is_inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return key + equals + os.path.relpath(path) if is_inside else argument


def _python_call(labels: Sequence[str], seeds: Sequence[int]) -> str:
    return f'hetero_fl.compare(source, "{",".join(labels)}", seeds={list(seeds)}, out=…)'
