"""How numbers and names are put into words: the same in the terminal, in plots, in tables and in reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import method_title
from hetero_fl.core.metrics import SMALLER_IS_BETTER, selection_metric
from hetero_fl.core.task import Task
from hetero_fl.utils.text import format_list, split_top_level

MISSING = "–"

FEW_ROWS = 20
"""A figure from fewer test rows is marked as uncertain: one row more that is right moves it by over five points."""

READINGS = {"personal": "local test", "global": "global test", "server": "server"}

READING_WORDS = {
    "personal": "local test (own test split)",
    "global": "global test (one set for all)",
    "server": "server's own model",
}

METRICS = {
    "accuracy": "accuracy",
    "top3_accuracy": "top-3 accuracy",
    "perplexity": "perplexity",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "loss": "cross-entropy",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "R²",
}

BALANCED = ("balanced_accuracy", "auroc")
"""The metrics that a line has room for where the task has a few classes."""

MOST_DECIMALS = 20

_IN_UNIT = {"mae", "rmse"}
_PERCENT = {"accuracy", "top3_accuracy", "balanced_accuracy", "macro_f1"}
_DECIMAL = {"auroc", "average_precision", "r2"}


def algorithm_base(label: str) -> str:
    """The method of a label: `hybrid` of `hybrid:teacher=mean`, `python:module:Class` of `python:module:Class:lr=1`."""
    parts = split_top_level(label, ":")
    return ":".join(parts[:3]) if parts[0] == "python" else parts[0]


def algorithm_name(label: str) -> str:
    """Return a method's title, followed by the settings of the label."""
    base = algorithm_base(label)
    kind = register_algorithm.get_loaded(base)
    name = (kind is not None and method_title(kind)) or base.rsplit(":", 1)[-1]
    settings = ", ".join(
        " = ".join(s.split("=", 1)) for s in split_top_level(label[len(base) + 1 :], ":")
    )
    return f"{name} ({settings})" if settings else name


def capitalize_first(text: str) -> str:
    """The same text with a capital first letter."""
    return text[:1].upper() + text[1:]


def format_metric(value: float | None, metric: str) -> str:
    """One value of a metric for reading: 84.7%, 0.944 or, for errors and losses, three digits that count."""
    if value is None:
        return MISSING
    if metric in _PERCENT:
        return f"{100 * value:.1f}%"
    return f"{value:.3f}" if metric in _DECIMAL else format_significant(value)


def metric_name(metric: str, unit: str = "") -> str:
    """What a metric is called, with the unit of the target where errors are counted in one: `mean absolute error (vehicles)`."""
    return f"{METRICS[metric]} ({unit})" if unit and metric in _IN_UNIT else METRICS[metric]


def tested_metric(reading: str, metric: str, unit: str = "") -> str:
    """Return what a metric is called on a test set: `Global test accuracy`, `Local test mean absolute error (vehicles)`."""
    return capitalize_first(f"{READINGS[reading]} {metric_name(metric, unit)}")


def format_significant(value: float, count: int = 3) -> str:
    """A number with so many digits that count, never as a power of ten: 0.0341, 2.80, 1234."""
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:.{min(max(0, count - before), MOST_DECIMALS)}f}"


def format_bytes(count: float) -> str:
    """Bytes in decimal units: 0 B, 812 kB, 12.3 MB."""
    factor, unit = byte_unit(count)
    value = count / factor
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def byte_unit(largest: float) -> tuple[float, str]:
    """The decimal unit in which the largest of some byte counts reads best, as (bytes of one unit, name)."""
    units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    return next(
        ((factor, unit) for factor, unit in units if largest >= 0.9995 * factor), (1.0, "B")
    )


def format_duration(seconds: float) -> str:
    """A time for reading: 0.4 s, 36 s, 2 min 5 s, 1 h 3 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which simulated times up to this one read best, as (seconds of one unit, name)."""
    units = [(2 * 86400.0, 86400.0, "days"), (3600.0, 3600.0, "hours"), (300.0, 60.0, "minutes")]
    return next(
        ((factor, name) for least, factor, name in units if seconds >= least), (1.0, "seconds")
    )


def format_arrivals(record: Mapping[str, Any]) -> str:
    """What came of a round's invitations: `10 invited, 7 arrived, 2 failed, 1 late`; empty where all arrived.

    Of a round that was given up because training at the server diverged: why.
    """
    if diverged := record.get("diverged"):
        return f"nothing was changed: {diverged}"
    counts = record.get("counts") or {}
    if not counts or counts["invited"] == counts["arrived"]:
        return ""
    told = [
        f"{counts[what]} {what}"
        for what in ("invited", "arrived", "failed", "late")
        if counts[what]
    ]
    return ", ".join(told) + ("; too few, nothing was changed" if record.get("skipped") else "")


