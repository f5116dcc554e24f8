"""Executor that distributes the tasks of clients to a pool of workers."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from typing import Any, Literal, Protocol

from typing_extensions import override

from hetero_fl.communication.protocol import Content, Message
from hetero_fl.core.participant import ClientInfo
from hetero_fl.engine.driver import Backend
from hetero_fl.engine.templates import training_flops
from hetero_fl.federation.client_runtime import ClientEvaluation
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
from hetero_fl.federation.executors.worker import JobResult, RemoteTracebackError, WorkerJob
from hetero_fl.federation.store import StateStore
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.recorded_warnings import RecordedWarning, issue_warnings

# Number of jobs per worker: one job runs and the next one waits, so that workers are not idle.
JOBS_PER_WORKER = 2
# Maximum number of unfinished and early results per worker in a large cohort, which limits the
# memory for results that wait for an earlier client.
MAX_AHEAD = 4
# A cohort is large if it has more than this number of chunks per worker.
LARGE_COHORT = 16
# The run fails after this number of workers have died while processing the same client.
MAX_DEATHS = 3


class WorkerPool(Protocol):
    """Interface of pools of workers, which start jobs in the order of submission.

    Attributes:
        size: Number of workers.
    """

    size: int

    def submit(self, job: WorkerJob) -> Future[Any]:
        """Start a job when a worker is idle.

        Returns:
            A future, which may be canceled and is passed to `result` when it is done.
        """

    def result(self, future: Future[Any]) -> JobResult:
        """Return the result of a job that is done.

        Raises:
            BrokenExecutor: If the worker has died. All unfinished jobs may be lost.
            RunFailedError: If workers cannot run.
        """

    def restart(self) -> None:
        """Replace the workers that have died.

        Raises:
            UserError: If the `__main__` guard is missing in the user's script.
            RunFailedError: If new workers would also die.
        """

    def close(self) -> None:
        """Stop the workers."""


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
        self._warned: set[RecordedWarning] = set()
        self._listener: Callable[[str], None] | None = None

    @override
    def run(
        self, clients: Sequence[str], request: Callable[[str], Message], until: Until = ALL_REPLIES
    ) -> Iterator[Arrival]:
        results = self._run_jobs("answer", clients, request)
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

        results = self._run_jobs("read", clients, request, details)
        return in_order(clients, (pair for result in results for pair in drain(result.evaluations)))

    @override
    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        self._listener = listener

    @override
    def close(self) -> None:
        self.pool.close()

    def _run_jobs(
        self,
        kind: Literal["answer", "read"],
        clients: Sequence[str],
        request: Callable[[str], Message],
        details: bool = False,
    ) -> Iterator[JobResult]:
        """Run a job for each chunk of clients, and yield the results in the order of the chunks.

        The private states in a result are staged before the result is yielded.
        """
        chunks = client_chunks(clients, self.client_infos, self.chunk)
        costs = [sum(training_flops(self.client_infos[c]) for c in chunk) for chunk in chunks]
        jobs = JobQueue(
            self.pool, chunks, costs, lambda chunk: self._make_job(kind, chunk, request, details)
        )
        try:
            for chunk in chunks:
                result = jobs.result(chunk)
                self._accept(chunk, result)
                yield result
                # Free the models before the next result.
                del result
        finally:
            jobs.cancel()

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
            if self._listener is not None:
                self._listener(f"{client}: {'train' if kind == 'answer' else 'evaluation'}")
        notes = {c: self.store.notes[c] for c in clients if c in self.store.notes}
        return WorkerJob(kind, requests, private, details, notes)

    def _accept(self, clients: list[str], result: JobResult) -> None:
        """Stage the private states in a result and record the notes.

        Raises:
            Exception: If the job has failed.
        """
        issue_warnings(result.warnings, self._warned)
        if result.error is not None:
            raise result.error from RemoteTracebackError(result.trace)
        for client, private in result.private.items():
            self.store.stage(client, private)
        for client in clients:
            self.store.notes.pop(client, None)
        self.store.notes.update(result.notes)


class JobQueue:
    """Jobs of the chunks of a cohort, which are submitted in time to keep all workers busy.

    In a small cohort, the most expensive chunks start first, so that workers finish at about the
    same time. In a large cohort, chunks start in order, and only few results wait in memory for
    earlier ones.

    Args:
        pool: The workers.
        chunks: The chunks in the order in which results are requested.
        costs: Estimated cost of each chunk.
        make_job: Function that returns the job of a chunk.
    """

    def __init__(
        self,
        pool: WorkerPool,
        chunks: Sequence[list[str]],
        costs: Sequence[float],
        make_job: Callable[[list[str]], WorkerJob],
    ) -> None:
        self._pool = pool
        self._make_job = make_job
        order = list(range(len(chunks)))
        self._max_ahead = MAX_AHEAD * pool.size
        if len(chunks) <= LARGE_COHORT * pool.size:
            order.sort(key=lambda i: -costs[i])
            self._max_ahead = len(chunks)
        self._waiting = deque(chunks[i] for i in order)
        self._running: dict[Future[Any], list[str]] = {}
        # Results that have not been requested, by the first client of the chunk.
        self._finished: dict[str, JobResult] = {}
        # Number of workers that have died during the task of a chunk, by its first client.
        self._deaths: Counter[str] = Counter()

    def result(self, chunk: list[str]) -> JobResult:
        """Return the result of a chunk, and submit further jobs.

        Raises:
            RunFailedError: If `MAX_DEATHS` workers have died while processing the same chunk.
        """
        self._collect()
        self._submit()
        while chunk[0] not in self._finished:
            wait(self._running, return_when=FIRST_COMPLETED)
            self._collect()
            self._submit()
        return self._finished.pop(chunk[0])

    def cancel(self) -> None:
        """Cancel jobs that no worker has started. The results of started jobs are ignored."""
        for future in self._running:
            future.cancel()

    def _submit(self) -> None:
        """Submit waiting jobs until all workers have enough jobs."""
        most = JOBS_PER_WORKER * self._pool.size
        if MAX_DEATHS - 1 in self._deaths.values():
            # Find the task during which workers die.
            most = 1
        while (
            self._waiting
            and len(self._running) < most
            and len(self._running) + len(self._finished) < self._max_ahead
        ):
            chunk = self._waiting.popleft()
            self._running[self._pool.submit(self._make_job(chunk))] = chunk

    def _collect(self) -> None:
        """Collect the results of jobs that are done.

        If workers have died, they are replaced, and the lost jobs are submitted again.
        """
        lost = self._collect_done()
        if not lost:
            return
        # The death of a worker may end all jobs.
        wait(self._running)
        lost += self._collect_done()
        # Jobs start in order, so the others had not started.
        for chunk in lost[: self._pool.size]:
            self._deaths[chunk[0]] += 1
            if self._deaths[chunk[0]] == MAX_DEATHS:
                raise RunFailedError(
                    f"{', '.join(chunk)}: {MAX_DEATHS} workers died during the same task; if they "
                    "ran out of memory, reduce runtime.workers or runtime.chunk"
                )
        self._pool.restart()
        self._waiting.extendleft(reversed(lost))

    def _collect_done(self) -> list[list[str]]:
        """Collect the results of jobs that are done, and return the chunks of lost jobs."""
        lost = []
        for future in [future for future in self._running if future.done()]:
            chunk = self._running.pop(future)
            try:
                self._finished[chunk[0]] = self._pool.result(future)
                self._deaths.pop(chunk[0], None)
            except BrokenExecutor:
                lost.append(chunk)
        return lost
