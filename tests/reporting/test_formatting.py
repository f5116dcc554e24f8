"""Formatting of numbers and names, and the metrics that are shown."""

from __future__ import annotations

from typing import Any

import pytest

from hetero_fl.core.metrics import metric_names, selection_metric
from hetero_fl.core.task import Task
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
from hetero_fl.reporting.shown_metrics import metrics_of_line, shown_metrics
from hetero_fl.utils.text import pluralize
from tests.support.cases import each_case


@each_case(
    ("written", "text"),
    [
        (format_metric(0.8466, "accuracy"), "84.7%"),
        (format_metric(0.9444, "auroc"), "0.944"),
        (format_metric(None, "auroc"), "–"),
        (format_metric(2.8, "mae"), "2.80"),
        (format_significant(0.0), "0.00"),
        (format_significant(0.03409), "0.0341"),
        (format_significant(12.0), "12.0"),
        (format_significant(123.4), "123"),
        (format_significant(1234.5), "1234"),
        (format_significant(-2.8), "-2.80"),
        # Deviations have the decimals of the mean.
        (format_deviation(0.0515, "loss", 1.5), "0.05"),
        (format_deviation(3.456, "mae", 12.0), "3.5"),
        (format_deviation(0.0523, "accuracy", 0.8), "5.2%"),
        (format_deviation(0.0523, "auroc", 0.9), "0.052"),
        (format_bytes(0), "0 B"),
        (format_bytes(999), "999 B"),
        (format_bytes(4_000), "4 kB"),
        (format_bytes(999_600), "1 MB"),
        (format_bytes(8_640_000), "8.64 MB"),
        (format_bytes(2.5e9), "2.5 GB"),
        (format_duration(0.42), "0.4 s"),
        (format_duration(9.97), "10 s"),
        (format_duration(59.7), "1 min 0 s"),
        (format_duration(125), "2 min 5 s"),
        (format_duration(3780), "1 h 3 min"),
        (pluralize(1, "round"), "1 round"),
        (pluralize(2000, "row"), "2,000 rows"),
        (algorithm_name("lg_fedavg"), "LG-FedAvg"),
        (
            algorithm_name("hybrid:teacher=mean:heads=take"),
            "Hybrid (teacher = mean, heads = take)",
        ),
        (algorithm_name("python:my.module:MyMethod"), "MyMethod"),
        (algorithm_name("python:my.module:MyMethod:lr=1"), "MyMethod (lr = 1)"),
        (algorithm_base("python:my.module:MyMethod:lr=1"), "python:my.module:MyMethod"),
        (algorithm_name("tomorrow"), "tomorrow"),
    ],
)
def test_numbers_and_names_are_formatted_for_display(written: str, text: str) -> None:
    assert written == text


def test_smallest_number_has_few_digits() -> None:
    assert len(format_significant(5e-324)) < 30


def test_better_depends_on_the_direction_of_the_metric() -> None:
    assert is_better("mae", 1, 2) and is_better("auroc", 2, 1) and not is_better("loss", 2, 1)


@each_case(
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
        # The same metrics are shown for both test sets.
        (
            {
                "personal": {"accuracy": 0.9, "balanced_accuracy": 0.8, "auroc": None},
                "global": {"accuracy": 0.7, "balanced_accuracy": 0.6, "auroc": 0.75},
                "server": None,
            },
            (
                "local test: balanced accuracy 80.0%, AUROC undefined; global "
                "test: balanced accuracy 60.0%, AUROC 0.750"
            ),
        ),
        ({"global": {"accuracy": None, "balanced_accuracy": None, "auroc": None}}, ""),
        ({}, ""),
    ],
)
def test_evaluation_shows_the_main_metrics(record: dict[str, Any], line: str) -> None:
    assert format_evaluation(record) == line


TASKS = {
    "binary": Task("multiclass", 2),
    "rare": Task("multiclass", 2, rare=1),
    "multiclass": Task("multiclass", 10),
    "many": Task("multiclass", 100),
    "ranking": Task("multiclass", 100, is_ranking=True),
    "multilabel": Task("multilabel", 14),
    "regression": Task("regression", 3),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_plots_begin_with_the_selection_metric(task: Task) -> None:
    shown = shown_metrics(task)

    assert shown.selection == shown.curves[0] == shown.clients[0] == selection_metric(task)[0]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_shown_metrics_are_computed(task: Task) -> None:
    shown = shown_metrics(task)

    used = {*shown.curves, *shown.clients, *shown.table, *shown.line, shown.client}

    assert used <= set(metric_names(task))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_line_of_scores_is_the_line_of_their_task(task: Task) -> None:
    scores = dict.fromkeys(metric_names(task), 0.5)

    assert metrics_of_line(scores) == shown_metrics(task).line
