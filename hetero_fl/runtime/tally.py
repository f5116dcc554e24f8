"""What a cohort's worth of an asynchronous run's events came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hetero_fl.payload import Payload, loss_of
from hetero_fl.runtime.queue import Task
from hetero_fl.runtime.readings import Record


@dataclass
class Tally:
    """`cohort`: whose uploads were taken, in the order in which they came; `failed`: why others' were not, the last time;
    `staleness`: how many were taken that were so many versions old; `tasks`: client, begin, end and what came of it."""

    start: float
    cohort: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    staleness: Counter[int] = field(default_factory=Counter)
    tasks: list[list[Any]] = field(default_factory=list)

    def took(self, task: Task, payload: Payload, versions: int) -> None:
        """A task's upload was taken, so many versions after it was given out."""
        self.cohort.append(task.client)
        self.tasks.append([task.client, task.begun, task.ends, "arrived"])
        self.staleness[versions] += 1
        if (loss := loss_of(payload.report)) is not None:
            self.losses[task.client] = loss

    def lost(self, task: Task, why: str) -> None:
        """Nothing came of a task that could be used."""
        self.failed[task.client] = why
        self.tasks.append([task.client, task.begun, task.ends, "failed"])

    def record(self, now: float, version: int, time: str) -> Record:
        """What `metrics.jsonl` says of it; `time`: its kind. Nobody is late: whatever comes, comes into the next version."""
        arrived, invited = len(self.cohort), len(self.tasks)
        return {
            "cohort": self.cohort,
            "failed": self.failed,
            "train_loss": self.losses,
            time: {"start": self.start, "end": now},
            "counts": {"invited": invited, "arrived": arrived, "failed": invited - arrived, "late": 0},
            "tasks": self.tasks,
            "version": version,
            "staleness": {str(versions): count for versions, count in sorted(self.staleness.items())},
        }
