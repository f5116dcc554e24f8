"""Asynchronous training: clients train continuously, and the server aggregates buffered uploads.

The version of the server is the number of aggregations so far. The staleness of an upload is the
number of aggregations since the client received the broadcast. See FedAsync (Xie et al. 2019) and
FedBuff (Nguyen et al. 2022).
"""

from __future__ import annotations

import heapq
import math
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from typing_extensions import override

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.means import discount_upload
from hetero_fl.algorithms.base import AsyncPolicy
from hetero_fl.communication.protocol import Message, TrainExchange, encoded
from hetero_fl.config.base import StalenessConfig
from hetero_fl.core.payload import Payload, PayloadError, logged_from_report, loss_from_report
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.simulation.faults import FaultOutcome, inject_faults
from hetero_fl.federation.simulation.schedule import SimulationEnvironment
from hetero_fl.federation.trainer import FederatedTrainer, Record
from hetero_fl.federation.upload_collector import DAMAGED
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.ordering import natural_key
from hetero_fl.utils.seeding import sample_numbers
from hetero_fl.utils.serialization import as_bytes, as_tensor

# Number of consecutive failures because of faults, per concurrent task, after which the run fails.
MAX_CONSECUTIVE_FAULTS = 100


@dataclass
class ClientTask:
    """Training task of one client, from the assignment to the arrival of the upload or a failure.

    Attributes:
        number: Number of the task in the run.
        client: Id of the client.
        position: Position of the client's id in the list of all client ids.
        version: Version of the server at the assignment.
        attempt: Number of earlier tasks of the client with the same version.
        start: Time of the assignment in seconds.
        end: End time in seconds, or infinity if the end time is not known yet.
        broadcast: The encoded broadcast.
        up_bytes: Expected size of the upload in bytes.
        fault: The simulated fault.
        upload: The upload, or None if no upload has been computed.
        failure: Reason why training produced no upload, or None if training did not fail.
    """

    number: int
    client: str
    position: int
    version: int
    attempt: int
    start: float
    end: float
    broadcast: bytes
    up_bytes: int
    fault: FaultOutcome
    upload: Message | None = None
    failure: str | None = None

    @property
    def request(self) -> Message:
        """The training request that is sent to the client."""
        return Message("train", self.broadcast, self.version, self.attempt)

    @property
    def is_computed(self) -> bool:
        """Whether the result of the task is known.

        Tasks that fail because of a simulated fault are never computed.
        """
        return self.fault.is_failure or self.upload is not None or self.failure is not None


