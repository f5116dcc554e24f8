"""Executor of a simulation, in which tasks on another executor take simulated time and may fail."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from typing_extensions import override

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import Content, DirectProtocol, Message, Reply
from hetero_fl.config.schema import Config
from hetero_fl.core.payload import Payload
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.executors.base import (
    ALL_REPLIES,
    Arrival,
    ClientAbsentError,
    ClientLateError,
    Executor,
    TimedExecutor,
    Until,
)
from hetero_fl.federation.expected import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.conditions import (
    NO_FAULT,
    Devices,
    FaultOutcome,
    Faults,
    flip_bytes,
    uniform,
)
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.utils.caching import IdentityCache
from hetero_fl.utils.errors import NoUploadError, RunFailedError
from hetero_fl.utils.seeding import sample_numbers

# Number of clients whose availability is checked: at least MIN_CANDIDATES, and at least
# CANDIDATES_PER_CLIENT times the size of the cohort.
MIN_CANDIDATES = 1000
CANDIDATES_PER_CLIENT = 20
# Simulated time between two checks for online clients, as a fraction of a day, and maximum number
# of checks.
WAIT_SHARE = 1 / 24
MAX_WAITS = 48
# Number of decoded broadcasts that are cached.
MAX_BROADCASTS = 8
# Kind of the request on which clients train. Only this task takes computing time.
TRAIN = "train"


@dataclass
class SimulatedTask:
    """Task of one client.

    Attributes:
        client: Id of the client.
        request: The request.
        number: Number of the task, which seeds the fault and the duration.
        start: Time at which the request is sent, in seconds.
        end: Time at which the server observes the end of the task, in seconds. Infinite if the
            server does not observe the end.
        fault: The fault of the task.
        up_bytes: Expected size of the reply in bytes.
        reply: The reply, or None if it has not been computed.
    """

    client: str
    request: Message
    number: int
    start: float
    end: float
    fault: FaultOutcome
    up_bytes: int
    reply: Reply | None = None


class SimulatedExecutor(TimedExecutor):
    """Executor that delays the replies of another executor, and loses or changes some of them.

    The durations of tasks depend on the devices and the sizes of the messages. The outcome of a
    task is known when the task starts, so that only tasks whose replies arrive are computed.

    Args:
        inner: Executor that computes the tasks.
        algorithm: The method.
        federation: The federation.
        config: The configuration with the devices and faults.

    Attributes:
        devices: Devices of the clients.
        faults: Faults of tasks.
    """

    clock = "simulated"

    def __init__(
        self, inner: Executor, algorithm: Algorithm, federation: FederationSpec, config: Config
    ) -> None:
        super().__init__(inner.store, inner.backend)
        self.inner = inner
        self.accepts_unencoded = inner.accepts_unencoded
        self.federation = federation
        self.devices = Devices(federation, config.devices)
        self.faults = Faults(config.faults, self.devices)
        self._protocol = make_protocol(algorithm, federation)
        self._expectations = ExpectedUploads(algorithm, federation)
        self._broadcasts: IdentityCache[Payload] = IdentityCache(MAX_BROADCASTS)
        self._reply_sizes: dict[tuple[str, int, int, int], int] = {}
        # Tasks in flight by number, and a heap of their ends.
        self._tasks: dict[int, SimulatedTask] = {}
        self._ends: list[tuple[float, int]] = []

    @override
    def run(
        self, clients: Sequence[str], request: Callable[[str], Message], until: Until = ALL_REPLIES
    ) -> Iterator[Arrival]:
        start = self.now
        tasks: dict[str, SimulatedTask] = {}
        for client in clients:
            message = request(client)
            tasks[client] = self._make_task(
                client,
                message,
                message.round_idx,
                start=start,
                cohort=len(clients),
                deadline=until.deadline,
            )
        if not tasks:
            return
        accepted, self.now = self._accept(tasks, until)
        replies = self.inner.run([client for client in clients if client in accepted], request)
        for client, task in tasks.items():
            if client in accepted:
                task.reply = next(replies).reply
            elif not task.fault.failure:
                task.reply = ClientLateError("the round has ended")
            yield self._arrival(task)
            # Free the upload before the next client trains.
            task.reply = None

    def _make_task(
        self,
        client: str,
        request: Message,
        number: int,
        *,
        start: float,
        cohort: int = 1,
        deadline: float | None = None,
    ) -> SimulatedTask:
        """Create a task, whose end is known.

        Args:
            client: The client.
            request: The request.
            number: Number of the task.
            start: Time at which the request is sent, in seconds.
            cohort: Number of clients that receive the request.
            deadline: Seconds for which the server waits, or None.
        """
        is_training = request.kind == TRAIN
        fault = self.faults.outcome(client, number)
        if not is_training and fault.kind != "before":
            fault = NO_FAULT
        up_bytes = self._reply_size(client, request, cohort)
        stages = self.devices.task_times(
            client, request.size, up_bytes, start, number if is_training else None
        )
        # The server observes the loss of an upload at the expected time of arrival or, if there is
        # a deadline, not at all.
        ends = {
            "before": stages.received,
            "during": stages.received + fault.completed_share * (stages.trained - stages.received),
            "after": stages.trained,
            "lost": stages.arrived if deadline is None else math.inf,
        }
        end = ends.get(fault.kind, stages.arrived + fault.delay)
        reply = NoUploadError(fault.failure) if fault.failure else None
        return SimulatedTask(client, request, number, start, end, fault, up_bytes, reply)

    def _reply_size(self, client: str, request: Message, cohort: int) -> int:
        """Return the expected size of the reply to a request in bytes."""
        upload = 0
        if request.kind == TRAIN and isinstance(self._protocol, DirectProtocol):
            received = self._received(request)
            client_info = self.federation.client_infos[client]
            upload = self._expectations.expected_size(client_info, received, request.round_idx)
        key = (request.kind, request.round_idx, cohort, upload)
        if key not in self._reply_sizes:
            sizes = self._protocol.sizes(cohort, request.round_idx, 0, upload)
            _, up_bytes = sizes.get(request.kind, (0, 0))
            # Clients of a round often send replies of the same size.
            self._reply_sizes = {key: up_bytes}
        return self._reply_sizes[key]

    def _received(self, request: Message) -> Payload:
        """Return the broadcast in a request."""
        content = request.content
        if isinstance(content, Payload):
            return content
        decode = self._expectations.links.decode_broadcast
        return self._broadcasts.get(content, lambda: decode(request.round_idx, content))

    def _accept(
        self, tasks: Mapping[str, SimulatedTask], until: Until
    ) -> tuple[Collection[str], float]:
        """Return the clients whose replies arrive in time, and the time at which waiting ends.

        The server waits until enough usable replies have arrived, the outcomes of all tasks are
        known, or the deadline has passed.
        """
        deadline = math.inf if until.deadline is None else self.now + until.deadline
        usable = [
            task
            for task in tasks.values()
            if not task.fault.failure and task.fault.kind != "corrupted" and task.end <= deadline
        ]
        # If several uploads arrive at the same time, their order is random in each round.
        seed = self.federation.seed
        usable.sort(key=lambda task: (task.end, uniform(seed, "turn", task.client, task.number)))
        num_required = len(tasks)
        if until.uploads is not None and any(t.request.kind == TRAIN for t in usable):
            num_required = min(until.uploads, len(tasks))
        end = min(deadline, max(task.end for task in tasks.values()))
        if len(usable) >= num_required:
            end = usable[num_required - 1].end
        accepted = {task.client for task in usable[:num_required]}
        accepted |= {
            task.client
            for task in tasks.values()
            if task.fault.kind == "corrupted" and task.end <= end
        }
        return accepted, end

    def _arrival(self, task: SimulatedTask) -> Arrival:
        """Return the arrival of a task whose reply is known, and change a corrupted reply."""
        assert task.reply is not None
        reply = task.reply
        kind = task.fault.kind
        unused_bytes = 0
        if kind == "lost" or (kind == "late" and isinstance(reply, ClientLateError)):
            unused_bytes = task.up_bytes
        elif isinstance(reply, Message) and kind == "twice":
            # The client sends the same upload again.
            unused_bytes = reply.size
        elif isinstance(reply, Message) and kind == "corrupted":
            key = (self.federation.seed, "changed", task.number, task.client)
            reply = replace(reply.with_checksum(), content=flip_bytes(reply.body, *key))
        return Arrival(task.client, reply, task.start, task.end, unused_bytes)

    @property
    @override
    def has_arrival(self) -> bool:
        return bool(self._ends) and self._ends[0][0] <= self.now

    @override
    def start(self, client: str, request: Message, number: int, start: float | None = None) -> None:
        at = self.now if start is None else start
        task = self._make_task(client, request, number, start=at)
        self._tasks[number] = task
        heapq.heappush(self._ends, (task.end, number))

    @override
    def next_arrival(self) -> Arrival:
        self.now, number = heapq.heappop(self._ends)
        if self._tasks[number].reply is None:
            self._compute()
        return self._arrival(self._tasks.pop(number))

    def _compute(self) -> None:
        """Compute all tasks in flight whose replies will arrive and are not known yet."""
        tasks = {task.client: task for task in self._tasks.values() if task.reply is None}
        for arrival in self.inner.run(list(tasks), lambda client: tasks[client].request):
            tasks[arrival.client].reply = arrival.reply

    @override
    def wait_for_clients(self, round_idx: int, count: int, least: int) -> Sequence[str]:
        """Wait until enough clients in a large sample are online.

        If enough clients are never online, the first clients that were online are returned.
        """
        ids = self.federation.client_infos.clients.ids
        num_candidates = min(len(ids), max(MIN_CANDIDATES, CANDIDATES_PER_CLIENT * count))
        now = self.now
        first: tuple[list[str], float] | None = None
        for wait in range(MAX_WAITS):
            key = (self.federation.seed, round_idx, "online", wait)
            positions = sample_numbers(len(ids), num_candidates, *key)
            devices = {ids[i]: self.devices.device(ids[i]) for i in positions}
            online = [c for c, candidate in devices.items() if candidate.next_online(now) == now]
            if len(online) >= least:
                self.now = now
                return online
            first = first or ((online, now) if online else None)
            now += WAIT_SHARE * max(candidate.day for candidate in devices.values())
        if first is None:
            raise RunFailedError(
                f"round {round_idx + 1}: none of {num_candidates:,} clients was online within two "
                "days"
            )
        online, self.now = first
        return online

    @override
    def evaluate(
        self,
        clients: Sequence[str],
        broadcast: Callable[[str], Content],
        round_idx: int,
        details: bool,
    ) -> Iterator[tuple[str, ClientEvaluation | ClientAbsentError]]:
        return self.inner.evaluate(clients, broadcast, round_idx, details)

    @override
    def resume(self, now: float) -> None:
        super().resume(now)
        self._tasks.clear()
        self._ends.clear()

    @override
    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        self.inner.set_listener(listener)

    @override
    def close(self) -> None:
        self.inner.close()
