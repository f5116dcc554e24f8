"""Asynchronous training: event queue, buffers, simulated time."""

from __future__ import annotations

import heapq
import math
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.means import discount_upload
from hetero_fl.algorithms.base import AsyncPolicy
from hetero_fl.communication.protocol import Message, encoded
from hetero_fl.config.base import StalenessConfig
from hetero_fl.core.payload import Payload, PayloadError, logged_from_report, loss_from_report
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.channel import UploadSizes
from hetero_fl.federation.simulation.faults import FaultOutcome, inject_faults
from hetero_fl.federation.simulation.schedule import SimulationEnvironment
from hetero_fl.federation.trainer import FederatedTrainer, Record
from hetero_fl.federation.upload_collector import CHANGED
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.ordering import natural_key
from hetero_fl.utils.seeding import sample_numbers
from hetero_fl.utils.serialization import as_bytes, as_tensor

# The event queue of an asynchronous run: tasks in flight by the simulated time at which they end,
# and who is idle.


@dataclass
class ClientTask:
    """One client's task, from when it is given out until its upload arrives or fails to. Where time is real, `end` is infinite
    until it has ended.

    `place`: the client's among all ids; `version`: the server's when the task was given out; `attempt`: how many tasks of that
    version the client had before; `start` and `end` in simulated seconds. What it uploads, or why it cannot, stands in
    `upload` or `diverged` once it has been computed.
    """

    number: int
    client: str
    place: int
    version: int
    attempt: int
    start: float
    end: float
    broadcast: bytes
    up_bytes: int
    fate: FaultOutcome
    upload: Message | None = None
    diverged: str | None = None

    @property
    def request(self) -> Message:
        """What the client is asked."""
        return Message("train", self.broadcast, self.version, self.attempt)

    @property
    def is_computed(self) -> bool:
        """Whether there is nothing left to compute: a task that fails has no effect, and never is."""
        return self.fate.is_failure or self.upload is not None or self.diverged is not None


class TaskQueue:
    """Tasks in flight, at most one of a client. The next to end comes first; of several that end together, the one given out
    first. An event costs the logarithm of the tasks in flight, whatever the population.
    """

    def __init__(self) -> None:
        self._ends: list[tuple[float, int]] = []
        self._tasks: dict[int, ClientTask] = {}
        self._open: dict[int, ClientTask] = {}  # not computed yet
        self._busy: list[int] = []  # places of the clients in flight, sorted

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[ClientTask]:
        """All of them, in the order in which they were given out."""
        return iter(self._tasks.values())

    @property
    def next_end(self) -> float:
        """When the next task ends; infinite where that is not known of any."""
        return self._ends[0][0] if self._ends else math.inf

    def push(self, task: ClientTask) -> None:
        """One more; its client must be idle."""
        self._tasks[task.number] = task
        if task.end < math.inf:
            self.set_end(task)
        insort(self._busy, task.place)
        if not task.is_computed:
            self._open[task.number] = task

    def set_end(self, task: ClientTask) -> None:
        """It is known now when this one ends."""
        heapq.heappush(self._ends, (task.end, task.number))

    @property
    def first(self) -> ClientTask:
        """The next to end."""
        return self._tasks[self._ends[0][1]]

    def pop(self) -> ClientTask:
        """The next to end, which is in flight no more."""
        _, number = heapq.heappop(self._ends)
        task = self._tasks.pop(number)
        self._open.pop(number, None)
        del self._busy[bisect_left(self._busy, task.place)]
        return task

    def pop_uncomputed(self) -> list[ClientTask]:
        """The tasks that are still to be computed, in the order in which they were given out; they are asked for once."""
        tasks = list(self._open.values())
        self._open.clear()
        return tasks

    def idle_place(self, rank: int) -> int:
        """The place of the idle client that has so many idle ones before it."""
        return rank + bisect_right(range(len(self._busy)), rank, key=lambda i: self._busy[i] - i)

    # Checkpoints -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; equal broadcasts are kept once."""
        broadcasts: dict[bytes, int] = {}
        rows = []
        for t in self:
            at = broadcasts.setdefault(t.broadcast, len(broadcasts))
            rows.append(
                [
                    t.number,
                    t.client,
                    t.place,
                    t.version,
                    t.attempt,
                    t.start,
                    t.end,
                    at,
                    t.up_bytes,
                    t.diverged,
                ]
            )
        return {
            "tasks": rows,
            "broadcasts": {str(at): as_tensor(body) for body, at in broadcasts.items()},
            "uploads": {
                str(t.number): as_tensor(t.upload.body) for t in self if t.upload is not None
            },
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], outcome_of: Any) -> TaskQueue:
        """Restore a queue from `state_dict`.

        Args:
            state: The state.
            outcome_of: Returns the fault of a task, given its client and number; faults are drawn
                by key and not saved.
        """
        queue = cls()
        broadcasts = {int(at): as_bytes(body) for at, body in state["broadcasts"].items()}
        for number, client, place, version, again, begun, ends, at, up, diverged in state["tasks"]:
            when = (version, again, begun, ends)
            fate = outcome_of(client, number)
            task = ClientTask(
                number, client, place, *when, broadcasts[at], up, fate, diverged=diverged
            )
            if (upload := state["uploads"].get(str(number))) is not None:
                task.upload = Message("upload", as_bytes(upload))
            queue.push(task)
        return queue