def is_better(metric: str, a: float, b: float) -> bool:
    """Is a better than b?"""
    return a < b if metric in SMALLER_IS_BETTER else a > b


def is_regression(metrics: Mapping[str, Any]) -> bool:
    """Do these metrics belong to a regression task?"""
    return "mae" in metrics


def last_scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The last round's figures of the first reading that there is; they tell which metrics the task has."""
    return next((summary[reading]["last"] for reading in READINGS if summary[reading]), {})


def target_kind(summary: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """Return the kind of target: `multiclass`, `multilabel` or `regression`."""
    if "kind" in details:
        return str(details["kind"])
    # Older runs do not record it; multilabel targets have a 2 × 2 confusion matrix for each label.
    if is_regression(last_scores(summary)):
        return "regression"
    matrices = (
        matrix for found in details["confusion"].values() for matrix in (found or {}).values()
    )
    first = next(matrices, [[0]])
    return "multilabel" if isinstance(first[0][0], list) else "multiclass"


def client_score(client: Mapping[str, Any], reading: str, metric: str) -> float | None:
    """One client's figure; None where it is undefined, or where the client has no test rows."""
    return (client[reading] or {}).get(metric)


def selection_metric_of(summary: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The metric by which validation selects rounds: the one that headline, story and pictures are about."""
    kind: Any = target_kind(summary, details)
    return selection_metric(Task(kind, len(details["labels"]), rare=details.get("rare")))[0]


def headline_metrics(summary: Mapping[str, Any], details: Mapping[str, Any]) -> tuple[str, str]:
    """The selection metric, and the one shown beside it."""
    first = selection_metric_of(summary, details)
    if details.get("rare") is not None:
        return first, "average_precision"
    return first, {"mae": "r2", "auroc": "balanced_accuracy", "accuracy": "perplexity"}.get(
        first, "auroc"
    )


def population(summary: Mapping[str, Any], details: Mapping[str, Any]) -> int:
    """How many clients there were; the summary lists those whose models were read."""
    return int(details.get("population", len(summary["clients"])))


def local_test_rows(details: Mapping[str, Any]) -> dict[str, int]:
    """Return how many local test rows each client has."""
    return {client: rows["test"] for client, rows in details["rows"].items()}


def format_range(counts: Iterable[int]) -> str:
    """`24 to 102`, or `60` where all are equal."""
    known = list(counts)
    low = min(known)
    high = max(known)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def small_test_note(rows: Mapping[str, int]) -> str:
    """Return a sentence on clients with few local test rows; empty if there are none."""
    few = [client for client, count in rows.items() if 0 < count < FEW_ROWS]
    if not few:
        return ""
    return f"Uncertain, from fewer than {FEW_ROWS} local test rows: {format_list(few)}."


def format_evaluation(record: Mapping[str, Any], unit: str = "") -> str:
    """Return a round's figures in one line, the same metrics for every test set.

    For example `local test: balanced accuracy 81.0%, AUROC 0.951; global test: balanced accuracy 71.0%, AUROC 0.930`. A metric
    that is undefined on one of the test sets is shown there as missing; one that is undefined on all of them is left out.
    `unit`: of errors.
    """
    scored = {words: record[reading] for reading, words in READINGS.items() if record.get(reading)}
    wanted = short_metrics(next(iter(scored.values()))) if scored else ()
    names = [
        name for name in wanted if any(scores.get(name) is not None for scores in scored.values())
    ]
    parts = []
    for words, scores in scored.items() if names else ():
        after = f" {unit}" if is_regression(scores) and unit else ""
        told = (f"{METRICS[name]} {format_metric(scores.get(name), name)}{after}" for name in names)
        parts.append(f"{words}: {', '.join(told)}")
    if parts and record.get("privacy"):
        parts.append(format_privacy(record["privacy"]))
    return "; ".join(parts)


def format_final_evaluation(summary: Mapping[str, Any], unit: str = "") -> str:
    """Return the figures after the last round of a finished run in one line (see `format_evaluation`)."""
    last = {reading: (summary[reading] or {}).get("last") for reading in READINGS}
    return format_evaluation({**last, "privacy": summary.get("privacy")}, unit)


def format_privacy(privacy: Mapping[str, Any]) -> str:
    """`ε 7.98 at δ 1e-05`."""
    return f"ε {format_significant(privacy['epsilon'])} at δ {privacy['delta']:g}"


def short_metrics(scores: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the metrics that a line has room for; the first of the scores is the leading one."""
    if is_regression(scores):
        return ("mae",)
    if "top3_accuracy" in scores:
        return ("accuracy", "top3_accuracy", "perplexity")
    if next(iter(scores)) == "auroc":
        return ("auroc", "average_precision")
    return BALANCED
