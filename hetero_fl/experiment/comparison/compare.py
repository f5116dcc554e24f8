"""Comparison of methods over several seeds, with optional tuning of the methods' settings."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.config.load import Overrides, override_list
from hetero_fl.experiment.comparison.jobs import Job, Point, Source, Variant, run_jobs
from hetero_fl.experiment.comparison.plan import ComparisonPlan, plan_comparison
from hetero_fl.experiment.comparison.tuning import (
    Grid,
    OptunaSearch,
    Rating,
    Space,
    Trial,
    best_trial,
    rate,
)
from hetero_fl.reporting.comparison.result import Comparison
from hetero_fl.reporting.formatting import algorithm_name
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import lock_folder
from hetero_fl.utils.code_permission import AllowCode
from hetero_fl.utils.errors import Interrupted, RunFailedError
from hetero_fl.utils.extras import check_extra
from hetero_fl.utils.processes import exit_if_importing

if TYPE_CHECKING:
    from hetero_fl.reporting.comparison.tables import Candidate

NO_REPORT = ("output.plots=false", "output.report=false", "output.best_models=false")
"""Overrides of the trials of a search."""


def compare(
    source: Source,
    algorithms: Sequence[str] | str,
    seeds: Iterable[int] = (0,),
    *,
    out: str | Path,
    overrides: Overrides = (),
    grid: Mapping[str, Sequence[str]] | None = None,
    space: Space | None = None,
    budget: int | str = 20,
    jobs: int | None = None,
    quiet: bool = False,
    allow_code: AllowCode = False,
) -> Comparison:
    """Run every algorithm with every seed and write a table, figures and a report into `out`.

    Finished runs in `out` are reused. In a script, call this function under
    `if __name__ == "__main__":`, because the worker processes import the script.

    Args:
        source: A configuration file or a dictionary.
        algorithms: Names or variants (`hybrid:teacher=mean`). "all" stands for all methods that
            support this configuration. In this case, the table is sorted by score, and the report
            lists why the other methods do not support the configuration.
        seeds: Seeds. Each algorithm is run once with each seed.
        out: The folder of the comparison.
        overrides: Changes to the configuration, as `key.path=value` or as a dictionary.
        grid: Values to try for each configuration key, keyed by key path. The results of each
            algorithm are those of the grid point with the best validation score, averaged over the
            seeds. If None, no settings are tuned.
        space: Values that Optuna searches for each configuration key, keyed by key path: `a,b,c`,
            `low..high`, or `low..high:log`, or a sequence of values. Each algorithm runs with the
            settings of the trial with the best validation score. Trials have a seed that is not
            compared. If None, nothing is searched.
        budget: Number of trials of each algorithm in the search, or hours of training, such as
            `1.5h`.
        jobs: Number of runs at a time. If None, one run per core, with one thread each.
        quiet: Whether to hide the progress display.
        allow_code: Whether code that a file refers to may be executed (see
            `hetero_fl.load_config`).

    Returns:
        The comparison.

    Raises:
        UserError: If an argument or a configuration is invalid, if a run in `out` has different
            settings, or if pandas or scipy is not installed. In this case, no run is started.
        RunFailedError: If runs failed. The error is raised after all other runs have ended, and its
            message has one line for each failed run.
        Interrupted: After a `KeyboardInterrupt`. The comparison can be continued.

    Example:
        >>> from tempfile import mkdtemp
        >>> import hetero_fl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 2}, "rounds": 1}
        >>> comparison = hetero_fl.compare(config, ["local", "fedavg"], out=mkdtemp(), jobs=1)
        >>> [run.summary["algorithm"] for run in comparison.runs]
        ['local', 'fedavg']
        >>> print(comparison.to_markdown())
        # run...
    """
    exit_if_importing()
    check_extra("tables", ["pandas", "scipy"], "compare")
    # Imported here because loading pandas is slow.
    from hetero_fl.reporting.comparison.facts import write_record

    plan = plan_comparison(
        source,
        algorithms,
        list(dict.fromkeys(seeds)),
        out=Path(out),
        overrides=override_list(overrides),
        grid=grid or {},
        space=space,
        budget=str(budget),
        jobs=jobs,
        permission=allow_code,
    )
    with lock_folder(plan.out) as lock_notes, Progress(plan.out / "log.txt", quiet) as progress:
        for line in lock_notes:
            progress.log(line)
        for name, reason in plan.left_out.items():
            progress.log(f"left out {name}: {reason}")
        arguments = {
            "config": str(source) if isinstance(source, str | Path) else None,
            "algorithms": [variant.label for variant in plan.variants],
            "seeds": plan.seeds,
            "overrides": override_list(overrides),
            "grid": {key: list(values) for key, values in (grid or {}).items()},
            "space": {key: str(values) for key, values in (space or {}).items()},
            "budget": str(budget),
        }
        points = 1 if isinstance(plan.tuner, OptunaSearch) else len(plan.tuner.ask({}))
        num_runs = len(plan.seeds) * len(plan.variants) * points
        write_record(plan.out, arguments, min(plan.at_once, num_runs))
        try:
            trials, failed = _tune(plan, progress)
            chosen, missing = _choose(plan, trials)
            num_runs = len(plan.seeds) * sum(map(len, trials.values()))
            if isinstance(plan.tuner, OptunaSearch):
                _write_search(plan.out / "search.csv", list(plan.tuner.space), trials)
                for line in missing.values():
                    progress.log(line)
                if not chosen:
                    raise RunFailedError("\n".join(missing.values()))
                work = _compared_jobs(plan, chosen)
                num_runs = len(work)
                ended = run_jobs(
                    plan.source, plan.base, work, plan.at_once, progress, allow_code=plan.permission
                )
                failed = {job: error for job, error in ended if error is not None}
        except KeyboardInterrupt as stop:
            raise Interrupted(plan.out) from stop
    _write_results(plan, trials, chosen, missing, failed)
    lines = list(missing.values())
    if failed:
        lines.append(f"{len(failed)} of {num_runs} runs failed")
        lines += [f"{job}: {' '.join(error.split())}" for job, error in failed.items()]
    if lines:
        raise RunFailedError("\n".join(lines))
    return Comparison(plan.out, plan.permission)


Trials = dict[Variant, list[Trial]]
"""The tried points of each variant."""


def _tune(plan: ComparisonPlan, progress: Progress) -> tuple[Trials, dict[Job, str]]:
    """Try points of each variant until the tuner asks for no more.

    Returns:
        The trials of each variant, and the error messages of failed runs.
    """
    tuner = plan.tuner
    base = [*plan.base, *NO_REPORT] if isinstance(tuner, OptunaSearch) else plan.base
    ratings: dict[Variant, dict[Point, Rating]] = {variant: {} for variant in plan.variants}
    errors: dict[Job, str] = {}
    while True:
        trials = {variant: tuner.trials(ratings[variant]) for variant in plan.variants}
        asked = {
            (variant, point): plan.trial_jobs(variant, point)
            for variant in plan.variants
            for point in tuner.ask(ratings[variant])
        }
        if not asked:
            return trials, errors
        early_stop: dict[str, Any] = {}
        if isinstance(tuner, OptunaSearch):
            early_stop["describe"] = partial(_describe_trial, plan)
            early_stop["should_stop"] = partial(_is_behind, plan, tuner, trials)
        ended = run_jobs(
            plan.source,
            base,
            _by_seed(asked.values()),
            plan.at_once,
            progress,
            allow_code=plan.permission,
            **early_stop,
        )
        errors |= {job: error for job, error in ended if error is not None}
        for (variant, point), jobs in asked.items():
            ratings[variant][point] = rate(jobs, plan.task, errors)


def _by_seed(jobs: Iterable[Sequence[Job]]) -> list[Job]:
    """Return jobs of several points, all jobs with the first seed first."""
    return [job for jobs_of_seed in zip(*jobs, strict=True) for job in jobs_of_seed]


def _compared_jobs(plan: ComparisonPlan, chosen: Mapping[Variant, Trial]) -> list[Job]:
    return _by_seed(plan.jobs(variant, trial.point) for variant, trial in chosen.items())


def _is_behind(plan: ComparisonPlan, tuner: OptunaSearch, trials: Trials, job: Job) -> bool:
    """Return whether to stop the run of a trial early."""
    return tuner.should_stop(rate([job], plan.task, {}).curve, trials[job.variant])


def _describe_trial(plan: ComparisonPlan, job: Job) -> str:
    rating = rate([job], plan.task, {})
    return f"validation {rating.score:.4g} after round {rating.rounds}"


def _choose(
    plan: ComparisonPlan, trials: Trials
) -> tuple[dict[Variant, Trial], dict[Variant, str]]:
    """Choose the best trial of each variant.

    Returns:
        The trials, and why other variants have none.
    """
    chosen = {}
    missing = {}
    for variant, tried in trials.items():
        best = best_trial(tried)
        if best is not None:
            chosen[variant] = best
        elif isinstance(plan.tuner, OptunaSearch):
            errors = [trial.rating.error for trial in tried if trial.rating.error]
            reason = f": {errors[-1]}" if errors else "; raise the budget"
            missing[variant] = f"search: no trial of {variant.label} is complete{reason}"
        elif plan.is_tuned:
            reason = "no setting of the grid has finished with every seed"
            missing[variant] = f"{variant.label}: {reason}"
        else:
            chosen[variant] = tried[0]
    return chosen, missing


def _write_search(path: Path, keys: Sequence[str], trials: Trials) -> None:
    """Write all trials of a search to a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["algorithm", "trial", *keys, "state", "validation", "rounds", "seconds"])
        for variant, tried in trials.items():
            for number, trial in enumerate(tried):
                values = [setting.partition("=")[2] for setting in trial.point]
                rating = trial.rating
                score = rating.score if math.isfinite(rating.score) else None
                result = [trial.state, score, rating.rounds, round(rating.seconds, 1)]
                writer.writerow([variant.label, number, *values, *result])


