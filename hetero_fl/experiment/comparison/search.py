"""Search for the settings of each method with Optuna, on validation data.

Trials that are worse than others after the same number of rounds are stopped early (ASHA: Li et
al., MLSys 2020). A trial is a run with a seed that the comparison does not use.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.config import describe_difference
from hetero_fl.core.task import Task
from hetero_fl.experiment.comparison.jobs import (
    KILLED,
    WAS_KILLED,
    JobPool,
    Point,
    Source,
    Variant,
    final_validation_score,
    log_unexpected,
    run_folder,
)
from hetero_fl.experiment.comparison.search_space import Budget, Choices, Range
from hetero_fl.experiment.configuration import describe_changes
from hetero_fl.experiment.runner import run
from hetero_fl.federation.evaluation import Record
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run_directory import METRICS, RunDirectory
from hetero_fl.reporting.summary import mean_validation_score
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import ArgumentError, RunFailedError, UserError, one_line
from hetero_fl.utils.seeding import stream_key

if TYPE_CHECKING:
    import optuna

NO_REPORT = ("output.plots=false", "output.report=false", "output.best_models=false")
REDUCTION = 3
"""One of this many trials continues at each rung of the successive halving."""

# Attributes of a trial.
SCORE = "score"
"""Validation score."""
ERROR = "error"
"""Error message of a failed trial."""
ROUNDS = "rounds"
"""Number of finished rounds."""
FIRST = "first"
"""Number of the interrupted trial that this trial continues."""
SECONDS = "seconds"
"""Duration of the trial whose result was copied."""
INDEX = "index"
"""Number of trials of the method that were started before."""

SETTINGS = "search.json"
"""File in the search folder with what must be the same when a search continues."""


@dataclass(frozen=True)
class Trial:
    """A trial of a search.

    Attributes:
        variant: The method.
        number: Number of the trial in the study, beginning with 0.
        point: The settings, as `key=value`.
        state: `complete`, `stopped` (early) or `failed`.
        score: Validation score after the last evaluated round, or None. Larger is better.
        rounds: Number of finished rounds.
        seconds: Duration.
        error: Message of a failed trial.
    """

    variant: Variant
    number: int
    point: Point
    state: str
    score: float | None
    rounds: int
    seconds: float
    error: str


@dataclass(frozen=True)
class SearchSettings:
    """The settings that a continued search must share with its earlier trials.

    Attributes:
        seed: Seed of the trials.
        space: Values to search, as text.
        methods: Resolved configurations without the searched values, keyed by method.
    """

    seed: int
    space: dict[str, Any]
    methods: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> SearchSettings | None:
        """Return the settings of an earlier search in a folder, or None.

        Raises:
            UserError: If the file is damaged.
        """
        path = folder / SETTINGS
        if not path.exists():
            return None
        try:
            content = json.loads(RunDirectory(folder).read_text(SETTINGS))
            return cls(int(content["seed"]), dict(content["space"]), dict(content["methods"]))
        except (KeyError, TypeError, ValueError, RecursionError):
            raise UserError(
                f"{path}: not valid; restore the file or choose another folder"
            ) from None

    def continue_from(self, earlier: SearchSettings | None, folder: Path) -> SearchSettings:
        """Return these settings with the methods of an earlier search.

        Args:
            earlier: Settings of the earlier search, or None.
            folder: Folder of the searches, for the message.

        Raises:
            ArgumentError: If the settings differ.
        """
        if earlier is None:
            return self
        shared = earlier.methods.keys() & self.methods.keys()
        differs = describe_difference({"space": earlier.space}, {"space": self.space})
        for name in sorted(shared):
            differs = differs or describe_changes(earlier.methods[name], self.methods[name])
        if differs:
            raise ArgumentError(
                f"out: {folder} has other settings ({differs}); choose another folder"
            )
        return replace(self, methods={**earlier.methods, **self.methods})


@dataclass(frozen=True)
class SearchTask:
    """The properties that all trials of a search share.

    Attributes:
        source: The configuration.
        base: Overrides for all runs.
        task: The task of all runs.
        space: Values to search, keyed by configuration key.
        budget: The budget of each method.
        seed: Seed of the trials.
        num_rounds: Number of rounds of a complete run.
        out: Folder of the trials.
        permission: The code that may be executed.
        settings: Settings that earlier trials must share.
    """

    source: Source
    base: list[str]
    task: Task
    space: Mapping[str, Choices | Range]
    budget: Budget
    seed: int
    num_rounds: int
    out: Path
    permission: CodePermission
    settings: SearchSettings


class Search:
    """The search for the settings of several methods, which continues earlier trials in its folder.

    Args:
        search: Properties that all trials share.
        variants: The methods.
    """

    def __init__(self, search: SearchTask, variants: Sequence[Variant]) -> None:
        self.search = search
        self.variants = list(variants)
        search.out.mkdir(parents=True, exist_ok=True)

    def trials(self, variant: Variant) -> list[Trial]:
        """Return the trials of a method that have ended, without interrupted ones."""
        study = _open_study(self.search, variant)
        found = [
            _read_trial(self.search, variant, trial) for trial in study.get_trials(deepcopy=False)
        ]
        return [trial for trial in found if trial is not None]

    def run(self, jobs: int, progress: Progress) -> None:
        """Run trials until the budget of each method is used.

        Args:
            jobs: Number of trials at a time.
            progress: Progress display, which also writes the log.

        Raises:
            RunFailedError: If a trial cannot be started.
        """
        RunDirectory(self.search.out).write_json(SETTINGS, asdict(self.search.settings))
        for variant in self.variants:
            _requeue_interrupted(_open_study(self.search, variant))
        running: dict[Future[Any], tuple[Variant, int]] = {}
        overrides = [override for variant in self.variants for override in variant.overrides]
        with JobPool(self.search.source, overrides) as pool:
            while True:
                while len(running) < jobs and (
                    following := self._next([variant for variant, _ in running.values()])
                ):
                    future = pool.submit(run_trial, self.search, *following)
                    running[future] = following
                if not running:
                    return
                ended = wait(running, return_when=FIRST_COMPLETED).done
                for future in ended:
                    variant, index = running.pop(future)
                    error = pool.release(future)
                    number = (
                        future.result()[0] if error is None else self._fail(variant, index, error)
                    )
                    progress.log(self._describe(variant, number))

    def _fail(self, variant: Variant, index: int, error: str) -> int:
        """Record the error of a trial whose process was killed, and return its number.

        Raises:
            RunFailedError: If the process has not started a trial.
        """
        import optuna

        study = _open_study(self.search, variant)
        running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        started = [trial for trial in running if trial.user_attrs.get(INDEX) == index]
        if not started:
            raise RunFailedError(f"search: {variant.label}: {error}")
        trial = optuna.trial.Trial(study, started[0]._trial_id)
        # A failed trial counts towards the budget and is not repeated.
        trial.set_user_attr(ERROR, WAS_KILLED if error == KILLED else error)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return trial.number

    def _next(self, running: Sequence[Variant]) -> tuple[Variant, int] | None:
        """Return the method with the fewest trials among those with budget left, or None.

        The second value is the number of trials of the method that were started.

        Args:
            running: The methods of the running trials.
        """
        started = {}
        for variant in self.variants:
            ended = self.trials(variant)
            num_runs = len(ended) + running.count(variant)
            hours = sum(trial.seconds for trial in ended) / 3600
            if self.search.budget.allows(num_runs, hours):
                started[variant] = num_runs
        return min(started.items(), key=lambda item: item[1], default=None)

    def _describe(self, variant: Variant, number: int) -> str:
        trials = self.trials(variant)
        (trial,) = (trial for trial in trials if trial.number == number)
        total = self.search.budget.max_runs
        place = f"{len(trials)}/{total}" if total is not None else str(len(trials))
        text = f"search {variant.label} {place}: {', '.join(trial.point)}: "
        if trial.state == "failed":
            return f"{text}failed: {trial.error}"
        early = f", stopped after round {trial.rounds}" if trial.state == "stopped" else ""
        return f"{text}validation {trial.score:.4g}{early}"

    def best(self, variant: Variant) -> Trial:
        """Return the complete trial of a method with the best score, the first in a tie.

        Raises:
            RunFailedError: If no trial is complete.
        """
        trials = self.trials(variant)
        complete = [trial for trial in trials if trial.state == "complete"]
        if not complete:
            errors = [trial.error for trial in trials if trial.error]
            reason = f": {errors[-1]}" if errors else "; raise the budget"
            raise RunFailedError(f"search: no trial of {variant.label} is complete{reason}")
        return max(complete, key=_score)

    def write(self, path: Path) -> None:
        """Write all trials to a CSV file."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            keys = list(self.search.space)
            writer.writerow(
                ["algorithm", "trial", *keys, "state", "validation", "rounds", "seconds"]
            )
            for variant in self.variants:
                numbers = _stable_numbers(_open_study(self.search, variant))
                for trial in sorted(self.trials(variant), key=lambda t: numbers[t.number]):
                    number = numbers[trial.number]
                    values = [setting.partition("=")[2] for setting in trial.point]
                    result = [trial.state, trial.score, trial.rounds, round(trial.seconds, 1)]
                    writer.writerow([variant.label, number, *values, *result])


