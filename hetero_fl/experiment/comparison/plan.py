"""The runs of a comparison, which are all validated before the first one starts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import needs_of
from hetero_fl.config import Config, resolve_config, resume_relevant
from hetero_fl.config.load import read_config_file
from hetero_fl.core.task import Task
from hetero_fl.experiment.comparison.jobs import ComparisonJob, Point, Source, Variant, run_folder
from hetero_fl.experiment.comparison.search import SearchSettings, SearchTask
from hetero_fl.experiment.comparison.search_space import Budget, Space, check_grid, parse_space
from hetero_fl.experiment.configuration import describe_changes, load_config
from hetero_fl.experiment.preparation import prepare
from hetero_fl.experiment.used_settings import used_settings
from hetero_fl.reporting.comparison.facts import UsedSettings
from hetero_fl.reporting.loggers import check_loggers
from hetero_fl.reporting.run_directory import RunDirectory, check_vacant
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import available_cores
from hetero_fl.utils.errors import ArgumentError, UserError
from hetero_fl.utils.extras import check_extra
from hetero_fl.utils.text import split_top_level

SEARCH_FOLDER = "search"
"""Folder of the trials of a search, in the folder of the comparison."""


class ComparisonPlan:
    """The runs of a comparison, which are all validated before the first run starts.

    Args:
        source: The configuration.
        algorithms: Names, variants or "all" (see `compare`).
        seeds: Seeds. Each algorithm is run once with each seed.
        out: The folder of the comparison.
        base: Overrides for all runs.
        grid: Values to try for each configuration key.
        space: Values that a search tries for each configuration key, or None.
        budget: Budget of each method in the search.
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
        points: Grid points of each variant. Without a grid, the only point is empty. After a
            search, the only point is the one that was found.
        search: The search for settings, which precedes the runs, or None.
        not_found: Why the search of a variant found no point, keyed by variant.
        seeds: Seeds of the runs.
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
        space: Space | None,
        budget: int | str,
        jobs: int | None,
        permission: CodePermission,
    ) -> None:
        if not seeds:
            raise ArgumentError("seeds: expected one or more integers, got none")
        if jobs is not None and jobs < 1:
            raise ArgumentError(f"jobs: must be >= 1, got {jobs}")
        _check_folder(out)
        if space is not None and grid:
            raise ArgumentError("space: cannot be combined with grid; choose one")
        check_grid(grid)
        config = load_config(source, base, permission)
        check_loggers(config)
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
        self.base = [*base, *_unset_defaults(config)]
        self.out = out
        self.seeds = seeds
        grid_points = [
            tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))
            for values in itertools.product(*grid.values())
        ]
        self.points = dict.fromkeys(self.variants, grid_points)
        self.work = self._make_work()
        _check_same_configuration(source, self.base, self.work, permission)
        first_seed = [job for job in self.work if job.seed == seeds[0]]
        # `_compatible_methods` has already checked the methods that "all" stands for.
        unchecked = [job for job in first_seed if grid or job.variant not in self.admitted]
        tasks = [_task(source, self.base, job, permission) for job in unchecked or first_seed[:1]]
        self.task = tasks[0]
        self.permission = permission.with_caller_references(
            source, [override for job in self.work for override in [*self.base, *job.overrides]]
        )
        self.title = config.name
        self.source = source
        self.file = "the configuration"
        if isinstance(source, str | Path):
            self.source = read_config_file(Path(source))
            self.file = Path(source).name
        self.search: SearchTask | None = None
        self.not_found: dict[Variant, str] = {}
        if space is not None:
            self.search = self._make_search(space, Budget.parse(str(budget)), config.rounds)

    def _make_work(self) -> list[ComparisonJob]:
        runs = self.out / "runs"
        return [
            ComparisonJob(variant, point, seed, runs / run_folder(variant, point, seed))
            for seed in self.seeds
            for variant in self.variants
            for point in self.points[variant]
        ]

    def _make_search(self, space: Space, budget: Budget, num_rounds: int) -> SearchTask:
        """Check the values to search with every variant, and return the search.

        Raises:
            UserError: If a value is invalid.
        """
        check_extra("tables", ["optuna"], "search")
        parsed = parse_space(space)
        folder = self.out / SEARCH_FOLDER
        earlier = SearchSettings.read(folder)
        seed = max(self.seeds) + 1 if earlier is None else earlier.seed
        if seed in self.seeds:
            raise ArgumentError(
                f"seeds: {seed} is the seed of the search in {folder}; remove it or choose another "
                "folder"
            )
        settings = self._search_settings(space, seed, num_rounds).continue_from(earlier, folder)
        for variant in self.variants:
            for key, values in parsed.items():
                for value in values.ends:
                    point = (f"{key}={value}",)
                    job = ComparisonJob(variant, point, seed, folder)
                    _task(self.source, self.base, job, self.permission, argument="space")
        return SearchTask(
            source=self.source,
            base=self.base,
            task=self.task,
            space=parsed,
            budget=budget,
            seed=seed,
            num_rounds=num_rounds,
            out=folder,
            permission=self.permission,
            settings=settings,
        )

    def _search_settings(self, space: Space, seed: int, num_rounds: int) -> SearchSettings:
        methods = {}
        for variant in self.variants:
            overrides = [*self.base, *variant.overrides, f"seed={seed}"]
            plain = resolve_config(load_config(self.source, overrides, self.permission))
            methods[variant.label] = {"rounds": num_rounds, **resume_relevant(plain)}
        texts = {
            key: values if isinstance(values, str) else list(values)
            for key, values in space.items()
        }
        return SearchSettings(seed, texts, methods)

    def use_points(self, points: Mapping[Variant, Point], failed: Mapping[Variant, str]) -> None:
        """Replace the points of each variant with one point, which a search has found.

        Args:
            points: The point of each variant.
            failed: Why the search of the other variants found no point.

        Raises:
            UserError: If a run in `out` has different settings.
        """
        self.not_found = dict(failed)
        self.variants = list(points)
        self.points = {variant: [point] for variant, point in points.items()}
        self.work = self._make_work()
        _check_same_configuration(self.source, self.base, self.work, self.permission)

    @property
    def is_tuned(self) -> bool:
        """Whether the grid has several points, of which one is chosen by validation score."""
        return any(len(points) > 1 for points in self.points.values())

    def settings(self, points: Mapping[Variant, Point], origins: Mapping[str, str]) -> UsedSettings:
        """Return the settings of every variant at its grid point (see `used_settings`)."""
        grid = "grid, chosen by validation" if self.is_tuned else "grid"
        if self.search is not None:
            grid = "search"
        return used_settings(
            self.source,
            self.base,
            points,
            origins,
            file=self.file,
            grid=grid,
            allow_code=self.permission,
        )


