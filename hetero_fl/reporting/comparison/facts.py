"""The subject of a comparison: columns, data, and the settings of each method."""

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
    READINGS,
    algorithm_base,
    algorithm_name,
    capitalize_first,
    format_range,
    local_test_rows,
    metric_name,
    population,
    selection_metric_of,
    small_test_note,
    tested_metric,
)
from hetero_fl.reporting.methods import is_baseline, is_bound
from hetero_fl.reporting.rendering import render_line
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import PACKAGE, UserError
from hetero_fl.utils.text import pluralize

# What a comparison shows, and in which order: columns that fit the task, methods that compete and
# those that bound them.

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _ShownMetrics:
    """Metrics shown for a kind of task: on both test sets, for the worst client, and for the server's model."""

    metrics: tuple[str, ...]
    worst: str
    server: str


_SHOWN = {
    "binary": _ShownMetrics(
        ("balanced_accuracy", "auroc", "accuracy"), "accuracy", "balanced_accuracy"
    ),
    "multiclass": _ShownMetrics(("accuracy", "balanced_accuracy", "auroc"), "accuracy", "accuracy"),
    "rare": _ShownMetrics(("auroc", "average_precision"), "auroc", "auroc"),
    "many": _ShownMetrics(("accuracy", "top3_accuracy", "perplexity"), "accuracy", "accuracy"),
    "multilabel": _ShownMetrics(
        ("auroc", "average_precision", "balanced_accuracy"), "auroc", "auroc"
    ),
    "regression": _ShownMetrics(("mae", "rmse", "r2"), "mae", "mae"),
}


@dataclass(frozen=True)
class Column:
    """A metric column: where its values are in a row, its title, its metric; its test set and its title below that."""

    key: str
    title: str
    metric: str
    group: str
    short: str


@dataclass(frozen=True)
class ComparedMethods:
    """Labels of the methods in the order in which they are shown: those that compete, then the bounds."""

    federated: tuple[str, ...]
    bounds: tuple[str, ...]

    @property
    def all_labels(self) -> tuple[str, ...]:
        """The one after the other."""
        return self.federated + self.bounds

    @property
    def baseline(self) -> str | None:
        """The line to beat, if it takes part."""
        return next((label for label in self.federated if is_baseline(label)), None)


def compared_methods(rows: Sequence[Row]) -> ComparedMethods:
    """The methods of these rows, in their order."""
    labels = list(dict.fromkeys(str(row["algorithm"]) for row in rows))
    return ComparedMethods(
        tuple(a for a in labels if not is_bound(a)), tuple(a for a in labels if is_bound(a))
    )


def rank_methods(rows: Sequence[Row], task: Task) -> list[Row]:
    """The rows with the best method first, by the mean of the tables' first column in the last round; ties as they were."""
    found = columns_of(rows, task, "last")
    if not found:
        return list(rows)
    key = found[0].key
    sign = 1 if found[0].metric in SMALLER_IS_BETTER else -1
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(str(row["algorithm"]), []).extend(
            [sign * row[key]] if row.get(key) is not None else []
        )
    place = {a: (not v, fmean(v) if v else 0.0) for a, v in values.items()}
    return sorted(rows, key=lambda row: place[str(row["algorithm"])])


def _kind(task: Task) -> str:
    if task.kind != "multiclass":
        return task.kind
    return (
        "rare"
        if task.rare is not None
        else "many"
        if task.has_many_classes
        else "binary"
        if task.outputs == 2
        else "multiclass"
    )


def metrics_of(task: Task) -> tuple[str, ...]:
    """Return the metrics that a comparison shows, each on global and local tests."""
    return _SHOWN[_kind(task)].metrics


def columns_of(rows: Sequence[Row], task: Task, moment: str) -> tuple[Column, ...]:
    """Return the columns that fit the task and that any row has a value for.

    Args:
        rows: One row for each run.
        task: What the runs learn.
        moment: `last` or `best`.
    """
    shown = _SHOWN[_kind(task)]
    columns = []
    for reading in ("global", "personal"):
        for metric in shown.metrics:
            columns.append(_column(f"{reading}_{moment}_{metric}", reading, metric))
    name = metric_name(shown.worst)
    worst = f"Worst client's {READINGS['personal']} {name}", f"Worst client's {name}"
    group = capitalize_first(READINGS["personal"])
    columns.append(
        Column(f"personal_{moment}_{shown.worst}_worst", worst[0], shown.worst, group, worst[1])
    )
    columns.append(_column(f"server_{moment}_{shown.server}", "server", shown.server))
    return tuple(c for c in columns if any(row.get(c.key) is not None for row in rows))


def _column(key: str, reading: str, metric: str) -> Column:
    name = metric_name(metric)
    group = capitalize_first(READINGS[reading])
    title = f"Server's {name}" if reading == "server" else tested_metric(reading, metric)
    return Column(key, title, metric, group, capitalize_first(name))


# The settings that each method of a comparison ran with, in words, and where each of them was
# written.

DEFAULTS = "defaults"


@dataclass(frozen=True)
class Setting:
    """A setting that is not the method's default, and where it was written."""

    key: str
    value: str
    origin: str


