"""The order of trials, widened grids, and the choice of settings by validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from benchmarks.league.protocol import BenchmarkRow, Tuning
from benchmarks.league.tuning import (
    FINAL_LEARNING_RATE,
    LEARNING_RATE,
    Coordinate,
    TunedSettings,
)
from hetero_fl.experiment.comparison.jobs import Point

LADDER = [0.0001, 0.001, 0.01, 0.1, 1.0]
TUNING = Tuning(
    seeds=[1],
    keys=["clients.defaults.optimizer.lr", "server.optimizer.lr"],
    learning_rates=LADDER[1:4],
    wider=LADDER,
    wider_settings={"mu": [0.01, 0.1, 1.0, 10.0]},
)
ROW = BenchmarkRow(
    method="fedprox",
    components="none",
    tuned={"mu": [0.1, 1.0], "clients.defaults.epochs": [1, 3, 5]},
)


def tune(
    score: Callable[[dict[str, Any]], float], row: BenchmarkRow = ROW
) -> tuple[TunedSettings, int]:
    """Run all trials with a score function, and return the choice and the number of trials."""
    tuner = Coordinate.for_row(row, TUNING)
    ratings: dict[Point, float] = {}
    while points := tuner.choose(ratings).remaining:
        for point in points:
            assert point not in ratings, "a trial is never repeated"
            # The values of a point are a configuration in YAML.
            trial = {key: yaml.safe_load(value) for key, _, value in map(partition, point)}
            ratings[point] = score(trial)
    return tuner.choose(ratings), len(ratings)


def partition(setting: str) -> tuple[str, str, str]:
    return setting.removeprefix("algorithm.").partition("=")


def rate_of(trial: dict[str, Any]) -> float:
    rates = {trial[key] for key in TUNING.keys}
    assert len(rates) == 1, "clients and server have the same learning rate"
    return float(rates.pop())


def test_settings_are_tuned_in_order_at_the_values_chosen_before() -> None:
    seen = []

    def score(trial: dict[str, Any]) -> float:
        seen.append((rate_of(trial), trial["mu"], trial["clients.defaults.epochs"]))
        return (
            -abs(rate_of(trial) - 0.01) - abs(trial["mu"] - 1.0) + trial["clients.defaults.epochs"]
        )

    choice, _ = tune(score)
    assert seen == [
        *((rate, 0.1, 1) for rate in (0.001, 0.01, 0.1)),
        (0.01, 1.0, 1),
        (0.01, 10.0, 1),
        (0.01, 1.0, 3),
        (0.01, 1.0, 5),
        *((rate, 1.0, 5) for rate in (0.001, 0.1)),
    ]
    assert choice.settings["mu"] == 1.0
    assert choice.settings["clients.defaults.epochs"] == 5
    keys = [LEARNING_RATE, "mu", "clients.defaults.epochs", FINAL_LEARNING_RATE]
    assert [key.key for key in choice.tuned] == keys
    assert choice.tuned[1].values == (0.1, 1.0, 10.0)


@pytest.mark.parametrize("best", range(len(LADDER)))
def test_the_best_of_a_unimodal_score_is_found_and_interior(best: int) -> None:
    choice, _ = tune(lambda trial: -abs(LADDER.index(rate_of(trial)) - best))
    assert rate_of(choice.settings) == LADDER[best]
    is_end = best in (0, len(LADDER) - 1)
    assert choice.is_interior == (not is_end), "only the end of all values is not interior"


def test_diverged_trials_are_not_chosen_and_ties_go_to_the_first_value() -> None:
    choice, _ = tune(lambda trial: float("-inf") if rate_of(trial) > 0.001 else 0.5)
    assert rate_of(choice.settings) == 0.001
    assert choice.tuned[0].scores[choice.tuned[0].values.index(0.01)] == float("-inf")
    assert choice.settings["mu"] == 0.1
    assert choice.settings["clients.defaults.epochs"] == 1


def test_epochs_are_a_budget_and_not_widened() -> None:
    _, count = tune(lambda trial: -abs(rate_of(trial) - 0.01) + trial["clients.defaults.epochs"])
    # Three learning rates, a second and (as the first is best) a smaller mu, two numbers of epochs,
    # and two learning rates at the chosen values.
    assert count == 3 + 2 + 2 + 2


def test_learning_rate_is_tuned_again_at_the_chosen_settings() -> None:
    # The best learning rate is 0.1 with one epoch and 0.001 with five, which are better.
    def score(trial: dict[str, Any]) -> float:
        epochs = trial["clients.defaults.epochs"]
        best = {1: 0.1, 3: 0.01, 5: 0.001}[epochs]
        return float(epochs - 0.3 * abs(LADDER.index(rate_of(trial)) - LADDER.index(best)))

    choice, _ = tune(score)
    assert rate_of(choice.settings) == 0.001
    assert choice.settings["clients.defaults.epochs"] == 5
    assert choice.tuned[0].chosen == 0.1
    assert choice.tuned[-1].values == (0.0001, 0.001, 0.01, 0.1)
    assert choice.is_interior
    assert choice.score == 5.0
