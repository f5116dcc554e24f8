"""What a comparison is about: data, clients, rounds and the command, gathered from its runs and its log."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hetero_fl
from hetero_fl.errors import UserError
from hetero_fl.reporting.comparison_columns import Row
from hetero_fl.reporting.methods import is_bound
from hetero_fl.reporting.rundir import RunDirectory
from hetero_fl.reporting.wording import (
    READINGS,
    algorithm_base,
    figure,
    home_rows,
    metric_name,
    plural,
    population,
    selection,
    span,
    uncertain,
)

Json = dict[str, Any]

NAMED = 6
"""So many clients of one model are named; of more the first and the last."""


@dataclass(frozen=True)
class About:
    """Facts as (name, text); the command, or the call from Python; how many runs shared the machine, where it is known."""

    facts: tuple[tuple[str, str], ...]
    warning: str
    command: str
    jobs: int | None
    home: str


def about(out: Path, rows: Sequence[Row], missing: Mapping[str, str] | None = None) -> About:
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
        summary, details, config = runs[0].summary(), runs[0].details(), runs[0].config()
        facts += [("Data", _data(summary, details)), ("Clients", _clients(summary, details, config))]
        tested = [home_rows(run.details()) for run in runs]
        if any(n for found in tested for n in found.values()):
            home = (
                f"Local test: n = {span(n for found in tested for n in found.values())} rows a client over all seeds."
            )
            fewest = {client: min(found.get(client, n) for found in tested) for client, n in tested[0].items()}
            home = f"{home} {uncertain(fewest)}".strip()
            facts += [("Local test rows", home.removeprefix("Local test: "))]
        completed = {run.summary()["rounds_completed"] for run in runs}
        facts += [("Rounds", span(completed) + (" (some runs stopped early)" if len(completed) > 1 else ""))]
        facts += _rules(summary, details)
        if summary["data"]["simulated"]:
            warning = "Generated data stood in for the real set. These figures say nothing about real data."
    facts += [("Seeds", ", ".join(map(str, seeds)))]
    if jobs is not None:
        facts += [("At a time", plural(jobs, "run"))]
    facts += [(f"Without {name}", why) for name, why in (missing or {}).items()]
    return About(tuple(facts), warning, _command() or _call(labels, seeds), jobs, home)


def _rules(summary: Json, details: Json) -> list[tuple[str, str]]:
    """What simple rules reach on the same rows, where the data brings any."""
    metric, told = selection(summary, details), []
    for rule, readings in summary.get("baselines", {}).items():
        found = [
            f"{READINGS[r]} {figure(readings[r].get(metric), metric)}"
            for r in ("personal", "global")
            if readings.get(r)
        ]
        told.append(f"{rule} {', '.join(found)}")
    return [("Simple rules", f"{metric_name(metric, details.get('unit', ''))}: {'; '.join(told)}")] if told else []


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
    data, about = summary["data"], f": {details['about']}" if details.get("about") else ""
    parts = [plural(data["n_train"], "training row")]
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
    count, models = population(summary, details), plural(len(kinds), "model")
    read = f"; {len(summary['clients']):,} of them read" if count > len(summary["clients"]) else ""
    return f"{plural(count, 'client')}, {models}{each}{read}: {'; '.join(groups)}."


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
        min(int(runs), int(jobs)) for runs, jobs in re.findall(r"  (\d+) runs, (\d+) at a time$", text, re.MULTILINE)
    ]
    return max(found, default=None)


def _command() -> str:
    """The command line of this process if it is a comparison's, without the folders of the machine; else empty."""
    program, *rest = sys.argv or [""]
    name = Path(program).name
    if Path(program).resolve() == Path(hetero_fl.__file__).resolve().parents[1] / "scripts" / "compare.py":
        return shlex.join(["python", "scripts/compare.py", *map(_bare, rest)])
    if name in ("hetero-fl", "hetero-fl.exe") and rest[:1] == ["compare"]:
        return shlex.join(["hetero-fl", *map(_bare, rest)])
    return ""


def _bare(word: str) -> str:
    """A word of a command line; an absolute path in it, after `=` too, from the working folder or as the bare name."""
    key, equals, value = word.rpartition("=")
    path = Path(value).expanduser()
    if not path.is_absolute():
        return word
    inside = path.is_relative_to(Path.cwd())
    return key + equals + (os.path.relpath(path) if inside else path.name)


def _call(labels: Sequence[str], seeds: Sequence[int]) -> str:
    return f'hetero_fl.compare(source, "{",".join(labels)}", seeds={list(seeds)}, out=…)'
