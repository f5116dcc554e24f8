"""Facts about a comparison: its data, clients, rounds, settings and notes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hetero_fl.config.schema import CLIENT_OPTIONS
from hetero_fl.reporting.comparison.runs import ComparedRuns, Row
from hetero_fl.reporting.comparison.tables import LOCAL_TEST_ROWS
from hetero_fl.reporting.formatting import (
    TEST_NAMES,
    algorithm_name,
    format_models,
    format_range,
    local_test_rows,
    population,
    small_test_note,
    task_of,
)
from hetero_fl.reporting.methods import method_class
from hetero_fl.reporting.rendering import render_line
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.shown_metrics import shown_metrics
from hetero_fl.utils.text import pluralize

Json = dict[str, Any]

RECORD = "comparison.json"
"""Name of the file with the arguments of a comparison."""

IGNORED_KEYS = ("name", "seed", "algorithm", "output")
"""Sections of the configuration whose differences between methods are not listed."""


def read_record(out: Path) -> Json:
    """Return the content of `comparison.json`, or no entries for a comparison without this file."""
    path = out / RECORD
    content: Json = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def write_record(out: Path, arguments: Mapping[str, Any], jobs: int) -> None:
    """Write `comparison.json` at the start of a comparison.

    Args:
        out: The folder of the comparison.
        arguments: The arguments of `compare` as plain values.
        jobs: Largest number of runs at a time. A comparison that is continued keeps the largest
            one.
    """
    jobs = max(jobs, read_record(out).get("jobs", 1))
    RunDirectory(out).write_json(RECORD, {**arguments, "jobs": jobs})


def open_runs(out: Path, rows: Sequence[Row]) -> dict[str, list[RunDirectory]]:
    """Return the directories of the runs that the rows name, keyed by the label of the method."""
    runs: dict[str, list[RunDirectory]] = {}
    for row in rows:
        if "run" in row:
            folder = out / "runs" / str(row["run"])
            runs.setdefault(str(row["algorithm"]), []).append(RunDirectory.open(folder))
    return runs


def gather_facts(runs: Sequence[RunDirectory]) -> dict[str, str]:
    """Return what the runs of a comparison share, keyed by names such as "Rounds"."""
    if not runs:
        return {}
    summary = runs[0].summary()
    details = runs[0].details()
    facts = {
        "Data": render_line(
            "comparison_data.txt", data=summary["data"], about=details.get("about", "")
        ),
        "Clients": _describe_clients(summary, details, runs[0].config()),
    }
    if note := _local_test_note([local_test_rows(run.details()) for run in runs]):
        facts[LOCAL_TEST_ROWS] = note
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
    return facts


def argument_facts(record: Mapping[str, Any], runs: ComparedRuns) -> dict[str, str]:
    """Return the arguments of a comparison that the report shows.

    Args:
        record: Content of `comparison.json`.
        runs: The runs.
    """
    shown = {
        "Configuration": Path(record.get("config") or "").name,
        "Overrides": ", ".join(record.get("overrides", [])),
        "Seeds": ", ".join(map(str, runs.seeds)),
        "Parallel runs": str(runs.jobs or ""),
    }
    return {name: text for name, text in shown.items() if text}


def _describe_clients(summary: Json, details: Json, config: Json) -> str:
    """Return the number of clients, and of those with each model of the configuration."""
    models: Counter[str] = Counter()
    for client in summary["clients"]:
        # A method may have replaced the configured model.
        configured = details["clients"].get(client["id"], {}).get("settings", {}).get("model")
        models[str(configured[0]["name"] if configured else client["model"])] += 1
    sampled = (config.get("clients") or {}).get("per_round")
    text = pluralize(population(summary, details), "client")
    text += f", {sampled} of them per round" if sampled else ""
    return f"{text}: {format_models(models)}"


def _local_test_note(tested: Sequence[Mapping[str, int]]) -> str:
    """Return text about the number of local test rows, or an empty string if there are none."""
    counts = [count for rows in tested for count in rows.values()]
    if not any(counts):
        return ""
    fewest = {
        client: min(rows.get(client, count) for rows in tested)
        for client, count in tested[0].items()
    }
    return f"n = {format_range(counts)} rows per client. {small_test_note(fewest)}".strip()


def simulation_note(first_runs: Mapping[str, RunDirectory]) -> str:
    """Return a sentence about simulated data, or an empty string for real data."""
    if not any(run.summary()["data"]["simulated"] for run in first_runs.values()):
        return ""
    return "The data is simulated, not real. The scores say nothing about real data."


def notes_of_methods(first_runs: Mapping[str, RunDirectory]) -> list[tuple[str, str]]:
    """Return the notes on the runs, with the names of the methods.

    Args:
        first_runs: One run of each method, keyed by label.
    """
    methods: dict[str, list[str]] = {}
    for label, run in first_runs.items():
        for note in run.details().get("notes", []):
            methods.setdefault(note, []).append(algorithm_name(label))
    return [
        ("All methods" if 1 < len(names) == len(first_runs) else ", ".join(names), note)
        for note, names in methods.items()
    ]


def settings_of_methods(first_runs: Mapping[str, RunDirectory]) -> list[tuple[str, str]]:
    """Return the names of methods and their settings, from the configurations of their runs.

    The settings are those that differ from the defaults of the method, the client options that all
    clients use, and other keys that the methods do not share. Methods without such settings share
    one line.

    Args:
        first_runs: One run of each method, keyed by label.
    """
    configs = [
        {key: value for key, value in run.config().items() if key not in IGNORED_KEYS}
        for run in first_runs.values()
    ]
    keys = pd.json_normalize(configs)
    differing = keys.columns[keys.astype(str).nunique() > 1]
    lines: dict[str, list[str]] = {}
    for index, (label, run) in enumerate(first_runs.items()):
        found = _method_settings(label, run)
        for key in differing:
            if key.rpartition(".")[2] not in CLIENT_OPTIONS:
                found[key] = keys[key][index]
        text = ", ".join(f"{key} = {_format_setting(value)}" for key, value in found.items())
        lines.setdefault(text or "defaults", []).append(algorithm_name(label))
    return [(", ".join(names), text) for text, names in lines.items()]


def _method_settings(label: str, run: RunDirectory) -> Json:
    """Return settings that differ from the method's defaults, and client options of all clients."""
    algorithm = run.config().get("algorithm", {})
    settings = {key: value for key, value in algorithm.items() if key != "name"}
    kind = method_class(label)
    # A method of the user may have settings without a default, which validation would reject.
    defaults = kind.model_construct().model_dump(mode="json", fallback=str) if kind else {}
    found = {key: value for key, value in settings.items() if value != defaults.get(key)}
    clients = [client.get("settings", {}) for client in run.details()["clients"].values()]
    for option in CLIENT_OPTIONS:
        values = [client.get(option) for client in clients]
        if values and values[0] is not None and all(value == values[0] for value in values):
            found[option] = values[0]
    return found


def _format_setting(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_format_setting, value))}]"
    return "none" if value is None or pd.isna(value) else str(value)
