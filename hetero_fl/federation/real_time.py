"""Trainers for deployments, in which clients on other machines may connect and disconnect."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from typing_extensions import override

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
from hetero_fl.federation.simulation.sampling import MAX_WAIT, POLL_INTERVAL
from hetero_fl.federation.simulation.schedule import Schedule
from hetero_fl.federation.state_store import PrivateState
from hetero_fl.federation.trainer import FederatedTrainer, Record
from hetero_fl.federation.upload_collector import UploadCollector
from hetero_fl.utils.errors import RunFailedError

# Kinds of replies that contain an upload.
UPLOADS = ("upload", "train")


class Stopwatch:
    """Stopwatch for the wall-clock time of a run.

    The time between a crash and the resumption of the run does not count.

    Args:
        elapsed: Time of the run before the start of the stopwatch, in seconds.
    """

    def __init__(self, elapsed: float = 0.0) -> None:
        self._start = time.monotonic() - elapsed

    def elapsed(self) -> float:
        """Return the time of the run in seconds, which starts at the argument `elapsed`."""
        return time.monotonic() - self._start


def reset_record(executor: RemoteExecutor) -> dict[str, Any]:
    """Return the entry of a round's record with the clients that have lost their private state.

    The result is empty if no client has lost its private state since the previous call.
    """
    clients = executor.pop_reset_clients()
    return {"reset": clients} if clients else {}


class RemoteClientsTrainer(FederatedTrainer):
    """Base class of trainers whose clients, on other machines, store the private states.

    The time of the run is measured. The arguments are those of the trainer that is the second base
    class.
    """

    executor: RemoteExecutor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stopwatch = Stopwatch()

    @override
    def on_checkpoint(self) -> None:
        self.executor.on_checkpoint()

    @override
    def load_client_states(self, states: Mapping[str, PrivateState]) -> None:
        self.executor.send_states(states)
        self.store.commit()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.stopwatch = Stopwatch(self.now)


class RemoteSynchronousTrainer(RemoteClientsTrainer, ScheduledTrainer):
    """Synchronous trainer with clients on other machines.

    A round ends when enough uploads have arrived or the deadline has passed. The arguments are the
    same as those of `ScheduledTrainer`.
    """

    @override
    def run_round(self) -> Record:
        self.now = self.stopwatch.elapsed()
        return super().run_round()

    @override
    def run_tasks(self, collector: UploadCollector) -> Schedule:
        self._sampled_at = self.stopwatch.elapsed()
        schedule = super().run_tasks(collector)
        self.now = self.stopwatch.elapsed()
        return replace(schedule, end=self.now, failed=collector.failed)

    @override
    def replies(
        self,
        schedule: Schedule,
        collector: UploadCollector,
        exchange: Exchange,
        clients: Sequence[str],
    ) -> Iterator[tuple[str, Reply]]:
        requests = partial(collector.request, exchange)
        arrivals = self.executor.as_completed(clients, requests, waits=exchange.waits_for_nodes)
        return in_order(clients, self._in_time(schedule, clients, arrivals))

    def _in_time(
        self, schedule: Schedule, clients: Sequence[str], arrivals: Iterator[tuple[str, Reply]]
    ) -> Iterator[tuple[str, Reply]]:
        """Yield replies until enough uploads have arrived, then an error for each late client."""
        tasks = schedule.tasks
        running = dict.fromkeys(clients)
        num_required = min(len(tasks), self.per_round or len(tasks))
        num_uploads = 0
        for client_id, reply in arrivals:
            tasks[client_id] = replace(tasks[client_id], end=self.stopwatch.elapsed())
            del running[client_id]
            num_uploads += isinstance(reply, Message) and reply.kind in UPLOADS
            yield client_id, reply
            # Free the upload before the next one arrives.
            del reply
            if num_uploads == num_required < len(tasks):
                break
        for client_id in running:
            tasks[client_id] = replace(tasks[client_id], end=math.inf)
            yield client_id, ClientLateError("the round has ended")

    @override
    def time_record(self, start: float) -> dict[str, Any]:
        wall = {"start": start, "end": self.now}
        return {"wall": wall, **self.task_record(), **reset_record(self.executor)}

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"now": self.now}


class RemoteAsynchronousTrainer(RemoteClientsTrainer, AsynchronousTrainer):
    """Asynchronous trainer with clients on other machines.

    Clients are sampled among the connected clients. If the same clients are connected and the
    uploads arrive in the same order, the results of two runs are bit-identical. After a crash of
    the server, tasks in flight are sent again unchanged. The arguments are the same as those of
    `AsynchronousTrainer`.
    """

    time_kind = "wall"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Reasons why clients did not reply since the last aggregation, keyed by client id. These
        # clients are not sampled.
        self._unresponsive: dict[str, str] = {}

    @override
    def run_round(self) -> Record:
        self.now = self.stopwatch.elapsed()
        return super().run_round() | reset_record(self.executor)

    @override
    def _next_task(self) -> ClientTask:
        deadline = time.monotonic() + MAX_WAIT
        while math.isinf(self.queue.next_end):
            self._assign_tasks()
            if not len(self.queue) and time.monotonic() > deadline:
                raise RunFailedError(
                    f"round {self.completed + 1}: no client connected for {MAX_WAIT / 3600:g} hours"
                )
            for task in self.queue.pop_uncomputed():
                self.executor.dispatch(task.client, partial(self._request, task))
            arrival = self.executor.next_reply(POLL_INTERVAL)
            if arrival is None:
                continue
            client, reply = arrival
            (task,) = (task for task in self.queue if task.client == client)
            if isinstance(reply, Message):
                task.upload = reply
            else:
                task.failure = str(reply)
                if isinstance(reply, ClientAbsentError):
                    self._unresponsive[client] = task.failure
            task.end = self.stopwatch.elapsed()
            self.queue.set_end(task)
        return self.queue.pop()

    def _request(self, task: ClientTask, _client: str) -> Message:
        return task.request

    @override
    def _idle_clients(self) -> tuple[int, Callable[[int], int]]:
        # Clients that did not reply are sampled again after the next aggregation, or if no other
        # clients are connected.
        connected = set(self.executor.connected_clients())
        busy = {task.client for task in self.queue}
        if not busy and not connected - self._unresponsive.keys():
            time.sleep(POLL_INTERVAL)
            self._unresponsive.clear()
        idle = connected - busy - self._unresponsive.keys()
        positions = [i for i, client_id in enumerate(self.ids) if client_id in idle]
        return len(positions), positions.__getitem__

    @override
    def _end_time(self, client: str, down: int, up: int, number: int, fault: FaultOutcome) -> float:
        return math.inf

    @override
    def _receive_upload(self, task: ClientTask) -> Payload:
        if task.client in self._unresponsive and task.failure is not None:
            raise TaskFailedError(task.failure, "fault")
        return super()._receive_upload(task)

    @override
    def _aggregate(self) -> None:
        super()._aggregate()
        self._unresponsive.clear()
