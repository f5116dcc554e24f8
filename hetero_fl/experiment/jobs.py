"""The runs of a comparison, carried out side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hetero_fl.brackets import pieces
from hetero_fl.children import ADVICE, UNGUARDED, deaf_children
from hetero_fl.environment import take_one_core
from hetero_fl.errors import RunFailed, UserError
from hetero_fl.experiment.single import run
from hetero_fl.own_code import CodePermission
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.rundir import RunDirectory
from hetero_fl.reporting.wording import duration, final

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
        name, *settings = pieces(text, ":")
        if name == "python":  # python:package.module:Class:setting=value
            name, settings = ":".join([name, *settings[:2]]), settings[2:]
        for setting in settings:
            if "=" not in setting:
                raise UserError(f"--algorithms: '{text}': write name:setting=value, found '{setting}'")
        paths = [s if "." in s.split("=")[0] else f"algorithm.{s}" for s in settings]
        return cls(text, (f"algorithm.name={name}", *paths))


@dataclass(frozen=True)
class Job:
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


def run_all(
    source: Source,
    base: list[str],
    work: list[Job],
    jobs: int,
    progress: Progress,
    allow_code: bool | CodePermission = False,
) -> dict[Job, str]:
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
    failed: dict[Job, str] = {}
    progress.log(f"{len(work)} runs, {jobs} at a time")
    schedule = _Schedule(work, jobs)
    others = multiprocessing.active_children()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(work)), spawn, initializer=take_one_core) as pool:
        with deaf_children():
            waiting = {pool.submit(run_one, source, [*base, *job.overrides], job.out, allow_code): job for job in work}
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
                except (UserError, RunFailed) as error:
                    failed[job] = str(error)
                told = f"failed: {failed[job]}" if job in failed else _figures(job.out)
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

    def __init__(self, work: Sequence[Job], jobs: int) -> None:
        self.finished_before = {job for job in work if _has_finished(job.out)}
        self._todo = [job for job in work if job not in self.finished_before]
        self._jobs = jobs
        self._seconds: list[float] = []

    def left_after(self, job: Job) -> str:
        """Return `(about 3 min 20 s left)` after a run has ended; empty while nothing is known, or if it was the last."""
        if job in self._todo:
            self._todo.remove(job)
            if _has_finished(job.out):
                self._seconds.append(RunDirectory(job.out).summary()["seconds"]["total"])
        if not self._todo or not self._seconds:
            return ""
        left = fmean(self._seconds) * len(self._todo) / min(self._jobs, len(self._todo))
        return f"(about {duration(left)} left)"


def _has_finished(out: Path) -> bool:
    return (out / "summary.json").exists()


def _figures(out: Path) -> str:
    finished = RunDirectory.open(out)
    return final(finished.summary(), finished.details().get("unit", ""))


def run_one(source: Source, overrides: list[str], out: Path, allow_code: bool | CodePermission = False) -> None:
    """A run in a process of its own; one that was interrupted goes on, one that has finished is left alone."""
    run(source, out=out, resume=True, overrides=overrides, allow_code=allow_code)
