"""An asynchronous run in real time: clients on machines of their own end when they end, and are given tasks when they are there.

All else is as in a simulation (`asynchronous.py`): who is drawn follows from the order in which uploads come, so that the same
order gives the same bits. A task in flight when the server dies is asked for again, and is the same task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from hetero_fl.errors import RunFailed
from hetero_fl.payload import Payload
from hetero_fl.runtime.asynchronous import Asynchronous, Nothing
from hetero_fl.runtime.executor import Absent
from hetero_fl.runtime.faults import Fate
from hetero_fl.runtime.invitation import LONGEST
from hetero_fl.runtime.plans import Diverged
from hetero_fl.runtime.queue import Task
from hetero_fl.runtime.readings import Record

LOOK = 1.0  # seconds after which vacant places are filled with who has come meanwhile


class Live(Asynchronous):
    """An asynchronous run whose executor is `Apart`."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._resting: dict[str, str] = {}  # why they had no answer

    def _hold(self) -> Record:
        self.now = self.real()
        record = super()._hold()
        if self.apart is not None and (lost := self.apart.anew()):
            record["anew"] = lost
        return record

    def _next(self) -> Task:
        assert self.apart is not None
        until = time.monotonic() + LONGEST
        while math.isinf(self.queue.due):
            self._fill()
            if not len(self.queue) and time.monotonic() > until:
                raise RunFailed(f"round {self.completed + 1}: nobody was there for {LONGEST / 3600:g} hours")
            for task in self.queue.take_open():
                self.apart.dispatch(task.client, task.request)
            if (came := self.apart.next(LOOK)) is None:
                continue
            client, reply = came
            (task,) = (task for task in self.queue if task.client == client)
            if isinstance(reply, Diverged):
                task.diverged = str(reply)
                if isinstance(reply, Absent):
                    self._resting[client] = task.diverged
            else:
                task.upload = reply
            task.ends = self.real()
            self.queue.settle(task)
        return self.queue.pop()

    def _idle(self) -> tuple[int, Callable[[int], int]]:
        """Those who are there, but for those who had no answer: they are asked again after the next version, or if else nobody is
        at it."""
        assert self.apart is not None
        here, busy = set(self.apart.here()), {task.client for task in self.queue}
        if not busy and not here - self._resting.keys():
            time.sleep(LOOK)
            self._resting.clear()
        free = here - busy - self._resting.keys()
        found = [place for place, id in enumerate(self.ids) if id in free]
        return len(found), found.__getitem__

    def _due(self, client: str, down: int, up: int, number: int, fate: Fate) -> float:
        return math.inf

    def _arrival(self, task: Task) -> Payload:
        if task.client in self._resting and task.diverged is not None:
            raise Nothing(task.diverged, "fate")
        return super()._arrival(task)

    def _aggregate(self) -> None:
        super()._aggregate()
        self._resting.clear()
