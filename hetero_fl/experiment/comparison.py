"""Comparison of methods over several seeds, with optional tuning of the methods' settings."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import needs_of
from hetero_fl.config import describe_difference, resolve_config
from hetero_fl.config.base import ConfigSection
from hetero_fl.config.errors import describe_error
from hetero_fl.config.load import Overrides, override_list, read_config_file
from hetero_fl.core.shipped_objects import pack_objects, unpack_objects
from hetero_fl.core.task import Task
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import prepare
from hetero_fl.experiment.runner import run
from hetero_fl.experiment.used_settings import add_method_defaults, used_settings
from hetero_fl.reporting.comparison.facts import UsedSettings, rank_methods
from hetero_fl.reporting.comparison.result import Comparison
from hetero_fl.reporting.formatting import (
    algorithm_name,
    format_duration,
    format_final_evaluation,
)
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import RunDirectory, check_vacant, lock_folder
from hetero_fl.reporting.summary import mean_validation_score
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import available_cores, use_one_core
from hetero_fl.utils.errors import (
    ArgumentError,
    Interrupted,
    RunFailedError,
    UserError,
    suggest_or_list,
)
from hetero_fl.utils.processes import (
    ADVICE,
    UNGUARDED,
    adopt_environment,
    exit_if_importing,
    ignore_interrupts_in_children,
    worker_context,
)
from hetero_fl.utils.registry import split_label
from hetero_fl.utils.text import pluralize, split_top_level

Source = str | Path | Mapping[str, Any]
Point = tuple[str, ...]
"""A point of the tuning grid: one string `key=value` for each key of the grid."""


@dataclass(frozen=True)
class Variant:
    """An algorithm with its settings, such as `hybrid:teacher=mean:heads=take`.

    Args:
        label: The text that the variant was parsed from.
        overrides: Changes to the configuration, as `key.path=value`.
    """

    label: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Parse a variant such as `name:setting=value`.

        A setting is a key of the section `algorithm`. If the setting contains a dot, it is a full
        key path.

        Raises:
            UserError: If a setting has no value.
        """
        name, settings = split_label(text)
        for setting in settings:
            if "=" not in setting:
                raise ArgumentError(f"algorithms: {text}: expected setting=value, got '{setting}'")
        paths = [s if "." in s.split("=")[0] else f"algorithm.{s}" for s in settings]
        return cls(text, (f"algorithm.name={name}", *paths))


@dataclass(frozen=True)
class ComparisonJob:
    """One run of a comparison.

    Args:
        variant: The algorithm and its settings.
        point: The grid point.
        seed: The seed of the run.
        out: The run directory.
    """

    variant: Variant
    point: Point
    seed: int
    out: Path

    @property
    def overrides(self) -> list[str]:
        """Changes to the configuration for this run, as `key.path=value`."""
        return [*self.variant.overrides, *self.point, f"seed={self.seed}"]

    def __str__(self) -> str:
        return " ".join([self.variant.label, *self.point, f"seed {self.seed}"])


