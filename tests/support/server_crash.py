"""Crashes of the server process at chosen points of a run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hetero_fl.federation.asynchronous import AsynchronousTrainer
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.reporting import report
from hetero_fl.reporting.run_directory import RunDirectory

# Each point is a function, and whether the process stops after or before it.
POINTS = {
    "clients have trained, nothing is committed": ([StateStore], "commit", "before"),
    "a round is over, nothing is written": (
        [SynchronousTrainer, AsynchronousTrainer],
        "run_round",
        "after",
    ),
    "its line is written, its checkpoint is not": ([RunDirectory], "append_metrics", "after"),
}


def wait_at(point: str, waiting: Path) -> None:
    """Let this process stop at the second call of a point, where it can be killed.

    Args:
        point: A key of `POINTS`.
        waiting: File to create when the process has stopped.
    """
    owners, name, moment = POINTS[point]
    for owner in owners:
        _wait_in(owner, name, moment, waiting)


def _wait_in(owner: type, name: str, moment: str, waiting: Path) -> None:
    plain = getattr(owner, name)
    calls = 0

    def wait(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and moment == "before":
            _wait(waiting)
        result = plain(*given)
        if calls == 2 and moment == "after":
            _wait(waiting)
        return result

    setattr(owner, name, wait)


def kill_in_rounds(rounds: Collection[int]) -> None:
    """Let this process kill itself at the end of rounds, before their results are written.

    The first round of a process completes, so that a resumed run makes progress.

    Args:
        rounds: Numbers of the rounds, from 1.
    """
    for trainer in (SynchronousTrainer, AsynchronousTrainer):
        _kill_in(trainer, rounds)


def kill_before_report() -> None:
    """Let this process kill itself after writing results and before writing the report."""

    def kill(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    report.write_report = kill


def _kill_in(trainer: type[FederatedTrainer], rounds: Collection[int]) -> None:
    run_round = trainer.run_round
    calls = 0

    def kill(self: FederatedTrainer) -> Any:
        nonlocal calls
        calls += 1
        record = run_round(self)
        if calls > 1 and self.completed in rounds:
            os.kill(os.getpid(), signal.SIGKILL)
        return record

    trainer.run_round = kill  # type: ignore[method-assign]


def _wait(waiting: Path) -> None:
    waiting.touch()
    time.sleep(10_000)
