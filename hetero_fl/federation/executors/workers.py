"""Distribute clients' tasks to workers: processes on this machine, Ray actors or ranks of torchrun."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Literal, Protocol

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import runs_user_code
from hetero_fl.communication.protocol import Content, Message, Reply
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import PayloadError
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import (
    MAX_MESSAGE_LENGTH,
    Backend,
    DivergedError,
    translate_user_errors,
)
from hetero_fl.engine.templates import TaskCosts
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.federation.client_runtime import ClientEvaluation, ClientRuntime
from hetero_fl.federation.executors.base import client_chunks, drain, in_order
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.secure_aggregation import make_protocol
from hetero_fl.federation.state_store import StateStore
from hetero_fl.utils.environment import use_deterministic_algorithms
from hetero_fl.utils.errors import RunFailedError, UserError

# Whole tasks of clients and their results travel between a run and its workers, never code or live
# objects. A worker makes the plans itself, from the method and the federation that it receives once.
# A client's result depends on nothing but its own task, and chunks follow from the cohort alone, so
# neither the number of workers, nor which of them computes a task, nor a death changes a bit.

MAX_HELD_STATE_BYTES = 256 * 2**20  # of private state that a worker keeps for later rounds
MAX_DEATHS = 3  # of workers that computed the same client, after which the run ends
CHUNKS_AHEAD = 4  # per worker, which may start before the first unfinished one in a large cohort
MAX_CHUNKS_PER_JOB = 2  # whose results come back together
LARGE_COHORT = 16  # chunks per worker
# Jobs of a worker: one runs, one waits, so that the worker is never idle.
JOBS_PER_WORKER = 2
# Exceptions that another process can unpickle.
_TRANSFERABLE_ERRORS = (UserError, RunFailedError, DivergedError, PayloadError)


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker receives once."""

    algorithm: Algorithm
    federation: FederationSpec
    threads: int
    devices: tuple[str, ...]  # assigned to workers in turn
    chunk: int = 1
    precision: str = "float32"
    dtype: torch.dtype = torch.float32
    shares_memory: bool = False  # with the server's process
    deterministic: bool = False
    owns_device: bool = False  # no other worker computes there


@dataclass(frozen=True)
class WorkerJob:
    """Tasks of some clients, chunk by chunk.

    `private` has the state of clients whose worker does not hold it already, `notes` what clients
    remember from the round's earlier exchanges.
    """

    number: int
    kind: Literal["answer", "read"]
    chunks: list[list[str]]
    requests: dict[str, Message]
    private: dict[str, bytes | None]
    details: bool = False
    notes: dict[str, bytes] = field(default_factory=dict)

    @property
    def clients(self) -> list[str]:
        """All clients of the job, in order."""
        return [client for chunk in self.chunks for client in chunk]


@dataclass
class JobResult:
    """The result of a job. An `error` ends the run."""

    job: int
    replies: dict[str, Reply] = field(default_factory=dict)
    evaluations: dict[str, ClientEvaluation] = field(default_factory=dict)
    private: dict[str, bytes] = field(default_factory=dict)  # state that changed
    notes: dict[str, bytes] = field(default_factory=dict)  # of all its clients that have any now
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # by client, an equal share of its chunk
    # clients whose state the server must send again
    dropped_states: list[str] = field(default_factory=list)
    error: Exception | None = None
    trace: str = ""  # where the error was raised

    def with_checksums(self) -> JobResult:
        """Return a copy whose messages have checksums, to be sent to another machine."""
        replies = {
            client: reply.with_checksum() if isinstance(reply, Message) else reply
            for client, reply in self.replies.items()
        }
        return replace(self, replies=replies)


