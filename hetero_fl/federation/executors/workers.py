"""Distribution of clients' tasks to workers: processes, Ray actors or ranks of torchrun.

A worker receives the method and the federation once, and then jobs. A job consists of the tasks of
some clients, in chunks of clients that are processed together. The result of a client depends only
on the task, and chunks depend only on the cohort. The number of workers, the order of jobs and the
failure of workers therefore do not change the results.
"""

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
from typing import Any, Literal, Protocol

import cloudpickle
import torch
from typing_extensions import override

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import runs_user_code
from hetero_fl.communication.protocol import Content, Message, Reply
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import PayloadError
from hetero_fl.core.shipped_objects import pack_objects, unpack_objects
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
from hetero_fl.federation.executors.base import (
    ALL_REPLIES,
    Arrival,
    Executor,
    Until,
    arrivals,
    client_chunks,
    drain,
    in_order,
)
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.utils.environment import use_deterministic_algorithms
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.recorded_warnings import RecordedWarning, issue_warnings, record_warnings
from model_zoo.generators import own_generators

# Maximum number of bytes of private state that a worker keeps for later rounds.
MAX_HELD_STATE_BYTES = 256 * 2**20
# The run fails after this number of workers have died while processing the same client.
MAX_DEATHS = 3
# In a large cohort, only this number of chunks per worker may start before the first unfinished
# chunk has finished.
CHUNKS_AHEAD = 4
# Maximum number of chunks in a job, whose results are sent together.
MAX_CHUNKS_PER_JOB = 2
# A cohort is large if it has more than this number of chunks per worker.
LARGE_COHORT = 16
# Number of jobs per worker: one job runs and the next one waits, so that workers are not idle.
JOBS_PER_WORKER = 2
# Exceptions that another process can unpickle.
_TRANSFERABLE_ERRORS = (UserError, RunFailedError, DivergedError, PayloadError)


@dataclass(frozen=True)
class WorkerSetup:
    """Setup that a worker receives once, at the start.

    Attributes:
        algorithm: The method.
        federation: The federation.
        threads: Number of threads of a worker.
        devices: Names of the devices, which are assigned to workers in turn.
        chunk: Number of clients of one architecture that are processed together.
        precision: "float32" or "bfloat16".
        dtype: Default dtype of PyTorch.
        shares_memory: Whether workers share memory with the process of the server.
        deterministic: Whether PyTorch uses deterministic algorithms.
        owns_device: Whether no two workers use the same device.
    """

    algorithm: Algorithm
    federation: FederationSpec
    threads: int
    devices: tuple[str, ...]
    chunk: int = 1
    precision: str = "float32"
    dtype: torch.dtype = torch.float32
    shares_memory: bool = False
    deterministic: bool = False
    owns_device: bool = False

    def __getstate__(self) -> dict[str, Any]:
        models = [
            [arch.name for arch in profile.models.values()]
            for profile in self.federation.client_infos.profiles
        ]
        settings = [
            profile.settings.model_dump() for profile in self.federation.client_infos.profiles
        ]
        objects = pack_objects(models, settings, self.federation.metrics)
        algorithm = cloudpickle.dumps(self.algorithm)
        return {**self.__dict__, "algorithm": algorithm, "objects": objects}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Objects are restored first, as the algorithm and the models refer to them.
        unpack_objects(state.pop("objects"))
        state["algorithm"] = cloudpickle.loads(state["algorithm"])
        self.__dict__.update(state)


