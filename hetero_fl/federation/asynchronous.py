"""Asynchronous training: clients train continuously, and the server aggregates buffered uploads.

The version of the server is the number of aggregations so far. The staleness of an upload is the
number of aggregations since the client received the broadcast. See FedAsync (Xie et al. 2019) and
FedBuff (Nguyen et al. 2022).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any

from typing_extensions import override

from hetero_fl.algorithms.base import AsyncPolicy
from hetero_fl.communication.protocol import Message, TrainExchange, encoded
from hetero_fl.config.base import StalenessConfig
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.engine.driver import DivergedError
from hetero_fl.federation.executors.base import Arrival, ClientAbsentError, TimedExecutor
from hetero_fl.federation.round import Record, RoundEvents, check_intact
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.ordering import natural_key
from hetero_fl.utils.seeding import sample_numbers
from hetero_fl.utils.serialization import as_bytes, as_tensor

# Number of consecutive failures because of faults, per concurrent task, after which the run fails.
MAX_CONSECUTIVE_FAULTS = 100
# Seconds without a task or an available client after which the run fails.
MAX_WAIT = 2 * 86400.0


@dataclass(frozen=True)
class ClientTask:
    """Training task of one client that is in flight.

    Attributes:
        number: Number of the task in the run.
        client: Id of the client.
        position: Position of the client's id in the list of all client ids.
        version: Version of the server at the assignment.
        attempt: Number of earlier tasks of the client with the same version.
        start: Time of the assignment in seconds.
        broadcast: The encoded broadcast.
    """

    number: int
    client: str
    position: int
    version: int
    attempt: int
    start: float
    broadcast: bytes

    @property
    def request(self) -> Message:
        """The training request that is sent to the client."""
        return Message("train", self.broadcast, self.version, self.attempt)


def idle_position(busy: Sequence[int], rank: int) -> int:
    """Return the position of an idle client in the list of all clients.

    The cost grows with the number of busy clients, not with the number of all clients.

    Args:
        busy: Positions of the busy clients, sorted.
        rank: Position of the client in the list of idle clients, starting at 0.
    """
    return rank + bisect_right(range(len(busy)), rank, key=lambda i: busy[i] - i)


@dataclass
class BufferEvents(RoundEvents):
    """Events of an asynchronous round, whose cohort are the clients of the accepted uploads.

    Attributes:
        staleness: Number of accepted uploads, keyed by staleness.
        diverged: Reason of the latest divergence of training at the server, or empty.
    """

    staleness: Counter[int] = field(default_factory=Counter)
    diverged: str = ""


class AsynchronousTrainer(FederatedTrainer):
    """Trainer that aggregates uploads asynchronously.

    The server assigns tasks to clients, each with the newest broadcast. When a task ends, the
    server adds the upload to a buffer, with a weight that depends on the staleness of the upload.
    An idle client then receives a new task. Whenever the buffer is full, the server aggregates the
    buffered uploads. A round in `metrics.jsonl` consists of as many accepted uploads as there are
    concurrent tasks.

    Tasks in flight are started again when a run is resumed. Their results are the same, because
    random draws depend only on the version and the attempt.

    Args:
        *args: Arguments of `FederatedTrainer`. `per_round` is the number of concurrent tasks.
        buffer: Number of uploads per aggregation. If None, the number of concurrent tasks. Ignored
            if the method sets the buffer size.
        staleness: Weights of stale uploads. If None, the default `StalenessConfig`. Ignored if the
            method sets the weights.
        **options: Keyword arguments of `FederatedTrainer`.

    Attributes:
        version: Number of aggregations so far.
        in_flight: The task in flight of each busy client, keyed by client id.
        events: What happened in the present round.
    """

    keeps_requests = True
    executor: TimedExecutor

    def __init__(
        self,
        *args: Any,
        buffer: int | None = None,
        staleness: StalenessConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.version = 0
        self.in_flight: dict[str, ClientTask] = {}
        self.ids = self.federation.client_infos.clients.ids
        self.num_concurrent = min(self.per_round or len(self.ids), len(self.ids))
        policy = self.algorithm.needs.asynchronous or AsyncPolicy()
        self.buffer_size = policy.buffer_size or buffer or self.num_concurrent
        self.staleness = policy.staleness or staleness or StalenessConfig()
        self.num_tasks = 0
        # Client id, upload and staleness weight of each accepted upload.
        self._buffer: list[tuple[str, Payload, float]] = []
        # Number of tasks of this version, by client id.
        self._attempts: Counter[str] = Counter()
        # Number of times that clients have been sampled in this version.
        self._num_samples = 0
        # Number of failed tasks since the last accepted upload, by cause.
        self._num_failed: Counter[str] = Counter()
        # Clients that have not replied since the last aggregation, which are not sampled.
        self._unresponsive: set[str] = set()
        self.events = BufferEvents()

    @property
    @override
    def round_idx(self) -> int:
        return self.version

    @override
    def run_round(self) -> Record:
        self.events = BufferEvents(start=self.executor.now)
        with self.rollback_on_error():
            while len(self.events.cohort) < self.num_concurrent:
                arrival = self._next_arrival()
                self._finish_task(self.in_flight.pop(arrival.client), arrival)
        self.events.end = self.executor.now
        record = self.complete_round(self.events)
        record["version"] = self.version
        record["staleness"] = {str(age): n for age, n in sorted(self.events.staleness.items())}
        if self.events.diverged:
            record["diverged"] = self.events.diverged
        return record

    def _next_arrival(self) -> Arrival:
        """Assign tasks, and wait for the next end of a task."""
        idle_since = self.executor.now
        while True:
            # Tasks that end at the same time are all finished before new ones are assigned.
            if not self.executor.has_arrival:
                self._assign_tasks()
            if (arrival := self.executor.next_arrival()) is not None:
                return arrival
            if not self.in_flight and self.executor.now - idle_since > MAX_WAIT:
                raise RunFailedError(
                    f"round {self.completed + 1}: no client connected for {MAX_WAIT / 3600:g} hours"
                )

    def _idle_clients(self) -> tuple[int, Callable[[int], int]]:
        """Return the number of idle clients, and a function that returns the position of each.

        The argument of the function is the position of a client in the list of idle clients,
        starting at 0. The result is the position of the client in the list of all clients.
        """
        available = self.executor.available()
        if available is None:
            busy = sorted(task.position for task in self.in_flight.values())
            return len(self.ids) - len(busy), partial(idle_position, busy)
        idle = set(available) - self.in_flight.keys()
        if not self.in_flight and not idle - self._unresponsive:
            # Clients that did not reply are sampled again if no other clients are available.
            self._unresponsive.clear()
        idle -= self._unresponsive
        positions = [i for i, client_id in enumerate(self.ids) if client_id in idle]
        return len(positions), positions.__getitem__

    def _assign_tasks(self) -> None:
        """Sample idle clients and assign tasks to them, up to the number of concurrent tasks."""
        num_idle, position_of = self._idle_clients()
        num_free = min(self.num_concurrent - len(self.in_flight), num_idle)
        if not num_free:
            return
        self.set_round(self.version)
        # The first sample of a version equals the cohort of a synchronous run.
        repeated = (self._num_samples,) if self._num_samples else ()
        key = (self.federation.seed, self.version, "cohort", *repeated)
        ranks = sample_numbers(num_idle, num_free, *key)
        self._num_samples += 1
        for position in [position_of(rank) for rank in ranks]:
            self._start(self._make_task(self.ids[position], position))

    def _make_task(self, client: str, position: int) -> ClientTask:
        """Create the next task of a client, and count the traffic of the broadcast."""
        number = self.num_tasks
        attempt = self._attempts[client]
        self.num_tasks = number + 1
        self._attempts[client] = attempt + 1
        payload = self.link.broadcast(self.federation.client_infos[client])
        body = encoded(self.link.content(payload))
        self.events.down_bytes += len(body)
        return ClientTask(number, client, position, self.version, attempt, self.executor.now, body)

    def _start(self, task: ClientTask) -> None:
        self.in_flight[task.client] = task
        self.executor.start(task.client, task.request, task.number, task.start)

    def _finish_task(self, task: ClientTask, arrival: Arrival) -> None:
        """Buffer the upload of a task and commit the client's private state, or record the failure.

        Raises:
            RunFailedError: If too many consecutive tasks have failed, or if training diverged and
                `runtime.divergence` is "stop".
        """
        self.check_divergence(arrival)
        self.events.up_bytes += arrival.unused_bytes
        reply = arrival.reply
        if not isinstance(reply, Message):
            if isinstance(reply, ClientAbsentError):
                self._unresponsive.add(task.client)
            self._fail(arrival, str(reply), is_fault=not isinstance(reply, DivergedError))
            return
        self.events.up_bytes += reply.size
        try:
            check_intact(reply)
            payload = self._decode(task, reply)
        except PayloadError as error:
            self._fail(arrival, f"upload refused: {error}", is_fault=not reply.is_intact)
            return
        self.events.tasks.append([task.client, arrival.start, arrival.end, "arrived"])
        self._accept(task, payload)

    def _decode(self, task: ClientTask, reply: Message) -> Payload:
        """Return the upload in a reply.

        Raises:
            PayloadError: If the upload is malformed.
        """
        # The task's own broadcast, of an earlier version: compressed uploads are changes of it.
        received = self.link.channel.decode_broadcast(task.version, task.broadcast)
        client_info = self.federation.client_infos[task.client]
        content = TrainExchange.upload_in(task.client, reply)
        return self.link.decode_upload(client_info, content, received, task.version, task.attempt)

    def _accept(self, task: ClientTask, payload: Payload) -> None:
        """Buffer an upload, commit the client's private state, and aggregate a full buffer."""
        staleness = self.version - task.version
        self.store.commit([task.client])
        self._num_failed.clear()
        self.events.cohort.append(task.client)
        self.events.add_report(task.client, payload)
        self.events.staleness[staleness] += 1
        self._buffer.append((task.client, payload, self.staleness.weight(staleness)))
        if len(self._buffer) >= self.buffer_size:
            self._aggregate()

    def _fail(self, arrival: Arrival, reason: str, *, is_fault: bool) -> None:
        """Record the failure of a task, and discard the client's new private state.

        Args:
            arrival: The end of the task.
            reason: Description of the failure.
            is_fault: Whether the cause is a random or network fault. Other failures, such as
                divergence, would recur.

        Raises:
            RunFailedError: If too many consecutive tasks have failed.
        """
        self.store.discard_client(arrival.client)
        self.events.failed[arrival.client] = reason
        self.events.tasks.append([arrival.client, arrival.start, arrival.end, "failed"])
        self._num_failed["fault" if is_fault else "client"] += 1
        if (
            self._num_failed["client"] >= self.num_concurrent
            or self._num_failed["fault"] >= MAX_CONSECUTIVE_FAULTS * self.num_concurrent
        ):
            num_tasks = sum(self._num_failed.values())
            raise RunFailedError(
                f"round {self.completed + 1}: no usable upload from {num_tasks} tasks; "
                f"{arrival.client}: {reason}"
            )

    def _aggregate(self) -> None:
        """Aggregate the buffered uploads. The version is incremented unless training diverges."""
        # Restart the random streams of the server, also after a diverged aggregation.
        self.set_round(self.version)
        uploads = self.make_uploads(self.version)
        for client, payload, weight in sorted(self._buffer, key=lambda e: natural_key(e[0])):
            uploads.add(self.federation.client_infos[client], payload, weight)
        diverged = self.update_server(uploads)
        self._buffer.clear()
        self._unresponsive.clear()
        if diverged:
            # Neither the version nor the committed states change: clients may already train on
            # them.
            self.events.diverged = diverged
            return
        self._attempts.clear()
        self._num_samples = 0
        self.version += 1
        self.set_round(self.version)

    @override
    def state_dict(self) -> dict[str, Any]:
        # A broadcast that tasks share is stored only once.
        broadcasts = list(dict.fromkeys(task.broadcast for task in self.in_flight.values()))
        tasks = [
            [*astuple(task)[:-1], broadcasts.index(task.broadcast)]
            for task in self.in_flight.values()
        ]
        return super().state_dict() | {
            "count": [self.version, self.num_tasks, self._num_samples],
            "asked": dict(self._attempts),
            "barren": dict(self._num_failed),
            "buffer": [
                [client, as_tensor(payload.encode()), weight]
                for client, payload, weight in self._buffer
            ],
            "in_flight": {"tasks": tasks, "broadcasts": [as_tensor(body) for body in broadcasts]},
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version, self.num_tasks, self._num_samples = state["count"]
        super().load_state_dict(state)
        self.set_round(self.version)
        self._attempts = Counter(state["asked"])
        self._num_failed = Counter(state["barren"])
        device = self.federation.memory.storage_device
        self._buffer = [
            (client, Payload.decode(as_bytes(body)).to(device), weight)
            for client, body, weight in state["buffer"]
        ]
        self.in_flight.clear()
        broadcasts = [as_bytes(body) for body in state["in_flight"]["broadcasts"]]
        for row in state["in_flight"]["tasks"]:
            number, client, position, version, attempt, start, idx = row
            task = ClientTask(number, client, position, version, attempt, start, broadcasts[idx])
            self._start(task)
