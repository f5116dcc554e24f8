"""Workers that run the tasks of clients, and an executor that distributes the tasks to a pool.

A worker runs in another process or at a site. It receives the method and the federation once, and
then jobs. A job contains everything that its result depends on. The number of workers, the order of
jobs and the failure of workers therefore do not change the results.
"""

from __future__ import annotations

import atexit
import threading
import traceback
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from queue import SimpleQueue
from typing import Any, Literal

import cloudpickle
import torch
from typing_extensions import override

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import runs_user_code
from hetero_fl.communication.protocol import BroadcastTo, Message, Reply
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import PayloadError
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import (
    MAX_MESSAGE_LENGTH,
    Backend,
    DivergedError,
    translate_user_errors,
)
from hetero_fl.engine.templates import training_flops
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.federation.client_runtime import ClientEvaluation, ClientRuntime
from hetero_fl.federation.executors.base import (
    ALL_REPLIES,
    Arrival,
    Evaluations,
    Executor,
    Until,
    arrivals,
    client_chunks,
    drain,
    in_order,
)
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.store import StateStore
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.utils.environment import use_deterministic_algorithms
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.recorded_warnings import RecordedWarning, issue_warnings, record_warnings
from hetero_fl.utils.registry import pack_objects, unpack_objects
from model_zoo.generators import own_generators

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
    """Tasks of clients that are processed together.

    Attributes:
        kind: "answer" if requests are executed, "read" if models are evaluated.
        requests: Request to each client, keyed by client id.
        private: Encoded private states, keyed by client id. The value is None if the state is
            empty.
        details: Whether an evaluation computes all results that a report shows.
        notes: State of the clients between the exchanges of a round, keyed by client id (see
            `RoundProtocol.answer`).
    """

    kind: Literal["answer", "read"]
    requests: dict[str, Message]
    private: dict[str, bytes | None]
    details: bool = False
    notes: dict[str, bytes] = field(default_factory=dict)


@dataclass
class JobResult:
    """Result of a job.

    Attributes:
        replies: Reply of each client, keyed by client id.
        evaluations: Evaluation of each client, keyed by client id.
        private: Encoded private states that have changed, keyed by client id.
        notes: State of the clients between the exchanges of a round, keyed by client id.
        error: The exception with which the job failed, or None. An exception ends the run.
        trace: Traceback of the exception as text.
        warnings: Warnings that the job has issued.
    """

    replies: dict[str, Reply] = field(default_factory=dict)
    evaluations: dict[str, ClientEvaluation] = field(default_factory=dict)
    private: dict[str, bytes] = field(default_factory=dict)
    notes: dict[str, bytes] = field(default_factory=dict)
    error: Exception | None = None
    trace: str = ""
    warnings: list[RecordedWarning] = field(default_factory=list)


class Worker:
    """Worker that runs jobs in a process.

    Args:
        setup: Setup of the workers.
        index: Index of the worker.
    """

    def __init__(self, setup: WorkerSetup, index: int) -> None:
        torch.set_num_threads(setup.threads)
        torch.set_default_dtype(setup.dtype)
        self.setup = setup
        self.index = index

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
            StateStore(),
            backend,
            make_protocol(algorithm, federation),
            local=self.setup.shares_memory,
        )

    def run_job(self, job: WorkerJob) -> JobResult:
        """Run a job, and return the result. Exceptions are stored in the result and not raised."""
        result = JobResult()
        try:
            with own_generators(), record_warnings() as result.warnings:
                self._run_tasks(job, result)
        except Exception as error:
            result.error = _transferable_error(error)
            result.trace = traceback.format_exc()
        return result

    @translate_user_errors()
    def _run_tasks(self, job: WorkerJob, result: JobResult) -> None:
        # Without the states of earlier jobs.
        store = StateStore()
        self.runtime.store = store
        for client, private in job.private.items():
            store.stage(client, private or b"")
        store.commit()
        if job.kind == "read":
            contents = {client: request.content for client, request in job.requests.items()}
            round_idx = next(iter(job.requests.values())).round_idx
            result.evaluations = self.runtime.evaluate(contents, round_idx, job.details)
            return
        store.notes.update(job.notes)
        stamps = {client: store.committed.get(client) for client in job.requests}
        result.replies = self.runtime.run(job.requests)
        if not self.setup.shares_memory:
            # Replies travel to another machine.
            for client, reply in result.replies.items():
                if isinstance(reply, Message):
                    result.replies[client] = reply.with_checksum()
        result.notes = dict(store.notes)
        store.commit()
        for client, stamp in stamps.items():
            if store.committed.get(client) != stamp:
                result.private[client] = store.encoded(client) or b""


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


# Number of jobs per worker: one job runs and the next one waits, so that workers are not idle.
JOBS_PER_WORKER = 2
# Maximum number of unfinished and early results per worker in a large cohort, which limits the
# memory for results that wait for an earlier client.
MAX_AHEAD = 3
# A cohort is large if it has more than this number of chunks per worker.
LARGE_COHORT = 16
# The run fails after this number of workers have died while processing the same clients.
MAX_DEATHS = 3


