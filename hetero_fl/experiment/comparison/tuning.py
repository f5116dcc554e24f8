"""Tuning of settings: the points to try, decided by the validation scores of the runs so far.

A tuner has no state. Its decisions follow from the ratings of points, which are read from run
directories, so that interrupted tuning continues as if it had not been interrupted.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hetero_fl.core.task import Task
from hetero_fl.experiment.comparison.jobs import Job, Point
from hetero_fl.federation.round import Record
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.summary import mean_validation_score
from hetero_fl.utils.errors import ArgumentError, UserError
from hetero_fl.utils.text import split_top_level

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Curve = Mapping[int, float]
"""Validation score after each evaluated round. Larger is better."""
Space = Mapping[str, str | Sequence[Any]]
RESERVED = ("seed", "rounds", "algorithm.name", "name", "output")
"""Keys that a search sets itself."""
SIGNIFICANT_DIGITS = 3
"""Number of significant digits of a drawn number, if its range is not narrow."""
BATCH = 4
"""Number of trials that a search draws at a time, independent of the number of parallel runs."""
REDUCTION = 3
"""One of this many trials continues at each rung of the successive halving."""
MIN_SECONDS = 10.0
"""Seconds that each trial costs at least, so that trials that fail at once use the budget, too."""


@dataclass(frozen=True)
class Rating:
    """Scores of the runs of a point so far, one run for each seed.

    Attributes:
        curve: Mean validation score after each evaluated round. Larger is better.
        score: Mean score in the last evaluation of each run, or minus infinity without scores.
        is_complete: Whether all runs have finished.
        seconds: Duration of all rounds.
        error: Message of a failed run, or an empty string.
    """

    curve: Curve
    score: float
    is_complete: bool
    seconds: float = 0.0
    error: str = ""

    @property
    def rounds(self) -> int:
        """The last evaluated round."""
        return max(self.curve, default=0)


State = Literal["complete", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """A point that was tried.

    Attributes:
        point: The settings.
        state: Whether the runs have finished with every seed, were stopped early, or have failed.
        rating: The rating of the point, in the rounds that count.
    """

    point: Point
    state: State
    rating: Rating


Ratings = Mapping[Point, Rating]


def rate(jobs: Sequence[Job], task: Task, errors: Mapping[Job, str]) -> Rating:
    """Read the rating of a point from its run directories.

    Args:
        jobs: The runs of the point.
        task: The task of the runs.
        errors: Messages of failed runs.
    """
    curves = []
    seconds = 0.0
    for job in jobs:
        records = _read_records(job, errors)
        seconds += sum(sum(record["seconds"].values()) for record in records)
        evaluated = [record for record in records if record.get("validation")]
        curves.append({record["round"]: _score(task, record) for record in evaluated})
    shared = [r for r in curves[0] if all(r in curve for curve in curves)]
    return Rating(
        {r: fmean(curve[r] for curve in curves) for r in shared},
        fmean(curve[max(curve)] for curve in curves) if all(curves) else -math.inf,
        all(RunDirectory(job.out).finished for job in jobs),
        seconds,
        next((errors[job] for job in jobs if job in errors), ""),
    )


def _read_records(job: Job, errors: Mapping[Job, str]) -> list[Record]:
    """Return the records of a run. A run that failed may have none that can be read."""
    directory = RunDirectory(job.out)
    try:
        return directory.metrics() if directory.lines() else []
    except UserError:
        if job in errors:
            return []
        raise


def _score(task: Task, record: Record) -> float:
    score = mean_validation_score(task, record)
    return -math.inf if score is None or math.isnan(score) else score


class Tuner(Protocol):
    """The choice of the points to try, which is made for each method alike."""

    def ask(self, ratings: Ratings) -> list[Point]:
        """Return the points to run before the next decision. Empty if all points were tried."""

    def trials(self, ratings: Ratings) -> list[Trial]:
        """Return the points that were tried, in the order in which they were asked for."""


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """Return the complete trial with the best score, the first in a tie, or None."""
    complete = [trial for trial in trials if trial.state == "complete"]
    return max(complete, key=lambda trial: trial.rating.score, default=None)


@dataclass(frozen=True)
class Grid:
    """All combinations of the values of settings.

    Args:
        values: Values of each configuration key. Without keys, the only point is empty.

    Raises:
        ArgumentError: If the comparison sets a key itself.

    Example:
        >>> Grid({"rounds": ["1", "2"]}).ask({})
        [('rounds=1',), ('rounds=2',)]
    """

    values: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        for key in self.values:
            if key in ("seed", "algorithm.name"):
                raise ArgumentError(f"grid: {key}: set by the comparison; remove it")

    @property
    def points(self) -> list[Point]:
        """The points, the values of the last key changing fastest."""
        settings = [[f"{key}={value}" for value in found] for key, found in self.values.items()]
        return list(itertools.product(*settings))

    def ask(self, ratings: Ratings) -> list[Point]:
        """Return the points without a rating."""
        return [point for point in self.points if point not in ratings]

    def trials(self, ratings: Ratings) -> list[Trial]:
        """Return the rated points, which are complete if they have finished with every seed."""
        trials = []
        for point, rating in ratings.items():
            state: State = "complete" if rating.is_complete and not rating.error else "failed"
            trials.append(Trial(point, state, rating))
        return trials


@dataclass(frozen=True)
class Budget:
    """The budget of each method in a search.

    Attributes:
        trials: Number of trials.
        seconds: Seconds of training, summed over the trials.
    """

    trials: float = math.inf
    seconds: float = math.inf

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse a number of runs, such as `20`, or of hours, such as `1.5h`.

        Raises:
            ArgumentError: If the text is neither.
        """
        number = text.removesuffix("h")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if value > 0 and number != text and math.isfinite(value):
            return cls(seconds=3600 * value)
        if number == text and text.isdigit() and value >= 1:
            return cls(trials=value)
        raise ArgumentError(
            f"budget: expected a number of runs or hours, such as 20 or 1.5h, got '{text}'"
        )