def _score(trial: Trial) -> float:
    return -math.inf if trial.score is None else trial.score


def run_trial(search: SearchTask, variant: Variant, index: int) -> int:
    """Run one trial, in a worker process.

    Args:
        search: Properties that all trials share.
        variant: The method.
        index: Number of trials of the method that were started before, which determines the draws.

    Returns:
        The number of the trial.
    """
    import optuna

    study = _open_study(search, variant, index)
    trial = study.ask()
    trial.set_user_attr(INDEX, index)
    point = _point(search, trial)
    if (earlier := _same_point(search, variant, study, point)) is not None:
        _copy_result(study, trial, earlier)
        return trial.number
    number = _stable_numbers(study)[trial.number]
    out = search.out / run_folder(variant, (f"trial{number}", *point), search.seed)

    # Other trials are compared after these rounds, which a resumed run may not repeat.
    recorded = RunDirectory(out).metrics() if (out / METRICS).exists() else []
    for record in recorded:
        _report(search, trial, record)

    def report(record: Record) -> None:
        """Stop the run if it is worse than other trials after the same number of rounds."""
        if record["round"] > len(recorded):
            _report(search, trial, record)
        is_last = record["round"] >= search.num_rounds
        if record.get("validation") and not is_last and trial.should_prune():
            raise optuna.TrialPruned

    overrides = [*search.base, *variant.overrides, *point, f"seed={search.seed}", *NO_REPORT]
    try:
        with log_unexpected(out, optuna.TrialPruned):
            finished = run(
                search.source,
                out=out,
                resume=True,
                overrides=overrides,
                callbacks=[report],
                allow_code=search.permission,
            )
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except (UserError, RunFailedError) as error:
        trial.set_user_attr(ERROR, one_line(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        _finish(study, trial, final_validation_score(finished, search.task))
    return trial.number


def _same_point(
    search: SearchTask, variant: Variant, study: optuna.Study, point: Point
) -> Trial | None:
    """Return the first complete or stopped trial with the same settings, or None."""
    found = (_read_trial(search, variant, trial) for trial in study.get_trials(deepcopy=False))
    return next(
        (t for t in found if t is not None and t.point == point and t.state != "failed"), None
    )


def _copy_result(study: optuna.Study, trial: optuna.Trial, earlier: Trial) -> None:
    """End a trial with the result of an earlier one, which counts towards the budget as well."""
    import optuna

    trial.set_user_attr(SCORE, earlier.score)
    trial.set_user_attr(ROUNDS, earlier.rounds)
    trial.set_user_attr(SECONDS, earlier.seconds)
    if earlier.state == "complete":
        study.tell(trial, earlier.score)
        return
    if earlier.score is not None:
        trial.report(earlier.score, earlier.rounds)
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def _report(search: SearchTask, trial: optuna.Trial, record: Record) -> None:
    """Report the validation score of an evaluated round to Optuna."""
    score = mean_validation_score(search.task, record) if record.get("validation") else None
    if score is None:
        return
    trial.set_user_attr(SCORE, score)
    trial.set_user_attr(ROUNDS, record["round"])
    trial.report(score, record["round"])


def _finish(study: optuna.Study, trial: optuna.Trial, score: float | None) -> None:
    """Record the score of a complete run."""
    import optuna

    if score is None or not math.isfinite(score):
        trial.set_user_attr(ERROR, f"the validation score is {score}")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        trial.set_user_attr(SCORE, score)
        study.tell(trial, score)


def _open_study(search: SearchTask, variant: Variant, index: int = 0) -> optuna.Study:
    """Open the study of a method, whose trials are in a file of the search folder."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = search.out / f"{run_folder(variant, (), search.seed)}.log"
    backend = JournalFileBackend(str(path))
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=max(1, search.num_rounds // REDUCTION**2), reduction_factor=REDUCTION
    )
    # The first trials of all methods try the same values, because the seed is the same.
    sampler_seed = stream_key(search.seed, "search", index) % 2**32
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=variant.label,
        direction="maximize",
        load_if_exists=True,
        pruner=pruner,
        sampler=optuna.samplers.TPESampler(seed=sampler_seed, constant_liar=True),
    )


def _requeue_interrupted(study: optuna.Study) -> None:
    """Start the trials again that were running when the search was interrupted."""
    import optuna

    running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    for trial in running:
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        first = trial.user_attrs.get(FIRST, trial.number)
        study.enqueue_trial(trial.params, user_attrs={FIRST: first})


def _stable_numbers(study: optuna.Study) -> dict[int, int]:
    """Return the numbers of the trials of a method, keyed by their numbers in the study.

    The study has a new trial for each trial that continues after an interruption. Here, it has the
    number of the interrupted one, and numbers have no gaps.
    """
    order = {
        trial.number: trial.user_attrs.get(FIRST, trial.number)
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name != "FAIL" or trial.user_attrs.get(ERROR)
    }
    return {number: i for i, number in enumerate(sorted(order, key=lambda n: order[n]))}


def _point(search: SearchTask, trial: Any) -> Point:
    return tuple(f"{key}={values.suggest(trial, key)}" for key, values in search.space.items())


def _read_trial(
    search: SearchTask, variant: Variant, trial: optuna.trial.FrozenTrial
) -> Trial | None:
    """Return an ended trial, or None if it is running, waiting or was interrupted."""
    names = {"COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed"}
    state = names.get(trial.state.name)
    error = trial.user_attrs.get(ERROR, "")
    if state is None or (state == "failed" and not error):
        return None
    duration = trial.duration
    return Trial(
        variant,
        trial.number,
        _point(search, trial),
        state,
        trial.user_attrs.get(SCORE),
        search.num_rounds if state == "complete" else trial.user_attrs.get(ROUNDS, 0),
        trial.user_attrs.get(SECONDS, duration.total_seconds() if duration else 0.0),
        error,
    )