class Worker:
    """Runs jobs one after the other, usually in a process of its own."""

    def __init__(self, setup: WorkerSetup, index: int) -> None:
        torch.set_num_threads(setup.threads)
        torch.set_default_dtype(setup.dtype)
        self.setup = setup
        self.index = index
        self.store = StateStore()
        # clients whose state is held, least recently used first
        self._used: OrderedDict[str, None] = OrderedDict()
        # Clients whose state is dropped after the next job, unless it is theirs: that job may have
        # been sent already.
        self._leaving: list[str] = []

    @cached_property
    def runtime(self) -> ClientRuntime:
        """The runtime, created with the first job so that its errors are reported with the result."""
        device = torch.device(self.setup.devices[self.index % len(self.setup.devices)])
        use_deterministic_algorithms(device, self.setup.deterministic)
        algorithm = self.setup.algorithm
        federation = self.setup.federation
        # Workers that share a device would each take half of it for copies.
        keeps_copies = self.setup.owns_device and not runs_user_code(
            algorithm, federation.client_infos
        )
        memory = DeviceMemory(device, keeps_copies)
        backend = make_backend(memory, self.setup.chunk, self.setup.precision)
        return ClientRuntime(
            algorithm,
            federation,
            self.store,
            backend,
            make_protocol(algorithm, federation),
            local=self.setup.shares_memory,
        )

    def run_job(self, job: WorkerJob) -> JobResult:
        """Run a job. Exceptions are returned with the result, not raised."""
        result = JobResult(job.number)
        try:
            for chunk in job.chunks:
                start = time.perf_counter()
                self._run_chunk(job, chunk, result)
                share = (time.perf_counter() - start) / len(chunk)
                result.seconds.update(dict.fromkeys(chunk, share))
        except Exception as error:
            result.error = _transferable_error(error)
            result.trace = traceback.format_exc()
        result.dropped_states = self._drop_oldest_states(job.clients)
        return result

    @translate_user_errors()
    def _run_chunk(self, job: WorkerJob, chunk: list[str], result: JobResult) -> None:
        for client in chunk:
            if client in job.private:
                self.store.stage(client, job.private[client] or b"")
        self.store.commit()
        if job.kind == "read":
            bodies = {client: job.requests[client].body for client in chunk}
            round_idx = job.requests[chunk[0]].round_idx
            result.evaluations.update(self.runtime.evaluate(bodies, round_idx, job.details))
            return
        stamps = {client: self.store.stamp(client) for client in chunk}
        self.store.notes.update({c: job.notes[c] for c in chunk if c in job.notes})
        result.replies.update(self.runtime.run({c: job.requests[c] for c in chunk}))
        result.notes.update(self.store.notes)
        self.store.commit()
        for client in chunk:
            if self.store.stamp(client) != stamps[client]:
                result.private[client] = self.store.encoded(client) or b""

    def _drop_oldest_states(self, clients: list[str]) -> list[str]:
        """Drop the state of the least recently used clients while there is too much of it.

        Args:
            clients: Those of the job that has run.

        Returns:
            The clients whose state is gone after the next job, unless that job is theirs.
        """
        for client in set(self._leaving).difference(clients):
            self.store.stage(client, b"")
        self.store.commit()
        for client in clients:
            self._used.pop(client, None)
            if self.store.stamp(client) is not None:
                self._used[client] = None
        excess = self.store.cached_bytes - MAX_HELD_STATE_BYTES
        self._leaving = []
        while excess > 0 and self._used:
            client, _ = self._used.popitem(last=False)
            excess -= self.store.num_bytes(client)
            self._leaving.append(client)
        return self._leaving


def _transferable_error(error: Exception) -> Exception:
    """Return an error that another process can unpickle: the user's classes may not exist there."""
    if type(error) in _TRANSFERABLE_ERRORS:
        return error
    if isinstance(error, _TRANSFERABLE_ERRORS):
        return RunFailedError(str(error))
    message = " ".join(str(error).split())[:MAX_MESSAGE_LENGTH]
    return RunFailedError(f"a worker failed: {type(error).__name__}: {message}")


class RemoteTraceback(Exception):
    """A traceback from another process, the cause of an exception that is raised in this one."""


class WorkerPool(Protocol):
    """Workers, numbered from 0. Each runs its jobs in order."""

    size: int

    def send(self, worker: int, job: WorkerJob) -> None:
        """Send a job to a worker that has fewer than `JOBS_PER_WORKER`."""

    def receive(self) -> tuple[int, JobResult | None]:
        """Wait for a worker's next result; None if it died, with all its jobs, and was replaced."""

    def close(self) -> None:
        """Release the workers."""


def run_jobs(
    worker: Worker, receive: Callable[[], WorkerJob], send: Callable[[JobResult], None]
) -> None:
    """Run jobs in the order in which they come; while one runs, the next is received.

    Otherwise both processes could block: one sends a long job, the other a long result.

    Args:
        worker: Runs the jobs.
        receive: Waits for the next job. What it raises ends the loop, after the jobs before.
        send: Sends a result.
    """
    received: queue.SimpleQueue[WorkerJob | Exception] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                received.put(receive())
        except Exception as error:
            received.put(error)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        job = received.get()
        if isinstance(job, Exception):
            raise job
        send(worker.run_job(job))
        del job  # the size of a model


