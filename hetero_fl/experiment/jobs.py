"""The runs of a comparison, carried out side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_fl.brackets import pieces
from hetero_fl.children import ADVICE, UNGUARDED, deaf_children
from hetero_fl.environment import take_one_core
from hetero_fl.errors import RunFailed, UserError
from hetero_fl.experiment.single import run
from hetero_fl.own_code import CodePermission
from hetero_fl.reporting.progress import Progress

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


def run_all(
    source: Source,
    base: list[str],
    work: list[Job],
    jobs: int,
    progress: Progress,
    allow_code: bool | CodePermission = False,
) -> dict[Job, str]:
    """Carry the runs out, some at a time, in processes of their own. Returns the failed ones with the reason."""
    failed: dict[Job, str] = {}
    progress.log(f"{len(work)} runs, {jobs} at a time")
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
                    progress.log(f"{done}/{len(work)} {job.variant.label} {' '.join(job.point)} seed {job.seed}")
                except BrokenProcessPool:
                    pool.shutdown()  # their exit statuses are known then
                    if any(worker.exitcode == UNGUARDED for worker in workers):
                        raise UserError(ADVICE) from None
                    failed[job] = "its process was killed (memory?); run the command again to go on"
                except (UserError, RunFailed) as error:
                    failed[job] = str(error)
                    progress.log(f"{done}/{len(work)} {job.variant.label} seed {job.seed} failed: {error}")
        except KeyboardInterrupt:
            for worker in workers:  # each goes on from its newest checkpoint
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def run_one(source: Source, overrides: list[str], out: Path, allow_code: bool | CodePermission = False) -> None:
    """A run in a process of its own; one that was interrupted goes on, one that has finished is left alone."""
    run(source, out=out, resume=True, overrides=overrides, allow_code=allow_code)
