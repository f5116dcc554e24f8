"""The runs of a comparison, and the processes that execute them."""

from __future__ import annotations

import copy
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.process import BaseProcess
from pathlib import Path
from traceback import format_exc
from typing import Any

from hetero_fl.core.task import Task
from hetero_fl.experiment.runner import run
from hetero_fl.federation.evaluation import Record
from hetero_fl.reporting.formatting import format_duration, format_final_evaluation
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import LOG, RunDirectory, has_run
from hetero_fl.reporting.summary import mean_validation_score
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import use_one_core
from hetero_fl.utils.errors import ArgumentError, RunFailedError, UserError
from hetero_fl.utils.processes import (
    ADVICE,
    UNGUARDED,
    adopt_environment,
    exit_with_parent,
    ignore_interrupts_in_children,
    worker_context,
)
from hetero_fl.utils.recorded_warnings import RecordedWarning, issue_warnings, record_warnings
from hetero_fl.utils.registry import pack_objects, split_label, unpack_objects
from hetero_fl.utils.text import pluralize

Source = str | Path | Mapping[str, Any]
Point = tuple[str, ...]
"""A point of the tuning grid: one string `key=value` for each key of the grid."""


MAX_FOLDER_NAME = 180
"""Length from which the name of a run directory is abbreviated. File systems allow 255 bytes."""