class WorkerExecutor:
    """Executor whose clients are computed by workers, and the server's plans in this process."""

    takes_payload = False

    def __init__(
        self,
        pool: WorkerPool,
        client_infos: Mapping[str, ClientInfo],
        store: StateStore,
        backend: Backend,
        chunk: int = 1,
    ) -> None:
        self.pool = pool
        self.client_infos = client_infos
        self.store = store
        self.backend = backend
        self.chunk = chunk
        self.costs = TaskCosts(client_infos)
        # by client: the worker that holds its state, and the stamp of that state
        self._holders: dict[str, tuple[int, int]] = {}
        # by worker, in order; jobs may belong to a round that was given up
        self._running: defaultdict[int, deque[WorkerJob]] = defaultdict(deque)
        self._num_jobs = 0
        self._listener: Callable[[str], None] | None = None

    def run(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        results = self._run_tasks("answer", clients, request)
        return in_order(clients, (pair for result in results for pair in drain(result.replies)))

    def evaluate(
        self,
        clients: Sequence[str],
        broadcast: Callable[[str], Content],
        round_idx: int,
        details: bool,
    ) -> Iterator[tuple[str, ClientEvaluation]]:
        def request(client: str) -> Message:
            return Message("read", broadcast(client), round_idx)

        results = self._run_tasks("read", clients, request, details)
        return in_order(
            clients, (pair for result in results for pair in result.evaluations.items())
        )

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        self._listener = listener

    def close(self) -> None:
        self.pool.close()

    def _run_tasks(
        self,
        kind: Literal["answer", "read"],
        clients: Sequence[str],
        request: Callable[[str], Message],
        details: bool = False,
    ) -> Iterator[JobResult]:
        """Run all tasks; yield results as they arrive, with private state staged."""
        chunks = client_chunks(clients, self.client_infos, self.chunk)
        waiting = ChunkQueue(chunks, self.costs, self.pool.size)
        deaths: Counter[str] = Counter()
        last_old_job = self._num_jobs  # jobs up to this number belong to calls that were given up

        def may_wait_behind(job: WorkerJob) -> bool:
            # An old job may change private state after the next one was made without it.
            return job.number > last_old_job and waiting.outlasts(job)

        def send_jobs() -> None:
            for num_jobs in range(JOBS_PER_WORKER):  # first to those that are idle
                for worker in range(self.pool.size):
                    jobs = self._running[worker]
                    if len(jobs) != num_jobs or not all(map(may_wait_behind, jobs)):
                        continue
                    taken = waiting.take(partial(self._may_compute, worker))
                    if taken:
                        job = self._make_job(worker, kind, taken, request, details)
                        jobs.append(job)
                        self.pool.send(worker, job)

        send_jobs()
        while waiting or any(
            j.number > last_old_job for jobs in self._running.values() for j in jobs
        ):
            worker, result = self.pool.receive()
            if result is None:  # the worker died, if idle without a job
                self._forget_states(worker, list(self._holders))
                lost = [job for job in self._running.pop(worker, ()) if job.number > last_old_job]
                if lost:
                    _count_deaths(lost[0], deaths)  # the others had not begun
                for job in lost:
                    waiting.put_back(job.chunks)
                send_jobs()
                continue
            finished = self._running[worker].popleft()
            if finished.number <= last_old_job or result.error is not None:
                # What the worker holds now is not the committed state.
                self._forget_states(worker, [*finished.clients, *result.dropped_states])
            if finished.number <= last_old_job:
                send_jobs()
                continue
            if result.error is not None:
                raise result.error from (RemoteTraceback(result.trace) if result.trace else None)
            self._accept(worker, finished, result)
            waiting.mark_finished(finished.chunks)
            send_jobs()  # the worker computes while the server takes the result
            yield result
            del finished, result  # the size of a model

    def _make_job(
        self,
        worker: int,
        kind: Literal["answer", "read"],
        chunks: list[list[str]],
        request: Callable[[str], Message],
        details: bool,
    ) -> WorkerJob:
        clients = [client for chunk in chunks for client in chunk]
        # Making a request may call a method's hook, which may fail: only then record anything.
        sent = {client: request(client) for client in clients}
        private: dict[str, bytes | None] = {}
        for client in clients:
            if not _needs_state(kind, sent[client]):
                continue
            stamp = self.store.stamp(client)
            if stamp is None or self._holders.get(client) != (worker, stamp):
                private[client] = self.store.encoded(client)
            if self._listener is not None:
                self._listener(f"{client}: {'train' if kind == 'answer' else 'evaluation'}")
        for client in private:
            self._record_holder(worker, client, self.store.stamp(client))
        notes = {c: self.store.notes[c] for c in clients if c in self.store.notes}
        self._num_jobs += 1
        return WorkerJob(self._num_jobs, kind, chunks, sent, private, details, notes)

    def _accept(self, worker: int, job: WorkerJob, result: JobResult) -> None:
        """Stage private state, and record notes and costs."""
        for client, private in result.private.items():
            self._record_holder(worker, client, self.store.stage(client, private))
        for client in job.clients:
            self.store.notes.pop(client, None)
        self.store.notes.update(result.notes)
        self._forget_states(worker, result.dropped_states)
        if job.kind == "answer":
            self.costs.update(
                {c: s for c, s in result.seconds.items() if _needs_state(job.kind, job.requests[c])}
            )

    def _may_compute(self, worker: int, client: str) -> bool:
        """Return whether no other worker holds the client's state."""
        holder = self._holders.get(client)
        return holder is None or holder[0] == worker

    def _record_holder(self, worker: int, client: str, stamp: int | None) -> None:
        """Record which worker has a client's state; a client without state may go to any worker."""
        if stamp is None:
            self._holders.pop(client, None)
        else:
            self._holders[client] = (worker, stamp)

    def _forget_states(self, worker: int, clients: Iterable[str]) -> None:
        """Record that a worker no longer has the state of these clients."""
        for client in clients:
            if client in self._holders and self._holders[client][0] == worker:
                del self._holders[client]


def _count_deaths(job: WorkerJob, deaths: Counter[str]) -> None:
    """Count a worker's death for all clients of its job: any of them may have caused it."""
    deaths.update(job.clients)
    for client in job.clients:
        if deaths[client] >= MAX_DEATHS:
            raise RunFailedError(f"{MAX_DEATHS} workers died on {client}; is there enough memory?")


def _needs_state(kind: str, request: Message) -> bool:
    """Return whether a task reads private state; a protocol's other exchanges do not."""
    return kind == "read" or request.kind == "train"


class ChunkQueue:
    """Chunks that are not finished, of which the most expensive start first.

    In a large cohort only chunks whose turn is near may start, so that few results have to wait for
    their turn.
    """

    def __init__(self, chunks: list[list[str]], costs: TaskCosts, workers: int) -> None:
        self._order = deque(chunks)  # unfinished, in turn
        self._waiting = {chunk[0]: chunk for chunk in chunks}  # not started
        self._finished: set[str] = set()
        self._costs = {chunk[0]: sum(map(costs.cost_of, chunk)) for chunk in chunks}
        is_large = len(chunks) > LARGE_COHORT * workers
        self._num_near = CHUNKS_AHEAD * workers if is_large else len(chunks)
        self._waiting_cost = sum(self._costs.values())
        self._workers = workers
        self._num_shares = LARGE_COHORT * workers  # in which what waits is sent, at least

    def __len__(self) -> int:
        return len(self._waiting)

    def outlasts(self, job: WorkerJob) -> bool:
        """Return whether what waits keeps all workers busy for longer than a job takes.

        If not, another worker may be idle before this one can begin with a second job.
        """
        cost = sum(self._costs.get(chunk[0], 0.0) for chunk in job.chunks)
        return self._waiting_cost > self._workers * cost

    def take(self, may_compute: Callable[[str], bool]) -> list[list[str]]:
        """Take the next chunks for a worker: an expensive one, or a few small ones.

        The less is left, the smaller a job, so that workers end at about the same time.

        Args:
            may_compute: Whether no other worker holds a client's state.
        """
        near = [chunk for chunk in islice(self._order, self._num_near) if chunk[0] in self._waiting]
        near.sort(key=lambda chunk: (not may_compute(chunk[0]), -self._costs[chunk[0]]))
        taken: list[list[str]] = []
        cost = 0.0
        for chunk in near[:MAX_CHUNKS_PER_JOB]:
            cost += self._costs[chunk[0]]
            is_enough = cost > self._waiting_cost / self._num_shares
            if taken and (is_enough or not may_compute(chunk[0])):
                break
            taken.append(chunk)
        for chunk in taken:
            del self._waiting[chunk[0]]
            self._waiting_cost -= self._costs[chunk[0]]
        return taken

    def put_back(self, chunks: list[list[str]]) -> None:
        """Return chunks whose worker died."""
        self._waiting.update({chunk[0]: chunk for chunk in chunks})
        self._waiting_cost += sum(self._costs[chunk[0]] for chunk in chunks)

    def mark_finished(self, chunks: list[list[str]]) -> None:
        """Remove chunks that are finished."""
        self._finished.update(chunk[0] for chunk in chunks)
        while self._order and self._order[0][0] in self._finished:
            self._order.popleft()