class WorkerDiedError(Exception):
    """Raised when a worker has died before it returned the result of a job."""


class Cohort:
    """Jobs whose results are used together.

    Attributes:
        outcomes: Position of each job that has ended, and the result or the exception with which it
            failed.
        is_wanted: Whether jobs that have not started will start.
    """

    def __init__(self) -> None:
        self.outcomes: SimpleQueue[tuple[int, JobResult | BaseException]] = SimpleQueue()
        self.is_wanted = True
        self._ended: dict[int, JobResult | BaseException] = {}

    def __len__(self) -> int:
        """Return the number of outcomes that wait for `result`."""
        return len(self._ended)

    def __contains__(self, position: int) -> bool:
        return position in self._ended

    def wait_for_outcome(self) -> None:
        """Wait until another job has ended."""
        position, outcome = self.outcomes.get()
        self._ended[position] = outcome

    def result(self, position: int) -> JobResult:
        """Return the result of a job that has ended, and forget it.

        Raises:
            BaseException: If the job has failed.
        """
        outcome = self._ended.pop(position)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class JobQueue:
    """Jobs that wait for the workers of a pool.

    Args:
        size: Number of workers.

    Attributes:
        is_closed: Whether no further job starts.
    """

    def __init__(self, size: int) -> None:
        self.is_closed = False
        self._size = size
        self._queue: SimpleQueue[tuple[int, WorkerJob, Cohort] | None] = SimpleQueue()

    def put(self, position: int, job: WorkerJob, cohort: Cohort) -> None:
        """Add a job.

        Raises:
            RuntimeError: If the queue is closed.
        """
        if self.is_closed:
            raise RuntimeError("the workers have been stopped")
        self._queue.put((position, job, cohort))

    def get(self) -> tuple[int, WorkerJob, Cohort] | None:
        """Wait for the next job, and return it, or None if the queue is closed."""
        return self._queue.get()

    def close(self) -> None:
        """End all calls of `get`."""
        self.is_closed = True
        for _ in range(self._size):
            self._queue.put(None)