# What a cohort's worth of an asynchronous run's events came to.


@dataclass
class BufferRecord:
    """`cohort`: whose uploads were taken, in the order in which they came; `failed`: why others' were not, the last time;
    `staleness`: how many were taken that were so many versions old; `tasks`: client, begin, end and what came of it."""

    start: float
    cohort: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    logged: dict[str, dict[str, float]] = field(default_factory=dict)
    staleness: Counter[int] = field(default_factory=Counter)
    tasks: list[list[Any]] = field(default_factory=list)

    def add_upload(self, task: ClientTask, payload: Payload, versions: int) -> None:
        """A task's upload was taken, so many versions after it was given out."""
        self.cohort.append(task.client)
        self.tasks.append([task.client, task.start, task.end, "arrived"])
        self.staleness[versions] += 1
        if (loss := loss_from_report(payload.report)) is not None:
            self.losses[task.client] = loss
        if logged := logged_from_report(payload.report):
            self.logged[task.client] = logged

    def add_failure(self, task: ClientTask, why: str) -> None:
        """Nothing came of a task that could be used."""
        self.failed[task.client] = why
        self.tasks.append([task.client, task.start, task.end, "failed"])

    def record(self, now: float, version: int, time: str) -> Record:
        """What `metrics.jsonl` says of it; `time`: its kind. Nobody is late: whatever comes, comes into the next version."""
        arrived = len(self.cohort)
        invited = len(self.tasks)
        return {
            "cohort": self.cohort,
            "failed": self.failed,
            "train_loss": self.losses,
            **({"logged": self.logged} if self.logged else {}),
            time: {"start": self.start, "end": now},
            "counts": {
                "invited": invited,
                "arrived": arrived,
                "failed": invited - arrived,
                "late": 0,
            },
            "tasks": self.tasks,
            "version": version,
            "staleness": {
                str(versions): count for versions, count in sorted(self.staleness.items())
            },
        }


# Asynchronous running: clients train at their own pace, and the server aggregates when enough
# uploads have come.
#
# An event queue in simulated time (FedAsync: Xie et al. 2019; FedBuff: Nguyen et al. 2022). A
# client is given a task with the newest broadcast and ends when its device says so; then its upload
# enters the buffer, weighted by how many versions the server has made meanwhile, and its place goes
# to an idle client. What befalls a task is known when it is given out, so those in flight are
# computed together, when the first of them is needed: when that is changes no bit.

# tasks in a row for each place that may come to nothing by fate, before the run ends
PATIENCE = 100


class TaskFailedError(Exception):
    """Why nothing came of a task: by `fate`, or by the `client`, which would do the same again."""

    def __init__(self, reason: str, cause: str) -> None:
        super().__init__(reason)
        self.cause = cause


