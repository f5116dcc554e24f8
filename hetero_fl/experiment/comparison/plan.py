"""The runs of a comparison, which are validated before the first one starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hetero_fl.algorithms import register_algorithm
from hetero_fl.config import Config
from hetero_fl.config.load import read_config_file
from hetero_fl.core.task import Task
from hetero_fl.experiment.comparison.jobs import Job, Point, Source, Variant, check_same_run
from hetero_fl.experiment.comparison.tuning import Budget, Grid, OptunaSearch, Space
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import prepare
from hetero_fl.reporting.run_directory import has_run
from hetero_fl.reporting.run_loggers import check_loggers
from hetero_fl.utils.code_permission import AllowCode, code_of_caller
from hetero_fl.utils.environment import available_cores
from hetero_fl.utils.errors import ArgumentError, UserError
from hetero_fl.utils.extras import check_extra
from hetero_fl.utils.text import split_top_level

TRIAL_SEED = 1_000_000
"""Seed of the trials of a search, which is not compared."""


@dataclass
class ComparisonPlan:
    """A comparison whose runs have been validated.

    Attributes:
        source: The configuration. A file is replaced with its content, so that later changes to
            the file have no effect.
        title: The name of the configuration.
        base: Overrides of all runs.
        variants: The variants to compare.
        is_ranked: Whether "all" methods are compared, and the table is sorted by score.
        seeds: Seeds of the runs.
        tuner: The points to try for each variant.
        out: The folder of the comparison.
        at_once: Number of runs at a time.
        permission: The code that may be executed.
        left_out: Why methods do not support the configuration, if "all" are compared.
        task: The task of all runs.
    """

    source: Source
    title: str
    base: list[str]
    variants: list[Variant]
    is_ranked: bool
    seeds: list[int]
    tuner: Grid | OptunaSearch
    out: Path
    at_once: int
    permission: AllowCode
    left_out: dict[str, str] = field(default_factory=dict)
    task: Task = field(init=False)

    @property
    def is_tuned(self) -> bool:
        """Whether one of several points is chosen by validation score."""
        return isinstance(self.tuner, OptunaSearch) or len(self.tuner.points) > 1

    def jobs(self, variant: Variant, point: Point) -> list[Job]:
        """Return the runs of a variant at a point, one for each seed."""
        runs = self.out / "runs"
        return [Job.in_folder(runs, variant, point, seed) for seed in self.seeds]

    def trial_jobs(self, variant: Variant, point: Point) -> list[Job]:
        """Return the runs by which a point is rated. Those of a search are not compared."""
        if isinstance(self.tuner, OptunaSearch):
            return [Job.in_folder(self.out / "search", variant, point, TRIAL_SEED)]
        return self.jobs(variant, point)


def plan_comparison(
    source: Source,
    algorithms: Sequence[str] | str,
    seeds: list[int],
    *,
    out: Path,
    overrides: list[str],
    grid: Mapping[str, Sequence[str]],
    space: Space | None,
    budget: str,
    jobs: int | None,
    permission: AllowCode,
) -> ComparisonPlan:
    """Validate the arguments and the runs of a comparison (see `compare`).

    Raises:
        UserError: If an argument or a run is invalid.
    """
    _check_arguments(seeds, jobs, out)
    if space is not None and grid:
        raise ArgumentError("space: cannot be combined with grid; choose one")
    tuner: Grid | OptunaSearch = Grid(grid)
    config = load_config(source, overrides, permission)
    check_loggers(config)
    for seed in seeds:
        load_config(source, [*overrides, f"seed={seed}"], permission)
    if space is not None:
        check_extra("tables", ["optuna"], "search")
        tuner = OptunaSearch(space, Budget.parse(budget), config.rounds, TRIAL_SEED)
        if TRIAL_SEED in seeds:
            raise ArgumentError(f"seeds: {TRIAL_SEED} is the seed of searches; remove it")
    base = [*overrides, *_unset_defaults(config)]
    names = split_top_level(algorithms, ",") if isinstance(algorithms, str) else algorithms
    names = [name.strip() for name in names if name.strip()]
    variants = [Variant.parse(name) for name in names if name.lower() != "all"]
    candidates = []
    if len(variants) < len(names):
        candidates = [Variant.parse(name) for name in register_algorithm]
        variants = [*candidates, *variants]
    if not variants:
        raise ArgumentError(
            f"algorithms: expected one or more; choose from all, {', '.join(register_algorithm)}"
        )
    plan = ComparisonPlan(
        source=source,
        title=config.name,
        base=base,
        variants=list(dict.fromkeys(variants)),
        is_ranked=bool(candidates),
        seeds=seeds,
        tuner=tuner,
        out=out,
        at_once=jobs or max(1, available_cores() // (config.runtime.threads or 1)),
        permission=permission,
    )
    _check_runs(plan, candidates)
    if isinstance(source, str | Path):
        plan.source = read_config_file(Path(source))
    return plan


def _check_arguments(seeds: Sequence[int], jobs: int | None, out: Path) -> None:
    """Raise UserError if an argument is invalid whatever the configuration is."""
    if not seeds:
        raise ArgumentError("seeds: expected one or more integers, got none")
    if jobs is not None and jobs < 1:
        raise ArgumentError(f"jobs: must be >= 1, got {jobs}")
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"out: {out} is a file; choose a folder")
    if (out / "environment.json").exists():
        raise ArgumentError(f"out: {out} is the directory of a run; choose another folder")


def _unset_defaults(config: Config) -> list[str]:
    """Return overrides for settings whose default differs in comparisons."""
    threads = [] if config.runtime.threads else ["runtime.threads=1"]
    is_set = "best_models" in config.output.model_fields_set
    return [*threads, *([] if is_set else ["output.best_models=false"])]


def _check_runs(plan: ComparisonPlan, candidates: Sequence[Variant]) -> None:
    """Validate one run of each variant and point, and set the task and the permission of the plan.

    Args:
        plan: The comparison.
        candidates: Variants that are left out if they do not support the configuration.

    Raises:
        UserError: If a run is invalid.
    """
    points = plan.tuner.ask({})
    if isinstance(plan.tuner, OptunaSearch):
        # The first trial shows whether the folder contains another search.
        del points[1:]
        points += [(f"{key}={end}",) for key, ends in plan.tuner.ends().items() for end in ends]
    for variant in list(plan.variants):
        try:
            for point in points:
                first, *others = plan.trial_jobs(variant, point)
                plan.task = _check_run(plan, first)
                # Runs with other seeds differ only in their directories.
                for job in others:
                    if has_run(job.out):
                        _check_run(plan, job)
        except ArgumentError:
            raise
        except UserError as error:
            if variant not in candidates:
                raise _with_argument(error, "algorithms", variant.overrides) from None
            plan.left_out[variant.label] = str(error)
            plan.variants.remove(variant)
    if not plan.variants:
        # The configuration is invalid for every method.
        raise UserError(next(iter(plan.left_out.values())))
    given = [override for variant in plan.variants for override in variant.overrides]
    given += [override for point in points for override in point]
    plan.permission = code_of_caller(plan.permission, plan.source, [*plan.base, *given])


def _check_run(plan: ComparisonPlan, job: Job) -> Task:
    """Validate a run and return its task.

    Raises:
        UserError: If the run is invalid, or if its directory contains another run. If the point is
            invalid, the message names the argument of `compare`.
    """
    overrides = [*plan.base, *job.overrides]
    try:
        prepared = prepare(plan.source, overrides, allow_code=plan.permission)
    except UserError as error:
        argument = "space" if isinstance(plan.tuner, OptunaSearch) else "grid"
        raise _with_argument(error, argument, job.point) from None
    check_same_run(prepared, job.out)
    return prepared.federation.task


def _with_argument(error: UserError, argument: str, overrides: Sequence[str]) -> UserError:
    """Return an error that names the argument of `compare`, if it is about one of its overrides."""
    line = str(error)
    for override in overrides:
        key = override.partition("=")[0]
        if line.startswith((f"{key}: ", f"{override}: ")):
            return ArgumentError(f"{argument}: {line.removeprefix(f'{override}: ')}")
    return error
