"""Many runs side by side: algorithms × seeds, each tuned alike if wished; what has finished is not run again."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_fl.algorithms import algorithm
from hetero_fl.config import load_config
from hetero_fl.config.load import read
from hetero_fl.errors import RunFailed, UserError
from hetero_fl.experiment.single import prepare, run
from hetero_fl.reporting.compare import comparison_row, write_comparison
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.summary import validation_score
from hetero_fl.task import Task

Source = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """An algorithm with settings of its own: `hybrid:teacher=mean:heads=take`."""

    label: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """From the command line's form. Settings are those of the algorithm, or full key paths."""
        name, *settings = text.split(":")
        if name == "python":  # python:package.module:Class:setting=value
            name, settings = ":".join(text.split(":")[:3]), text.split(":")[3:]
        for setting in settings:
            if "=" not in setting:
                raise UserError(f"--algorithms: '{text}': write name:setting=value, found '{setting}'")
        paths = [s if "." in s.split("=")[0] else f"algorithm.{s}" for s in settings]
        return cls(text, (f"algorithm.name={name}", *paths))


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    variant: Variant
    point: tuple[str, ...]  # of the grid: key=value
    seed: int
    out: Path

    @property
    def overrides(self) -> list[str]:
        """What the run changes in the configuration."""
        return [*self.variant.overrides, *self.point, f"seed={self.seed}"]


def compare(
    source: Source,
    algorithms: Sequence[str] | str,
    seeds: Iterable[int] = (0,),
    *,
    out: str | Path,
    overrides: Iterable[str] = (),
    grid: Mapping[str, Sequence[str]] | None = None,
    jobs: int | None = None,
    quiet: bool = True,
) -> Path:
    """Run every algorithm with every seed and write table, figure and report into `out`.

    `algorithms`: names or variants (`hybrid:teacher=mean`), or "all" for all that can mean something with this
    configuration. `grid`: values to try for keys; each algorithm takes the point with the best mean validation over the
    seeds. `jobs`: runs at a time, by default one per core with one thread each. Raises UserError before anything runs if a
    configuration is impossible; RunFailed, after the others have ended, if a run fails.
    """
    out, base, seeds = Path(out), list(overrides), list(dict.fromkeys(seeds))
    if not seeds:
        raise UserError("--seeds: found none; write whole numbers with commas, such as 0,1,2")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs: found {jobs}; take 1 or more")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    config = load_config(source, base)
    for seed in seeds:
        load_config(source, [*base, f"seed={seed}"])
    variants, left_out = _variants(source, algorithms, base)
    cores = os.cpu_count() or 1
    threads = config.runtime.threads or 1
    base += [] if config.runtime.threads else ["runtime.threads=1"]
    points = [
        tuple(f"{k}={v}" for k, v in zip(grid or {}, p, strict=True)) for p in itertools.product(*(grid or {}).values())
    ]
    work = [Job(v, p, s, out / "runs" / _folder(v, p, s)) for s in seeds for v in variants for p in points]
    tasks = [prepare(source, [*base, *job.overrides]).federation.task for job in work[: len(variants) * len(points)]]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be made ({error.strerror})") from None
    with Progress(out / "log.txt", quiet) as progress:
        for name, why in left_out.items():
            progress.log(f"left out {name}: {why}")
        plain = read(Path(source)) if isinstance(source, str | Path) else source  # the file may change while it runs
        failed = _run_all(plain, base, work, jobs or max(1, cores // threads), progress)
    done = [j for j in work if j not in failed]
    chosen = _choose(done, variants, points, tasks[0])
    notes = [f"{v.label}: {', '.join(p)} (chosen by validation)" for v, p in chosen.items() if p]
    notes += [f"{name} is left out: {why}" for name, why in left_out.items()]
    rows = [
        comparison_row(Run(j.out).summary) | {"algorithm": j.variant.label}
        for j in done
        if j.point == chosen[j.variant]
    ]
    if rows:
        write_comparison(out, rows, title=config.name, note="; ".join(notes), task=tasks[0])
    if failed:
        first, why = next(iter(failed.items()))
        raise RunFailed(f"{len(failed)} of {len(work)} runs failed; {first.variant.label}, seed {first.seed}: {why}")
    return out


def _variants(source: Source, algorithms: Sequence[str] | str, base: list[str]) -> tuple[list[Variant], dict[str, str]]:
    names = algorithms.split(",") if isinstance(algorithms, str) else list(algorithms)
    if names != ["all"]:
        variants = list(dict.fromkeys(Variant.parse(n.strip()) for n in names if n.strip()))
        if not variants:
            raise UserError(f"--algorithms: found none; choose from all, {', '.join(algorithm)}")
        return variants, {}
    kept, left_out = [], {}
    for name in algorithm:
        try:
            prepare(source, [*base, f"algorithm.name={name}"])
            kept.append(Variant.parse(name))
        except UserError as error:
            left_out[name] = str(error)
    return kept, left_out


def _folder(variant: Variant, point: tuple[str, ...], seed: int) -> str:
    parts = [variant.label, *point, f"seed{seed}"]
    return "-".join("".join(c if c.isalnum() or c in "._=" else "_" for c in part) for part in parts)


def _run_all(source: Source, base: list[str], work: list[Job], jobs: int, progress: Progress) -> dict[Job, str]:
    """Carry the runs out, some at a time, in processes of their own. Returns the failed ones with the reason."""
    failed: dict[Job, str] = {}
    progress.log(f"{len(work)} runs, {jobs} at a time")
    with ProcessPoolExecutor(min(jobs, len(work)), multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_one, source, [*base, *job.overrides], job.out): job for job in work}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                job = waiting[future]
                try:
                    future.result()
                    progress.log(f"{done}/{len(work)} {job.variant.label} {' '.join(job.point)} seed {job.seed}")
                except BrokenProcessPool:
                    failed[job] = "its process was killed (memory?); run the command again to go on"
                except (UserError, RunFailed) as error:
                    failed[job] = str(error)
                    progress.log(f"{done}/{len(work)} {job.variant.label} seed {job.seed} failed: {error}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _one(source: Source, overrides: list[str], out: Path) -> None:
    """A run in a process of its own; one that was interrupted goes on, one that has finished is left alone."""
    run(source, out=out, resume=True, overrides=overrides)


def _choose(
    done: list[Job], variants: list[Variant], points: list[tuple[str, ...]], task: Task
) -> dict[Variant, tuple[str, ...]]:
    """For each variant the grid point with the best mean validation over its seeds; ties to the first."""
    if len(points) == 1:
        return dict.fromkeys(variants, points[0])
    scores: dict[tuple[Variant, tuple[str, ...]], list[float]] = {}
    for job in done:
        scores.setdefault((job.variant, job.point), []).append(_validation(Run(job.out), task))
    mean = {key: sum(values) / len(values) for key, values in scores.items()}
    return {v: max(points, key=lambda p: mean.get((v, p), float("-inf"))) for v in variants}


def _validation(finished: Run, task: Task) -> float:
    """The validation of the last round that was read, at home and in common together; larger is better."""
    last = [r for r in finished.metrics if r.get("validation")][-1]
    both = [validation_score(task, last, which) for which in ("personal", "global")]
    known = [v for v in both if v is not None]
    return sum(known) / len(known) if known else float("-inf")