class AsynchronousTrainer(FederatedTrainer):
    """A run without rounds; what is called one is a cohort's worth of uploads taken.

    Args:
        environment: The conditions of the run.
        per_round: clients in flight at any time (None: all).
        buffer: uploads after which the server aggregates, where the method does not say it; None: a cohort's worth.
        staleness: what an upload is worth, where the method does not say it.
    """

    keeps_requests = True

    def __init__(
        self,
        *args: Any,
        environment: SimulationEnvironment,
        buffer: int | None = None,
        staleness: StalenessConfig | None = None,
        **options: Any,
    ) -> None:
        self.version = 0  # number of aggregations
        self.queue = TaskQueue()
        super().__init__(*args, policy=environment.policy, **options)
        self.environment = environment
        self.upload_sizes = UploadSizes(self.algorithm, self.federation, self.expectations)
        self.ids = self.federation.client_infos.clients.ids
        self.places = min(self.per_round or len(self.ids), len(self.ids))
        policy = self.algorithm.needs.asynchronous or AsyncPolicy()
        self.goal = policy.buffer_size or buffer or self.places
        self.staleness = policy.staleness or staleness or StalenessConfig()
        self.num_tasks = 0
        # what came from whom, and what staleness leaves of it
        self._buffer: list[tuple[str, Payload, float]] = []
        self._attempts: Counter[str] = Counter()  # tasks of this version by client
        self._fillings = 0  # of places, in this version
        # tasks that came to nothing since the last upload was taken
        self._barren: Counter[str] = Counter()
        self._given_up = ""  # why the newest aggregation of this round came to nothing

    time_kind = "simulated"  # key of the round's time in its record

    @property
    def round_idx(self) -> int:
        return self.version

    @property
    def fingerprint(self) -> str:
        return self.environment.devices.fingerprint

    def clients_in_training(self) -> Collection[str]:
        return {task.client for task in self.queue}

    # Events ------------------------------------------------------------------------------------------------------
    def run_round(self) -> Record:
        started = time.perf_counter()
        tally = BufferRecord(self.now)
        traffic = (self.traffic.up, self.traffic.down)
        with self.rollback_on_error():
            while len(tally.cohort) < self.places:
                task = self._next_task()
                self.now = task.end
                self._finish_task(task, tally)
        self.completed += 1
        given_up = self._given_up
        self._given_up = ""
        return {
            "round": self.completed,
            **tally.record(self.now, self.version, self.time_kind),
            "up_bytes": self.traffic.up - traffic[0],
            "down_bytes": self.traffic.down - traffic[1],
            "seconds": {"training": time.perf_counter() - started, "evaluation": 0.0},
            **({"diverged": given_up} if given_up else {}),
        }

    def _next_task(self) -> ClientTask:
        """The next task to end; vacant places are filled before."""
        # whatever ends together has ended
        if not len(self.queue) or self.queue.next_end > self.now:
            self._assign_tasks()
        if not self.queue.first.is_computed:
            self._compute()
        return self.queue.pop()

    def _idle_clients(self) -> tuple[int, Callable[[int], int]]:
        """How many clients can be given a task, and what place each of them in turn has among all."""
        return len(self.ids) - len(self.queue), self.queue.idle_place

    def _assign_tasks(self) -> None:
        """Give every vacant place to an idle client, all of them drawn together: who is alone in being idle is drawn."""
        idle, place_of = self._idle_clients()
        vacant = min(self.places - len(self.queue), idle)
        if not vacant:
            return
        self._set_round_context(self.version)
        # the first is drawn as a synchronous cohort is
        anew = (self._fillings,) if self._fillings else ()
        ranks = sample_numbers(idle, vacant, self.federation.seed, self.version, "cohort", *anew)
        self._fillings += 1
        for place in [place_of(rank) for rank in ranks]:
            self.queue.push(self._make_task(self.ids[place], place))

    def _make_task(self, client: str, place: int) -> ClientTask:
        """A client's next task, its fate and its time known."""
        number = self.num_tasks
        again = self._attempts[client]
        client_info = self.federation.client_infos[client]
        self.num_tasks = number + 1
        self._attempts[client] = again + 1
        payload = self.broadcast(client_info)
        body = encoded(self.broadcast_content(client_info, payload))
        fate = self.environment.faults.outcome(client, number)
        up = self.upload_sizes(client_info, payload, self.version)
        self.count_traffic(down=len(body))
        ends = self._end_time(client, len(body), up, number, fate)
        return ClientTask(
            number, client, place, self.version, again, self.now, ends, body, up, fate
        )

    def _end_time(self, client: str, down: int, up: int, number: int, fate: FaultOutcome) -> float:
        """When a task that is given out now will end."""
        stages = self.environment.timing.task_times(client, down, up, self.now, number)
        return {
            "before": stages.received,
            "during": stages.received + fate.completed_share * (stages.trained - stages.received),
            "after": stages.trained,
        }.get(fate.kind, stages.arrived + fate.delay)

    def _compute(self) -> None:
        """Whatever is in flight and will have an effect, together."""
        tasks = {task.client: task for task in self.queue.pop_uncomputed()}
        for client, reply in self.executor.run(list(tasks), lambda client: tasks[client].request):
            if isinstance(reply, Message):
                tasks[client].upload = reply
            else:
                tasks[client].diverged = str(reply)

    def _finish_task(self, task: ClientTask, tally: BufferRecord) -> None:
        """A task ends. Its upload enters the buffer, and what its client keeps is settled; or nothing comes of it. Raises
        RunFailedError if that is all that ever happens."""
        try:
            payload = self._receive_upload(task)
        except TaskFailedError as nothing:
            self.store.discard_client(task.client)
            tally.add_failure(task, str(nothing))
            self._barren[nothing.cause] += 1
            if (
                self._barren["client"] >= self.places
                or self._barren["fate"] >= PATIENCE * self.places
            ):
                tasks = sum(self._barren.values())
                raise RunFailedError(
                    f"round {self.completed + 1}: no usable upload from {tasks} tasks; {task.client}: {nothing}"
                ) from None
            return
        versions = self.version - task.version
        self.store.commit([task.client])
        self._barren.clear()
        tally.add_upload(task, payload, versions)
        self._buffer.append((task.client, payload, self.staleness.weight(versions)))
        if len(self._buffer) >= self.goal:
            self._aggregate()

    def _receive_upload(self, task: ClientTask) -> Payload:
        """The task's upload as it arrives, if it is what was sent and what was asked for. Raises TaskFailedError."""
        if task.fate.is_failure:
            self.count_traffic(up=task.up_bytes if task.fate.kind == "lost" else 0)
            raise TaskFailedError(task.fate.description, "fate")
        if task.diverged is not None:
            self.check_divergence(task.client, task.diverged)
            raise TaskFailedError(task.diverged, "client")
        sent = iter([(task.client, task.upload or Message("upload", b""))])
        came = list(
            inject_faults(
                sent, {task.client: task.fate}, self.federation.seed, "changed", task.number
            )
        )
        arrivals = [message for _, message in came if isinstance(message, Message)]
        self.count_traffic(up=sum(message.size for message in arrivals))
        upload = arrivals[0]  # the same once more is known by the task's number, and dropped
        if not upload.is_intact:
            raise TaskFailedError(CHANGED, "fate")
        asked = self.broadcasts.received_by(task.client, task.version, task.broadcast)
        client_info = self.federation.client_infos[task.client]
        try:
            return self.decode_upload(
                client_info, upload.content, asked, task.version, task.attempt
            )
        except PayloadError as error:
            raise TaskFailedError(f"upload refused: {error}", "client") from None

    def _aggregate(self) -> None:
        """The buffer becomes the next version."""
        self._set_round_context(self.version)
        client_infos = self.federation.client_infos
        came = sorted(self._buffer, key=lambda entry: natural_key(entry[0]))
        sent = [
            Upload(client_infos[c], discount_upload(payload, worth), worth)
            for c, payload, worth in came
        ]
        given_up = self.update_server(
            lambda: self._aggregate_uploads(sent), {c: payload.magnitude for c, payload, _ in came}
        )
        self._buffer.clear()
        if given_up:  # the version stays, and what clients keep, which they may have built on
            self._given_up = given_up
            return
        self._attempts.clear()
        self._fillings = 0
        self.version += 1
        self._set_round_context(self.version)

    def _aggregate_uploads(self, arrived: list[Upload]) -> None:
        uploads = Uploads(specs=self.algorithm.uploads, common=self.federation.common)
        for upload in arrived:
            uploads.add(upload)
        run_plan(self.algorithm.aggregate(self.server, uploads), self.server, self.backend)

    # Crash safety ------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "now": self.now,
            "count": [self.version, self.num_tasks, self._fillings],
            "asked": dict(self._attempts),
            "barren": dict(self._barren),
            "buffer": [
                [client, as_tensor(payload.encode()), worth]
                for client, payload, worth in self._buffer
            ],
            "queue": self.queue.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version, self.num_tasks, self._fillings = state["count"]
        self.queue = TaskQueue.from_state_dict(state["queue"], self.environment.faults.outcome)
        super().load_state_dict(state)
        self.now = state["now"]
        self._set_round_context(self.version)
        self._attempts = Counter(state["asked"])
        self._barren = Counter(state["barren"])
        device = self.federation.memory.storage_device
        self._buffer = [
            (client, Payload.decode(as_bytes(body)).to(device), worth)
            for client, body, worth in state["buffer"]
        ]
