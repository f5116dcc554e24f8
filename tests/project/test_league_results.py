"""Ranks and differences of a benchmark's rows, from an archive written by hand."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.league.results import BEST, BenchmarkResults
from benchmarks.league.tuning import LEARNING_RATE, TunedKey, TunedSettings

GLOBAL = "global_last_balanced_accuracy"
SEEDS = range(5)
RATES = (0.001, 0.01, 0.1)
PROTOCOL: dict[str, Any] = {
    "seeds": [*SEEDS],
    "components": {"none": "", "all": "components", "more": "more"},
    "tuning": {
        "seeds": [5],
        "keys": ["clients.defaults.optimizer.lr", "server.optimizer.lr"],
        "learning_rates": [*RATES],
        "wider": [*RATES],
    },
    "rows": [
        {"method": method, "components": components}
        for method, components in (
            ("fedavg", "none"),
            ("fedavg", "all"),
            ("ditto", "none"),
            ("ditto", "all"),
            ("ditto", "more"),
        )
    ],
    "primary": {
        "method": "fedavg",
        "against": ["ditto"],
        "components": "all",
        "metric": GLOBAL,
        "federations": ["one"],
    },
}


def at_rate(rate: float) -> str:
    return f"clients.defaults.optimizer.lr={rate}:server.optimizer.lr={rate}"


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def results(tmp_path: Path) -> BenchmarkResults:
    """Results of two federations, in which validation chooses the worse row of FedAvg."""
    folder = tmp_path / "benchmark"
    folder.mkdir()
    (folder / "protocol.yaml").write_text(
        yaml.safe_dump(PROTOCOL, sort_keys=False), encoding="utf-8"
    )
    (tmp_path / "config.yaml").write_text("{}", encoding="utf-8")
    # Scores on the global test, and on validation rows.
    scores = {
        "one": {
            ("fedavg", "none"): (0.6, 0.9),
            ("fedavg", "all"): (0.7, 0.8),
            ("ditto", "none"): (0.5, 0.4),
            ("ditto", "all"): (0.8, 0.7),
            ("ditto", "more"): (0.55, 0.75),
        },
        "two": {
            ("fedavg", "none"): (0.6, 0.1),
            ("fedavg", "all"): (0.7, 0.2),
            ("ditto", "none"): (0.65, 0.1),
            ("ditto", "all"): (0.5, 0.3),
            ("ditto", "more"): (0.9, 0.2),
        },
    }
    for name, rows in scores.items():
        federation = {"title": name.title(), "config": "../config.yaml"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(federation), encoding="utf-8")
        write_table(
            tmp_path / f"{name}.csv",
            ["method", "components", "settings", "seed", GLOBAL, "commit", "seconds_total"],
            [
                (*row, at_rate(0.01), seed, score + 0.01 * seed * (row[0] == "fedavg"), "a", 1)
                for row, (score, _) in rows.items()
                for seed in SEEDS
            ],
        )
        write_table(
            tmp_path / f"{name}_tuning.csv",
            ["method", "components", "settings", "seed", "validation_score"],
            [
                (*row, at_rate(rate), 5, score if rate == 0.01 else 0.0)
                for row, (_, score) in rows.items()
                for rate in RATES
            ],
        )
    return BenchmarkResults(folder, tmp_path)


def test_ranks_are_means_over_federations(results: BenchmarkResults) -> None:
    # The group `more` has no row of FedAvg.
    assert list(results.rankings) == ["none", "all", BEST]
    for components in ("none", "all"):
        assert results.ranks(GLOBAL, components) == {"fedavg": 1.5, "ditto": 1.5}


def test_best_rows_are_those_of_validation(results: BenchmarkResults) -> None:
    assert results.best_rows("one") == {"fedavg": ("fedavg", "none"), "ditto": ("ditto", "more")}
    assert results.best_rows("two") == {"fedavg": ("fedavg", "all"), "ditto": ("ditto", "all")}
    assert results.ranks(GLOBAL, BEST) == {"fedavg": 1.0, "ditto": 2.0}


def test_page_contains_the_main_federations(results: BenchmarkResults) -> None:
    other = {"title": "Two", "config": "../config.yaml", "group": "Variants"}
    folder = results.archive / "benchmark"
    (folder / "two.yaml").write_text(yaml.safe_dump(other), encoding="utf-8")

    page = BenchmarkResults(folder, results.archive).page()

    assert "- **Runs:** 25 reported, 15 for tuning" in page
    assert "Two" not in page and "Variants" not in page


def keep_lines(path: Path, keep: Callable[[list[str]], list[str]]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(keep(lines)) + "\n", encoding="utf-8")


def test_rows_that_lack_a_seed_are_left_out(results: BenchmarkResults) -> None:
    keep_lines(results.archive / "two.csv", lambda lines: lines[:-1])

    assert ("ditto", "more") not in results.scores["two"].rows
    assert results.scores["two"].rows == results.scores["one"].rows[:-1]
    assert results.incomplete == ["Two"]


def test_federations_that_lack_a_primary_row_are_left_out(results: BenchmarkResults) -> None:
    def keep(lines: list[str]) -> list[str]:
        return [line for line in lines if not line.startswith("fedavg,all,") or ",0," in line]

    keep_lines(results.archive / "two.csv", keep)

    assert results.scores["two"].rows == [] and results.scores["one"].rows
    assert results.ranks(GLOBAL, "none") == {"fedavg": 1.0, "ditto": 2.0}


def test_best_rows_need_a_complete_tuning(results: BenchmarkResults) -> None:
    keep_lines(results.archive / "two_tuning.csv", lambda lines: lines[:-1])

    assert results.best_rows("two") == {}
    assert list(results.rankings) == ["none", "all"]


def test_largest_values_are_counted_if_they_are_not_widened(
    results: BenchmarkResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tuned(epochs: int) -> TunedSettings:
        keys = (
            TunedKey("epochs", (1, 3, 5), (0.0, 0.0, 0.0), epochs),
            TunedKey(LEARNING_RATE, RATES, (0.0, 0.0, 0.0), RATES[-1]),
            TunedKey("recalibrate", (["local_test"], []), (0.0, 0.0), []),
        )
        return TunedSettings((), tuned=keys)

    choices = {("fedavg", "all"): tuned(5), ("ditto", "all"): tuned(3)}
    monkeypatch.setattr(BenchmarkResults, "choices", lambda self, name: choices)

    assert results.largest() == ["epochs: 2 of 4"]
    assert results.edges() == [
        f"{federation}, {row}: {LEARNING_RATE} 0.1"
        for federation in ("One", "Two")
        for row in ("FedAvg + components", "Ditto + components")
    ]
