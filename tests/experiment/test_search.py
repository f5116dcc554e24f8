"""Search of settings with Optuna: spaces, early stopping, continuation and failures."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hetero_fl
from hetero_fl.experiment.comparison import compare as comparison
from hetero_fl.experiment.comparison.jobs import Job, Point
from hetero_fl.experiment.comparison.tuning import (
    BATCH,
    Budget,
    OptunaSearch,
    Rating,
    as_text,
    best_trial,
    parse_space,
)
from hetero_fl.utils import extras
from hetero_fl.utils.errors import RunFailedError, UserError

CONFIG = {
    "name": "searched",
    "data": {"name": "digits", "train_limit": 300, "test_limit": 100},
    "clients": {"count": 2, "defaults": {"model": "mlp"}},
    "rounds": 3,
    "runtime": {"threads": 1},
}
LR = "clients.defaults.optimizer.lr"


def test_missing_optuna_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "optuna" else find(name))

    with pytest.raises(UserError, match=r"^search needs optuna, which is not installed; run pip"):
        hetero_fl.compare(CONFIG, "fedavg", out=tmp_path / "out", space={LR: "0.1..1"})


def trials_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "search.csv").open(encoding="utf-8") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_search_stops_bad_trials_and_compares_the_best_settings(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = {LR: "1e-6..0.1:log"}

    compared = hetero_fl.compare(
        CONFIG, "fedavg", [0, 1], out=tmp_path, space=space, budget=8, jobs=1
    )

    trials = trials_of(tmp_path)
    assert len(trials) == 8
    complete = [trial for trial in trials if trial["state"] == "complete"]
    stopped = [trial for trial in trials if trial["state"] == "stopped"]
    assert stopped and all(int(trial["rounds"]) < 3 for trial in stopped)
    assert {trial["rounds"] for trial in complete} == {"3"}
    best = max(complete, key=lambda trial: float(trial["validation"]))
    rates = [
        run.directory.config()["clients"]["defaults"]["optimizer"]["lr"] for run in compared.runs
    ]
    assert rates == [float(best[LR])] * 2
    assert {run.summary["seed"] for run in compared.runs} == {0, 1}

    # As if the search had been interrupted: one trial is missing, another one is in round 2.
    folders = sorted((tmp_path / "search").iterdir())
    shutil.rmtree(folders[0])
    hetero_fl.compare(CONFIG, "fedavg", [0, 1], out=tmp_path, space=space, budget=8, jobs=2)

    assert trials_of(tmp_path) == trials


@pytest.mark.slow
def test_search_with_other_settings_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = {LR: "0.001..0.1:log"}
    hetero_fl.compare(CONFIG, "fedavg", out=tmp_path, space=space, budget=1, jobs=1)

    with pytest.raises(UserError, match=r"search.* has other settings \(rounds: was 3, is now 4\)"):
        hetero_fl.compare({**CONFIG, "rounds": 4}, "fedavg", out=tmp_path, space=space, budget=1)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_search_goes_on_after_a_killed_trial(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    method = "python:tests.support.failing_methods:Killed"
    space = {"algorithm.is_killed": "true,false"}

    compared = hetero_fl.compare(CONFIG, method, out=tmp_path, space=space, budget=6, jobs=2)

    states = {(row["algorithm.is_killed"], row["state"]) for row in trials_of(tmp_path)}
    assert states == {("true", "failed"), ("false", "complete")}
    (run,) = compared.runs
    assert run.directory.config()["algorithm"]["is_killed"] is False
    assert "failed: its process was killed, possibly" in (tmp_path / "log.txt").read_text()


def test_methods_without_a_complete_trial_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: list[str]
) -> None:
    pytest.importorskip("optuna")
    run_jobs: Callable[..., Any] = comparison.run_jobs

    def fail_local_trials(
        source: Any, base: Any, jobs: list[Job], *rest: Any, **options: Any
    ) -> Any:
        failed = [j for j in jobs if j.variant.label == "local" and j.out.parent.name == "search"]
        yield from ((job, "diverged") for job in failed)
        yield from run_jobs(source, base, [j for j in jobs if j not in failed], *rest, **options)

    monkeypatch.setattr(comparison, "run_jobs", fail_local_trials)
    config = {**CONFIG, "rounds": 1}

    with pytest.raises(RunFailedError, match=r"^search: no trial of local is complete: diverged$"):
        hetero_fl.compare(
            config, "local,fedavg", out=tmp_path, space={LR: "0.1..0.2"}, budget=2, jobs=1
        )

    text = (tmp_path / "comparison.md").read_text()
    assert "FedAvg" in text and "no trial of local is complete: diverged" in text


Runs = Callable[[Point], Rating]


def finished(score: float, seconds: float = 0.0) -> Rating:
    """Return the rating of a run with three rounds and the same score after each of them."""
    return Rating({1: score, 2: score, 3: score}, score, is_complete=True, seconds=seconds)


def by_value(point: Point) -> Rating:
    """Return a finished run whose score is the value of its first setting."""
    return finished(float(point[0].partition("=")[2]))


def replay(search: OptunaSearch, run: Runs) -> dict[Point, Rating]:
    """Return the ratings of all points that a search asks for."""
    ratings: dict[Point, Rating] = {}
    while points := search.ask(ratings):
        assert len(points) <= BATCH
        ratings |= {point: run(point) for point in points}
    return ratings


@pytest.fixture
def search() -> OptunaSearch:
    """Return a search of one setting with 20 trials of three rounds."""
    pytest.importorskip("optuna")
    return OptunaSearch({"x": "0..1"}, Budget(trials=20), num_rounds=3, seed=0)


def test_search_depends_on_ratings_only(search: OptunaSearch) -> None:
    ratings = replay(search, by_value)
    trials = search.trials(ratings)

    # Ratings are read in any order, and a lost one is asked for again.
    assert search.trials(dict(reversed(ratings.items()))) == trials
    lost = trials[9].point
    assert search.ask({p: r for p, r in ratings.items() if p != lost}) == [lost]
    assert len(trials) == 20 and search.ask(ratings) == []


def test_trials_are_stopped_behind_the_best_third_of_earlier_batches(search: OptunaSearch) -> None:
    trials = search.trials(replay(search, by_value))

    assert {trial.state for trial in trials[:BATCH]} == {"complete"}
    for begin in range(BATCH, 20, BATCH):
        earlier = [trial.rating.score for trial in trials[:begin]]
        for trial in trials[begin : begin + BATCH]:
            ranked = sorted([*earlier, trial.rating.score], reverse=True)
            is_ahead = trial.rating.score >= ranked[len(ranked) // 3 - 1]
            assert trial.state == ("complete" if is_ahead else "stopped")
            assert trial.rating.rounds == (3 if is_ahead else 1)
            assert search.should_stop(trial.rating.curve, trials[:begin]) is not is_ahead


def test_later_trials_are_better(search: OptunaSearch) -> None:
    scores = [trial.rating.score for trial in search.trials(replay(search, by_value))]

    assert sum(scores[10:]) > sum(scores[:10])


def test_best_trial_is_complete(search: OptunaSearch) -> None:
    def run(point: Point) -> Rating:
        value = float(point[0].partition("=")[2])
        error = "diverged" if value > 0.9 else ""
        return Rating({}, value, is_complete=not error, error=error)

    trials = search.trials(replay(search, run))

    failed = [trial for trial in trials if trial.state == "failed"]
    best = best_trial(trials)
    assert failed and best is not None
    assert best.rating.score == max(t.rating.score for t in trials if t not in failed)
    assert best_trial(failed) is None


def test_runs_without_validation_scores_fail(search: OptunaSearch) -> None:
    trials = search.trials(replay(search, lambda _: finished(float("-inf"))))

    assert {trial.state for trial in trials} == {"failed"}
    assert {trial.rating.error for trial in trials} == {
        "the last evaluation has no validation score"
    }


@pytest.mark.parametrize(
    ("seconds", "num_trials"), [(600.0, 2 * BATCH), (1.0, 360)], ids=["slow", "fast"]
)
def test_budget_in_hours_counts_at_least_ten_seconds_per_trial(
    seconds: float, num_trials: int
) -> None:
    pytest.importorskip("optuna")
    search = OptunaSearch({"x": "a,b"}, Budget.parse("1h"), num_rounds=1, seed=0)

    ratings = replay(search, lambda _: finished(0.5, seconds))

    assert len(ratings) == 2
    assert len(search.trials(ratings)) == num_trials


def test_drawn_numbers_stay_in_a_narrow_range() -> None:
    pytest.importorskip("optuna")
    values = parse_space({"momentum": "0.9..0.9999"})["momentum"]

    drawn = {as_text(value, values) for value in (0.9, 0.99234, 0.99989, 0.9999)}

    assert drawn == {"0.9", "0.9923", "0.9999"}


def test_ends_of_ranges_and_all_choices_are_checked() -> None:
    pytest.importorskip("optuna")
    space = {"a": "0.001..1:log", "b": "1..5", "c": "x,[1,2]", "d": [1, 2], "e": (True, "x")}

    search = OptunaSearch(space, Budget(), num_rounds=1, seed=0)

    assert search.ends() == {
        "a": ["0.001", "1"],
        "b": ["1", "5"],
        "c": ["x", "[1,2]"],
        "d": ["1", "2"],
        "e": ["true", "x"],
    }
