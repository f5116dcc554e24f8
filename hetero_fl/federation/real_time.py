"""Runs in real time: the clients are on other machines, come and go, and take as long as they take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hetero_fl.communication.protocol import Exchange, Message, Reply
from hetero_fl.core.payload import Payload
from hetero_fl.federation.asynchronous import AsynchronousTrainer, ClientTask, TaskFailedError
from hetero_fl.federation.executors.base import (
    ClientAbsentError,
    ClientLateError,
    RemoteExecutor,
    in_order,
)
from hetero_fl.federation.simulation.faults import FaultOutcome
from hetero_fl.federation.simulation.rounds import ScheduledTrainer
from hetero_fl.federation.simulation.sampling import LONGEST
from hetero_fl.federation.simulation.schedule import Schedule
from hetero_fl.federation.state_store import PrivateState
from hetero_fl.federation.trainer import Record
from hetero_fl.federation.upload_collector import UploadCollector
from hetero_fl.utils.errors import RunFailedError

LOOK = 1.0  # seconds after which free places are given to clients that have connected meanwhile
UPLOADS = ("upload", "train")  # kinds of replies that carry an upload


class Stopwatch:
    """Real seconds since a run began, without those between a crash and a resume."""

    def __init__(self, elapsed: float = 0.0) -> None:
        self._start = time.monotonic() - elapsed

    def elapsed(self) -> float:
        """Return the seconds."""
        return time.monotonic() - self._start


def reset_record(executor: RemoteExecutor) -> dict[str, Any]:
    """Return what a record says of clients that lost their private state."""
    clients = executor.pop_reset_clients()
    return {"anew": clients} if clients else {}


class RemoteSynchronousTrainer(ScheduledTrainer):
    """Synchronous rounds with clients on other machines.

    A round is closed when as many uploads have come as it wants, or the time is over.
    """

    executor: RemoteExecutor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.executor.on_reset = self.broadcasts.reset
        self.stopwatch = Stopwatch()

    def run_round(self) -> Record:
        self.now = self.stopwatch.elapsed()
        return super().run_round()

    def hold(self, collector: UploadCollector, number: int) -> Schedule:
        self._sampled_at = self.stopwatch.elapsed()
        schedule = super().hold(collector, number)
        self.now = schedule.end = self.stopwatch.elapsed()
        return schedule

    def replies(
        self,
        schedule: Schedule,
        collector: UploadCollector,
        exchange: Exchange,
        clients: Sequence[str],
        task: int,
    ) -> Iterator[tuple[str, Reply]]:
        arrivals = self.executor.as_completed(clients, partial(collector.request, exchange))
        return in_order(clients, self._in_time(schedule, clients, arrivals))

    def _in_time(
        self, schedule: Schedule, clients: Sequence[str], arrivals: Iterator[tuple[str, Reply]]
    ) -> Iterator[tuple[str, Reply]]:
        """Yield replies until there are as many uploads as are wanted; the other clients are late."""
        tasks = schedule.tasks
        running = dict.fromkeys(clients)
        wanted = min(len(tasks), self.per_round or len(tasks))
        uploads = 0
        for client_id, reply in arrivals:
            tasks[client_id] = replace(tasks[client_id], end=self.stopwatch.elapsed())
            del running[client_id]
            uploads += isinstance(reply, Message) and reply.kind in UPLOADS
            yield client_id, reply
            del reply  # a model's worth of memory
            if uploads == wanted < len(tasks):
                break
        for client_id in running:
            tasks[client_id] = replace(tasks[client_id], end=math.inf)
            yield client_id, ClientLateError("the round was closed")

    def time_record(self, start: float) -> dict[str, Any]:
        wall = {"start": start, "end": self.now}
        return {"wall": wall, **self.task_record(), **reset_record(self.executor)}

    def on_checkpoint(self) -> None:
        self.executor.on_checkpoint()

    def load_client_states(self, states: Mapping[str, PrivateState]) -> None:
        self.executor.send_states(states)
        self.store.commit()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.now = state.get("now", 0.0)
        self.stopwatch = Stopwatch(self.now)


class RemoteAsynchronousTrainer(AsynchronousTrainer):
    """An asynchronous run in real time: clients end when they end, and are asked when connected.

    Who is drawn follows from the order in which uploads come, so that the same order gives the
    same bits. A task in flight when the server dies is sent again, and is the same task.
    """

    executor: RemoteExecutor
    time_kind = "wall"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.executor.on_reset = self._send_again
        self.stopwatch = Stopwatch()
        self._resting: dict[str, str] = {}  # why they had no answer

    def run_round(self) -> Record:
        self.now = self.stopwatch.elapsed()
        return super().run_round() | reset_record(self.executor)

    def on_checkpoint(self) -> None:
        self.executor.on_checkpoint()

    def load_client_states(self, states: Mapping[str, PrivateState]) -> None:
        self.executor.send_states(states)
        self.store.commit()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.stopwatch = Stopwatch(self.now)

    def _next_task(self) -> ClientTask:
        until = time.monotonic() + LONGEST
        while math.isinf(self.queue.next_end):
            self._assign_tasks()
            if not len(self.queue) and time.monotonic() > until:
                raise RunFailedError(
                    f"round {self.completed + 1}: nobody was there for {LONGEST / 3600:g} hours"
                )
            for task in self.queue.pop_uncomputed():
                self.executor.dispatch(task.client, partial(self._request, task))
            if (came := self.executor.next_reply(LOOK)) is None:
                continue
            client, reply = came
            (task,) = (task for task in self.queue if task.client == client)
            if isinstance(reply, Message):
                task.upload = reply
            else:
                task.diverged = str(reply)
                if isinstance(reply, ClientAbsentError):
                    self._resting[client] = task.diverged
            task.end = self.stopwatch.elapsed()
            self.queue.set_end(task)
        return self.queue.pop()

    def _request(self, task: ClientTask, client: str) -> Message:
        return task.request

    def _send_again(self, client: str) -> None:
        """Have the next request to a client that has lost its state contain the whole model."""
        body = self.broadcasts.reset(client)
        for task in self.queue:
            if task.client == client and body is not None:
                task.broadcast = body
                self.count_traffic(down=len(body))

    def _idle_clients(self) -> tuple[int, Callable[[int], int]]:
        """Those who are there, but for those who had no answer: they are asked again after the next version, or if else nobody is
        at it."""
        here = set(self.executor.connected_clients())
        busy = {task.client for task in self.queue}
        if not busy and not here - self._resting.keys():
            time.sleep(LOOK)
            self._resting.clear()
        free = here - busy - self._resting.keys()
        found = [place for place, id in enumerate(self.ids) if id in free]
        return len(found), found.__getitem__

    def _end_time(self, client: str, down: int, up: int, number: int, fate: FaultOutcome) -> float:
        return math.inf

    def _receive_upload(self, task: ClientTask) -> Payload:
        if task.client in self._resting and task.diverged is not None:
            raise TaskFailedError(task.diverged, "fate")
        return super()._receive_upload(task)

    def _aggregate(self) -> None:
        super()._aggregate()
        self._resting.clear()