def run_jobs(
    source: Source,
    base: list[str],
    work: list[ComparisonJob],
    jobs: int,
    progress: Progress,
    *,
    allow_code: bool | CodePermission = False,
) -> dict[ComparisonJob, str]:
    """Execute runs in worker processes.

    When a run ends, the function logs the scores or the error, and the estimated remaining time.

    Args:
        source: The configuration.
        base: Overrides for all runs.
        work: The runs. Runs that have already finished are skipped.
        jobs: Number of runs at a time.
        progress: Progress display, which also writes the log.
        allow_code: Whether code that a file refers to may be executed (see
            `hetero_fl.load_config`).

    Returns:
        The error messages of the failed runs, keyed by run.

    Raises:
        UserError: If the calling script has no `__main__` guard.
    """
    failed: dict[ComparisonJob, str] = {}
    pool_size = min(jobs, len(work))
    parallel = f", {pool_size} at a time" if pool_size > 1 else ""
    progress.log(f"{pluralize(len(work), 'run')}{parallel}")
    schedule = _Schedule(work)
    workers: list[BaseProcess] = []
    context = _record_processes(worker_context(__name__), workers)
    named = [override.partition("=")[2] for job in work for override in job.overrides]
    environ = (dict(os.environ), pack_objects(source, named))
    with ProcessPoolExecutor(pool_size, context, start_worker, environ) as pool:
        try:
            with ignore_interrupts_in_children():
                waiting = {
                    pool.submit(run_job, source, [*base, *job.overrides], job.out, allow_code): job
                    for job in work
                }
        except BrokenPipeError:
            # A worker that imports a script without a `__main__` guard exits before reading a task.
            raise UserError(ADVICE) from None
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                job = waiting[future]
                try:
                    future.result()
                except BrokenProcessPool:
                    # Exit codes are only known after the shutdown.
                    pool.shutdown()
                    if any(worker.exitcode == UNGUARDED for worker in workers):
                        raise UserError(ADVICE) from None
                    failed[job] = (
                        "its process was killed, possibly for lack of memory; "
                        "run the command again to continue"
                    )
                except (UserError, RunFailedError) as error:
                    failed[job] = str(error)
                result = f"failed: {failed[job]}" if job in failed else _format_scores(job.out)
                mark = " (finished before)" if job in schedule.finished_before else ""
                line = f"{job}{mark}: {result} {schedule.remaining_after(job)}"
                progress.finish_job(line, done, len(work))
        except BaseException:
            # Any error, such as a closed output stream, stops the workers. The interrupted runs
            # can be resumed.
            for worker in workers:
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _record_processes(context: Any, started: list[BaseProcess]) -> Any:
    """Return a copy of a multiprocessing context that appends each process it creates to `started`.

    `multiprocessing.active_children` omits processes that have already ended.
    """
    create = context.Process

    def create_and_record(*args: Any, **kwargs: Any) -> BaseProcess:
        started.append(create(*args, **kwargs))
        return started[-1]

    context = copy.copy(context)
    context.Process = create_and_record
    return context


def start_worker(environ: Mapping[str, str], objects: bytes) -> None:
    """Initialize a worker process and restrict it to a single core.

    Args:
        environ: Environment variables of the parent process.
        objects: Serialized objects that the configuration refers to.
    """
    adopt_environment(environ)
    unpack_objects(objects)
    use_one_core()


class _Schedule:
    """Estimator of the remaining time, based on the mean duration of the finished runs."""

    def __init__(self, work: Sequence[ComparisonJob]) -> None:
        self.finished_before = {job for job in work if RunDirectory(job.out).finished}
        self._todo = [job for job in work if job not in self.finished_before]
        self._started = time.monotonic()
        self._num_finished = 0

    def remaining_after(self, job: ComparisonJob) -> str:
        """Record that a run has ended, and describe the estimated remaining time.

        Returns:
            A text such as `(about 3 min 20 s left)`. The text is empty as long as no run has
            finished, and after the last run has ended.
        """
        if job in self._todo:
            self._todo.remove(job)
            self._num_finished += RunDirectory(job.out).finished
        if not self._todo or not self._num_finished:
            return ""
        # Wall time includes startup and plots, and accounts for runs in parallel.
        seconds = (time.monotonic() - self._started) / self._num_finished * len(self._todo)
        return f"(about {format_duration(seconds)} left)"


def _format_scores(out: Path) -> str:
    finished = RunDirectory.open(out)
    return format_final_evaluation(finished.summary(), finished.details().get("unit", ""))


def run_job(
    source: Source, overrides: list[str], out: Path, allow_code: bool | CodePermission = False
) -> None:
    """Execute one run. An interrupted run is resumed, and a finished run is skipped.

    Args:
        source: The configuration.
        overrides: Changes to the configuration, as `key.path=value`.
        out: The run directory.
        allow_code: Whether code that a file refers to may be executed (see
            `hetero_fl.load_config`).
    """
    run(source, out=out, resume=True, overrides=overrides, allow_code=allow_code)


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
        ['fedavg', 'local']
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
            ComparisonJob(variant, point, seed, out / "runs" / _folder(variant, point, seed))
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
        _point_values(job.point)
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


def _folder(variant: Variant, point: Point, seed: int) -> str:
    parts = [variant.label, *point, f"seed{seed}"]
    return "-".join(
        "".join(c if c.isalnum() or c in "._=" else "_" for c in part) for part in parts
    )


def _point_values(point: Point) -> dict[str, str]:
    return {key: value for key, _, value in (entry.partition("=") for entry in point)}


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
