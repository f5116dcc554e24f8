"""Run several methods over several seeds, with tuning, and compare them."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.algorithms.requirements import needs_of
from hetero_fl.config import describe_difference, resolve_config
from hetero_fl.config.base import ConfigSection
from hetero_fl.config.errors import describe_error
from hetero_fl.config.load import Overrides, override_list, raw_algorithm_section, read_config_file
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
from hetero_fl.reporting.summary import validation_score
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import available_cores, use_one_core
from hetero_fl.utils.errors import Interrupted, RunFailedError, UserError, suggest_or_list
from hetero_fl.utils.processes import (
    ADVICE,
    UNGUARDED,
    exit_if_importing,
    ignore_interrupts_in_children,
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
    schedule = _Schedule(work, jobs)
    others = multiprocessing.active_children()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(work)), spawn, initializer=use_one_core) as pool:
        with ignore_interrupts_in_children():
            waiting = {
                pool.submit(run_job, source, [*base, *job.overrides], job.out, allow_code): job
                for job in work
            }
        workers = [child for child in multiprocessing.active_children() if child not in others]
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


class _Schedule:
    """How long the runs of a comparison that have not finished will take, from those that have."""

    def __init__(self, work: Sequence[ComparisonJob], jobs: int) -> None:
        self.finished_before = {job for job in work if _has_finished(job.out)}
        self._todo = [job for job in work if job not in self.finished_before]
        self._jobs = jobs
        self._seconds: list[float] = []

    def left_after(self, job: ComparisonJob) -> str:
        """Return `(about 3 min 20 s left)` after a run has ended; empty while nothing is known, or if it was the last."""
        if job in self._todo:
            self._todo.remove(job)
            if _has_finished(job.out):
                self._seconds.append(RunDirectory(job.out).summary()["seconds"]["total"])
        if not self._todo or not self._seconds:
            return ""
        left = fmean(self._seconds) * len(self._todo) / min(self._jobs, len(self._todo))
        return f"(about {format_duration(left)} left)"


def _has_finished(out: Path) -> bool:
    return (out / "summary.json").exists()


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
    out = Path(out)
    base = override_list(overrides)
    seeds = list(dict.fromkeys(seeds))
    if not seeds:
        raise UserError("--seeds: found none; write whole numbers with commas, such as 0,1,2")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs: found {jobs}; take 1 or more")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    permission = CodePermission.from_argument(allow_code)
    config = load_config(source, base, permission)
    for seed in seeds:
        load_config(source, [*base, f"seed={seed}"], permission)
    names = [
        n.strip()
        for n in (split_top_level(algorithms, ",") if isinstance(algorithms, str) else algorithms)
    ]
    everything = any(n.lower() == "all" for n in names)
    asked = [Variant.parse(n) for n in names if n and n.lower() != "all"]
    admitted, left_out = (
        _compatible_methods(source, base, seeds[0], permission) if everything else ([], {})
    )
    variants = list(dict.fromkeys([*admitted, *asked]))
    if not variants:
        raise UserError(
            f"--algorithms: found none; choose from all, {', '.join(register_algorithm)}"
        )
    threads = config.runtime.threads or 1
    base += [] if config.runtime.threads else ["runtime.threads=1"]
    points = [
        tuple(f"{k}={v}" for k, v in zip(grid or {}, p, strict=True))
        for p in itertools.product(*(grid or {}).values())
    ]
    work = [
        ComparisonJob(v, p, s, out / "runs" / _folder(v, p, s))
        for s in seeds
        for v in variants
        for p in points
    ]
    _check_same_configuration(source, base, work, permission)
    once = work[: len(variants) * len(points)]
    # the others have been prepared
    new = [job for job in once if grid or job.variant not in admitted]
    tasks = [_task(source, base, job, permission) for job in new or once[:1]]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be made ({error.strerror})") from None
    with lock_folder(out) as unheld, Progress(out / "log.txt", quiet) as progress:
        for line in unheld:
            progress.log(line)
        for name, why in left_out.items():
            progress.log(f"left out {name}: {why}")
        # the file may change while it runs
        plain = read_config_file(Path(source)) if isinstance(source, str | Path) else source
        permitted = permission.with_written(
            source, [o for job in work for o in [*base, *job.overrides]]
        )
        file = Path(source).name if isinstance(source, str | Path) else "the configuration"
        before = used_settings(
            plain, base, dict.fromkeys(variants, ()), origins or {}, file, allow_code=permitted
        )
        for methods, text in before.lines():
            progress.log(f"settings of {methods}: {text}")
        if before.note:
            progress.log(before.note)
        try:
            failed = run_jobs(
                plain, base, work, jobs or max(1, available_cores() // threads), progress, permitted
            )
        except KeyboardInterrupt as stop:
            raise Interrupted(out) from stop
    done = [j for j in work if j not in failed]
    scores = _validations(done, tasks[0]) if len(points) > 1 else {}
    chosen = _choose(scores, variants, points)
    notes = [f"{v.label}: {', '.join(p)} (chosen by validation)" for v, p in chosen.items() if p]
    missing = {algorithm_name(name): why for name, why in left_out.items()}
    for job, why in failed.items():
        told = [algorithm_name(job.variant.label), *job.point, f"seed {job.seed}"]
        missing[", ".join(told)] = f"it failed: {why}"
    # loads what draws
    from hetero_fl.reporting.comparison.plots import hours_to_reach, write_curves
    from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
    from hetero_fl.reporting.comparison.tables import Candidate

    best = [j for j in done if j.point == chosen[j.variant]]
    reached = hours_to_reach([Run(j.out).metrics for j in best], tasks[0])
    rows = [
        _values(j.point)
        | comparison_row(Run(j.out).summary)
        | {"algorithm": j.variant.label}
        | hours
        for j, hours in zip(best, reached, strict=True)
    ]
    if rows:
        shown = rank_methods(rows, tasks[0]) if admitted else rows
        tried = [
            Candidate(v.label, p, scores.get((v, p)), p == chosen[v])
            for v in variants
            for p in points
            if len(points) > 1
        ]
        by = "grid, chosen by validation" if len(points) > 1 else "grid"
        points_of = {j.variant: j.point for j in best}
        settings = used_settings(plain, base, points_of, origins or {}, file, by, permitted)
        write_comparison(
            out, shown, title=config.name, note="; ".join(notes), task=tasks[0], missing=missing, tried=tried,
            settings=settings,
        )  # fmt: skip
        labels = dict.fromkeys(str(row["algorithm"]) for row in shown)
        histories = {a: [Run(j.out).metrics for j in best if j.variant.label == a] for a in labels}
        write_curves(out / "curves.png", histories, tasks[0])
        write_curves(out / "curves_time.png", histories, tasks[0], timed=True)
    if failed:
        lines = (f"{job}: {' '.join(why.split())}" for job, why in failed.items())
        raise RunFailedError("\n".join([f"{len(failed)} of {len(work)} runs failed", *lines]))
    return out


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
    both = [validation_score(task, last, which) for which in ("personal", "global")]
    known = [v for v in both if v is not None]
    return sum(known) / len(known) if known else float("-inf")


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
        settings = load_config(source, [override for override, _ in written], allow_code).algorithm
        defaults = _defaults(settings["name"])
        found = [
            Setting(key, _plain(value), _origin(f"{SECTION}.{key}", written, section))
            for key, value in settings.items()
            if key != "name" and value != defaults.get(key)
        ]
        # Keys of other sections that only this variant or the grid sets.
        for override, origin in written[len(base) :]:
            key, _, value = override.partition("=")
            if key.partition(".")[0] != SECTION:
                found.append(Setting(key, value, origin))
        order = [section, *(origin for _, origin in written)]
        methods.append(
            (variant.label, tuple(sorted(found, key=lambda setting: order.index(setting.origin))))
        )
    return UsedSettings(
        tuple(methods), _note(source, section, [variant.label for variant in points])
    )


def _defaults(name: str) -> dict[str, Any]:
    kind: type[Algorithm] = register_algorithm[name]
    try:
        return kind().model_dump()
    except ValidationError:  # a custom method with a required setting
        return kind.model_construct().model_dump()


def _origin(key: str, overrides: Sequence[tuple[str, str]], otherwise: str) -> str:
    """Return the origin of the last override that sets the key or a part of it."""
    for override, origin in reversed(overrides):
        named = override.partition("=")[0]
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
