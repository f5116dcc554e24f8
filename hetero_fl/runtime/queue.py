"""The event queue of an asynchronous run: tasks in flight by the simulated time at which they end, and who is idle."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hetero_fl.channel.protocol import Message
from hetero_fl.codec import as_bytes, as_tensor
from hetero_fl.runtime.faults import Fate


@dataclass
class Task:
    """One client's task, from when it is given out until its upload arrives or fails to. Where time is real, `ends` is infinite
    until it has ended.

    `place`: the client's among all ids; `version`: the server's when the task was given out; `again`: how many tasks of that
    version the client had before; `begun` and `ends` in simulated seconds. What it uploads, or why it cannot, stands in
    `upload` or `diverged` once it has been computed.
    """

    number: int
    client: str
    place: int
    version: int
    again: int
    begun: float
    ends: float
    broadcast: bytes
    up_bytes: int
    fate: Fate
    upload: Message | None = None
    diverged: str | None = None

    @property
    def request(self) -> Message:
        """What the client is asked."""
        return Message("train", self.broadcast, self.version, self.again)

    @property
    def computed(self) -> bool:
        """Whether there is nothing left to compute: a task that fails has no effect, and never is."""
        return self.fate.fails or self.upload is not None or self.diverged is not None


class Queue:
    """Tasks in flight, at most one of a client. The next to end comes first; of several that end together, the one given out
    first. An event costs the logarithm of the tasks in flight, whatever the population.
    """

    def __init__(self) -> None:
        self._ends: list[tuple[float, int]] = []
        self._tasks: dict[int, Task] = {}
        self._open: dict[int, Task] = {}  # not computed yet
        self._busy: list[int] = []  # places of the clients in flight, sorted

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        """All of them, in the order in which they were given out."""
        return iter(self._tasks.values())

    @property
    def due(self) -> float:
        """When the next task ends; infinite where that is not known of any."""
        return self._ends[0][0] if self._ends else math.inf

    def push(self, task: Task) -> None:
        """One more; its client must be idle."""
        self._tasks[task.number] = task
        if task.ends < math.inf:
            self.settle(task)
        insort(self._busy, task.place)
        if not task.computed:
            self._open[task.number] = task

    def settle(self, task: Task) -> None:
        """It is known now when this one ends."""
        heapq.heappush(self._ends, (task.ends, task.number))

    @property
    def first(self) -> Task:
        """The next to end."""
        return self._tasks[self._ends[0][1]]

    def pop(self) -> Task:
        """The next to end, which is in flight no more."""
        _, number = heapq.heappop(self._ends)
        task = self._tasks.pop(number)
        self._open.pop(number, None)
        del self._busy[bisect_left(self._busy, task.place)]
        return task

    def take_open(self) -> list[Task]:
        """The tasks that are still to be computed, in the order in which they were given out; they are asked for once."""
        tasks = list(self._open.values())
        self._open.clear()
        return tasks

    def idle(self, rank: int) -> int:
        """The place of the idle client that has so many idle ones before it."""
        return rank + bisect_right(range(len(self._busy)), rank, key=lambda i: self._busy[i] - i)

    # Checkpoints -------------------------------------------------------------------------------------------------
    def tree(self) -> dict[str, Any]:
        """All that `of` needs; equal broadcasts once."""
        broadcasts: dict[bytes, int] = {}
        rows = []
        for t in self:
            at = broadcasts.setdefault(t.broadcast, len(broadcasts))
            rows.append([t.number, t.client, t.place, t.version, t.again, t.begun, t.ends, at, t.up_bytes, t.diverged])
        return {
            "tasks": rows,
            "broadcasts": {str(at): as_tensor(body) for body, at in broadcasts.items()},
            "uploads": {str(t.number): as_tensor(t.upload.body) for t in self if t.upload is not None},
        }

    @classmethod
    def of(cls, tree: dict[str, Any], fates: Any) -> Queue:
        """The reverse of `tree`. `fates(client, number)`: what befalls a task, which is drawn by the key and not kept."""
        queue = cls()
        broadcasts = {int(at): as_bytes(body) for at, body in tree["broadcasts"].items()}
        for number, client, place, version, again, begun, ends, at, up, diverged in tree["tasks"]:
            when, fate = (version, again, begun, ends), fates(client, number)
            task = Task(number, client, place, *when, broadcasts[at], up, fate, diverged=diverged)
            if (upload := tree["uploads"].get(str(number))) is not None:
                task.upload = Message("upload", as_bytes(upload))
            queue.push(task)
        return queue
