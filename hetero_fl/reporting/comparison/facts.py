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
    format_metric,
    format_range,
    local_test_rows,
    metric_name,
    population,
    selection_metric_of,
    small_test_note,
    tested_metric,
)
from hetero_fl.reporting.methods import is_baseline, is_bound
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
    """Gather it for a comparison in `out`; facts whose files are missing are left out.

    `missing`: what is not in it, and why.
    """
    runs = _runs(out, rows)
    labels = list(dict.fromkeys(str(row["algorithm"]) for row in rows))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    jobs = _jobs(out)
    facts: list[tuple[str, str]] = []
    home = warning = ""
    if runs:
        summary = runs[0].summary()
        details = runs[0].details()
        config = runs[0].config()
        facts += [
            ("Data", _data(summary, details)),
            ("Clients", _clients(summary, details, config)),
        ]
        tested = [local_test_rows(run.details()) for run in runs]
        if any(n for found in tested for n in found.values()):
            home = f"Local test: n = {format_range(n for found in tested for n in found.values())} rows a client over all seeds."
            fewest = {
                client: min(found.get(client, n) for found in tested)
                for client, n in tested[0].items()
            }
            home = f"{home} {small_test_note(fewest)}".strip()
            facts += [("Local test rows", home.removeprefix("Local test: "))]
        completed = {run.summary()["rounds_completed"] for run in runs}
        facts += [
            (
                "Rounds",
                format_range(completed)
                + (" (some runs stopped early)" if len(completed) > 1 else ""),
            )
        ]
        facts += _baseline_facts(summary, details)
        if summary["data"]["simulated"]:
            warning = "Generated data stood in for the real set. These figures say nothing about real data."
    facts += [("Seeds", ", ".join(map(str, seeds)))]
    if jobs is not None:
        facts += [("At a time", pluralize(jobs, "run"))]
    facts += [(f"Without {name}", why) for name, why in (missing or {}).items()]
    return ComparisonFacts(tuple(facts), warning, _command() or _call(labels, seeds), jobs, home)


def _baseline_facts(summary: Json, details: Json) -> list[tuple[str, str]]:
    """What simple rules reach on the same rows, where the data brings any."""
    metric = selection_metric_of(summary, details)
    told = []
    for rule, readings in summary.get("baselines", {}).items():
        found = [
            f"{READINGS[r]} {format_metric(readings[r].get(metric), metric)}"
            for r in ("personal", "global")
            if readings.get(r)
        ]
        told.append(f"{rule} {', '.join(found)}")
    return (
        [("Simple rules", f"{metric_name(metric, details.get('unit', ''))}: {'; '.join(told)}")]
        if told
        else []
    )


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


def _data(summary: Json, details: Json) -> str:
    data = summary["data"]
    about = f": {details['about']}" if details.get("about") else ""
    parts = [pluralize(data["n_train"], "training row")]
    parts += [f"{data['n_test']:,} in the global test set"] if data["n_test"] else []
    parts += [f"{data['n_proxy']:,} in the public proxy set"] if data["n_proxy"] else []
    return f"{data['name']}{about}. {', '.join(parts)}."


def _clients(summary: Json, details: Json, config: Json) -> str:
    kinds: dict[str, list[str]] = {}
    for client in summary["clients"]:
        kinds.setdefault(_own_model(client, details), []).append(client["id"])
    groups = []
    for model, ids in kinds.items():
        named = ", ".join(ids) if len(ids) <= NAMED else f"{ids[0]}, {ids[1]} … {ids[-1]}"
        groups.append(f"{len(ids)} × {model} ({named})")
    sampled = (config.get("clients") or {}).get("per_round")
    each = f"; {sampled} of them in a round" if sampled else ""
    count = population(summary, details)
    models = pluralize(len(kinds), "model")
    read = f"; {len(summary['clients']):,} of them read" if count > len(summary["clients"]) else ""
    return f"{pluralize(count, 'client')}, {models}{each}{read}: {'; '.join(groups)}."


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
