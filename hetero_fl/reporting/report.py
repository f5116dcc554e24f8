"""Write the report of a run, a self-contained HTML file that works offline."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hetero_fl.algorithms.requirements import needs_of
from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.federation.executors.base import NODES
from hetero_fl.reporting import plots
from hetero_fl.reporting.formatting import (
    FEW_ROWS,
    MISSING,
    TEST_NAMES,
    client_score,
    format_models,
    is_better,
    last_scores,
    local_test_rows,
    population,
    small_test_note,
    task_of,
)
from hetero_fl.reporting.methods import docstring_paragraph, method_class
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.plots.clients import FEW, PANELS
from hetero_fl.reporting.rendering import format_environment, render
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.shown_metrics import is_metric, own_metrics, shown_metrics
from hetero_fl.reporting.summary import describe_attack, describe_protections
from hetero_fl.utils.code_permission import find_references

Json = dict[str, Any]


def write_report(run_dir: str | os.PathLike[str], log: Callable[[str], None] | None = None) -> Path:
    """Write the report of a finished run to `report.html`.

    The report contains the plots in `plots/`. If there are no plots, they are drawn.

    Args:
        run_dir: The run directory.
        log: Function that is called with a line for each plot or report that cannot be created. If
            None, the error is raised.

    Returns:
        Path of the report.

    Raises:
        UserError: If the folder does not contain a finished run.
    """
    run = RunDirectory.open(run_dir)
    with plots.report_errors("the report cannot be written", log):
        run.write_text("report.html", _page(run, log))
    return run.path / "report.html"


def _page(run: RunDirectory, log: Callable[[str], None] | None) -> str:
    paths = {name: run.plots / f"{name}.png" for name in plots.PLOTS}
    pictures = {
        name: path.read_bytes() for name, path in paths.items() if path.is_file()
    } or plots.draw_plots(run, log)
    return render(
        "report.html",
        **report_facts(run.summary(), run.details(), run.metrics()),
        title=run.summary()["name"],
        pictures={name: style.embed_picture(pictures[name]) for name in pictures},
        command=_repeat_command(run),
        environment=format_environment(run.environment()),
        config=run.read_text("config.yaml"),
    )


def _repeat_command(run: RunDirectory) -> str:
    """Return the command that repeats a run with the same executor."""
    # A report must not reveal folder names of the machine.
    folder = f"PATH/{run.path.name}" if run.path.is_absolute() else run.path.as_posix()
    command = f"hetero-fl train --config {folder}/config.yaml --out runs/again"
    if find_references(run.config()):
        command += " --allow-code"
    configured = run.config().get("runtime", {}).get("executor")
    choice = run.environment().get("choice", {})
    if configured != "auto" or choice.get("executor") in (None, NODES):
        return command
    command += f" runtime.executor={choice['executor']}"
    return f"{command} runtime.chunk={choice['chunk']}" if choice["chunk"] > 1 else command


def report_facts(summary: Json, details: Json, records: Sequence[Json] = ()) -> Json:
    """Return the values that the report templates use.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.
        records: Records of the rounds, as in `metrics.jsonl`.
    """
    task = task_of(summary, details)
    shown = shown_metrics(task)
    metric = shown.selection
    method = method_class(summary["algorithm"])
    num_clients = population(summary, details)
    attacks = summary.get("attacks")
    own = own_metrics(last_scores(summary))
    models = Counter(client["model"] for client in summary["clients"])
    return {
        "summary": summary,
        "details": details,
        "metric": metric,
        "metrics": [name for name in last_scores(summary) if is_metric(name)],
        "client_metrics": _client_metrics(summary, [*shown.table, *own]),
        "unit": task.unit,
        "target": task.kind,
        "failed": [
            {"round": record["round"], "client": client, "reason": reason}
            for record in records
            if "counts" not in record
            for client, reason in record["failed"].items()
        ],
        "population": num_clients,
        "honest": num_clients - (len(attacks["malicious"]) if attacks else 0),
        "models": format_models(models),
        "test_rows": local_test_rows(details).values(),
        "small_test_note": small_test_note(local_test_rows(details)) if summary["personal"] else "",
        "explanation": docstring_paragraph(summary["algorithm"]),
        "distills_numbers": method is not None
        and needs_of(method).proxy_set != "unused"
        and task.kind == "regression",
        "attack": describe_attack(attacks),
        "protections": describe_protections(summary, details),
        "worst": {test: _worst_client(summary, test, metric) for test in ("personal", "global")},
        "rules": _compare_with_rules(summary, details, metric),
        "test_names": TEST_NAMES,
        "missing": MISSING,
        "few_rows": FEW_ROWS,
        "panels": PANELS,
        "drawn_as_points": FEW,
    }


def _client_metrics(summary: Json, metrics: Sequence[str]) -> list[tuple[str, str]]:
    """Return the columns of the client table, pairs of test and metric that have a score."""
    return [
        (test, metric)
        for test in ("personal", "global")
        for metric in metrics
        if any(client_score(client, test, metric) is not None for client in summary["clients"])
    ]


def _worst_client(summary: Json, test: str, metric: str) -> Json | None:
    """Return the client with the worst score, or None if fewer than two clients have a score."""
    scores = {c["id"]: client_score(c, test, metric) for c in summary["clients"]}
    known = {client: score for client, score in scores.items() if score is not None}
    if len(known) < 2:
        return None
    worst = (max if metric in SMALLER_IS_BETTER else min)(known, key=lambda client: known[client])
    return {"client": worst, "score": known[worst]}


def _compare_with_rules(summary: Json, details: Json, metric: str) -> list[Json]:
    """Compare the client models with simple baseline rules on the local test.

    Returns:
        The score of each rule, and the number of client models that are better.
    """
    compared = []
    for rule, scores in summary.get("baselines", {}).items():
        known = []
        for client in summary["clients"]:
            found = details["baselines"].get(client["id"], {}).get("personal", {})
            score = client_score(client, "personal", metric)
            simple = found.get(rule, {}).get(metric)
            if score is not None and simple is not None:
                known.append((score, simple))
        if known:
            beaten = sum(is_better(metric, score, simple) for score, simple in known)
            score = scores["personal"].get(metric)
            compared.append({"name": rule, "score": score, "beaten": beaten, "known": len(known)})
    return compared