@dataclass(frozen=True)
class UsedSettings:
    """Settings by label of the method, and a sentence on those of the configuration's `algorithm` section."""

    methods: tuple[tuple[str, tuple[Setting, ...]], ...] = ()
    note: str = ""

    def lines(self) -> list[tuple[str, str]]:
        """Return (methods, settings) for reading; methods at their defaults share the first line."""
        plain = [algorithm_name(label) for label, settings in self.methods if not settings]
        tuned = [
            (algorithm_name(label), format_settings(settings))
            for label, settings in self.methods
            if settings
        ]
        return [*([(", ".join(plain), DEFAULTS)] if plain else []), *tuned]


def format_settings(settings: Sequence[Setting]) -> str:
    """Return settings as one line, those of one origin together: `a = 1, b = 2 (variant); c = 3 (grid)`."""
    parts = []
    for origin, found in groupby(settings, key=lambda setting: setting.origin):
        parts.append(f"{', '.join(f'{s.key} = {s.value}' for s in found)} ({origin})")
    return "; ".join(parts)


# What a comparison is about: data, clients, rounds and the command, gathered from its runs and its
# log.

Json = dict[str, Any]

NAMED = 6
"""So many clients of one model are named; of more the first and the last."""


@dataclass(frozen=True)
class ComparisonFacts:
    """Facts as (name, text); the command, or the call from Python; how many runs shared the machine, where it is known."""

    facts: tuple[tuple[str, str], ...]
    warning: str
    command: str
    jobs: int | None
    local_test_note: str


def gather_facts(
    out: Path, rows: Sequence[Row], missing: Mapping[str, str] | None = None
) -> ComparisonFacts:
    """Gather the facts about a comparison; those whose files are missing are left out.

    Args:
        out: The folder of the comparison.
        rows: One row for each run.
        missing: Why a method, or a run of it, is not among the rows.
    """
    runs = _runs(out, rows)
    labels = list(dict.fromkeys(str(row["algorithm"]) for row in rows))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    jobs = _jobs(out)
    facts = {}
    local_test_note = ""
    warning = ""
    if runs:
        summary = runs[0].summary()
        details = runs[0].details()
        about = details.get("about", "")
        facts["Data"] = render_line("comparison_data.txt", data=summary["data"], about=about)
        facts["Clients"] = _clients(summary, details, runs[0].config())
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
                metric=selection_metric_of(summary, details),
                unit=details.get("unit", ""),
                readings=READINGS,
            )
        if summary["data"]["simulated"]:
            warning = "Generated data stood in for the real set. These figures say nothing about real data."
    facts["Seeds"] = ", ".join(map(str, seeds))
    if jobs is not None:
        facts["At a time"] = pluralize(jobs, "run")
    facts |= {f"Without {name}": why for name, why in (missing or {}).items()}
    command = _command() or _call(labels, seeds)
    return ComparisonFacts(tuple(facts.items()), warning, command, jobs, local_test_note)


def _local_test_note(tested: Sequence[Mapping[str, int]]) -> str:
    """Return how many local test rows clients have over all runs; empty if they have none."""
    counts = [count for rows in tested for count in rows.values()]
    if not any(counts):
        return ""
    fewest = {
        client: min(rows.get(client, count) for rows in tested)
        for client, count in tested[0].items()
    }
    note = f"n = {format_range(counts)} rows a client over all seeds."
    return f"{note} {small_test_note(fewest)}".strip()


def _runs(out: Path, rows: Sequence[Row]) -> list[RunDirectory]:
    """The finished runs that the rows are of, those of federated methods first."""
    wanted = {(algorithm_base(str(row["algorithm"])), row["seed"]) for row in rows}
    found = []
    for folder in sorted((out / "runs").glob("*")):
        try:
            run = RunDirectory.open(folder)
            summary = run.summary()
            run.details()
        except UserError:  # one that failed
            continue
        if (summary["algorithm"], summary["seed"]) in wanted:
            found.append((is_bound(summary["algorithm"]), run))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def _clients(summary: Json, details: Json, config: Json) -> str:
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
    """A client's model as configured, which some methods replace."""
    configured = details["clients"].get(client["id"], {}).get("settings", {}).get("model")
    return str(configured[0]["name"] if configured else client["model"])


def _jobs(out: Path) -> int | None:
    """The most runs at a time that the log tells of; None without a log."""
    try:
        text = (out / "log.txt").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [
        min(int(runs), int(jobs))
        for runs, jobs in re.findall(r"  (\d+) runs, (\d+) at a time$", text, re.MULTILINE)
    ]
    return max(found, default=None)


def _command() -> str:
    """The command line of this process if it is a comparison's, without the folders of the machine; else empty."""
    program, *rest = sys.argv or [""]
    name = Path(program).name
    if Path(program).resolve() == PACKAGE.resolve().parent / "scripts" / "compare.py":
        return shlex.join(["python", "scripts/compare.py", *map(_shorten_word, rest)])
    if name in ("hetero-fl", "hetero-fl.exe") and rest[:1] == ["compare"]:
        return shlex.join(["hetero-fl", *map(_shorten_word, rest)])
    return ""


def _shorten_word(word: str) -> str:
    """A word of a command line; an absolute path in it, after `=` too, from the working folder or as the bare name."""
    key, equals, value = word.rpartition("=")
    path = Path(value).expanduser()
    if not path.is_absolute():
        return word
    inside = path.is_relative_to(Path.cwd())
    return key + equals + (os.path.relpath(path) if inside else path.name)


def _call(labels: Sequence[str], seeds: Sequence[int]) -> str:
    return f'hetero_fl.compare(source, "{",".join(labels)}", seeds={list(seeds)}, out=…)'
