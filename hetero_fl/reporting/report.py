"""The report of a run: one HTML file with everything in it, which opens anywhere and needs nothing from the network."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hetero_fl.core.metrics import REGRESSION
from hetero_fl.reporting import plots, report_text
from hetero_fl.reporting.formatting import (
    FEW_ROWS,
    METRICS,
    MISSING,
    READINGS,
    algorithm_name,
    capitalize_first,
    client_score,
    format_bytes,
    format_duration,
    format_metric,
    format_privacy,
    format_range,
    is_regression,
    last_scores,
    local_test_rows,
    metric_name,
    population,
    selection_metric_of,
    small_test_note,
    tested_metric,
)
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.report_text import captions
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.text import pluralize

Json = dict[str, Any]


def render(template: str, **content: Any) -> str:
    """Fill a template of this package; everything put in is escaped."""
    environment = Environment(
        loader=PackageLoader("hetero_fl.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**content)


def embed_picture(picture: bytes) -> Json:
    """A PNG as it stands in an HTML file: its data, and the width at which type is as large as on paper and a half."""
    width = int.from_bytes(picture[16:20], "big")
    return {
        "data": base64.b64encode(picture).decode("ascii"),
        "width": round(width * 140 / style.DPI),
    }


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
    summary = run.summary()
    details = run.details()
    records = run.metrics()
    found = {name: run.plots / f"{name}.png" for name in plots.NAMES}
    pictures = {
        name: path.read_bytes() for name, path in found.items() if path.is_file()
    } or plots.draw_plots(run, say)
    subtitle = (
        f"{algorithm_name(summary['algorithm'])} · {summary['data']['name']} · "
        f"{pluralize(population(summary, details), 'client')} · {pluralize(summary['rounds_completed'], 'round')} · "
        f"seed {summary['seed']}"
    )
    environment = [(key, _plain(value)) for key, value in run.environment().items()]
    shown = run.path.name if run.path.is_absolute() else run.path.as_posix()
    return render(
        "report.html",
        title=summary["name"],
        subtitle=subtitle,
        warnings=report_text.warnings(summary, records),
        tiles=_tiles(summary, details),
        story=report_text.summarize_run(summary, details),
        results=_results(summary, details),
        glossary=report_text.glossary(summary, details),
        pictures=[
            {"title": title, "caption": caption, **embed_picture(pictures[name])}
            for name, (title, caption) in captions(summary, details).items()
            if name in pictures
        ],
        exchanged="communication" in pictures,
        clients=_clients(summary, details),
        few=small_test_note(local_test_rows(details)) if summary["personal"] else "",
        command=f"python scripts/train.py --config {shown}/config.yaml --out runs/again",
        environment=environment,
        notes=details["notes"],
        config=run.read_text("config.yaml"),
    )


def _plain(value: Any) -> str:
    """A value of `environment.json`, lists and objects as one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {found}" for name, found in value.items())
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tiles(summary: Json, details: Json) -> list[Json]:
    """The headline: the selection metric wherever models were read, then what the run cost."""
    name = selection_metric_of(summary, details)
    tiles = []
    for reading in ("global", "personal", "server"):
        if not summary[reading]:
            continue
        scores = summary[reading]["last"]
        worst = scores.get(f"{name}_worst")
        deviation = scores.get(f"{name}_std")
        more = (
            f"± {format_metric(deviation, name)} over clients; worst {format_metric(worst, name)}"
            if deviation is not None
            else ""
        )
        rows = (
            f"n = {format_range(local_test_rows(details).values())} test rows a client"
            if reading == "personal"
            else _has_global_test(summary)
        )
        unit = details.get("unit", "")
        words = tested_metric(reading, name, unit)
        if reading == "server":
            words = f"{capitalize_first(metric_name(name, unit))} of the server's model"
        tiles.append(
            {
                "name": words,
                "value": format_metric(scores.get(name), name),
                "more": more,
                "rows": rows,
            }
        )
    up, down = (summary["communication"][k] for k in ("up_bytes", "down_bytes"))
    more = f"{format_bytes(up)} up, {format_bytes(down)} down"
    tiles.append(
        {"name": "Exchanged in all", "value": format_bytes(up + down), "more": more, "rows": ""}
    )
    if summary.get("privacy"):
        tiles.append(
            {
                "name": "Privacy spent",
                "value": format_privacy(summary["privacy"]),
                "more": "largest of any client",
                "rows": "",
            }
        )
    seconds = summary["seconds"]
    more = f"{format_duration(seconds['training'])} of it training"
    tiles.append(
        {"name": "Time", "value": format_duration(seconds["total"]), "more": more, "rows": ""}
    )
    if told := summary.get("simulated"):
        counts = ", ".join(f"{told[w]:,} {w}" for w in ("invited", "arrived", "failed", "late"))
        skipped = f"{pluralize(told['skipped'], 'round')} with too few" if told["skipped"] else ""
        tiles.append(
            {
                "name": "Simulated time",
                "value": format_duration(told["seconds"]),
                "more": counts,
                "rows": skipped,
            }
        )
    return tiles


