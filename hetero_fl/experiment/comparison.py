"""Comparison of methods over several seeds, with optional tuning of the methods' settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import needs_of
from hetero_fl.config import describe_difference, resolve_config
from hetero_fl.config.base import ConfigSection
from hetero_fl.config.errors import describe_error
from hetero_fl.config.load import Overrides, override_list, read_config_file
from hetero_fl.core.task import Task
from hetero_fl.experiment.comparison_jobs import (
    ComparisonJob,
    Point,
    Source,
    Variant,
    point_values,
    run_folder,
    run_jobs,
)
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import prepare
from hetero_fl.experiment.used_settings import add_method_defaults, used_settings
from hetero_fl.reporting.comparison.facts import UsedSettings, rank_methods
from hetero_fl.reporting.comparison.result import Comparison
from hetero_fl.reporting.formatting import (
    algorithm_name,
)
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import RunDirectory, check_vacant, lock_folder
from hetero_fl.reporting.summary import mean_validation_score
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import available_cores
from hetero_fl.utils.errors import (
    ArgumentError,
    Interrupted,
    RunFailedError,
    UserError,
    suggest_or_list,
)
from hetero_fl.utils.processes import (
    exit_if_importing,
)
from hetero_fl.utils.text import split_top_level


def compare(
    source: Source,
    algorithms: Sequence[str] | str,
    seeds: Iterable[int] = (0,),
    *,
    out: str | Path,
    overrides: Overrides = (),
    grid: Mapping[str, Sequence[str]] | None = None,
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
        jobs: Number of runs at a time. If None, one run per core, with one thread each.
        quiet: Whether to hide the progress display. If None, progress is shown in notebooks only.
        origins: Names of the places where entries of `algorithms` and `overrides` were set, keyed
            by entry. The report shows the origins next to the settings.
        allow_code: Whether code that a file refers to may be executed (see
            `hetero_fl.load_config`).

    Returns:
        The comparison.

    Raises:
        UserError: If an argument or a configuration is invalid, or if a run in `out` has different
            settings. In this case, no run is started.
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
    plan = _Plan(
        source,
        algorithms,
        seeds=list(dict.fromkeys(seeds)),
        out=Path(out),
        base=override_list(overrides),
        grid=grid or {},
        jobs=jobs,
        permission=CodePermission.from_argument(allow_code),
    )
    with lock_folder(plan.out) as lock_notes, Progress(plan.out / "log.txt", quiet) as progress:
        for line in lock_notes:
            progress.log(line)
        settings = plan.settings(dict.fromkeys(plan.variants, ()), origins or {})
        _log_plan(plan, settings, progress)
        try:
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
    if failed:
        lines = (f"{job}: {' '.join(error.split())}" for job, error in failed.items())
        raise RunFailedError("\n".join([f"{len(failed)} of {len(plan.work)} runs failed", *lines]))
    return Comparison(plan.out, plan.permission)


class _Plan:
    """The runs of a comparison, which are all validated before the first run starts.

    Args:
        source: The configuration.
        algorithms: Names, variants or "all" (see `compare`).
        seeds: Seeds. Each algorithm is run once with each seed.
        out: The folder of the comparison.
        base: Overrides for all runs.
        grid: Values to try for each configuration key.
        jobs: Number of runs at a time. If None, one run per core.
        permission: The code that may be executed.

    Attributes:
        source: The configuration. A file is replaced with its content, so that later changes to
            the file have no effect.
        file: The name of the configuration file, or "the configuration" if there is no file.
        out: The folder of the comparison.
        title: The name of the configuration.
        base: Overrides for all runs.
        variants: The variants to compare.
        admitted: The variants that "all" stands for.
        left_out: Reasons why methods do not support the configuration, keyed by method.
        points: Grid points, each of which is combined with all variants. Without a grid, the only
            point is empty.
        work: One run for each seed, variant and grid point.
        jobs: Number of runs at a time.
        task: The task of all runs.
        permission: The code that may be executed.

    Raises:
        UserError: If any of the runs is invalid.
    """

    def __init__(
        self,
        source: Source,
        algorithms: Sequence[str] | str,
        *,
        seeds: list[int],
        out: Path,
        base: list[str],
        grid: Mapping[str, Sequence[str]],
        jobs: int | None,
        permission: CodePermission,
    ) -> None:
        if not seeds:
            raise ArgumentError("seeds: expected one or more integers, got none")
        if jobs is not None and jobs < 1:
            raise ArgumentError(f"jobs: must be >= 1, got {jobs}")
        if out.exists() and not out.is_dir():
            raise ArgumentError(f"out: {out} is a file; choose a folder")
        config = load_config(source, base, permission)
        for seed in seeds:
            load_config(source, [*base, f"seed={seed}"], permission)
        names = split_top_level(algorithms, ",") if isinstance(algorithms, str) else algorithms
        names = [name.strip() for name in names if name.strip()]
        listed = [Variant.parse(name) for name in names if name.lower() != "all"]
        self.admitted: list[Variant] = []
        self.left_out: dict[str, str] = {}
        if len(listed) < len(names):
            self.admitted, self.left_out = _compatible_methods(source, base, seeds[0], permission)
        self.variants = list(dict.fromkeys([*self.admitted, *listed]))
        if not self.variants:
            raise ArgumentError(
                "algorithms: expected one or more; choose from all, "
                f"{', '.join(register_algorithm)}"
            )
        threads = config.runtime.threads
        self.jobs = jobs or max(1, available_cores() // (threads or 1))
        self.base = base if threads else [*base, "runtime.threads=1"]
        self.points = [
            tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))
            for values in itertools.product(*grid.values())
        ]
        self.work = [
            ComparisonJob(variant, point, seed, out / "runs" / run_folder(variant, point, seed))
            for seed in seeds
            for variant in self.variants
            for point in self.points
        ]
        _check_same_configuration(source, self.base, self.work, permission)
        first_seed = self.work[: len(self.variants) * len(self.points)]
        # `_compatible_methods` has already checked the methods that "all" stands for.
        unchecked = [job for job in first_seed if grid or job.variant not in self.admitted]
        tasks = [_task(source, self.base, job, permission) for job in unchecked or first_seed[:1]]
        self.task = tasks[0]
        self.permission = permission.with_caller_references(
            source, [override for job in self.work for override in [*self.base, *job.overrides]]
        )
        self.out = out
        self.title = config.name
        self.source = source
        self.file = "the configuration"
        if isinstance(source, str | Path):
            self.source = read_config_file(Path(source))
            self.file = Path(source).name

    @property
    def is_tuned(self) -> bool:
        """Whether the grid has several points, of which one is chosen by validation score."""
        return len(self.points) > 1

    def settings(self, points: Mapping[Variant, Point], origins: Mapping[str, str]) -> UsedSettings:
        """Return the settings of every variant at its grid point (see `used_settings`)."""
        grid = "grid, chosen by validation" if self.is_tuned else "grid"
        return used_settings(
            self.source,
            self.base,
            points,
            origins,
            file=self.file,
            grid=grid,
            allow_code=self.permission,
        )


def _log_plan(plan: _Plan, settings: UsedSettings, progress: Progress) -> None:
    for name, reason in plan.left_out.items():
        progress.log(f"left out {name}: {reason}")
    for methods, text in settings.lines():
        progress.log(f"settings of {methods}: {text}")
    if settings.note:
        progress.log(settings.note)


def _write_results(
    plan: _Plan, failed: Mapping[ComparisonJob, str], origins: Mapping[str, str]
) -> None:
    """Write the table, figures and report of the finished runs at the chosen grid points."""
    # Imported here because loading matplotlib is slow.
    from hetero_fl.reporting.comparison.plots import hours_to_reach, write_curves
    from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
    from hetero_fl.reporting.comparison.tables import Candidate

    finished = [job for job in plan.work if job not in failed]
    scores = _mean_validation_scores(finished, plan.task) if plan.is_tuned else {}
    chosen = _choose(scores, plan.variants, plan.points)
    best = [job for job in finished if job.point == chosen[job.variant]]
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
    tried = [
        Candidate(variant.label, point, scores.get((variant, point)), point == chosen[variant])
        for variant in plan.variants
        for point in plan.points
        if plan.is_tuned
    ]
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
        tried=tried,
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


def _missing_methods(plan: _Plan, failed: Mapping[ComparisonJob, str]) -> dict[str, str]:
    """Return why methods and runs are missing from the table, keyed by the name of each."""
    missing = {algorithm_name(name): reason for name, reason in plan.left_out.items()}
    for job, reason in failed.items():
        name = ", ".join([algorithm_name(job.variant.label), *job.point, f"seed {job.seed}"])
        missing[name] = f"failed: {reason}"
    return missing


def _compatible_methods(
    source: Source, base: list[str], seed: int, permission: CodePermission
) -> tuple[list[Variant], dict[str, str]]:
    """Return the methods that support a configuration, and why the others do not.

    Raises:
        UserError: If no method supports the configuration.
    """
    compatible = []
    left_out = {}
    for name in register_algorithm:
        try:
            prepare(
                source, [*base, f"algorithm.name={name}", f"seed={seed}"], allow_code=permission
            )
            compatible.append(Variant.parse(name))
        except UserError as error:
            left_out[name] = str(error)
    if not compatible:
        # The configuration is invalid for every method.
        raise UserError(next(iter(left_out.values())))
    return compatible, left_out


def _task(source: Source, base: list[str], job: ComparisonJob, permission: CodePermission) -> Task:
    """Validate a run and return its task.

    Raises:
        UserError: If the run is invalid. The message names the argument of `compare` that set the
            invalid key.
    """
    try:
        return prepare(source, [*base, *job.overrides], allow_code=permission).federation.task
    except UserError as error:
        line = str(error)
        for argument, overrides in (("algorithms", job.variant.overrides), ("grid", job.point)):
            for override in overrides:
                if line.startswith(f"{override}: "):
                    raise ArgumentError(
                        f"{argument}: {line.removeprefix(f'{override}: ')}"
                    ) from None
        raise


def _check_same_configuration(
    source: Source, base: list[str], work: list[ComparisonJob], permission: CodePermission
) -> None:
    """Raise UserError if the run directory of a job exists and has different settings."""
    for job in work:
        if not (job.out / "config.yaml").exists():
            check_vacant(job.out)
            continue
        recorded = RunDirectory.open(job.out).config()
        current = resolve_config(load_config(source, [*base, *job.overrides], permission))
        # An algorithm setting that is None was replaced with a value derived from the federation.
        derived = {
            key: value
            for key, value in recorded.get("algorithm", {}).items()
            if current["algorithm"].get(key, value) is None
        }
        current["algorithm"] |= derived
        # Asynchronous methods override the configured mode.
        if needs_of(register_algorithm[current["algorithm"]["name"]]).asynchronous is not None:
            current["runtime"]["mode"] = "async"
        # The noise multiplier was derived from the target ε.
        if (
            current["privacy"] is not None
            and current["privacy"]["noise_multiplier"] is None
            and recorded.get("privacy")
        ):
            noise_multiplier = recorded["privacy"].get("noise_multiplier")
            current["privacy"]["noise_multiplier"] = noise_multiplier
        if differs := describe_difference(recorded, current):
            raise ArgumentError(
                f"out: {job.out} has other settings ({differs}); choose another folder"
            )


def _mean_validation_scores(
    finished: list[ComparisonJob], task: Task
) -> dict[tuple[Variant, Point], float]:
    """Average the validation scores over the seeds.

    Returns:
        The mean scores, keyed by variant and grid point. Larger is better.
    """
    scores: dict[tuple[Variant, Point], list[float]] = {}
    for job in finished:
        scores.setdefault((job.variant, job.point), []).append(
            _validation_score(Run(job.out), task)
        )
    return {key: sum(values) / len(values) for key, values in scores.items()}


def _choose(
    scores: Mapping[tuple[Variant, Point], float], variants: list[Variant], points: list[Point]
) -> dict[Variant, Point]:
    """Choose the grid point with the best validation score per variant, the first in a tie."""
    return {v: max(points, key=lambda p: scores.get((v, p), float("-inf"))) for v in variants}


def _validation_score(finished: Run, task: Task) -> float:
    """Return the mean of the local and global validation scores in the last evaluation.

    The result is -inf if the evaluation has no validation score.
    """
    last = [r for r in finished.metrics if r.get("validation")][-1]
    score = mean_validation_score(task, last)
    return float("-inf") if score is None else score


class Study(ConfigSection):
    """Arguments of a comparison, read from a file so that the comparison can be repeated.

    Attributes:
        config: The path of the configuration file. In a study file, the path is relative to the
            folder of the study file.
        algorithms: Names or variants of the methods to compare.
        seeds: Seeds. Each algorithm is run once with each seed.
        overrides: Changes to the configuration, as `key.path=value`.
        jobs: Number of runs at a time. If None, one run per core.
        out: The folder of the comparison. Default: `runs/<name of the study file>`.
    """

    config: Path
    algorithms: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    overrides: list[str] = []
    jobs: PositiveInt | None = None
    out: Path

    @classmethod
    def load(cls, path: Path) -> Study:
        """Load a study from a file.

        Raises:
            UserError: If the file is invalid.
        """
        raw = read_config_file(path)
        for key in raw:
            if key not in cls.model_fields:
                raise UserError(
                    f"{path}: {key}: unknown key{suggest_or_list(key, cls.model_fields)}"
                )
        try:
            study = cls.model_validate({"out": f"runs/{path.stem}", **raw})
        except ValidationError as error:
            raise UserError(f"{path}: {describe_error(error, raw, cls)}") from None
        return study.model_copy(update={"config": path.parent / study.config})