@dataclass(frozen=True)
class WorkerJob:
    """Tasks of some clients that are sent to one worker.

    Attributes:
        number: Number of the job.
        kind: "answer" if requests are executed, "read" if models are evaluated.
        chunks: Lists of client ids that are processed together.
        requests: Request to each client, keyed by client id.
        private: Encoded private states that the worker does not have, keyed by client id. The value
            is None if the state is empty.
        details: Whether an evaluation computes all results that a report shows.
        notes: State of the clients between the exchanges of a round, keyed by client id (see
            `RoundProtocol.answer`).
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
        """Ids of all clients in the chunks, in order."""
        return [client for chunk in self.chunks for client in chunk]


@dataclass
class JobResult:
    """Result of a job.

    Attributes:
        job: Number of the job.
        replies: Reply of each client, keyed by client id.
        evaluations: Evaluation of each client, keyed by client id.
        private: Encoded private states that have changed, keyed by client id.
        notes: State of the clients between the exchanges of a round, keyed by client id.
        seconds: Duration of each client's task in seconds, keyed by client id. The duration of a
            chunk is divided equally among the clients in the chunk.
        dropped_states: Ids of clients whose private state the worker drops. The server must send
            these states again.
        error: The exception with which the job failed, or None. An exception ends the run.
        trace: Traceback of the exception as text.
        warnings: Warnings that the job has issued.
    """

    job: int
    replies: dict[str, Reply] = field(default_factory=dict)
    evaluations: dict[str, ClientEvaluation] = field(default_factory=dict)
    private: dict[str, bytes] = field(default_factory=dict)
    notes: dict[str, bytes] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    dropped_states: list[str] = field(default_factory=list)
    error: Exception | None = None
    trace: str = ""
    warnings: list[RecordedWarning] = field(default_factory=list)

    def with_checksums(self) -> JobResult:
        """Return a copy in which replies have checksums, for a transfer to another machine."""
        replies = {
            client: reply.with_checksum() if isinstance(reply, Message) else reply
            for client, reply in self.replies.items()
        }
        return replace(self, replies=replies)


class Worker:
    """Worker that runs jobs in a process.

    Args:
        setup: Setup of the workers.
        index: Index of the worker.

    Attributes:
        store: Store of the private states that the worker has received or computed.
    """

    def __init__(self, setup: WorkerSetup, index: int) -> None:
        torch.set_num_threads(setup.threads)
        torch.set_default_dtype(setup.dtype)
        self.setup = setup
        self.index = index
        self.store = StateStore()
        # Clients whose state is in the store, least recently used first.
        self._used: OrderedDict[str, None] = OrderedDict()
        # Clients whose state is dropped after the next job. The state is kept if the next job,
        # which may already have been sent, includes the client.
        self._to_drop: list[str] = []

    @cached_property
    def runtime(self) -> ClientRuntime:
        """Runtime that executes the plans of clients.

        The runtime is created by the first job, so that errors are part of the result of the job.
        """
        device = torch.device(self.setup.devices[self.index % len(self.setup.devices)])
        use_deterministic_algorithms(device, self.setup.deterministic)
        algorithm = self.setup.algorithm
        federation = self.setup.federation
        # Workers that share a device would each use half of the device's memory for copies.
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
        """Run a job, and return the result. Exceptions are stored in the result and not raised."""
        result = JobResult(job.number)
        try:
            with own_generators(), record_warnings() as result.warnings:
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
        """Drop the previously selected states, and select the least recently used states to drop.

        States are selected if the total size of all states exceeds the limit.

        Args:
            clients: The clients of the finished job.

        Returns:
            The clients whose states are dropped after the next job. States of clients in the next
            job are not dropped.
        """
        for client in set(self._to_drop).difference(clients):
            self.store.stage(client, b"")
        self.store.commit()
        for client in clients:
            self._used.pop(client, None)
            if self.store.stamp(client) is not None:
                self._used[client] = None
        excess = self.store.cached_bytes - MAX_HELD_STATE_BYTES
        self._to_drop = []
        while excess > 0 and self._used:
            client, _ = self._used.popitem(last=False)
            excess -= self.store.num_bytes(client)
            self._to_drop.append(client)
        return self._to_drop


def _transferable_error(error: Exception) -> Exception:
    """Convert an exception to one that a process without the user's classes can unpickle."""
    if type(error) in _TRANSFERABLE_ERRORS:
        return error
    if isinstance(error, _TRANSFERABLE_ERRORS):
        return RunFailedError(str(error))
    message = " ".join(str(error).split())[:MAX_MESSAGE_LENGTH]
    return RunFailedError(f"a worker failed: {type(error).__name__}: {message}")


class RemoteTracebackError(Exception):
    """Cause of an exception in a worker, with the traceback of the worker's process as message."""


class WorkerPool(Protocol):
    """Interface of pools of workers, which are numbered from 0.

    Each worker runs jobs in the order of sending.

    Attributes:
        size: Number of workers.
    """

    size: int

    def send(self, worker: int, job: WorkerJob) -> None:
        """Send a job to a worker.

        The worker must have fewer than `JOBS_PER_WORKER` unfinished jobs.
        """

    def receive(self) -> tuple[int, JobResult | None]:
        """Wait for the next result.

        Returns:
            The number of the worker and the result. If the worker has died and was replaced, the
            result is None, and all unfinished jobs of the worker are lost.
        """

    def close(self) -> None:
        """Release the workers."""


