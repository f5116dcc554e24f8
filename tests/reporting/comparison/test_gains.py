"""The gain or loss of each client against training alone, in every file of a comparison."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.core.metrics import CLASSIFICATION, REGRESSION
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.report import write_comparison
from hetero_fl.reporting.comparison.result import Comparison
from tests.reporting.comparison.test_tables import BINARY, VALUES, make_rows

SCORES = {
    ("local", 0): {"a": 0.5, "b": 0.8},
    ("fedavg", 0): {"a": 0.7, "b": 0.6},
    ("hybrid", 0): {"a": 0.9, "b": 0.85},
    ("local", 1): {"a": 0.6, "b": 0.9},
    ("fedavg", 1): {"a": 0.6, "b": 0.8},
    ("hybrid", 1): {"a": 0.9, "b": 0.95},
}


def rows_with_clients(task: Task = BINARY, **undefined: Any) -> list[dict[str, Any]]:
    """Return the rows of three methods and two seeds, with the scores of two clients.

    Args:
        task: Task of the runs. Errors are ten times the scores.
        **undefined: Global scores of single clients, which replace those of all runs.
    """
    names = CLASSIFICATION if task.kind == "multiclass" else REGRESSION
    metric, local = ("balanced_accuracy", "accuracy") if task is BINARY else ("mae", "mae")
    factor = 1 if task is BINARY else 10
    rows = make_rows(["local", "fedavg", "hybrid"], [0, 1], names)
    for row in rows:
        row["clients"] = [
            {
                "id": client,
                "global": {metric: undefined.get(client, factor * score)},
                "personal": {local: factor * score} if task is BINARY else None,
            }
            for client, score in SCORES[row["algorithm"], row["seed"]].items()
        ]
    return rows


def write(folder: Path, rows: list[dict[str, Any]], task: Task = BINARY) -> Comparison:
    write_comparison(folder, rows, title="t", note="", task=task)
    return Comparison(folder)


def test_gains_are_differences_from_the_baseline_with_the_same_seed(tmp_path: Path) -> None:
    comparison = write(tmp_path, rows_with_clients())

    for test, metric in (("global", "balanced_accuracy"), ("personal", "accuracy")):
        gains = comparison.gains[comparison.gains["test"] == test]
        assert set(gains["metric"]) == {metric}
        found = gains.set_index(["algorithm", "seed", "client"])["gain"].to_dict()
        assert found == pytest.approx(
            {
                (name, seed, client): score - SCORES["local", seed][client]
                for (name, seed), scores in SCORES.items()
                if name != "local"
                for client, score in scores.items()
            }
        )
    column = comparison.frame["global_last_balanced_accuracy_gain_a"]
    expected = [math.nan, 0.2, 0.4, math.nan, 0.0, 0.3]
    assert column.tolist() == pytest.approx(expected, nan_ok=True)


def test_smaller_errors_are_gains(tmp_path: Path) -> None:
    gains = write(tmp_path, rows_with_clients(VALUES), VALUES).gains

    assert set(gains["test"]) == {"global"}, "no client has local test rows"
    found = gains.set_index(["algorithm", "seed", "client"])["gain"]
    assert found["fedavg", 0, "a"] == pytest.approx(-2) and found["fedavg", 0, "b"] == (
        pytest.approx(2)
    )


def test_table_and_sentence_say_who_gains(tmp_path: Path) -> None:
    text = write(tmp_path, rows_with_clients()).to_markdown()

    section = text.partition("over Local: Global test balanced accuracy")[2]
    lines = [[cell.strip() for cell in line.split("|")] for line in section.splitlines()[2:7]]
    assert [line[1:5] for line in (lines[0], *lines[2:])] == [
        ["Client", "Local", "FedAvg", "Hybrid"],
        ["a", "55.0", "+10.0", "+35.0"],
        ["b", "85.0", "−15.0", "+5.0"],
        ["clients that gain", "", "1 of 2", "2 of 2"],
    ]
    assert (
        "After the last round of Hybrid, 2 of 2 clients are better than with Local by balanced "
        "accuracy on the global test (from +5.0 for b to +35.0 percentage points for a) and 2 of 2 "
        "by accuracy on their local tests" in text
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 2 and "last round of Hybrid, 2 of 2 clients" in page
    assert (tmp_path / "gains.png").stat().st_size > 10_000


def test_gains_shown_as_zero_are_neither_gains_nor_losses(tmp_path: Path) -> None:
    rows = rows_with_clients(a=0.5, b=0.5)
    for row in rows:
        if row["algorithm"] == "hybrid":
            for client, change in zip(row["clients"], (0.0004, -0.0004), strict=True):
                client["global"]["balanced_accuracy"] += change

    text = write(tmp_path, rows).to_markdown()

    assert "Hybrid, 0 of 2 clients are better" in text
    assert "(from 0.0 for b to 0.0 percentage points for a) and" in text


def test_undefined_scores_are_left_out(tmp_path: Path) -> None:
    comparison = write(tmp_path, rows_with_clients(b=None))
    diverged = rows_with_clients()
    for row in diverged:
        if row["algorithm"] == "hybrid":
            row["clients"][1]["global"] = None

    text = write(tmp_path / "diverged", diverged).to_markdown()

    own = comparison.gains[comparison.gains["test"] == "global"]
    assert set(own["client"]) == {"a"}
    assert "1 of 1 clients are better than with Local" in comparison.to_markdown()
    assert "Hybrid, 1 of 2 clients are better than with Local by balanced accuracy" in text
    assert "– is undefined" in text


def test_each_seed_of_the_baseline_counts_once(tmp_path: Path) -> None:
    rows = [r for r in rows_with_clients() if (r["algorithm"], r["seed"]) != ("fedavg", 1)]

    text = write(tmp_path, rows).to_markdown()

    (line, *_) = [line for line in text.splitlines() if line.startswith("| a ")]
    assert [cell.strip() for cell in line.split("|")][2:5] == ["55.0", "+20.0", "+35.0"]


def test_many_clients_are_listed_from_both_ends(tmp_path: Path) -> None:
    rows = make_rows(["local", "fedavg"], [0])
    order = [7 * n % 50 for n in range(50)]
    for row in rows:
        gain = 0.01 if row["algorithm"] == "fedavg" else 0.0
        row["clients"] = [
            {
                "id": f"c{n}",
                "global": {"balanced_accuracy": 0.4 + gain * (order[n] - 9)},
                "personal": None,
            }
            for n in range(50)
        ]

    text = write(tmp_path, rows).to_markdown()

    listed = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| c")]
    edges = [f"c{n}" for n in range(50) if order[n] < 10 or order[n] >= 40]
    assert listed == [*edges, "clients that gain"]
    assert "40 of 50" in text and "all are in comparison.csv" in text


def test_without_the_baseline_there_are_no_gains(tmp_path: Path) -> None:
    write(tmp_path, rows_with_clients())
    comparison = write(tmp_path, [r for r in rows_with_clients() if r["algorithm"] != "local"])

    assert comparison.gains.empty and "clients gain" not in comparison.to_markdown()
    assert not (tmp_path / "gains.png").exists(), "no picture of an earlier comparison remains"
    assert "clients" not in comparison.frame


def test_the_best_method_is_no_baseline(tmp_path: Path) -> None:
    """Training alone with other settings is no federation."""
    rows = rows_with_clients()
    for row in rows:
        if row["algorithm"] == "hybrid":
            row["algorithm"] = "local:clients.defaults.epochs=2"

    text = write(tmp_path, rows).to_markdown()

    assert "of FedAvg, 1 of 2" in text and "to +10.0 percentage points for a)" in text