def _write_results(
    plan: ComparisonPlan,
    trials: Trials,
    chosen: Mapping[Variant, Trial],
    missing: Mapping[Variant, str],
    failed: Mapping[Job, str],
) -> None:
    """Write the table, figures and report of the finished runs at the chosen points.

    Args:
        plan: The comparison.
        trials: The tried points of each variant.
        chosen: The chosen trials.
        missing: Why other variants have no trial.
        failed: Error messages of failed runs.
    """
    # Imported here because loading matplotlib is slow.
    from hetero_fl.reporting.comparison.plots import hours_to_reach, write_curves
    from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
    from hetero_fl.reporting.comparison.runs import rank_methods

    finished = [job for job in _compared_jobs(plan, chosen) if job not in failed]
    if not finished:
        return
    runs = {job: Run(job.out) for job in finished}
    metrics = [run.metrics for run in runs.values()]
    rows = [
        {key: value for key, _, value in (entry.partition("=") for entry in job.point)}
        | comparison_row(run.summary)
        | {"algorithm": job.variant.label, "run": job.out.name}
        | hours
        for (job, run), hours in zip(runs.items(), hours_to_reach(metrics, plan.task), strict=True)
    ]
    shown = rank_methods(rows, plan.task) if plan.is_ranked else rows
    notes = [
        f"{variant.label}: {', '.join(trial.point)} (chosen by validation)"
        for variant, trial in chosen.items()
        if trial.point
    ]
    write_comparison(
        plan.out,
        shown,
        title=plan.title,
        note="; ".join(notes),
        task=plan.task,
        missing=_missing_methods(plan, missing, failed),
        tried=_candidates(plan, trials, chosen),
    )
    histories: dict[str, list[Any]] = {str(row["algorithm"]): [] for row in shown}
    for job, records in zip(finished, metrics, strict=True):
        histories[job.variant.label].append(records)
    write_curves(plan.out / "curves.png", histories, plan.task)
    write_curves(plan.out / "curves_time.png", histories, plan.task, timed=True)