def _check_folder(out: Path) -> None:
    """Raise UserError if a comparison cannot be written to a folder."""
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"out: {out} is a file; choose a folder")
    if (out / "environment.json").exists():
        raise ArgumentError(f"out: {out} is the directory of a run; choose another folder")


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


def _task(
    source: Source,
    base: list[str],
    job: ComparisonJob,
    permission: CodePermission,
    argument: str = "grid",
) -> Task:
    """Validate a run and return its task.

    Args:
        source: The configuration.
        base: Overrides for all runs.
        job: The run.
        permission: The code that may be executed.
        argument: Argument of `compare` that set the grid point.

    Raises:
        UserError: If the run is invalid. The message names the argument of `compare` that set the
            invalid key.
    """
    try:
        return prepare(source, [*base, *job.overrides], allow_code=permission).federation.task
    except UserError as error:
        line = str(error)
        for name, overrides in (("algorithms", job.variant.overrides), (argument, job.point)):
            for override in overrides:
                key = override.partition("=")[0]
                if line.startswith((f"{key}: ", f"{override}: ")):
                    raise ArgumentError(f"{name}: {line.removeprefix(f'{override}: ')}") from None
        raise


def _unset_defaults(config: Config) -> list[str]:
    """Return overrides for settings whose default differs in comparisons."""
    threads = [] if config.runtime.threads else ["runtime.threads=1"]
    is_set = "best_models" in config.output.model_fields_set
    return [*threads, *([] if is_set else ["output.best_models=false"])]


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
            if key in current["algorithm"] and current["algorithm"][key] is None
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
        if differs := describe_changes(recorded, current):
            raise ArgumentError(
                f"out: {job.out} has other settings ({differs}); choose another folder"
            )