def run_jobs(
    worker: Worker, receive: Callable[[], WorkerJob], send: Callable[[JobResult], None]
) -> None:
    """Run the jobs that a worker receives, until `receive` raises an exception.

    The next job is received while a job runs. Otherwise, both processes could block: one process
    while sending a long job, the other process while sending a long result.

    Args:
        worker: Worker that runs the jobs.
        receive: Function that waits for the next job and returns the job. If the function raises an
            exception, the jobs that were received before are run, and the exception is raised.
        send: Function that sends a result.
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
        # Free the model before the next job.
        del job


class WorkerExecutor(Executor):
    """Executor that runs clients in workers, and the server's plans in this process.

    Args:
        pool: The workers.
        client_infos: Information on each client, keyed by client id.
        store: Store of the clients' private states.
        backend: Backend that computes the server's plans.
        chunk: Number of clients of one architecture that are processed together.
    """

    accepts_unencoded = False

    def __init__(
        self,
        pool: WorkerPool,
        client_infos: Mapping[str, ClientInfo],
        store: StateStore,
        backend: Backend,
        chunk: int = 1,
    ) -> None:
        super().__init__(store, backend)
        self.pool = pool
        self.client_infos = client_infos
        self.chunk = chunk
        self.costs = TaskCosts(client_infos)
        # Worker that has the private state of a client, and stamp of the state, keyed by client id.
        self._holders: dict[str, tuple[int, int]] = {}
        # Unfinished jobs of each worker, in order. They may belong to an abandoned round.
        self._running: defaultdict[int, deque[WorkerJob]] = defaultdict(deque)
        self._num_jobs = 0
        self._warned: set[RecordedWarning] = set()
        self._listener: Callable[[str], None] | None = None

    @override
    def run(
        self, clients: Sequence[str], request: Callable[[str], Message], until: Until = ALL_REPLIES
    ) -> Iterator[Arrival]:
        results = self._run_tasks("answer", clients, request)
        replies = in_order(clients, (pair for result in results for pair in drain(result.replies)))
        return arrivals(replies)

    @override
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

    @override
    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        self._listener = listener

    @override
    def close(self) -> None:
        self.pool.close()

    def _run_tasks(
        self,
        kind: Literal["answer", "read"],
        clients: Sequence[str],
        request: Callable[[str], Message],
        details: bool = False,
    ) -> Iterator[JobResult]:
        """Run all tasks, and yield each result after staging the private states in the result."""
        chunks = client_chunks(clients, self.client_infos, self.chunk)
        waiting = ChunkQueue(chunks, self.costs, self.pool.size)
        deaths: Counter[str] = Counter()
        # Jobs up to this number belong to calls that were abandoned.
        last_old_job = self._num_jobs

        def may_wait_behind(job: WorkerJob) -> bool:
            # The next job contains the present private states, which an unfinished job of an
            # abandoned call may still change.
            return job.number > last_old_job and waiting.keeps_workers_busy(job)

        def make_job(worker: int, chunks: list[list[str]]) -> WorkerJob:
            return self._make_job(worker, kind, chunks, request, details)

        send_jobs = partial(self._send_jobs, waiting, may_wait_behind, make_job)
        send_jobs()
        while waiting or self._has_job_after(last_old_job):
            worker, result = self.pool.receive()
            if result is None:
                self._requeue_lost_jobs(worker, last_old_job, waiting, deaths)
                send_jobs()
                continue
            finished = self._running[worker].popleft()
            issue_warnings(result.warnings, self._warned)
            if finished.number <= last_old_job or result.error is not None:
                # The worker's states differ from the committed ones.
                self._forget_states(worker, [*finished.clients, *result.dropped_states])
            if finished.number <= last_old_job:
                send_jobs()
                continue
            if result.error is not None:
                cause = RemoteTracebackError(result.trace) if result.trace else None
                raise result.error from cause
            self._accept(worker, finished, result)
            waiting.mark_finished(finished.chunks)
            # The worker continues while the server processes the result.
            send_jobs()
            yield result
            # Free the models before the next result.
            del finished, result

    def _send_jobs(
        self,
        waiting: ChunkQueue,
        may_wait_behind: Callable[[WorkerJob], bool],
        make_job: Callable[[int, list[list[str]]], WorkerJob],
    ) -> None:
        """Send jobs with waiting chunks to workers, starting with idle workers."""
        for num_jobs in range(JOBS_PER_WORKER):
            for worker in range(self.pool.size):
                jobs = self._running[worker]
                if len(jobs) != num_jobs or not all(map(may_wait_behind, jobs)):
                    continue
                chunks = waiting.take(partial(self._may_compute, worker))
                if chunks:
                    job = make_job(worker, chunks)
                    jobs.append(job)
                    self.pool.send(worker, job)

    def _has_job_after(self, number: int) -> bool:
        return any(job.number > number for jobs in self._running.values() for job in jobs)

    def _requeue_lost_jobs(
        self, worker: int, last_old_job: int, waiting: ChunkQueue, deaths: Counter[str]
    ) -> None:
        """Put the unfinished chunks of a dead worker back into the queue."""
        self._forget_states(worker, list(self._holders))
        lost = [job for job in self._running.pop(worker, ()) if job.number > last_old_job]
        if lost:
            # Only the first job had begun.
            _count_deaths(lost[0], deaths)
        for job in lost:
            waiting.requeue(job.chunks)

    def _make_job(
        self,
        worker: int,
        kind: Literal["answer", "read"],
        chunks: list[list[str]],
        request: Callable[[str], Message],
        details: bool,
    ) -> WorkerJob:
        clients = [client for chunk in chunks for client in chunk]
        # Requests are created before anything changes, because hooks of the method may fail.
        requests = {client: request(client) for client in clients}
        private: dict[str, bytes | None] = {}
        for client in clients:
            if not _needs_state(kind, requests[client]):
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
        return WorkerJob(self._num_jobs, kind, chunks, requests, private, details, notes)

    def _accept(self, worker: int, job: WorkerJob, result: JobResult) -> None:
        """Stage the private states in a result, and record the notes and costs."""
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
        """Return whether no other worker has the client's state."""
        holder = self._holders.get(client)
        return holder is None or holder[0] == worker

    def _record_holder(self, worker: int, client: str, stamp: int | None) -> None:
        """Record which worker has the state of a client. If `stamp` is None, there is no state."""
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
    """Count the death of a worker for all clients of a job, because any client may be the cause.

    Raises:
        RunFailedError: If `MAX_DEATHS` workers have died while processing the same client.
    """
    deaths.update(job.clients)
    for client in job.clients:
        if deaths[client] >= MAX_DEATHS:
            raise RunFailedError(
                f"{client}: {MAX_DEATHS} workers died during its tasks; if they ran out of memory, "
                "reduce runtime.workers or runtime.chunk"
            )


