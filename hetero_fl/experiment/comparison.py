"""Run several methods over several seeds, with tuning, and compare them."""

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
from hetero_fl.config.load import Overrides, override_list, raw_algorithm_section, read_config_file
from hetero_fl.config.schema import CLIENT_OPTIONS, Config
from hetero_fl.core.task import Task
from hetero_fl.experiment.preparation import load_config, prepare
from hetero_fl.experiment.runner import run
from hetero_fl.reporting.comparison.facts import Setting, UsedSettings, rank_methods
from hetero_fl.reporting.formatting import (
    algorithm_base,
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
from hetero_fl.utils.errors import Interrupted, RunFailedError, UserError, suggest_or_list
from hetero_fl.utils.processes import (
    ADVICE,
    UNGUARDED,
    adopt_environment,
    exit_if_importing,
    ignore_interrupts_in_children,
    worker_context,
)
from hetero_fl.utils.text import split_top_level

# The runs of a comparison, carried out side by side in processes of their own.

Source = str | Path | Mapping[str, Any]
Point = tuple[str, ...]
"""A point of a grid: key=value for each of its keys."""


@dataclass(frozen=True)
class Variant:
    """An algorithm with settings of its own: `hybrid:teacher=mean:heads=take`."""

    label: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """From the command line's form. Settings are those of the algorithm, or full key paths."""
        name, *settings = split_top_level(text, ":")
        if name == "python":  # python:package.module:Class:setting=value
            name = ":".join([name, *settings[:2]])
            settings = settings[2:]
        for setting in settings:
            if "=" not in setting:
                raise UserError(
                    f"--algorithms: '{text}': write name:setting=value, found '{setting}'"
                )
        paths = [s if "." in s.split("=")[0] else f"algorithm.{s}" for s in settings]
        return cls(text, (f"algorithm.name={name}", *paths))


@dataclass(frozen=True)
class ComparisonJob:
    """One run of a comparison."""

    variant: Variant
    point: Point
    seed: int
    out: Path

    @property
    def overrides(self) -> list[str]:
        """What the run changes in the configuration."""
        return [*self.variant.overrides, *self.point, f"seed={self.seed}"]

    def __str__(self) -> str:
        return " ".join([self.variant.label, *self.point, f"seed {self.seed}"])


def run_jobs(
    source: Source,
    base: list[str],
    work: list[ComparisonJob],
    jobs: int,
    progress: Progress,
    allow_code: bool | CodePermission = False,
) -> dict[ComparisonJob, str]:
    """Carry out runs in processes of their own.

    Each run that ends is a line of the log: its figures, or why it failed, and about how long the others will take.

    Args:
        source: The configuration.
        base: Overrides for all runs.
        work: The runs; those that have finished already are left alone.
        jobs: Runs at a time.
        progress: Where lines go.
        allow_code: As for `run`.

    Returns:
        The runs that failed, each with the reason.
    """
    failed: dict[ComparisonJob, str] = {}
    progress.log(f"{len(work)} runs, {jobs} at a time")
    schedule = _Schedule(work)
    pool_size = min(jobs, len(work))
    workers: list[BaseProcess] = []
    context = _record_processes(worker_context(__name__), workers)
    environ = (dict(os.environ),)
    with ProcessPoolExecutor(pool_size, context, start_worker, environ) as pool:
        with ignore_interrupts_in_children():
            waiting = {
                pool.submit(run_job, source, [*base, *job.overrides], job.out, allow_code): job
                for job in work
            }
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                job = waiting[future]
                try:
                    future.result()
                except BrokenProcessPool:
                    pool.shutdown()  # their exit statuses are known then
                    if any(worker.exitcode == UNGUARDED for worker in workers):
                        raise UserError(ADVICE) from None
                    failed[job] = "its process was killed (memory?); run the command again to go on"
                except (UserError, RunFailedError) as error:
                    failed[job] = str(error)
                told = f"failed: {failed[job]}" if job in failed else _format_scores(job.out)
                before = " (finished before)" if job in schedule.finished_before else ""
                progress.log(f"{done}/{len(work)} {job}{before}: {told} {schedule.left_after(job)}")
        except BaseException:  # also where nobody reads the lines any longer
            for worker in workers:  # each goes on from its newest checkpoint
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _record_processes(context: Any, started: list[BaseProcess]) -> Any:
    """Return a copy of a multiprocessing context that appends each process it makes to `started`.

    `multiprocessing.active_children` omits processes that have already ended.
    """
    make = context.Process

    def make_and_record(*args: Any, **kwargs: Any) -> BaseProcess:
        started.append(make(*args, **kwargs))
        return started[-1]

    context = copy.copy(context)
    context.Process = make_and_record
    return context


def start_worker(environ: Mapping[str, str]) -> None:
    """Prepare a process that carries out runs: the others take the other cores."""
    adopt_environment(environ)
    use_one_core()


class _Schedule:
    """How long the runs of a comparison that have not ended will take, from those that have."""

    def __init__(self, work: Sequence[ComparisonJob]) -> None:
        self.finished_before = {job for job in work if RunDirectory(job.out).finished}
        self._todo = [job for job in work if job not in self.finished_before]
        self._started = time.monotonic()
        self._num_finished = 0

    def left_after(self, job: ComparisonJob) -> str:
        """Return `(about 3 min 20 s left)` after a run has ended; empty while nothing is known, or if it was the last."""
        if job in self._todo:
            self._todo.remove(job)
            self._num_finished += RunDirectory(job.out).finished
        if not self._todo or not self._num_finished:
            return ""
        # By the clock, so that starts, pictures and runs side by side count.
        left = (time.monotonic() - self._started) / self._num_finished * len(self._todo)
        return f"(about {format_duration(left)} left)"


def _format_scores(out: Path) -> str:
    finished = RunDirectory.open(out)
    return format_final_evaluation(finished.summary(), finished.details().get("unit", ""))


def run_job(
    source: Source, overrides: list[str], out: Path, allow_code: bool | CodePermission = False
) -> None:
    """A run in a process of its own; one that was interrupted goes on, one that has finished is left alone."""
    run(source, out=out, resume=True, overrides=overrides, allow_code=allow_code)


# Many runs side by side: algorithms × seeds, each tuned alike if wished; what has finished is not
# run again.


def compare(
    source: Source,
    algorithms: Sequence[str] | str,
    seeds: Iterable[int] = (0,),
    *,
    out: str | Path,
    overrides: Overrides = (),
    grid: Mapping[str, Sequence[str]] | None = None,
    jobs: int | None = None,
    quiet: bool = True,
    origins: Mapping[str, str] | None = None,
    allow_code: bool | CodePermission = False,
) -> Path:
    """Run every algorithm with every seed and write table, figure and report into `out`.

    A script calls this under its `__main__` guard: the runs' processes import it.

    Args:
        source: A configuration file or a dictionary.
        algorithms: Names or variants (`hybrid:teacher=mean`), and "all" for all that can mean something with this
            configuration: then the best is shown first, and what is left out named with the reason.
        seeds: Each algorithm runs with each of them.
        out: The folder.
        overrides: Changes to the configuration, `key.path=value`, or a dictionary of them.
        grid: Values to try for keys; each algorithm takes the point with the best mean validation over the seeds.
        jobs: Runs at a time; None: one per core, with one thread each.
        quiet: Show no progress.
        origins: Where entries of `algorithms` and `overrides` were written, if not in this call; the
            comparison states it.
        allow_code: Whether code that a file names may run (see `hetero_fl.load_config`).

    Raises:
        UserError: Before anything runs: a configuration is impossible, or a run in `out` was made with another one.
        RunFailedError: After the others have ended: runs failed; a line for each of them.
    """
    exit_if_importing()
    plan = _Plan(
        source,
        algorithms,
        list(dict.fromkeys(seeds)),
        Path(out),
        override_list(overrides),
        grid or {},
        jobs,
        CodePermission.from_argument(allow_code),
    )
    with lock_folder(plan.out) as unheld, Progress(plan.out / "log.txt", quiet) as progress:
        for line in unheld:
            progress.log(line)
        settings = plan.settings(dict.fromkeys(plan.variants, ()), origins or {})
        _log_plan(plan, settings, progress)
        try:
            failed = run_jobs(
                plan.source, plan.base, plan.work, plan.jobs, progress, plan.permission
            )
        except KeyboardInterrupt as stop:
            raise Interrupted(plan.out) from stop
    _write_results(plan, failed, origins or {})
    if failed:
        lines = (f"{job}: {' '.join(why.split())}" for job, why in failed.items())
        raise RunFailedError("\n".join([f"{len(failed)} of {len(plan.work)} runs failed", *lines]))
    return plan.out


class _Plan:
    """The runs of a comparison, checked before the first one starts.

    Attributes:
        source: The keys of the configuration; its file may change while the runs go on.
        file: What the configuration is called.
        out: The folder.
        title: Name of the configuration.
        base: Overrides of all runs.
        variants: What is compared.
        admitted: The variants that "all" stands for.
        left_out: The methods that "all" does not stand for, with the reason.
        points: Grid points, each tried with all variants; one without keys if there is no grid.
        work: One run for each seed, variant and point.
        jobs: Runs at a time.
        task: What all runs learn.
        permission: Whether code that the configuration names may run.

    Args:
        source: The configuration.
        algorithms: Names or variants, and "all".
        seeds: Each algorithm runs with each of them.
        out: The folder.
        base: Overrides of all runs.
        grid: Values to try for keys.
        jobs: Runs at a time; None: one per core.
        permission: Whether code that the configuration names may run.

    Raises:
        UserError: If anything is wrong with any of the runs.
    """

    def __init__(
        self,
        source: Source,
        algorithms: Sequence[str] | str,
        seeds: list[int],
        out: Path,
        base: list[str],
        grid: Mapping[str, Sequence[str]],
        jobs: int | None,
        permission: CodePermission,
    ) -> None:
        if not seeds:
            raise UserError("--seeds: found none; write whole numbers with commas, such as 0,1,2")
        if jobs is not None and jobs < 1:
            raise UserError(f"--jobs: found {jobs}; take 1 or more")
        if out.exists() and not out.is_dir():
            raise UserError(f"--out: {out} is a file; name a folder")
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
            raise UserError(
                f"--algorithms: found none; choose from all, {', '.join(register_algorithm)}"
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
        # "all" has prepared its methods already
        unchecked = [job for job in first_seed if grid or job.variant not in self.admitted]
        tasks = [_task(source, self.base, job, permission) for job in unchecked or first_seed[:1]]
        self.task = tasks[0]
        self.permission = permission.with_written(
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
        """Whether grid points are chosen by validation."""
        return len(self.points) > 1

    def settings(self, points: Mapping[Variant, Point], origins: Mapping[str, str]) -> UsedSettings:
        """Return the settings of every variant at its grid point (see `used_settings`)."""
        grid = "grid, chosen by validation" if self.is_tuned else "grid"
        return used_settings(
            self.source, self.base, points, origins, self.file, grid, self.permission
        )


def _log_plan(plan: _Plan, settings: UsedSettings, progress: Progress) -> None:
    for name, why in plan.left_out.items():
        progress.log(f"left out {name}: {why}")
    for methods, text in settings.lines():
        progress.log(f"settings of {methods}: {text}")
    if settings.note:
        progress.log(settings.note)


def _write_results(
    plan: _Plan, failed: Mapping[ComparisonJob, str], origins: Mapping[str, str]
) -> None:
    """Write table, figures and report of the runs that have finished, at the chosen grid points."""
    # loads what draws
    from hetero_fl.reporting.comparison.plots import hours_to_reach, write_curves
    from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
    from hetero_fl.reporting.comparison.tables import Candidate

    finished = [job for job in plan.work if job not in failed]
    scores = _validations(finished, plan.task) if plan.is_tuned else {}
    chosen = _choose(scores, plan.variants, plan.points)
    best = [job for job in finished if job.point == chosen[job.variant]]
    if not best:
        return
    metrics = {job: Run(job.out).metrics for job in best}
    reached = hours_to_reach(list(metrics.values()), plan.task)
    rows = [
        _values(job.point)
        | comparison_row(Run(job.out).summary)
        | {"algorithm": job.variant.label}
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
        settings=plan.settings({job.variant: job.point for job in best}, origins),
    )
    histories: dict[str, list[Any]] = {str(row["algorithm"]): [] for row in shown}
    for job in best:
        histories[job.variant.label].append(metrics[job])
    write_curves(plan.out / "curves.png", histories, plan.task)
    write_curves(plan.out / "curves_time.png", histories, plan.task, timed=True)


def _missing_methods(plan: _Plan, failed: Mapping[ComparisonJob, str]) -> dict[str, str]:
    """Return why methods and runs are not in the table, by their names."""
    missing = {algorithm_name(name): why for name, why in plan.left_out.items()}
    for job, why in failed.items():
        name = ", ".join([algorithm_name(job.variant.label), *job.point, f"seed {job.seed}"])
        missing[name] = f"it failed: {why}"
    return missing


def _compatible_methods(
    source: Source, base: list[str], seed: int, permission: CodePermission
) -> tuple[list[Variant], dict[str, str]]:
    """The methods that this configuration admits, and why the others are refused."""
    kept = []
    left_out = {}
    for name in register_algorithm:
        try:
            prepare(
                source, [*base, f"algorithm.name={name}", f"seed={seed}"], allow_code=permission
            )
            kept.append(Variant.parse(name))
        except UserError as error:
            left_out[name] = str(error)
    if not kept:  # then it is no matter of the method
        raise UserError(next(iter(left_out.values())))
    return kept, left_out


def _task(source: Source, base: list[str], job: ComparisonJob, permission: CodePermission) -> Task:
    """What a run learns. Raises UserError, which says by which option the key was set, if the run is impossible."""
    try:
        return prepare(source, [*base, *job.overrides], allow_code=permission).federation.task
    except UserError as error:
        line = str(error)
        for option, overrides in (("--algorithms", job.variant.overrides), ("--grid", job.point)):
            for override in overrides:
                if line.startswith(f"{override}: "):
                    raise UserError(f"{option}: {line.removeprefix(f'{override}: ')}") from None
        raise


def _check_same_configuration(
    source: Source, base: list[str], work: list[ComparisonJob], permission: CodePermission
) -> None:
    """Raises UserError, before anything runs, for a run directory that is there and was made with other settings."""
    for job in work:
        if not (job.out / "config.yaml").exists():
            check_vacant(job.out)
            continue
        made = RunDirectory.open(job.out).config()
        now = resolve_config(load_config(source, [*base, *job.overrides], permission))
        derived = {
            k: v for k, v in made.get("algorithm", {}).items() if now["algorithm"].get(k, v) is None
        }
        now["algorithm"] |= derived  # what is left open follows from the federation
        if needs_of(register_algorithm[now["algorithm"]["name"]]).asynchronous is not None:
            now["runtime"]["mode"] = "async"  # whatever was asked for
        if (
            now["privacy"] is not None
            and now["privacy"]["noise_multiplier"] is None
            and made.get("privacy")
        ):
            # follows from the target
            now["privacy"]["noise_multiplier"] = made["privacy"].get("noise_multiplier")
        if differs := describe_difference(made, now):
            raise UserError(
                f"--out: {job.out} was made with other settings ({differs}); choose another --out"
            )


def _folder(variant: Variant, point: Point, seed: int) -> str:
    parts = [variant.label, *point, f"seed{seed}"]
    return "-".join(
        "".join(c if c.isalnum() or c in "._=" else "_" for c in part) for part in parts
    )


def _values(point: Point) -> dict[str, str]:
    """A point's values under their keys."""
    return {key: value for key, _, value in (entry.partition("=") for entry in point)}


def _validations(finished: list[ComparisonJob], task: Task) -> dict[tuple[Variant, Point], float]:
    """The mean validation of each variant at each grid point over its seeds; larger is better."""
    scores: dict[tuple[Variant, Point], list[float]] = {}
    for job in finished:
        scores.setdefault((job.variant, job.point), []).append(_validation(Run(job.out), task))
    return {key: sum(values) / len(values) for key, values in scores.items()}


def _choose(
    scores: Mapping[tuple[Variant, Point], float], variants: list[Variant], points: list[Point]
) -> dict[Variant, Point]:
    """For each variant the grid point with the best validation; ties to the first."""
    return {v: max(points, key=lambda p: scores.get((v, p), float("-inf"))) for v in variants}


def _validation(finished: Run, task: Task) -> float:
    """The validation of the last round that was read, at home and in common together; larger is better."""
    last = [r for r in finished.metrics if r.get("validation")][-1]
    score = mean_validation_score(task, last)
    return float("-inf") if score is None else score


# A study: a comparison that is written down, so that one command repeats it.


class Study(ConfigSection):
    """`config`: a configuration's file, seen from the study's own folder; `algorithms`: as compare's `--algorithms` has them."""

    config: Path
    algorithms: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    overrides: list[str] = []
    jobs: PositiveInt | None = None
    out: Path

    @classmethod
    def load(cls, path: Path) -> Study:
        """A study's file; without `--out` it goes to `runs/<its name>`. Raises UserError, in one line, for what is wrong."""
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


# Which settings each method of a comparison gets, and from where: file, override, variant, study or
# grid.

SECTION = "algorithm"


# client settings that count as the method's, by key
CLIENT_KEYS = {f"clients.defaults.{name}": f"{SECTION}.{name}" for name in CLIENT_OPTIONS}


def used_settings(
    source: Source,
    base: Sequence[str],
    points: Mapping[Variant, Point],
    origins: Mapping[str, str],
    file: str = "the configuration",
    grid: str = "grid",
    allow_code: bool | CodePermission = False,
) -> UsedSettings:
    """Return the settings of every variant that differ from its method's defaults.

    Args:
        source: The configuration of the comparison.
        base: Overrides that hold for every run.
        points: The grid point of each variant; empty without a grid.
        origins: Where labels of variants and overrides were written, if not in the call: a study's name, say.
        file: What the configuration is called.
        grid: What settings of a grid point are said to come from.
        allow_code: Whether code that the configuration names may run (see `hetero_fl.load_config`).
    """
    section = f"{SECTION} section of {file}"
    methods = []
    for variant, point in points.items():
        written = [(override, origins.get(override, "override")) for override in base]
        written += [
            (override, origins.get(variant.label, "variant")) for override in variant.overrides
        ]
        written += [(override, grid) for override in point]
        config = load_config(source, [override for override, _ in written], allow_code)
        settings = config.algorithm | _client_options(config)
        # a user's method may have a setting without a default
        defaults = register_algorithm[settings["name"]].model_construct().model_dump()
        found = [
            Setting(key, _plain(value), _origin(f"{SECTION}.{key}", written, section))
            for key, value in settings.items()
            if key != "name" and value != defaults.get(key)
        ]
        # Keys of other sections that only this variant or the grid sets.
        for override, origin in written[len(base) :]:
            key, _, value = override.partition("=")
            if key.partition(".")[0] != SECTION and key not in CLIENT_KEYS:
                found.append(Setting(key, value, origin))
        order = [section, *(origin for _, origin in written)]
        methods.append(
            (variant.label, tuple(sorted(found, key=lambda setting: order.index(setting.origin))))
        )
    return UsedSettings(
        tuple(methods), _note(source, section, [variant.label for variant in points])
    )


def _client_options(config: Config) -> dict[str, Any]:
    """Return the options of all clients that may be written in the algorithm section, if set."""
    defaults = config.clients.defaults
    options = {name: getattr(defaults, name, None) for name in CLIENT_OPTIONS}
    return {name: value for name, value in options.items() if value is not None}


def _origin(key: str, overrides: Sequence[tuple[str, str]], otherwise: str) -> str:
    """Return the origin of the last override that sets the key or a part of it."""
    for override, origin in reversed(overrides):
        named = override.partition("=")[0]
        named = CLIENT_KEYS.get(named, named)
        if named in (SECTION, key) or named.startswith(f"{key}."):
            return origin
    return otherwise


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _note(source: Source, section: str, labels: Sequence[str]) -> str:
    """Return a sentence on which method the configuration's own settings went to; empty if it has none."""
    written = raw_algorithm_section(source)
    own = ", ".join(f"{key} = {_plain(value)}" for key, value in written.items() if key != "name")
    name = written.get("name")
    if not own or not isinstance(name, str):
        return ""
    method = algorithm_name(name)
    told = f"The settings in the {section} ({own})"
    if name in map(algorithm_base, labels):
        return f"{told} were applied to {method} only; every other method starts from its own defaults."
    return f"{told} are those of {method}, which is not compared: every method starts from its own defaults."