def _candidates(
    plan: ComparisonPlan, trials: Trials, chosen: Mapping[Variant, Trial]
) -> list[Candidate]:
    """Return the tried points, without the failed trials of a search."""
    # Imported here because loading pandas is slow.
    from hetero_fl.reporting.comparison.tables import Candidate

    candidates = []
    for variant, tried in trials.items():
        for trial in tried if plan.is_tuned else ():
            score = trial.rating.score
            rounds = trial.rating.rounds
            is_chosen = trial is chosen.get(variant)
            if trial.state == "stopped":
                stopped = Candidate(variant.label, trial.point, score, is_chosen, rounds)
                candidates.append(stopped)
            elif trial.state == "complete":
                candidates.append(Candidate(variant.label, trial.point, score, is_chosen))
            elif isinstance(plan.tuner, Grid):
                candidates.append(Candidate(variant.label, trial.point, None, False))
    return candidates


def _missing_methods(
    plan: ComparisonPlan, missing: Mapping[Variant, str], failed: Mapping[Job, str]
) -> dict[str, str]:
    """Return why methods and runs are missing from the table, keyed by the name of each."""
    reasons = {algorithm_name(name): reason for name, reason in plan.left_out.items()}
    reasons |= {algorithm_name(variant.label): reason for variant, reason in missing.items()}
    for job, reason in failed.items():
        name = ", ".join([algorithm_name(job.variant.label), *job.point, f"seed {job.seed}"])
        reasons[name] = f"failed: {reason}"
    return reasons