class WorkerPool(ABC):
    """Base class of pools of workers, each of which is served by a thread of this process.

    A worker that dies is replaced, and its job starts again. Jobs and outcomes pass through queues
    that Ctrl-C leaves intact. The locks of `concurrent.futures` may stay locked if a signal arrives
    while one is acquired, and the end of the run would wait for them forever.

    A pool that is not closed ends with its last reference, or with this process.

    Args:
        size: Number of workers.

    Attributes:
        size: Number of workers.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._jobs = JobQueue(size)
        # Called before `multiprocessing` ends the workers, which would otherwise be replaced.
        self._end = weakref.finalize(self, self._jobs.close)
        atexit.register(self._end)
        self._threads = [
            threading.Thread(target=_serve, args=(weakref.ref(self), self._jobs, i), daemon=True)
            for i in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, position: int, job: WorkerJob, cohort: Cohort) -> None:
        """Start a job when a worker is idle. Jobs start in the order of submission.

        The outcome is put into the cohort. It is a `RunFailedError` if workers cannot run or
        `MAX_DEATHS` workers have died during the job.

        Args:
            position: Position of the job in the cohort.
            job: The job.
            cohort: The cohort.

        Raises:
            RuntimeError: If the pool is closed.
        """
        self._jobs.put(position, job, cohort)

    def close(self) -> None:
        """Stop the workers, even if they are busy."""
        atexit.unregister(self._end)
        self._end()
        self.stop_workers()
        for thread in self._threads:
            thread.join()

    @abstractmethod
    def exchange(self, worker: int, job: WorkerJob) -> JobResult:
        """Send a job to an idle worker, and wait for the result.

        Args:
            worker: Index of the worker.
            job: The job.

        Raises:
            WorkerDiedError: If the worker has died.
            RunFailedError: If workers cannot run.
        """

    @abstractmethod
    def replace_worker(self, worker: int) -> None:
        """Replace a worker that has died.

        Args:
            worker: Index of the worker.

        Raises:
            UserError: If the `__main__` guard is missing in the user's script.
            RunFailedError: If a new worker would also die.
        """

    @abstractmethod
    def stop_workers(self) -> None:
        """Stop the workers, which ends all exchanges."""

    def run(self, worker: int, job: WorkerJob) -> JobResult:
        """Run a job in a worker, which is replaced if it dies.

        Raises:
            WorkerDiedError: If the worker has died after the pool was closed.
            RunFailedError: If workers cannot run or `MAX_DEATHS` of them have died.
        """
        for _ in range(MAX_DEATHS):
            try:
                return self.exchange(worker, job)
            except WorkerDiedError:
                if self._jobs.is_closed:
                    raise
                self.replace_worker(worker)
        raise RunFailedError(
            f"{', '.join(job.requests)}: {MAX_DEATHS} workers died during the same task; if they "
            "ran out of memory, reduce runtime.workers or runtime.chunk"
        )


def _serve(pool: weakref.ref[WorkerPool], jobs: JobQueue, worker: int) -> None:
    """Run jobs in a worker of a pool until its queue is closed."""
    while _run_next(pool, jobs, worker):
        # While the thread waits, it references neither the pool nor the last job and result.
        continue


def _run_next(pool: weakref.ref[WorkerPool], jobs: JobQueue, worker: int) -> bool:
    submitted = jobs.get()
    running = pool()
    if submitted is None or running is None:
        return False
    position, job, cohort = submitted
    if cohort.is_wanted:
        try:
            if jobs.is_closed:
                raise WorkerDiedError
            cohort.outcomes.put((position, running.run(worker, job)))
        except BaseException as error:
            cohort.outcomes.put((position, error))
    return True


class PooledExecutor(Executor):
    """Executor that runs clients in workers, and the server's plans in this process.

    The private state of a client is sent with each task and returned with the reply. The results do
    not depend on the worker.

    Args:
        pool: The workers.
        client_infos: Information on each client, keyed by client id.
        store: Store of the clients' private states.
        backend: Backend that computes the server's plans.
        chunk: Number of clients of one architecture that are processed together.
    """

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
        self._warned: set[RecordedWarning] = set()

    @override
    def run(
        self, clients: Sequence[str], request: Callable[[str], Message], until: Until = ALL_REPLIES
    ) -> Iterator[Arrival]:
        return arrivals(in_order(clients, self._run_jobs("answer", clients, request)))

    @override
    def evaluate(
        self, clients: Sequence[str], broadcast: BroadcastTo, round_idx: int, details: bool
    ) -> Evaluations:
        def request(client: str) -> Message:
            return Message("read", broadcast(client), round_idx)

        return in_order(clients, self._run_jobs("read", clients, request, details))

    @override
    def close(self) -> None:
        self.pool.close()

    def _run_jobs(
        self,
        kind: Literal["answer", "read"],
        clients: Sequence[str],
        request: Callable[[str], Message],
        details: bool = False,
    ) -> Iterator[tuple[str, Any]]:
        """Run a job for each chunk of clients, and yield the replies or evaluations of clients.

        The private states of a chunk are staged before its replies are yielded.

        Raises:
            Exception: If a job has failed.
        """
        chunks = client_chunks(clients, self.client_infos, self.chunk)
        costs = [sum(training_flops(self.client_infos[c]) for c in chunk) for chunk in chunks]
        jobs = run_jobs(
            self.pool, chunks, costs, lambda chunk: self._make_job(kind, chunk, request, details)
        )
        with closing(jobs):
            for chunk, result in zip(chunks, jobs, strict=True):
                issue_warnings(result.warnings, self._warned)
                if result.error is not None:
                    raise result.error from RemoteTracebackError(result.trace)
                for client, private in result.private.items():
                    self.store.stage(client, private)
                for client in chunk:
                    self.store.notes.pop(client, None)
                self.store.notes.update(result.notes)
                yield from drain(result.replies)
                yield from drain(result.evaluations)
                # Free the private states before the next result.
                del result

    def _make_job(
        self,
        kind: Literal["answer", "read"],
        clients: list[str],
        request: Callable[[str], Message],
        details: bool,
    ) -> WorkerJob:
        requests = {client: request(client) for client in clients}
        private: dict[str, bytes | None] = {}
        for client in clients:
            # Exchanges before training need no private state.
            if kind == "answer" and requests[client].kind != "train":
                continue
            private[client] = self.store.encoded(client)
            if self.listener is not None:
                self.listener(f"{client}: {'train' if kind == 'answer' else 'evaluation'}")
        notes = {c: self.store.notes[c] for c in clients if c in self.store.notes}
        return WorkerJob(kind, requests, private, details, notes)


def run_jobs(
    pool: WorkerPool,
    chunks: Sequence[list[str]],
    costs: Sequence[float],
    make_job: Callable[[list[str]], WorkerJob],
) -> Generator[JobResult, None, None]:
    """Run the jobs of the chunks of a cohort, and yield the results in the order of the chunks.

    In a small cohort, the most expensive chunks start first, so that workers finish at about the
    same time. In a large cohort, chunks start in order, and only few results wait in memory for
    earlier ones. Jobs that have not started are canceled if the generator is closed.

    Args:
        pool: The workers.
        chunks: The chunks.
        costs: Estimated cost of each chunk.
        make_job: Function that returns the job of a chunk.
    """
    order = list(range(len(chunks)))
    max_running = JOBS_PER_WORKER * pool.size
    max_ahead = MAX_AHEAD * pool.size
    if len(chunks) <= LARGE_COHORT * pool.size:
        order.sort(key=lambda i: -costs[i])
        max_ahead = len(chunks)
    waiting = deque(order)
    cohort = Cohort()
    running = 0
    try:
        for position in range(len(chunks)):
            while True:
                while waiting and running < max_running and running + len(cohort) < max_ahead:
                    started = waiting.popleft()
                    pool.submit(started, make_job(chunks[started]), cohort)
                    running += 1
                if position in cohort:
                    break
                cohort.wait_for_outcome()
                running -= 1
            yield cohort.result(position)
    finally:
        cohort.is_wanted = False