WAS_KILLED = "its process was killed, possibly for lack of memory"
KILLED = f"{WAS_KILLED}; run the command again to continue"
"""Error message of a run whose process was killed."""


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
    on_end: Callable[[ComparisonJob, str | None], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[ComparisonJob, str]:
    """Execute runs in worker processes.

    When a run ends, the function logs the scores or the error, and the estimated remaining time. If
    a run raises an exception or its process is killed, only this run fails.

    Args:
        source: The configuration.
        base: Overrides for all runs.
        work: The runs. Runs that have already finished are skipped.
        jobs: Number of runs at a time.
        progress: Progress display, which also writes the log.
        allow_code: Whether code that a file refers to may be executed (see
            `hetero_fl.load_config`).
        on_end: Function that is called with each run that has ended and its error message, which is
            None if the run has finished.
        should_stop: Function that is called when a run has ended, and returns whether to start no
            further runs.

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
    waiting = deque(work)
    running: dict[Future[Any], ComparisonJob] = {}
    done = 0
    with JobPool(source, [x for job in work for x in job.overrides]) as pool:
        while waiting or running:
            while waiting and len(running) < pool_size:
                job = waiting.popleft()
                overrides = [*base, *job.overrides]
                running[pool.submit(run_job, source, overrides, job.out, allow_code)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                done += 1
                error = pool.release(future)
                if error is not None:
                    failed[job] = error
                result = f"failed: {error}" if error is not None else _format_scores(job.out)
                mark = " (finished before)" if job in schedule.finished_before else ""
                line = f"{job}{mark}: {result} {schedule.remaining_after(job)}"
                progress.finish_job(line, done, len(work))
                if on_end is not None:
                    on_end(job, error)
                if should_stop():
                    waiting.clear()
    return failed


class JobPool:
    """Worker processes that execute runs, each on one core.

    Leaving the context with an error, such as an interrupt, terminates the workers. The interrupted
    runs can be resumed.

    Args:
        source: The configuration.
        overrides: Overrides of all runs, as `key.path=value`, whose objects the workers need.
    """

    def __init__(self, source: Source, overrides: Sequence[str]) -> None:
        self._workers: list[BaseProcess] = []
        self._context = _record_processes(worker_context(__name__), self._workers)
        values = [override.partition("=")[2] for override in overrides]
        self._environ = (dict(os.environ), pack_objects(source, values))
        # Each pool has one process, because a killed process breaks all processes of its pool.
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[Any], ProcessPoolExecutor] = {}
        self._warned: set[RecordedWarning] = set()

    def __enter__(self) -> JobPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for worker in self._workers:
                worker.terminate()
        for pool in (*self._idle, *self._busy.values()):
            pool.shutdown(cancel_futures=kind is not None)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call a function in an idle worker process, or in a new one if all are busy.

        The result of the future consists of the result of the function, its warnings, and the
        message of the exception that it has raised, or None.

        Raises:
            UserError: If the calling script has no `__main__` guard.
        """
        if not self._idle:
            new = ProcessPoolExecutor(1, self._context, start_worker, self._environ)
            self._idle.append(new)
        try:
            with ignore_interrupts_in_children():
                future = self._idle[-1].submit(_with_warnings, function, *arguments)
        except BrokenPipeError:
            # A worker that imports a script without a `__main__` guard exits before reading a task.
            raise UserError(ADVICE) from None
        self._busy[future] = self._idle.pop()
        return future

    def release(self, future: Future[Any]) -> str | None:
        """Make the process of a call that has ended idle again.

        Returns:
            The error message of the call, `KILLED` if its process was killed, or None if the call
            has succeeded.

        Raises:
            UserError: If the calling script has no `__main__` guard.
        """
        pool = self._busy.pop(future)
        try:
            _, recorded, error = future.result()
        except BrokenProcessPool:
            # Exit codes are only known after the shutdown.
            pool.shutdown()
            if any(worker.exitcode == UNGUARDED for worker in self._workers):
                raise UserError(ADVICE) from None
            return KILLED
        except Exception as failure:
            # The arguments or the result cannot be pickled.
            self._idle.append(pool)
            return str(failure)
        self._idle.append(pool)
        # A filter of the user may turn warnings into errors, which are none of the call.
        issue_warnings(recorded, self._warned)
        return error


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
    exit_with_parent()
    unpack_objects(objects)
    use_one_core()


def _with_warnings(
    function: Callable[..., Any], *arguments: Any
) -> tuple[Any, list[RecordedWarning], str | None]:
    """Return the result of a function, its warnings, and the message of its exception or None."""
    result = None
    message = None
    with record_warnings() as recorded:
        try:
            result = function(*arguments)
        except Exception as error:
            message = str(error)
    return result, recorded, message


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
    with log_unexpected(out):
        run(source, out=out, resume=has_run(out), overrides=overrides, allow_code=allow_code)


@contextmanager
def log_unexpected(out: Path, *expected: type[Exception]) -> Iterator[None]:
    """Convert an unexpected exception of a run to `RunFailedError`, and log its traceback.

    Args:
        out: The run directory.
        expected: Types of exceptions to leave unchanged, in addition to those of failed runs.
    """
    log = out / LOG
    size = log.stat().st_size if log.exists() else 0
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, RunFailedError, *expected)):
            raise
        out.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            # A run that has started has written the traceback itself.
            if file.tell() == size:
                file.write(format_exc())
        raise RunFailedError(f"{type(error).__name__}: {error} (see {log})") from None


def run_folder(variant: Variant, point: Point, seed: int) -> str:
    """Return the name of the run directory of a variant, a grid point and a seed.

    The end of a long name is replaced by a hash.
    """
    parts = [variant.label, *point, f"seed{seed}"]
    name = "-".join(
        "".join(c if c.isalnum() or c in "._=" else "_" for c in part) for part in parts
    )
    if len(name) <= MAX_FOLDER_NAME:
        return name
    digest = sha256("\n".join(parts).encode()).hexdigest()[:12]
    return f"{name[:MAX_FOLDER_NAME]}-{digest}-seed{seed}"


def point_values(point: Point) -> dict[str, str]:
    """Return the values of a grid point, keyed by key path."""
    return {key: value for key, _, value in (entry.partition("=") for entry in point)}


def last_evaluation(finished: Run) -> Record:
    """Return the record of the last evaluated round of a finished run."""
    return next(record for record in reversed(finished.metrics) if record.get("validation"))


def final_validation_score(finished: Run, task: Task) -> float | None:
    """Return the mean of the local and global validation scores in the last evaluation.

    Larger is better. The result is None if the evaluation has no validation score.
    """
    return mean_validation_score(task, last_evaluation(finished))