def _has_global_test(summary: Json) -> str:
    return f"n = {summary['data']['n_test']:,} test rows"


def _results(summary: Json, details: Json) -> Json:
    names = [name for name in last_scores(summary) if name in METRICS]
    rows = []
    for reading in READINGS:
        found = summary[reading]
        if not found:
            continue
        where = capitalize_first(READINGS[reading])
        for moment in ("last", "best_by_validation"):
            scores = found[moment]
            more = (
                "last round"
                if moment == "last"
                else f"round {scores['round']}, selected by validation"
            )
            cells = [_cell(scores, name) for name in names]
            n = (
                f"n = {format_range(local_test_rows(details).values())} a client"
                if reading == "personal"
                else _has_global_test(summary)
            )
            rows.append(
                {"name": where, "more": [more, n], "cells": cells, "first": moment == "last"}
            )
    caption = (
        "Mean ± standard deviation over clients, and the worst client. n: test rows. "
        + ("The server has one model, so no spread. " if summary["server"] else "")
        + "“Undefined” counts clients whose test rows lack what the metric needs (as a class, for AUROC); they are left "
        "out of the mean. "
        + (small_test_note(local_test_rows(details)) if summary["personal"] else "")
    )
    for rule, readings in summary.get("baselines", {}).items():
        for reading, scores in readings.items():
            cells = [_cell(scores, name) for name in names]
            rows.append(
                {
                    "name": capitalize_first(rule),
                    "more": ["a simple rule", READINGS[reading]],
                    "cells": cells,
                    "first": True,
                }
            )
    titles = [capitalize_first(metric_name(name, details.get("unit", ""))) for name in names]
    return {"columns": titles, "rows": rows, "caption": caption}


def _cell(scores: Mapping[str, Any], name: str) -> Json:
    value, deviation, worst = (scores.get(key) for key in (name, f"{name}_std", f"{name}_worst"))
    more = []
    if deviation is not None:
        more.append(f"± {format_metric(deviation, name)}")
        more.append(f"worst {format_metric(worst, name)}")
    if scores.get(f"{name}_undefined"):
        more.append(f"undefined: {scores[f'{name}_undefined']}")
    return {"value": format_metric(value, name), "more": more}


def _clients(summary: Json, details: Json) -> Json:
    shown = [
        (r, name)
        for r in ("personal", "global")
        for name in _client_metrics(r, last_scores(summary))
    ]
    columns: list[Json] = [
        {"name": "Client", "text": True, "more": "group"},
        {"name": "Model", "text": True, "more": "parameters"},
        {"name": "Shares", "text": True, "more": "own training settings"},
        {"name": "Preprocessing", "text": True, "more": "scanner"},
        {"name": "Rows", "text": False, "more": "train / validation / test"},
        *(
            {
                "name": capitalize_first(metric_name(name, details.get("unit", ""))),
                "text": False,
                "more": READINGS[reading],
            }
            for reading, name in shown
        ),
    ]
    rows = []
    for client in summary["clients"]:
        about = details["clients"][client["id"]]
        parts = details["rows"][client["id"]]
        row = [
            {"value": client["id"], "more": about["group"]},
            {"value": client["model"], "more": f"{client['parameters']:,}"},
            {
                "value": ", ".join(about["shares"]) or MISSING,
                "more": _training(about.get("settings", {})),
            },
            {"value": about["preprocess"] or MISSING, "more": about["scanner"]},
            {
                "value": " / ".join(f"{parts[part]:,}" for part in ("train", "validation", "test")),
                "more": "",
            },
        ]
        for reading, name in shown:
            found = format_metric(client_score(client, reading, name), name)
            home = reading == "personal"
            few = home and found != MISSING and parts["test"] < FEW_ROWS
            note = f"n = {parts['test']}" + (", uncertain" if few else "") if home else ""
            rules = details.get("baselines", {}).get(client["id"], {}).get(reading, {})
            note = ", ".join(
                [
                    *([note] if note else []),
                    *(f"{r} {format_metric(s.get(name), name)}" for r, s in rules.items()),
                ]
            )
            row.append({"value": found, "more": note, "few": few})
        rows.append([{"few": False, **cell} for cell in row])
    return {"columns": columns, "rows": rows}


def _training(settings: Mapping[str, Any]) -> str:
    """A client's own settings for training, as far as `details.json` tells them."""
    own = {
        **settings.get("optimizer", {}),
        **{k: settings[k] for k in ("epochs", "steps", "batch_size") if k in settings},
    }
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in own.items() if value is not None
    )


def _client_metrics(reading: str, scores: Mapping[str, Any]) -> tuple[str, ...]:
    if is_regression(scores):
        return REGRESSION
    if "top3_accuracy" in scores:
        return ("accuracy", "top3_accuracy", "perplexity")
    if next(iter(scores)) == "auroc":
        return ("auroc", "average_precision")
    both = ("accuracy", "balanced_accuracy")
    return both if reading == "personal" else (*both, "auroc")
