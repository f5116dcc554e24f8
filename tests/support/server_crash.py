"""Crashes of the server process at chosen points of a run."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from hetero_fl import run
from hetero_fl.federation.asynchronous import AsynchronousTrainer
from hetero_fl.federation.store import StateStore
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.reporting import report
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.processes import worker_context

# Each point is a function, and whether the process stops before or after a call of it.
POINTS: dict[str, tuple[list[Any], str, str, int]] = {
    "clients have trained, nothing is committed": ([StateStore], "commit", "before", 2),
    "a round is over, nothing is written": (
        [FederatedTrainer, AsynchronousTrainer],
        "run_round",
        "after",
        2,
    ),
    "its line is written, its checkpoint is not": ([RunDirectory], "append_metrics", "after", 2),
    "the results are written, the report is not": ([report], "write_report", "before", 1),
}
PATIENCE = 300.0
"""Seconds to wait for a process, because the machine may be busy."""


def start_run(source: dict[str, Any], out: Path, point: str | None = None) -> Any:
    """Start a process that starts or resumes a run.

    Args:
        source: The configuration.
        out: Folder of the run.
        point: A key of `POINTS` at which the process stops, or None.
    """
    process = worker_context().Process(target=_resume, args=(source, str(out), point))
    process.start()
    return process


def kill_at(point: str, source: dict[str, Any], out: Path) -> None:
    """Start or resume a run in a process that is killed at a point of `POINTS`."""
    process = start_run(source, out, point)
    wait_for(_sign(out), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, point


def wait_for(path: Path, process: Any) -> None:
    """Wait until a path exists or a process has ended."""
    end = time.monotonic() + PATIENCE
    while not path.exists() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)


def _resume(source: dict[str, Any], out: str, point: str | None) -> None:
    if point is not None:
        wait_at(point, _sign(Path(out)))
    run(source, out=out, resume=True)


def _sign(out: Path) -> Path:
    """Return the file that a process creates when it has stopped."""
    return out.with_name(f"{out.name}.waits")


def wait_at(point: str, waiting: Path) -> None:
    """Let this process stop at a point, where it can be killed.

    Args:
        point: A key of `POINTS`.
        waiting: File to create when the process has stopped.
    """
    owners, name, moment, number = POINTS[point]
    for owner in owners:
        _wait_in(owner, name, moment, number, waiting)


def _wait_in(owner: Any, name: str, moment: str, number: int, waiting: Path) -> None:
    plain = getattr(owner, name)
    calls = 0

    def wait(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and moment == "before":
            _wait(waiting)
        result = plain(*given)
        if calls == number and moment == "after":
            _wait(waiting)
        return result

    setattr(owner, name, wait)


def _wait(waiting: Path) -> None:
    waiting.touch()
    time.sleep(10_000)
