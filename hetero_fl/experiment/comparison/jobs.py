"""The runs of a comparison, each in a process of its own, restricted to one core."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from traceback import format_exc
from typing import Any

from hetero_fl.config import resolve_config
from hetero_fl.experiment.configuration import describe_changes
from hetero_fl.experiment.preparation import PreparedRun, prepare
from hetero_fl.experiment.runner import run_prepared
from hetero_fl.reporting.formatting import format_duration, format_final_evaluation
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run_directory import LOG, RunDirectory, check_vacant, has_run
from hetero_fl.utils.code_permission import AllowCode
from hetero_fl.utils.environment import use_one_core
from hetero_fl.utils.errors import ArgumentError, RunFailedError, UserError
from hetero_fl.utils.processes import (
    ADVICE,
    UNGUARDED,
    begin_worker,
    ignore_interrupts_in_children,
    worker_context,
)
from hetero_fl.utils.recorded_warnings import RecordedWarning, issue_warnings, record_warnings
from hetero_fl.utils.registry import pack_objects, split_label, unpack_objects
from hetero_fl.utils.text import pluralize

Source = str | Path | Mapping[str, Any]
Point = tuple[str, ...]
"""Values of tuned settings: one string `key=value` for each configuration key."""

MAX_FOLDER_NAME = 180
"""Length from which the name of a run directory is abbreviated. File systems allow 255 bytes."""
POLL_SECONDS = 0.5
"""Time between two decisions whether to stop a run early."""
KILLED = "its process was killed, possibly for lack of memory; run the command again to continue"
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
class Job:
    """A run with a variant, a point and a seed.

    Args:
        variant: The algorithm and its settings.
        point: Values of the tuned settings.
        seed: The seed of the run.
        out: The run directory.
    """

    variant: Variant
    point: Point
    seed: int
    out: Path

    @classmethod
    def in_folder(cls, folder: Path, variant: Variant, point: Point, seed: int) -> Job:
        """Create a job whose run directory is in a folder and is named after the job.

        The end of a long name is replaced by a hash.
        """
        parts = [variant.label, *point, f"seed{seed}"]
        name = "-".join(
            "".join(c if c.isalnum() or c in "._=" else "_" for c in part) for part in parts
        )
        if len(name) > MAX_FOLDER_NAME:
            digest = sha256("\n".join(parts).encode()).hexdigest()[:12]
            name = f"{name[:MAX_FOLDER_NAME]}-{digest}-seed{seed}"
        return cls(variant, point, seed, folder / name)

    @property
    def overrides(self) -> list[str]:
        """Changes to the configuration for this run, as `key.path=value`."""
        return [*self.variant.overrides, *self.point, f"seed={self.seed}"]

    def __str__(self) -> str:
        return " ".join([self.variant.label, *self.point, f"seed {self.seed}"])


def describe_scores(job: Job) -> str:
    """Return the test scores of a finished run in one line."""
    finished = RunDirectory.open(job.out)
    return format_final_evaluation(finished.summary(), finished.details().get("unit", ""))


def run_jobs(
    source: Source,
    base: Sequence[str],
    jobs: Sequence[Job],
    at_once: int,
    progress: Progress,
    *,
    allow_code: AllowCode = False,
    describe: Callable[[Job], str] = describe_scores,
    should_stop: Callable[[Job], bool] | None = None,
) -> Iterator[tuple[Job, str | None]]:
    """Execute runs, each in a worker process, and log the result of each run.

    Interrupted runs are resumed. If a run raises an exception or its process is killed, only this
    run fails. If the iteration ends early, for example by an interrupt, all processes are ended.

    Args:
        source: The configuration.
        base: Overrides of all runs.
        jobs: The runs.
        at_once: Number of runs at a time.
        progress: Progress display, which also writes the log.
        allow_code: Whether code that a file refers to may be executed (see
            `hetero_fl.load_config`).
        describe: Function that returns the result of a run that has not failed, for the log.
        should_stop: Function that returns whether to stop a run before its last round, which is
            called repeatedly. If None, no run is stopped.

    Yields:
        Each run that has ended or was stopped, and its error message, which is None if the run has
        not failed.

    Raises:
        UserError: If the calling script has no `__main__` guard.
    """
    parallel = f", {at_once} at a time" if min(at_once, len(jobs)) > 1 else ""
    progress.log(f"{pluralize(len(jobs), 'run')}{parallel}")
    started = time.monotonic()
    todo = {job for job in jobs if not RunDirectory(job.out).finished}
    num_new = len(todo)
    tasks = {
        job: partial(run_job, source, [*base, *job.overrides], job.out, allow_code) for job in jobs
    }
    objects = pack_objects(source, [o.partition("=")[2] for job in jobs for o in job.overrides])
    with closing(_run_processes(tasks, objects, at_once, should_stop)) as ended:
        for done, (job, error) in enumerate(ended, 1):
            mark = "" if job in todo else " (finished before)"
            todo.discard(job)
            result = f"failed: {error}" if error is not None else describe(job)
            left = ""
            if todo and len(todo) < num_new:
                # Wall time includes startup and plots, and accounts for runs in parallel.
                seconds = (time.monotonic() - started) / (num_new - len(todo)) * len(todo)
                left = f"(about {format_duration(seconds)} left)"
            progress.finish_job(f"{job}{mark}: {result} {left}", done, len(jobs))
            yield job, error


def _run_processes(
    tasks: Mapping[Job, Callable[[], None]],
    objects: bytes,
    at_once: int,
    should_stop: Callable[[Job], bool] | None,
) -> Generator[tuple[Job, str | None], None, None]:
    """Execute tasks in processes, and yield each job that has ended with its error message."""
    context = worker_context(__name__)
    warned: set[RecordedWarning] = set()
    waiting = deque(tasks)
    running: dict[Connection, tuple[BaseProcess, Job]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                if should_stop is not None and should_stop(job):
                    yield job, None
                    continue
                receiver, sender = context.Pipe(duplex=False)
                arguments = (sender, dict(os.environ), objects, tasks[job])
                process = context.Process(target=_work, args=arguments)
                # An interrupt while the process starts is raised after it has started.
                running[receiver] = (process, job)
                _start(process)
                sender.close()
            timeout = None if should_stop is None else POLL_SECONDS
            for connection in wait(list(running), timeout):
                assert isinstance(connection, Connection)
                worker, job = running.pop(connection)
                yield job, _receive_result(connection, worker, warned)
            for connection, (worker, job) in list(running.items()):
                if should_stop is not None and should_stop(job):
                    del running[connection]
                    _end(worker)
                    yield job, None
    finally:
        for worker, _ in running.values():
            _end(worker)


def _start(process: BaseProcess) -> None:
    try:
        with ignore_interrupts_in_children():
            process.start()
    except BrokenPipeError:
        # A worker that imports a script without a `__main__` guard exits before reading its task.
        raise UserError(ADVICE) from None


def _end(process: BaseProcess) -> None:
    """End the process of a run, which can be resumed, if it has started."""
    if process.pid is not None:
        process.terminate()
        process.join()


def _receive_result(
    receiver: Connection, process: BaseProcess, warned: set[RecordedWarning]
) -> str | None:
    """Return the error message of a process that has ended, or None, and issue its warnings.

    Raises:
        UserError: If the calling script has no `__main__` guard.
    """
    with receiver:
        try:
            error, recorded = receiver.recv()
        except EOFError:
            process.join()
            if process.exitcode == UNGUARDED:
                raise UserError(ADVICE) from None
            return KILLED
    process.join()
    issue_warnings(recorded, warned)
    return None if error is None else str(error)


def _work(
    sender: Connection, environ: Mapping[str, str], objects: bytes, task: Callable[[], None]
) -> None:
    """Execute a task in a new process, and send its error message or None, and its warnings."""
    begin_worker(environ)
    unpack_objects(objects)
    use_one_core()
    message = None
    with record_warnings() as recorded:
        try:
            task()
        except Exception as error:
            message = str(error)
    sender.send((message, recorded))


def run_job(source: Source, overrides: list[str], out: Path, allow_code: AllowCode = False) -> None:
    """Execute one run. An interrupted run is resumed, and a finished run is skipped.

    Args:
        source: The configuration.
        overrides: Changes to the configuration, as `key.path=value`.
        out: The run directory.
        allow_code: Whether code that a file refers to may be executed (see
            `hetero_fl.load_config`).

    Raises:
        UserError: If the configuration is invalid, or differs from that of a run in `out`.
        RunFailedError: If the run fails. The traceback of an unexpected exception is logged.
    """
    log = out / LOG
    size = log.stat().st_size if log.exists() else 0
    try:
        prepared = prepare(source, overrides, allow_code=allow_code)
        check_same_run(prepared, out)
        run_prepared(prepared, out=out, resume=has_run(out))
    except (UserError, RunFailedError):
        raise
    except Exception as error:
        out.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            # A run that has started has written the traceback itself.
            if file.tell() == size:
                file.write(format_exc())
        raise RunFailedError(f"{type(error).__name__}: {error} (see {log})") from None


def check_same_run(prepared: PreparedRun, out: Path) -> None:
    """Check that a run directory is vacant or contains a run with the same settings.

    Unlike a single run, a run of a comparison is not extended to more rounds.

    Raises:
        UserError: If the settings differ, or if the folder contains something else.
    """
    if not has_run(out):
        check_vacant(out)
        return
    saved = RunDirectory.open(out).config()
    if differs := describe_changes(saved, resolve_config(prepared.config)):
        raise ArgumentError(f"out: {out} has other settings ({differs}); choose another folder")
