"""The report of a run: one HTML file with everything in it, which opens anywhere and needs nothing from the network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hetero_fl.algorithms.requirements import needs_of
from hetero_fl.core.metrics import REGRESSION, SMALLER_IS_BETTER
from hetero_fl.reporting import plots
from hetero_fl.reporting.formatting import (
    BALANCED,
    FEW_ROWS,
    METRICS,
    MISSING,
    READINGS,
    client_score,
    is_better,
    is_regression,
    last_scores,
    local_test_rows,
    population,
    selection_metric_of,
    short_metrics,
    small_test_note,
    target_kind,
)
from hetero_fl.reporting.integrity import NODES
from hetero_fl.reporting.methods import docstring_paragraph, method_class
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.plots.clients import FEW
from hetero_fl.reporting.plots.rounds import ROUNDS, SHOWN
from hetero_fl.reporting.plots.scores import PANELS
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.summary import describe_attack, describe_protections

Json = dict[str, Any]
LISTED_MODELS = 8


def write_report(run_dir: str | os.PathLike[str], say: Callable[[str], None] | None = None) -> Path:
    """Write a finished run's `report.html` and return its path.

    It takes the pictures of `plots/`, or draws its own if there are none. Raises UserError if the folder is no finished
    run.

    Args:
        run_dir: The finished run.
        say: Where a picture or a report that cannot be made is reported in one line; None raises what went wrong.
    """
    run = RunDirectory.open(run_dir)
    with plots.report_errors("the report cannot be written", say):
        run.write_text("report.html", _page(run, say))
    return run.path / "report.html"


def _page(run: RunDirectory, say: Callable[[str], None] | None) -> str:
    found = {name: run.plots / f"{name}.png" for name in plots.NAMES}
    pictures = {
        name: path.read_bytes() for name, path in found.items() if path.is_file()
    } or plots.draw_plots(run, say)
    return render(
        "report.html",
        **report_facts(run.summary(), run.details(), run.metrics()),
        title=run.summary()["name"],
        pictures={name: style.embed_picture(pictures[name]) for name in pictures},
        command=_repeat_command(run),
        environment=run.environment(),
        config=run.read_text("config.yaml"),
    )


def _repeat_command(run: RunDirectory) -> str:
    """Return the command that repeats a run; `auto` might choose another executor the next time."""
    folder = run.path.name if run.path.is_absolute() else run.path.as_posix()
    command = f"python scripts/train.py --config {folder}/config.yaml --out runs/again"
    configured = run.config().get("runtime", {}).get("executor")
    choice = run.environment().get("choice", {})
    if configured != "auto" or choice.get("executor") in (None, NODES):
        return command
    command += f" runtime.executor={choice['executor']}"
    return f"{command} runtime.chunk={choice['chunk']}" if choice["chunk"] > 1 else command


def report_facts(summary: Json, details: Json, records: Sequence[Json] = ()) -> Json:
    """Return what the templates of the report are filled with.

    Args:
        summary: Content of `summary.json`.
        details: Content of `details.json`.
        records: Lines of `metrics.jsonl`.
    """
    metric = selection_metric_of(summary, details)
    scores = last_scores(summary)
    method = method_class(summary["algorithm"])
    num_clients = population(summary, details)
    attacks = summary.get("attacks")
    models = Counter(client["model"] for client in summary["clients"])
    listed = ", ".join(f"{count} × {name}" for name, count in models.most_common(LISTED_MODELS))
    return {
        "summary": summary,
        "details": details,
        "metric": metric,
        "metrics": [name for name in scores if name in METRICS],
        "client_metrics": _client_metrics(scores),
        "unit": details.get("unit", ""),
        "is_regression": is_regression(scores),
        "target": target_kind(summary, details),
        "failed": [
            {"round": record["round"], "client": client, "reason": reason}
            for record in records
            if "counts" not in record
            for client, reason in record["failed"].items()
        ],
        "population": num_clients,
        "honest": num_clients - (len(attacks["liars"]) if attacks else 0),  # style: ok (file key)
        "models": listed + (" …" if len(models) > LISTED_MODELS else ""),
        "test_rows": local_test_rows(details).values(),
        "small_test_note": small_test_note(local_test_rows(details)) if summary["personal"] else "",
        "explanation": docstring_paragraph(summary["algorithm"]),
        "distills_numbers": method is not None
        and needs_of(method).proxy_set != "unused"
        and is_regression(scores),
        "attack": describe_attack(attacks),
        "protections": describe_protections(summary, details),
        "worst": {
            reading: _worst_client(summary, reading, metric) for reading in ("personal", "global")
        },
        "rules": _compare_with_rules(summary, details, metric),
        "readings": READINGS,
        "missing": MISSING,
        "few_rows": FEW_ROWS,
        "panels": PANELS,
        "drawn_as_points": FEW,
        "drawn_rounds": ROUNDS,
        "drawn_clients": SHOWN,
    }


def _client_metrics(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (reading, metric) of the columns in the table of clients."""
    names = REGRESSION if is_regression(scores) else short_metrics(scores)
    if names == BALANCED:
        names = ("accuracy", "balanced_accuracy")
        return [("personal", name) for name in names] + [("global", n) for n in (*names, "auroc")]
    return [(reading, name) for reading in ("personal", "global") for name in names]


def _worst_client(summary: Json, reading: str, metric: str) -> Json | None:
    """Return the client with the worst score; None if fewer than two have one."""
    scores = {c["id"]: client_score(c, reading, metric) for c in summary["clients"]}
    known = {client: score for client, score in scores.items() if score is not None}
    if len(known) < 2:
        return None
    worst = (max if metric in SMALLER_IS_BETTER else min)(known, key=lambda client: known[client])
    return {"client": worst, "score": known[worst]}


def _compare_with_rules(summary: Json, details: Json, metric: str) -> list[Json]:
    """Return, for each simple rule of the data, its score and how many clients' models are better on local tests."""
    compared = []
    for rule, readings in summary.get("baselines", {}).items():
        known = []
        for client in summary["clients"]:
            found = details["baselines"].get(client["id"], {}).get("personal", {})
            score = client_score(client, "personal", metric)
            simple = found.get(rule, {}).get(metric)
            if score is not None and simple is not None:
                known.append((score, simple))
        if known:
            beaten = sum(is_better(metric, score, simple) for score, simple in known)
            score = readings["personal"].get(metric)
            compared.append({"name": rule, "score": score, "beaten": beaten, "known": len(known)})
    return compared
