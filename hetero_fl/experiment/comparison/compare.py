"""Comparison of methods over several seeds, with optional tuning of the methods' settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hetero_fl.config.load import Overrides, override_list
from hetero_fl.core.task import Task
from hetero_fl.experiment.comparison.jobs import (
    ComparisonJob,
    Point,
    Source,
    Variant,
    final_validation_score,
    point_values,
    run_jobs,
)
from hetero_fl.experiment.comparison.plan import ComparisonPlan
from hetero_fl.experiment.comparison.search import Search, SearchTask
from hetero_fl.experiment.comparison.search_space import Space
from hetero_fl.experiment.used_settings import add_method_defaults
from hetero_fl.reporting.comparison.facts import UsedSettings, rank_methods
from hetero_fl.reporting.comparison.result import Comparison
from hetero_fl.reporting.comparison.tables import Candidate
from hetero_fl.reporting.formatting import algorithm_name
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import RunDirectory, lock_folder
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import Interrupted, RunFailedError
from hetero_fl.utils.extras import check_extra
from hetero_fl.utils.processes import exit_if_importing


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
    quiet: bool | None = None,
    origins: Mapping[str, str] | None = None,
    allow_code: bool | CodePermission = False,
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
        quiet: Whether to hide the progress display. If None, progress is shown in notebooks only.
        origins: Names of the places where entries of `algorithms` and `overrides` were set, keyed
            by entry. The report shows the origins next to the settings.
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
    plan = ComparisonPlan(
        source,
        algorithms,
        seeds=list(dict.fromkeys(seeds)),
        out=Path(out),
        base=override_list(overrides),
        grid=grid or {},
        space=space,
        budget=budget,
        jobs=jobs,
        permission=CodePermission.from_argument(allow_code),
    )
    with lock_folder(plan.out) as lock_notes, Progress(plan.out / "log.txt", quiet) as progress:
        for line in lock_notes:
            progress.log(line)
        settings = plan.settings(dict.fromkeys(plan.variants, ()), origins or {})
        _log_plan(plan, settings, progress)
        try:
            if plan.search is not None:
                plan.use_points(*_search(plan, plan.search, progress))
            failed = run_jobs(
                plan.source,
                plan.base,
                plan.work,
                plan.jobs,
                progress,
                allow_code=plan.permission,
            )
        except KeyboardInterrupt as stop:
            raise Interrupted(plan.out) from stop
    _write_results(plan, failed, origins or {})
    lines = list(plan.not_found.values())
    if failed:
        lines.append(f"{len(failed)} of {len(plan.work)} runs failed")
        lines += [f"{job}: {' '.join(error.split())}" for job, error in failed.items()]
    if lines:
        raise RunFailedError("\n".join(lines))
    return Comparison(plan.out, plan.permission)


def _log_plan(plan: ComparisonPlan, settings: UsedSettings, progress: Progress) -> None:
    for name, reason in plan.left_out.items():
        progress.log(f"left out {name}: {reason}")
    for methods, text in settings.lines():
        progress.log(f"settings of {methods}: {text}")
    if settings.note:
        progress.log(settings.note)


def _search(
    plan: ComparisonPlan, task: SearchTask, progress: Progress
) -> tuple[dict[Variant, Point], dict[Variant, str]]:
    """Search the settings of each variant, and write `search.csv`.

    Returns:
        The point of each variant, and why there is none, keyed by variant.

    Raises:
        RunFailedError: If no variant has a point.
    """
    search = Search(task, plan.variants)
    try:
        search.run(plan.jobs, progress)
    finally:
        search.write(plan.out / "search.csv")
    points = {}
    failed = {}
    for variant in plan.variants:
        try:
            points[variant] = search.best(variant).point
        except RunFailedError as error:
            failed[variant] = str(error)
            progress.log(str(error))
    if not points:
        raise RunFailedError("\n".join(failed.values()))
    return points, failed


def _write_results(
    plan: ComparisonPlan, failed: Mapping[ComparisonJob, str], origins: Mapping[str, str]
) -> None:
    """Write the table, figures and report of the finished runs at the chosen grid points."""
    # Imported here because loading matplotlib is slow.
    from hetero_fl.reporting.comparison.plots import hours_to_reach, write_curves
    from hetero_fl.reporting.comparison.report import comparison_row, write_comparison

    finished = [job for job in plan.work if job not in failed]
    scores = _mean_validation_scores(_rated(plan.work, failed), plan.task) if plan.is_tuned else {}
    chosen = _choose(scores, plan.points)
    for variant in plan.variants:
        if variant not in chosen:
            reason = "no setting of the grid has finished with every seed"
            plan.not_found[variant] = f"{variant.label}: {reason}"
    best = [job for job in finished if job.point == chosen.get(job.variant)]
    if not best:
        return
    metrics = {job: Run(job.out).metrics for job in best}
    reached = hours_to_reach(list(metrics.values()), plan.task)
    rows = [
        point_values(job.point)
        | comparison_row(Run(job.out).summary)
        | {"algorithm": job.variant.label, "run": job.out.name}
        | hours
        for job, hours in zip(best, reached, strict=True)
    ]
    shown = rank_methods(rows, plan.task) if plan.admitted else rows
    notes = [
        f"{variant.label}: {', '.join(point)} (chosen by validation)"
        for variant, point in chosen.items()
        if point
    ]
    write_comparison(
        plan.out,
        shown,
        title=plan.title,
        note="; ".join(notes),
        task=plan.task,
        missing=_missing_methods(plan, failed),
        tried=_candidates(plan, scores, chosen),
        settings=add_method_defaults(
            plan.settings({job.variant: job.point for job in best}, origins),
            {job.variant.label: RunDirectory.open(job.out) for job in best},
        ),
    )
    histories: dict[str, list[Any]] = {str(row["algorithm"]): [] for row in shown}
    for job in best:
        histories[job.variant.label].append(metrics[job])
    write_curves(plan.out / "curves.png", histories, plan.task)
    write_curves(plan.out / "curves_time.png", histories, plan.task, timed=True)


def _candidates(
    plan: ComparisonPlan,
    scores: Mapping[tuple[Variant, Point], float],
    chosen: Mapping[Variant, Point],
) -> list[Candidate]:
    """Return the tried points of the grid, or the trials of the search that have not failed.

    Args:
        plan: The comparison.
        scores: Mean validation scores, keyed by variant and grid point.
        chosen: The chosen grid point of each variant.
    """
    if plan.search is None and not plan.is_tuned:
        return []
    if plan.search is None:
        return [
            Candidate(
                variant.label, point, scores.get((variant, point)), point == chosen.get(variant)
            )
            for variant in plan.variants
            for point in plan.points[variant]
        ]
    search = Search(plan.search, plan.variants)
    candidates = []
    for variant in plan.variants:
        best = search.best(variant)
        for trial in search.trials(variant):
            stopped_after = trial.rounds if trial.state == "stopped" else None
            if trial.state != "failed":
                candidates.append(
                    Candidate(variant.label, trial.point, trial.score, trial == best, stopped_after)
                )
    return candidates


def _missing_methods(plan: ComparisonPlan, failed: Mapping[ComparisonJob, str]) -> dict[str, str]:
    """Return why methods and runs are missing from the table, keyed by the name of each."""
    missing = {algorithm_name(name): reason for name, reason in plan.left_out.items()}
    missing |= {algorithm_name(v.label): reason for v, reason in plan.not_found.items()}
    for job, reason in failed.items():
        name = ", ".join([algorithm_name(job.variant.label), *job.point, f"seed {job.seed}"])
        missing[name] = f"failed: {reason}"
    return missing


def _rated(
    work: Sequence[ComparisonJob], failed: Mapping[ComparisonJob, str]
) -> list[ComparisonJob]:
    """Return the runs at the points that have finished with every seed.

    Seeds differ in difficulty, so means over different seeds cannot be compared.
    """
    incomplete = {(job.variant, job.point) for job in failed}
    return [job for job in work if (job.variant, job.point) not in incomplete]


def _mean_validation_scores(
    finished: list[ComparisonJob], task: Task
) -> dict[tuple[Variant, Point], float]:
    """Average the validation scores over the seeds.

    Returns:
        The mean scores, keyed by variant and grid point. Larger is better.
    """
    scores: dict[tuple[Variant, Point], list[float]] = {}
    for job in finished:
        score = final_validation_score(Run(job.out), task)
        scores.setdefault((job.variant, job.point), []).append(
            float("-inf") if score is None else score
        )
    return {key: sum(values) / len(values) for key, values in scores.items()}


def _choose(
    scores: Mapping[tuple[Variant, Point], float], points: Mapping[Variant, Sequence[Point]]
) -> dict[Variant, Point]:
    """Choose the grid point with the best validation score per variant, the first in a tie.

    A variant is left out if it has several points and none has a score.
    """
    chosen = {}
    for variant, found in points.items():
        rated = [point for point in found if (variant, point) in scores]
        if rated or len(found) == 1:
            chosen[variant] = max(rated or found, key=lambda p: scores.get((variant, p), 0.0))
    return chosen