class TaskQueue:
    """Priority queue of the tasks in flight, ordered by end time.

    Each client has at most one task. Tasks that end at the same time are ordered by number. The
    cost of an operation grows with the number of tasks in flight, not with the number of clients.
    """

    def __init__(self) -> None:
        self._ends: list[tuple[float, int]] = []
        self._tasks: dict[int, ClientTask] = {}
        self._uncomputed: dict[int, ClientTask] = {}
        # Positions of the clients with a task, sorted.
        self._busy: list[int] = []

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[ClientTask]:
        """Iterate over all tasks in the order of assignment."""
        return iter(self._tasks.values())

    @property
    def next_end(self) -> float:
        """Time at which the next task ends, in seconds. Infinite if no end time is known."""
        return self._ends[0][0] if self._ends else math.inf

    def push(self, task: ClientTask) -> None:
        """Add a task of a client that has no task in the queue."""
        self._tasks[task.number] = task
        if task.end < math.inf:
            self.set_end(task)
        insort(self._busy, task.position)
        if not task.is_computed:
            self._uncomputed[task.number] = task

    def set_end(self, task: ClientTask) -> None:
        """Schedule a task in the queue at `task.end`, once the end time is known."""
        heapq.heappush(self._ends, (task.end, task.number))

    @property
    def first(self) -> ClientTask:
        """The task that ends next. At least one end time must be known."""
        return self._tasks[self._ends[0][1]]

    def pop(self) -> ClientTask:
        """Remove and return the task that ends next. At least one end time must be known."""
        _, number = heapq.heappop(self._ends)
        task = self._tasks.pop(number)
        self._uncomputed.pop(number, None)
        del self._busy[bisect_left(self._busy, task.position)]
        return task

    def pop_uncomputed(self) -> list[ClientTask]:
        """Return the tasks that must be computed, in the order of assignment.

        Each task is returned by a single call only.
        """
        tasks = list(self._uncomputed.values())
        self._uncomputed.clear()
        return tasks

    def idle_position(self, rank: int) -> int:
        """Return the position of an idle client in the list of all clients.

        Args:
            rank: Position of the client in the list of idle clients, starting at 0.
        """
        return rank + bisect_right(range(len(self._busy)), rank, key=lambda i: self._busy[i] - i)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. A broadcast that tasks share is stored only once."""
        broadcasts: dict[bytes, int] = {}
        rows = []
        for t in self:
            broadcast_idx = broadcasts.setdefault(t.broadcast, len(broadcasts))
            rows.append(
                [
                    t.number,
                    t.client,
                    t.position,
                    t.version,
                    t.attempt,
                    t.start,
                    t.end,
                    broadcast_idx,
                    t.up_bytes,
                    t.failure,
                ]
            )
        return {
            "tasks": rows,
            "broadcasts": {str(idx): as_tensor(body) for body, idx in broadcasts.items()},
            "uploads": {
                str(t.number): as_tensor(t.upload.body) for t in self if t.upload is not None
            },
        }

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], outcome_of: Callable[[str, int], FaultOutcome]
    ) -> TaskQueue:
        """Create a queue from the return value of `state_dict`.

        Args:
            state: The return value of `state_dict`.
            outcome_of: Function that returns the fault of a task, given the client id and the
                number of the task. Faults are not part of the state, because they depend
                only on seeded random draws.
        """
        queue = cls()
        broadcasts = {int(idx): as_bytes(body) for idx, body in state["broadcasts"].items()}
        for row in state["tasks"]:
            number, client, position, version, attempt, start, end, idx, up_bytes, failure = row
            task = ClientTask(
                number,
                client,
                position,
                version,
                attempt,
                start,
                end,
                broadcasts[idx],
                up_bytes,
                outcome_of(client, number),
                failure=failure,
            )
            upload = state["uploads"].get(str(number))
            if upload is not None:
                task.upload = Message("upload", as_bytes(upload))
            queue.push(task)
        return queue


@dataclass
class BufferRecord:
    """Events of an asynchronous round, for the line of the round in `metrics.jsonl`.

    Attributes:
        start: Time at which the round began, in seconds.
        cohort: Ids of the clients whose uploads were accepted, in the order of arrival.
        failed: Reason why a client's last failed task failed, keyed by client id.
        losses: Training loss reported with a client's last upload, keyed by client id.
        logged: Values that clients logged, keyed by client id and name.
        staleness: Number of accepted uploads, keyed by staleness.
        tasks: A list `[client, start, end, outcome]` for each finished task, with times in seconds.
    """

    start: float
    cohort: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    logged: dict[str, dict[str, float]] = field(default_factory=dict)
    staleness: Counter[int] = field(default_factory=Counter)
    tasks: list[list[Any]] = field(default_factory=list)

    def add_upload(self, task: ClientTask, payload: Payload, versions: int) -> None:
        """Record an accepted upload.

        Args:
            task: The task.
            payload: The upload.
            versions: Staleness of the upload.
        """
        self.cohort.append(task.client)
        self.tasks.append([task.client, task.start, task.end, "arrived"])
        self.staleness[versions] += 1
        if (loss := loss_from_report(payload.report)) is not None:
            self.losses[task.client] = loss
        if logged := logged_from_report(payload.report):
            self.logged[task.client] = logged

    def add_failure(self, task: ClientTask, reason: str) -> None:
        """Record a failed task and the reason for the failure."""
        self.failed[task.client] = reason
        self.tasks.append([task.client, task.start, task.end, "failed"])

    def record(self, now: float, version: int, time_kind: str) -> Record:
        """Return the entries for the round in `metrics.jsonl`.

        The number of late clients is always 0, because every upload is used in the next
        aggregation.

        Args:
            now: Time at which the round ends, in seconds.
            version: Number of aggregations so far.
            time_kind: Name of the entry with the start and end times, "simulated" or "wall".
        """
        num_arrived = len(self.cohort)
        num_tasks = len(self.tasks)
        return {
            "cohort": self.cohort,
            "failed": self.failed,
            "train_loss": self.losses,
            **({"logged": self.logged} if self.logged else {}),
            time_kind: {"start": self.start, "end": now},
            "counts": {
                "invited": num_tasks,
                "arrived": num_arrived,
                "failed": num_tasks - num_arrived,
                "late": 0,
            },
            "tasks": self.tasks,
            "version": version,
            "staleness": {
                str(versions): count for versions, count in sorted(self.staleness.items())
            },
        }


class TaskFailedError(Exception):
    """Raised when a task produces no usable upload.

    Args:
        reason: Description of the failure.
        cause: "fault" for a random or network fault, "client" for a failure that would recur, such
            as divergence.
    """

    def __init__(self, reason: str, cause: Literal["fault", "client"]) -> None:
        super().__init__(reason)
        self.cause = cause


class AsynchronousTrainer(FederatedTrainer):
    """Trainer that aggregates uploads asynchronously.

    The server assigns tasks to clients, each with the newest broadcast. When a task ends, the
    server adds the upload to a buffer, with a weight that depends on the staleness of the upload.
    An idle client then receives a new task. Whenever the buffer is full, the server aggregates the
    buffered uploads. A round in `metrics.jsonl` consists of as many accepted uploads as there are
    concurrent tasks.

    In a simulation, the fault of a task is known at the assignment. When the first task ends, all
    tasks in flight can therefore be computed together. This does not affect the results.

    Args:
        *args: Arguments of `FederatedTrainer`. `per_round` is the number of concurrent tasks.
        environment: Simulated devices, faults and timing.
        buffer: Number of uploads per aggregation. If None, the number of concurrent tasks. Ignored
            if the method sets the buffer size.
        staleness: Weights of stale uploads. If None, the default `StalenessConfig`. Ignored if the
            method sets the weights.
        **options: Keyword arguments of `FederatedTrainer`.

    Attributes:
        version: Number of aggregations so far.
        queue: The tasks in flight.
        time_kind: Name of the entry with the start and end times in the record of a round.
    """

    keeps_requests = True
    time_kind = "simulated"

    def __init__(
        self,
        *args: Any,
        environment: SimulationEnvironment,
        buffer: int | None = None,
        staleness: StalenessConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, policy=environment.policy, **options)
        self.version = 0
        self.queue = TaskQueue()
        self.environment = environment
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
        # Reason of the latest divergence of training at the server in this round, or empty.
        self._server_diverged = ""

    @property
    @override
    def round_idx(self) -> int:
        return self.version

    @override
    def run_round(self) -> Record:
        started = time.perf_counter()
        buffer_record = BufferRecord(self.now)
        traffic = (self.traffic.up, self.traffic.down)
        with self.rollback_on_error():
            while len(buffer_record.cohort) < self.num_concurrent:
                task = self._next_task()
                self.now = task.end
                self._finish_task(task, buffer_record)
        self.completed += 1
        diverged = self._server_diverged
        self._server_diverged = ""
        return {
            "round": self.completed,
            **buffer_record.record(self.now, self.version, self.time_kind),
            "up_bytes": self.traffic.up - traffic[0],
            "down_bytes": self.traffic.down - traffic[1],
            "seconds": {"training": time.perf_counter() - started, "evaluation": 0.0},
            **({"diverged": diverged} if diverged else {}),
        }

    def _next_task(self) -> ClientTask:
        """Assign new tasks, and remove and return the task that ends next."""
        # Tasks that end at the same time are all finished before new ones are assigned.
        if not len(self.queue) or self.queue.next_end > self.now:
            self._assign_tasks()
        if not self.queue.first.is_computed:
            self._compute()
        return self.queue.pop()

    def _idle_clients(self) -> tuple[int, Callable[[int], int]]:
        """Return the number of idle clients, and a function that returns the position of each.

        The argument of the function is the position of a client in the list of idle clients,
        starting at 0. The result is the position of the client in the list of all clients.
        """
        return len(self.ids) - len(self.queue), self.queue.idle_position

    def _assign_tasks(self) -> None:
        """Sample idle clients and assign tasks to them, up to the number of concurrent tasks."""
        num_idle, position_of = self._idle_clients()
        num_free = min(self.num_concurrent - len(self.queue), num_idle)
        if not num_free:
            return
        self._set_round_context(self.version)
        # The first sample of a version equals the cohort of a synchronous run.
        repeated = (self._num_samples,) if self._num_samples else ()
        key = (self.federation.seed, self.version, "cohort", *repeated)
        ranks = sample_numbers(num_idle, num_free, *key)
        self._num_samples += 1
        for position in [position_of(rank) for rank in ranks]:
            self.queue.push(self._make_task(self.ids[position], position))

    def _make_task(self, client: str, position: int) -> ClientTask:
        """Create the next task of a client, and count the traffic of the broadcast."""
        number = self.num_tasks
        attempt = self._attempts[client]
        client_info = self.federation.client_infos[client]
        self.num_tasks = number + 1
        self._attempts[client] = attempt + 1
        payload = self.broadcast(client_info)
        body = encoded(self.broadcasts.content(payload))
        fault = self.environment.faults.outcome(client, number)
        up_bytes = self.expectations.expected_size(client_info, payload, self.version)
        self.count_traffic(down=len(body))
        end = self._end_time(client, len(body), up_bytes, number, fault)
        return ClientTask(
            number, client, position, self.version, attempt, self.now, end, body, up_bytes, fault
        )

    def _end_time(self, client: str, down: int, up: int, number: int, fault: FaultOutcome) -> float:
        """Return the time at which a task that is assigned now will end, in seconds."""
        stages = self.environment.timing.task_times(client, down, up, self.now, number)
        return {
            "before": stages.received,
            "during": stages.received + fault.completed_share * (stages.trained - stages.received),
            "after": stages.trained,
        }.get(fault.kind, stages.arrived + fault.delay)

    def _compute(self) -> None:
        """Compute the tasks in flight, except those that will fail because of a fault."""
        tasks = {task.client: task for task in self.queue.pop_uncomputed()}
        for client, reply in self.executor.run(list(tasks), lambda client: tasks[client].request):
            if isinstance(reply, Message):
                tasks[client].upload = reply
            else:
                tasks[client].failure = str(reply)

    def _finish_task(self, task: ClientTask, buffer_record: BufferRecord) -> None:
        """Buffer the upload of a task and commit the client's private state, or record the failure.

        Raises:
            RunFailedError: If too many consecutive tasks have failed, or if training diverged and
                `runtime.divergence` is "stop".
        """
        try:
            payload = self._receive_upload(task)
        except TaskFailedError as error:
            self.store.discard_client(task.client)
            buffer_record.add_failure(task, str(error))
            self._num_failed[error.cause] += 1
            if (
                self._num_failed["client"] >= self.num_concurrent
                or self._num_failed["fault"] >= MAX_CONSECUTIVE_FAULTS * self.num_concurrent
            ):
                num_tasks = sum(self._num_failed.values())
                raise RunFailedError(
                    f"round {self.completed + 1}: no usable upload from {num_tasks} tasks; "
                    f"{task.client}: {error}"
                ) from None
            return
        versions = self.version - task.version
        self.store.commit([task.client])
        self._num_failed.clear()
        buffer_record.add_upload(task, payload, versions)
        self._buffer.append((task.client, payload, self.staleness.weight(versions)))
        if len(self._buffer) >= self.buffer_size:
            self._aggregate()

    def _receive_upload(self, task: ClientTask) -> Payload:
        """Return the decoded upload of a task.

        Raises:
            TaskFailedError: If no upload arrives, or if the upload is damaged or malformed.
            RunFailedError: If training diverged and `runtime.divergence` is "stop".
        """
        if task.fault.is_failure:
            self.count_traffic(up=task.up_bytes if task.fault.kind == "lost" else 0)
            raise TaskFailedError(task.fault.description, "fault")
        if task.failure is not None:
            self.check_divergence(task.client, task.failure)
            raise TaskFailedError(task.failure, "client")
        sent = iter([(task.client, task.upload or Message("upload", b""))])
        replies = list(
            inject_faults(
                sent, {task.client: task.fault}, self.federation.seed, "changed", task.number
            )
        )
        arrivals = [message for _, message in replies if isinstance(message, Message)]
        self.count_traffic(up=sum(message.size for message in arrivals))
        # The second of two equal uploads of a task is ignored.
        upload = arrivals[0]
        if not upload.is_intact:
            raise TaskFailedError(DAMAGED, "fault")
        received = self.links.decode_broadcast(task.version, task.broadcast)
        client_info = self.federation.client_infos[task.client]
        try:
            content = TrainExchange.upload_in(task.client, upload)
            return self.decode_upload(client_info, content, received, task.version, task.attempt)
        except PayloadError as error:
            raise TaskFailedError(f"upload refused: {error}", "client") from None

    def _aggregate(self) -> None:
        """Aggregate the buffered uploads. The version is incremented unless training diverges."""
        self._set_round_context(self.version)
        client_infos = self.federation.client_infos
        entries = sorted(self._buffer, key=lambda entry: natural_key(entry[0]))
        uploads = [
            Upload(client_infos[c], discount_upload(payload, weight), weight)
            for c, payload, weight in entries
        ]
        diverged = self.update_server(
            lambda: self._aggregate_uploads(uploads),
            {c: payload.magnitude for c, payload, _ in entries},
        )
        self._buffer.clear()
        if diverged:
            # Neither the version nor the committed states change: clients may already train on
            # them.
            self._server_diverged = diverged
            return
        self._attempts.clear()
        self._num_samples = 0
        self.version += 1
        self._set_round_context(self.version)

    def _aggregate_uploads(self, arrived: list[Upload]) -> None:
        uploads = Uploads(specs=self.algorithm.uploads, common=self.federation.common)
        for upload in arrived:
            uploads.add(upload)
        run_plan(self.server, self.algorithm.aggregate(self.server, uploads), self.backend)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "now": self.now,
            "count": [self.version, self.num_tasks, self._num_samples],
            "asked": dict(self._attempts),
            "barren": dict(self._num_failed),
            "buffer": [
                [client, as_tensor(payload.encode()), weight]
                for client, payload, weight in self._buffer
            ],
            "queue": self.queue.state_dict(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version, self.num_tasks, self._num_samples = state["count"]
        self.queue = TaskQueue.from_state_dict(state["queue"], self.environment.faults.outcome)
        super().load_state_dict(state)
        self.now = state["now"]
        self._set_round_context(self.version)
        self._attempts = Counter(state["asked"])
        self._num_failed = Counter(state["barren"])
        device = self.federation.memory.storage_device
        self._buffer = [
            (client, Payload.decode(as_bytes(body)).to(device), weight)
            for client, body, weight in state["buffer"]
        ]