class OptunaSearch:
    """A search with a tree-structured Parzen estimator, which stops trials that are behind.

    Trials are drawn in batches. A trial is stopped if it is behind the trials of earlier batches
    after the same number of rounds (ASHA: Li et al., MLSys 2020). Each call replays the search from
    its beginning, with the ratings as results.

    Args:
        space: Values of each configuration key (see `parse_space`).
        budget: The budget of each method.
        num_rounds: Number of rounds of a complete run.
        seed: Seed of the draws.
    """

    def __init__(self, space: Space, budget: Budget, num_rounds: int, seed: int) -> None:
        self.space = parse_space(space)
        self._budget = budget
        self._seed = seed
        first = max(1, num_rounds // REDUCTION**2)
        rungs = (first * REDUCTION**power for power in range(num_rounds))
        self._num_rounds = num_rounds
        self._rungs = list(itertools.takewhile(lambda rung: rung < num_rounds, rungs))

    def ask(self, ratings: Ratings) -> list[Point]:
        """Return the points of the first batch that lacks ratings."""
        return self._replay(ratings)[1]

    def trials(self, ratings: Ratings) -> list[Trial]:
        """Return the trials of the batches that have ended."""
        return self._replay(ratings)[0]

    def _replay(self, ratings: Ratings) -> tuple[list[Trial], list[Point]]:
        """Return the trials of the batches that have ended, and points of the next one to run."""
        # Imported here because it is an optional dependency, and slow to load.
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self._seed, constant_liar=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        states = {
            "complete": optuna.trial.TrialState.COMPLETE,
            "stopped": optuna.trial.TrialState.PRUNED,
            "failed": optuna.trial.TrialState.FAIL,
        }
        trials: list[Trial] = []
        while (
            len(trials) < self._budget.trials
            and sum(max(MIN_SECONDS, trial.rating.seconds) for trial in trials)
            < self._budget.seconds
        ):
            size = int(min(BATCH, self._budget.trials - len(trials)))
            drawn = [study.ask(self.space) for _ in range(size)]
            points = [self._point(trial.params) for trial in drawn]
            if missing := [point for point in dict.fromkeys(points) if point not in ratings]:
                return trials, missing
            batch = [self._trial(point, ratings[point], trials) for point in points]
            for sample, trial in zip(drawn, batch, strict=True):
                score = trial.rating.score
                if trial.state == "stopped":
                    sample.report(score, trial.rating.rounds)
                study.tell(
                    sample, score if trial.state == "complete" else None, states[trial.state]
                )
            trials += batch
        return trials, []

    def ends(self) -> dict[str, list[str]]:
        """Return the values that are checked before the search, keyed by configuration key."""
        from optuna.distributions import CategoricalDistribution

        found = {}
        for key, values in self.space.items():
            if isinstance(values, CategoricalDistribution):
                ends = list(values.choices)
            else:
                # All other distributions of a space are ranges.
                ends = [getattr(values, end) for end in ("low", "high")]
            found[key] = [as_text(end, values) for end in ends]
        return found

    def _point(self, params: Mapping[str, Any]) -> Point:
        return tuple(f"{key}={as_text(params[key], values)}" for key, values in self.space.items())

    def _trial(self, point: Point, rating: Rating, rivals: Sequence[Trial]) -> Trial:
        """Return the trial of a point, which ends where it is behind the trials of its rivals."""
        stopped_after = self._last_round(rating.curve, rivals)
        if stopped_after is not None:
            curve = {r: score for r, score in rating.curve.items() if r <= stopped_after}
            return Trial(point, "stopped", replace(rating, curve=curve, score=curve[stopped_after]))
        if rating.is_complete and not math.isfinite(rating.score):
            rating = replace(rating, error="the last evaluation has no validation score")
        state: State = "failed" if rating.error or not rating.is_complete else "complete"
        return Trial(point, state, rating)

    def should_stop(self, curve: Curve, trials: Sequence[Trial]) -> bool:
        """Return whether to stop a run early.

        Args:
            curve: Validation score after each evaluated round of the run.
            trials: The trials of earlier batches.
        """
        return self._last_round(curve, trials) is not None

    def _last_round(self, curve: Curve, rivals: Sequence[Trial]) -> int | None:
        """Return the round after which a run with this curve is stopped, or None."""
        for rung in self._rungs:
            round_idx = next((r for r in curve if r >= rung), self._num_rounds)
            if round_idx >= self._num_rounds:
                return None
            curves = [curve, *(trial.rating.curve for trial in rivals)]
            ranked = sorted((each[round_idx] for each in curves if round_idx in each), reverse=True)
            if curve[round_idx] < ranked[max(0, len(ranked) // REDUCTION - 1)]:
                return round_idx
        return None


def parse_space(space: Space) -> dict[str, BaseDistribution]:
    """Parse the values to search.

    Args:
        space: Values of each configuration key: `a,b,c` for a list, `low..high` for a range, and
            `low..high:log` for a range on a logarithmic scale. A list may also be a sequence.

    Raises:
        ArgumentError: If there is no key, or if values are invalid.

    Example:
        >>> parse_space({"algorithm.mu": "0.001..1:log"})
        {'algorithm.mu': FloatDistribution(high=1.0, log=True, low=0.001, step=None)}
    """
    if not space:
        raise ArgumentError("space: expected one or more keys, such as algorithm.mu=0.001..1:log")
    for key in space:
        if key in RESERVED or key.startswith("output."):
            raise ArgumentError(f"space: {key}: set by the comparison; remove it")
    return {key: _parse_values(key, values) for key, values in space.items()}


def _parse_values(key: str, text: str | Sequence[Any]) -> BaseDistribution:
    # Imported here because it is an optional dependency, and slow to load.
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if not isinstance(text, str):
        return CategoricalDistribution(_parse_sequence(key, text))
    low_text, dots, rest = text.partition("..")
    if not dots:
        values = split_top_level(text, ",")
        if len(values) < 2:
            raise ArgumentError(
                f"space: {key}: expected a,b,c or low..high or low..high:log, got '{text}'"
            )
        return CategoricalDistribution(values)
    high_text, colon, scale = rest.partition(":")
    try:
        low = float(low_text)
        high = float(high_text)
    except ValueError:
        raise ArgumentError(f"space: {key}: expected low..high, got '{text}'") from None
    if colon and scale != "log":
        raise ArgumentError(f"space: {key}: unknown scale '{scale}'; use low..high:log")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ArgumentError(f"space: {key}: low must be less than high, got '{text}'")
    if colon and low <= 0:
        raise ArgumentError(f"space: {key}: a logarithmic scale starts above 0, got '{low_text}'")
    if all(end.lstrip("+-").isdigit() for end in (low_text, high_text)):
        return IntDistribution(int(low), int(high), log=bool(colon))
    return FloatDistribution(low, high, log=bool(colon))


def _parse_sequence(key: str, values: Sequence[Any]) -> list[str]:
    try:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    except (TypeError, ValueError):
        texts = []
    if len(texts) < 2 or not isinstance(values, Sequence):
        raise ArgumentError(f"space: {key}: expected 'a,b,c' or 'low..high', got {values!r}")
    return texts


def as_text(value: Any, values: BaseDistribution) -> str:
    """Return a drawn value as text.

    A number has at least three significant digits, and more in a narrow range, such as 0.9..0.9999.
    """
    from optuna.distributions import FloatDistribution

    if not isinstance(values, FloatDistribution):
        return str(value)
    low = values.low
    high = values.high
    digits = SIGNIFICANT_DIGITS + int(math.log10(2 * max(abs(low), abs(high)) / (high - low)))
    text = f"{value:.{digits}g}"
    return text if low <= float(text) <= high else repr(value)