def _needs_state(kind: str, request: Message) -> bool:
    """Return whether a task needs private state. Exchanges before training do not."""
    return kind == "read" or request.kind == "train"


class ChunkQueue:
    """Queue of unfinished chunks, from which the most expensive chunks start first.

    In a large cohort, only the first unfinished chunks may start. Results are processed in the
    order of the cohort, so only few results then wait in memory for earlier results.

    Args:
        chunks: The chunks in the order of the cohort.
        costs: Estimated cost of each client's task.
        workers: Number of workers.
    """

    def __init__(self, chunks: list[list[str]], costs: TaskCosts, workers: int) -> None:
        # Unfinished chunks in order.
        self._order = deque(chunks)
        # Chunks that have not started, by the id of their first client.
        self._waiting = {chunk[0]: chunk for chunk in chunks}
        self._finished: set[str] = set()
        self._costs = {chunk[0]: sum(map(costs.cost_of, chunk)) for chunk in chunks}
        is_large = len(chunks) > LARGE_COHORT * workers
        self._num_near = CHUNKS_AHEAD * workers if is_large else len(chunks)
        self._waiting_cost = sum(self._costs.values())
        self._workers = workers
        # The cost of a job with several chunks is at most `_waiting_cost / _num_shares`.
        self._num_shares = LARGE_COHORT * workers

    def __len__(self) -> int:
        return len(self._waiting)

    def keeps_workers_busy(self, job: WorkerJob) -> bool:
        """Return whether the waiting chunks keep all workers busy for longer than a job takes.

        Otherwise, a chunk that waits for the end of the job could start earlier on another worker.
        """
        cost = sum(self._costs.get(chunk[0], 0.0) for chunk in job.chunks)
        return self._waiting_cost > self._workers * cost

    def take(self, may_compute: Callable[[str], bool]) -> list[list[str]]:
        """Remove and return the next chunks for a worker.

        The result is one expensive chunk or a few small chunks, and empty if no chunk may start.
        Jobs become smaller toward the end, so that workers finish at about the same time.

        Args:
            may_compute: Function that returns whether the worker may process a client, because no
                other worker has the client's state.
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

    def requeue(self, chunks: list[list[str]]) -> None:
        """Put the chunks of a dead worker back into the queue."""
        self._waiting.update({chunk[0]: chunk for chunk in chunks})
        self._waiting_cost += sum(self._costs[chunk[0]] for chunk in chunks)

    def mark_finished(self, chunks: list[list[str]]) -> None:
        """Remove finished chunks from the queue."""
        self._finished.update(chunk[0] for chunk in chunks)
        while self._order and self._order[0][0] in self._finished:
            self._order.popleft()
