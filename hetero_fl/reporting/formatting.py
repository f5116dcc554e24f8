"""Format numbers and names for the terminal, plots, tables and reports.

A label consists of the name of a method and optional settings, such as `hybrid:teacher=mean`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import method_title
from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.core.task import Task
from hetero_fl.reporting.shown_metrics import metrics_of_line
from hetero_fl.utils.registry import split_label
from hetero_fl.utils.text import format_list

MISSING = "–"

FEW_ROWS = 20
"""Number of test rows below which scores are marked as uncertain.

With fewer rows, a single row changes the accuracy by more than 5 percentage points.
"""

TEST_NAMES = {"personal": "local test", "global": "global test", "server": "server"}

TEST_DESCRIPTIONS = {
    "personal": "local test (client's test split)",
    "global": "global test (same for all clients)",
    "server": "server's model",
}

METRICS = {
    "ndcg_10": "NDCG@10",
    "hit_rate_10": "hit rate@10",
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

MAX_DECIMALS = 20
LISTED_MODELS = 8

_IN_UNIT = {"mae", "rmse"}
_PERCENT = {
    "accuracy",
    "top3_accuracy",
    "balanced_accuracy",
    "macro_f1",
    "hit_rate_10",
}
_DECIMAL = {"auroc", "average_precision", "r2", "ndcg_10"}


def algorithm_base(label: str) -> str:
    """Return the method in a label, such as `hybrid` for `hybrid:teacher=mean`."""
    return split_label(label)[0]


def algorithm_name(label: str) -> str:
    """Return the display name of a method, followed by the settings in the label."""
    base = algorithm_base(label)
    kind = register_algorithm.get_loaded(base)
    name = (kind is not None and method_title(kind)) or base.rsplit(":", 1)[-1]
    settings = ", ".join(" = ".join(s.split("=", 1)) for s in split_label(label)[1])
    return f"{name} ({settings})" if settings else name


def capitalize_first(text: str) -> str:
    """Return the text with its first letter capitalized."""
    return text[:1].upper() + text[1:]


def format_metric(value: float | None, metric: str) -> str:
    """Format the value of a metric.

    Accuracies, hit rates and F1 scores are formatted as percentages (`84.7%`), AUROC, average
    precision, NDCG and R² with three decimals (`0.944`), and errors and losses with three
    significant digits. If the value is None, a dash is returned.
    """
    if value is None:
        return MISSING
    if metric in _PERCENT:
        return f"{100 * value:.1f}%"
    return f"{value:.3f}" if metric in _DECIMAL else format_significant(value)


def format_score(value: float | None, metric: str) -> str:
    """Format a score as in tables: fractions in percent, without the percent sign.

    Errors, losses, R² and metrics of the user are formatted as by `format_metric`. If the value is
    None or NaN, a dash is returned.
    """
    if value is None or math.isnan(value):
        return MISSING
    if metric in _PERCENT or (metric in _DECIMAL and metric != "r2"):
        return f"{100 * value:.1f}"
    return format_metric(value, metric)


def format_difference(value: float, metric: str) -> str:
    """Format a difference of two scores as in tables, with a sign unless it rounds to 0."""
    if math.isnan(value):
        return MISSING
    text = format_score(abs(value), metric)
    return text if not text.strip("0.") else f"{'−' if value < 0 else '+'}{text}"


def format_p(p: float) -> str:
    """Format a p-value with two significant digits, or as `<0.001`."""
    return "<0.001" if p < 0.001 else format_significant(p, 2)


def is_percentage(metric: str) -> bool:
    """Return whether values of a metric are formatted as percentages."""
    return metric in _PERCENT


def format_deviation(deviation: float, metric: str, mean: float) -> str:
    """Format the standard deviation of a metric with as many decimals as its mean."""
    if metric in _PERCENT or metric in _DECIMAL:
        return format_metric(deviation, metric)
    return f"{deviation:.{significant_decimals(mean)}f}"


def metric_name(metric: str, unit: str = "") -> str:
    """Return the display name of a metric, such as `mean absolute error (vehicles)`.

    Args:
        metric: Name of the metric.
        unit: Unit of errors, which is ignored for other metrics. If empty, no unit is added.
    """
    name = METRICS.get(metric, metric.replace("_", " "))
    return f"{name} ({unit})" if unit and metric in _IN_UNIT else name


def tested_metric(test: str, metric: str, unit: str = "") -> str:
    """Return the name of a metric on a test, such as `Global test accuracy`."""
    return capitalize_first(f"{TEST_NAMES[test]} {metric_name(metric, unit)}")


def format_significant(value: float, count: int = 3) -> str:
    """Format a number with `count` significant digits and no exponent, such as 0.0341 or 2.80.

    All digits before the decimal point are kept, even if there are more than `count`.
    """
    return f"{value:.{significant_decimals(value, count)}f}"


def significant_decimals(value: float, count: int = 3) -> int:
    """Return the number of decimals with which a number has `count` significant digits."""
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return min(max(0, count - before), MAX_DECIMALS)


def format_bytes(count: float) -> str:
    """Format a number of bytes with a decimal unit, such as `812 kB` or `12.3 MB`."""
    factor, unit = byte_unit(count)
    value = count / factor
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def byte_unit(largest: float) -> tuple[float, str]:
    """Return a decimal unit for byte counts up to `largest`, as (bytes per unit, name)."""
    units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    return next(
        ((factor, unit) for factor, unit in units if largest >= 0.9995 * factor), (1.0, "B")
    )


def format_duration(seconds: float) -> str:
    """Format a duration, such as `0.4 s`, `36 s`, `2 min 5 s` or `1 h 3 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return a unit for simulated times up to `seconds`, as (seconds per unit, name)."""
    units = [(2 * 86400.0, 86400.0, "days"), (3600.0, 3600.0, "hours"), (300.0, 60.0, "minutes")]
    return next(
        ((factor, name) for least, factor, name in units if seconds >= least), (1.0, "seconds")
    )


def format_arrivals(record: Mapping[str, Any]) -> str:
    """Format the outcomes of invited clients, such as `10 invited, 7 arrived, 2 failed, 1 late`.

    The text is empty if all uploads arrived. If the training on the server diverged, the text
    contains the reason instead.
    """
    if diverged := record.get("diverged"):
        return f"no update: {diverged}"
    counts = record.get("counts") or {}
    if not counts or counts["invited"] == counts["arrived"]:
        return ""
    parts = [
        f"{counts[outcome]} {outcome}"
        for outcome in ("invited", "arrived", "failed", "late")
        if counts[outcome]
    ]
    return ", ".join(parts) + ("; too few uploads, no update" if record.get("skipped") else "")


def is_better(metric: str, a: float, b: float) -> bool:
    """Return whether score `a` is better than `b`."""
    return a < b if metric in SMALLER_IS_BETTER else a > b


def is_regression(metrics: Mapping[str, Any]) -> bool:
    """Return whether the metrics belong to a regression task."""
    return "mae" in metrics


def last_scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores in the last round on the first test that has scores.

    If no test has scores, the result is empty.
    """
    return next((summary[test]["last"] for test in TEST_NAMES if summary[test]), {})


def task_of(summary: Mapping[str, Any], details: Mapping[str, Any]) -> Task:
    """Return the task of a run, without the names of the classes."""
    kind: Any = details.get("kind")
    if kind is None and is_regression(last_scores(summary)):
        # Older runs do not record the kind.
        kind = "regression"
    elif kind is None:
        matrices = (
            matrix for found in details["confusion"].values() for matrix in (found or {}).values()
        )
        # Multilabel tasks have a 2 × 2 confusion matrix per label.
        is_multilabel = isinstance(next(matrices, [[0]])[0][0], list)
        kind = "multilabel" if is_multilabel else "multiclass"
    return Task(
        kind,
        len(details["labels"]),
        unit=details.get("unit", ""),
        rare=details.get("rare"),
        is_ranking=details.get("ranking", False),
    )


def client_score(client: Mapping[str, Any], test: str, metric: str) -> float | None:
    """Return the score of a client, or None if it is undefined or the client has no test rows."""
    return (client[test] or {}).get(metric)


def population(summary: Mapping[str, Any], details: Mapping[str, Any]) -> int:
    """Return the number of clients, including clients that were not evaluated."""
    return int(details.get("population", len(summary["clients"])))


def local_test_rows(details: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of local test rows of each client."""
    return {client: rows["test"] for client, rows in details["rows"].items()}


def format_models(models: Counter[str]) -> str:
    """Format the number of clients with each model, such as `4 × cnn, 2 × resnet18`."""
    listed = ", ".join(f"{count} × {name}" for name, count in models.most_common(LISTED_MODELS))
    return f"{listed} …" if len(models) > LISTED_MODELS else listed


def format_range(counts: Iterable[int]) -> str:
    """Format the range of counts, such as `24 to 102`, or `60` if all counts are equal."""
    known = list(counts)
    low = min(known)
    high = max(known)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def small_test_note(rows: Mapping[str, int]) -> str:
    """Return a sentence about clients with few local test rows.

    Args:
        rows: Number of local test rows, keyed by client id.

    Returns:
        The sentence, or an empty string if there are no such clients.
    """
    few = [client for client, count in rows.items() if 0 < count < FEW_ROWS]
    if not few:
        return ""
    return f"Uncertain because of fewer than {FEW_ROWS} local test rows: {format_list(few)}."


def format_evaluation(record: Mapping[str, Any], unit: str = "") -> str:
    """Format the scores of a round in one line, with the same metrics for all tests.

    An example is `local test: balanced accuracy 81.0%, AUROC 0.951; global test: balanced accuracy
    71.0%, AUROC 0.930`. A metric that is undefined on only one of the tests is shown as
    `undefined`. A metric that is undefined on all tests is omitted. If there are no scores, the
    text is empty.

    Args:
        record: A line of `metrics.jsonl`.
        unit: Unit of errors in a regression.
    """
    scored = {name: record[test] for test, name in TEST_NAMES.items() if record.get(test)}
    wanted = metrics_of_line(next(iter(scored.values()))) if scored else ()
    names = [
        name for name in wanted if any(scores.get(name) is not None for scores in scored.values())
    ]
    if not names:
        return ""
    parts = []
    for test_name, scores in scored.items():
        suffix = f" {unit}" if is_regression(scores) and unit else ""
        values = (
            f"{METRICS[name]} undefined"
            if scores.get(name) is None
            else f"{METRICS[name]} {format_metric(scores[name], name)}{suffix}"
            for name in names
        )
        parts.append(f"{test_name}: {', '.join(values)}")
    if record.get("privacy"):
        parts.append(format_privacy(record["privacy"]))
    return "; ".join(parts)


def format_final_evaluation(summary: Mapping[str, Any], unit: str = "") -> str:
    """Format the scores after the last round in one line (see `format_evaluation`)."""
    last = {test: (summary[test] or {}).get("last") for test in TEST_NAMES}
    return format_evaluation({**last, "privacy": summary.get("privacy")}, unit)


def format_privacy(privacy: Mapping[str, Any]) -> str:
    """Format a privacy budget, such as `ε 7.98 at δ 1e-05`."""
    return f"ε {format_significant(privacy['epsilon'])} at δ {privacy['delta']:g}"
