"""Formatting of numbers and names."""

from __future__ import annotations

from typing import Any

import pytest

from hetero_fl.reporting.formatting import (
    algorithm_base,
    algorithm_name,
    format_bytes,
    format_deviation,
    format_duration,
    format_evaluation,
    format_metric,
    format_significant,
    is_better,
)
from hetero_fl.utils.text import pluralize


def test_format_metric_and_format_significant() -> None:
    assert format_metric(0.8466, "accuracy") == "84.7%"
    assert format_metric(0.9444, "auroc") == "0.944"
    assert format_metric(None, "auroc") == "–"
    assert format_metric(2.8, "mae") == "2.80"
    assert [format_significant(x) for x in (0.0, 0.03409, 12.0, 123.4, 1234.5, -2.8)] == [
        "0.00",
        "0.0341",
        "12.0",
        "123",
        "1234",
        "-2.80",
    ]
    assert len(format_significant(5e-324)) < 30


@pytest.mark.parametrize(
    ("deviation", "metric", "mean", "text"),
    [
        (0.0515, "loss", 1.5, "0.05"),
        (3.456, "mae", 12.0, "3.5"),
        (0.0523, "accuracy", 0.8, "5.2%"),
        (0.0523, "auroc", 0.9, "0.052"),
    ],
)
def test_deviation_has_the_decimals_of_the_mean(
    deviation: float, metric: str, mean: float, text: str
) -> None:
    assert format_deviation(deviation, metric, mean) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (4_000, "4 kB"),
        (999_600, "1 MB"),
        (8_640_000, "8.64 MB"),
        (2.5e9, "2.5 GB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (9.97, "10 s"), (59.7, "1 min 0 s"), (125, "2 min 5 s"), (3780, "1 h 3 min")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_algorithm_name() -> None:
    assert algorithm_name("lg_fedavg") == "LG-FedAvg"
    assert (
        algorithm_name("hybrid:teacher=mean:heads=take") == "Hybrid (teacher = mean, heads = take)"
    )
    assert algorithm_name("python:my.module:MyMethod") == "MyMethod"
    assert algorithm_name("python:my.module:MyMethod:lr=1") == "MyMethod (lr = 1)"
    assert algorithm_base("python:my.module:MyMethod:lr=1") == "python:my.module:MyMethod"
    assert algorithm_name("tomorrow") == "tomorrow"


def test_plural_and_better() -> None:
    assert (pluralize(1, "round"), pluralize(2000, "row")) == ("1 round", "2,000 rows")
    assert is_better("mae", 1, 2) and is_better("auroc", 2, 1) and not is_better("loss", 2, 1)


def test_evaluated_shows_the_same_metrics_for_both_test_sets() -> None:
    record = {
        "personal": {"accuracy": 0.9, "balanced_accuracy": 0.8, "auroc": None},
        "global": {"accuracy": 0.7, "balanced_accuracy": 0.6, "auroc": 0.75},
        "server": None,
    }

    assert format_evaluation(record) == (
        "local test: balanced accuracy 80.0%, AUROC undefined; global "
        "test: balanced accuracy 60.0%, AUROC 0.750"
    )


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            {"personal": {"accuracy": 0.9, "balanced_accuracy": 0.8, "auroc": None}},
            "local test: balanced accuracy 80.0%",
        ),
        (
            {"personal": {"mae": 1.5, "r2": 0.1}, "server": {"mae": 2.0, "r2": 0.0}},
            "local test: mean absolute error 1.50; server: mean absolute error 2.00",
        ),
        (
            {
                "personal": {"auroc": 0.5, "average_precision": 0.2},
                "global": {"auroc": 0.6, "average_precision": 0.3},
            },
            (
                "local test: AUROC 0.500, average precision 0.200; global "
                "test: AUROC 0.600, average precision 0.300"
            ),
        ),
        ({"global": {"accuracy": None, "balanced_accuracy": None, "auroc": None}}, ""),
        ({}, ""),
    ],
)
def test_evaluated_of_other_tasks(record: dict[str, Any], line: str) -> None:
    assert format_evaluation(record) == line
