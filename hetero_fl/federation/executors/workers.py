"""Tasks as messages to workers, and the pool that distributes them."""

from __future__ import annotations

import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import Message, Messages
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import PayloadError
from hetero_fl.engine.driver import Backend, DivergedError
from hetero_fl.engine.prediction_cache import make_backend
from hetero_fl.engine.templates import TaskCosts
from hetero_fl.federation.channel import make_protocol
from hetero_fl.federation.client_runtime import ClientEvaluation, ClientRuntime
from hetero_fl.federation.executors.base import Reply, client_chunks, drain
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.user_methods import LONGEST, translate_user_errors
from hetero_fl.utils.caching import LazyMapping
from hetero_fl.utils.errors import RunFailedError, UserError

# What travels between a run and its workers: whole tasks of clients, and their results. Never code,
# never live objects.
#
# A worker makes the plans itself, from the method's settings and the federation that it was given
# once.

MAX_HELD_STATE_BYTES = 256 * 2**20  # bytes of private state that a worker keeps for the next time


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs once."""

    algorithm: Algorithm
    federation: FederationSpec
    threads: int
    devices: tuple[str, ...]  # workers take them in turn
    chunk: int = 1
    precision: str = "float32"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class WorkerJob:
    """Tasks of some clients, chunk by chunk. `private` has the state of those whose worker does not hold it already, `notes`
    what they remember of the round's earlier exchanges."""

    number: int
    kind: Literal["answer", "read"]
    chunks: list[list[str]]
    requests: dict[str, Message]
    private: dict[str, bytes | None]
    details: bool = False
    notes: dict[str, bytes] = field(default_factory=dict)

    @property
    def clients(self) -> list[str]:
        """All of them."""
        return [client for chunk in self.chunks for client in chunk]


@dataclass
class JobResult:
    """What came of a job. `error` ends the run."""

    job: int
    replies: dict[str, Message | DivergedError] = field(default_factory=dict)
    evaluations: dict[str, ClientEvaluation] = field(default_factory=dict)
    private: dict[str, bytes] = field(default_factory=dict)  # as staged
    notes: dict[str, bytes] = field(default_factory=dict)  # of all its clients that have any now
    seconds: dict[str, float] = field(default_factory=dict)  # of each client's chunk, shared out
    # clients whose state this worker no longer holds
    dropped_states: list[str] = field(default_factory=list)
    error: Exception | None = None
    trace: str = ""  # where it was raised

    def with_checksums(self) -> JobResult:
        """With the checksums of its messages: as it leaves a worker that may be on another machine."""
        replies = {
            c: r.with_checksum() if isinstance(r, Message) else r for c, r in self.replies.items()
        }
        return replace(self, replies=replies)


class Worker:
    """Does jobs, one after the other, in a process of its own or anywhere else."""

    def __init__(self, setup: WorkerSetup, index: int) -> None:
        torch.set_num_threads(setup.threads)
        torch.set_default_dtype(setup.dtype)
        self.setup = setup
        self.index = index
        self.store = StateStore()
        # clients whose state is held, the last used at the end
        self._used: OrderedDict[str, None] = OrderedDict()

    @cached_property
    def runtime(self) -> ClientRuntime:
        """Made with the first job, so that what goes wrong comes back with its results."""
        device = torch.device(self.setup.devices[self.index % len(self.setup.devices)])
        backend = make_backend(device, self.setup.chunk, self.setup.precision)
        algorithm = self.setup.algorithm
        federation = self.setup.federation
        return ClientRuntime(
            algorithm, federation, self.store, backend, make_protocol(algorithm, federation)
        )

    def run_job(self, job: WorkerJob) -> JobResult:
        """The job's results; an exception that is not a client's own divergence is among them, not raised."""
        done = JobResult(job.number)
        try:
            for chunk in job.chunks:
                begun = time.perf_counter()
                self._run_chunk(job, chunk, done)
                done.seconds.update(
                    dict.fromkeys(chunk, (time.perf_counter() - begun) / len(chunk))
                )
        except (UserError, RunFailedError, DivergedError, PayloadError) as error:
            # a user's own might not travel
            known = type(error) in (UserError, RunFailedError, DivergedError, PayloadError)
            done.error = error if known else RunFailedError(str(error))
            done.trace = traceback.format_exc()
        except Exception as error:
            done.error = RunFailedError(
                f"a worker failed: {type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}"
            )
            done.trace = traceback.format_exc()
        done.dropped_states = self._drop_oldest_states(job.clients)
        return done

    @translate_user_errors()
    def _run_chunk(self, job: WorkerJob, chunk: list[str], done: JobResult) -> None:
        for client in chunk:
            if client in job.private:
                self.store.stage(client, job.private[client] or b"")
        self.store.commit()
        if job.kind == "read":
            bodies = {c: job.requests[c].body for c in chunk}
            (round,) = {job.requests[c].round_idx for c in chunk}
            done.evaluations.update(self.runtime.evaluate(bodies, round, job.details))
            return
        before = {c: self.store.stamp(c) for c in chunk}
        self.store.notes.update({c: job.notes[c] for c in chunk if c in job.notes})
        done.replies.update(self.runtime.run({c: job.requests[c] for c in chunk}))
        done.notes.update(self.store.notes)
        self.store.commit()
        for client in chunk:
            if self.store.stamp(client) != before[client]:
                done.private[client] = self.store.encoded(client) or b""

    def _drop_oldest_states(self, clients: list[str]) -> list[str]:
        """Forget the state of those who were not seen for longest, beyond the bound."""
        for client in clients:
            self._used.pop(client, None)
            if self.store.stamp(client) is not None:
                self._used[client] = None
        forgot = []
        while self.store.cached_bytes > MAX_HELD_STATE_BYTES and self._used:
            forgot.append(self._used.popitem(last=False)[0])
            self.store.stage(forgot[-1], b"")
            self.store.commit()
        return forgot


class RemoteTraceback(Exception):
    """A traceback from another process: the cause of what is raised here. (Exceptions do not carry theirs across.)"""


# Tasks computed by workers: which gets what and when, what happens when one dies, in which process
# private state lies.
#
# Whole tasks travel, as a site receives them. A client's result depends on nothing but its own
# task, and chunks follow from the cohort alone, so neither the number of workers nor who computes
# what, nor a death, changes a bit. Which kind of worker it is (processes here, a cluster's) is the
# crew's affair.

DEATHS = 3  # of workers on the same job, after which the run ends
AHEAD = 4  # chunks per worker that may be begun before the first missing one, in a large cohort
MOST = 2  # chunks in one job: their results come back together
LARGE = 16  # tasks per worker from which a cohort is large


class WorkerPool(Protocol):
    """Workers, numbered from 0. Each takes one job at a time."""

    size: int

    def send(self, worker: int, job: WorkerJob) -> None:
        """Hand a job to an idle worker."""
        ...

    def receive(self) -> tuple[int, JobResult | None]:
        """Wait for the next result; None where the worker died. Another one stands in its place by then."""
        ...

    def close(self) -> None:
        """Let them go."""
        ...


class WorkerExecutor:
    """An executor whose sites are elsewhere. The server's own plans are computed in this process."""

    def __init__(
        self,
        pool: WorkerPool,
        client_infos: Mapping[str, ClientInfo],
        store: StateStore,
        backend: Backend,
        chunk: int = 1,
    ) -> None:
        self.crew = pool
        self.cards = client_infos
        self.store = store
        self.backend = backend
        self.chunk = chunk
        self.costs = TaskCosts(client_infos)
        # client -> (worker, stamp of the state that it holds)
        self._held: dict[str, tuple[int, int]] = {}
        # what each worker is at; of an earlier task, if that was given up
        self._busy: dict[int, WorkerJob] = {}
        self._jobs = 0
        self._tell: Callable[[str], None] | None = None

    def run(self, requests: Messages) -> Iterator[tuple[str, Reply]]:
        for _, done in self._run_tasks("answer", requests):
            yield from drain(done.replies)

    def evaluate(
        self, broadcasts: Mapping[str, bytes], round_idx: int, details: bool
    ) -> Iterator[tuple[str, ClientEvaluation]]:
        requests = LazyMapping(
            broadcasts.keys(), lambda client: Message("read", broadcasts[client], round_idx)
        )
        for _, done in self._run_tasks("read", requests, details):
            yield from done.evaluations.items()

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        self._tell = listener

    def close(self) -> None:
        self.crew.close()

    def _run_tasks(
        self, kind: Literal["answer", "read"], requests: Messages, details: bool = False
    ) -> Iterator[tuple[WorkerJob, JobResult]]:
        """Have all tasks done; results as they come, private state staged."""
        queue = ChunkQueue(
            client_chunks(requests, self.cards, self.chunk), self.costs, self.crew.size
        )
        running: dict[int, list[list[str]]] = {}  # by number of the job
        deaths: dict[str, int] = {}
        while queue or running:
            for worker in range(self.crew.size):
                if worker in self._busy:
                    continue
                part = queue.take(lambda client, w=worker: self._held.get(client, (w,))[0] == w)  # type: ignore[misc]
                if part:
                    job = self._make_job(worker, kind, part, requests, details)
                    running[job.number], self._busy[worker] = part, job
                    self.crew.send(worker, job)
            worker, done = self.crew.receive()
            ended = self._busy.pop(worker, None)  # none: it was idle, and died
            begun = running.pop(ended.number, None) if ended is not None else None
            if done is None:
                self._forget_states(worker, self._held)
                if begun is not None:
                    self._record_deaths([client for chunk in begun for client in chunk], deaths)
                    queue.put_back(begun)
                continue
            assert ended is not None
            if done.error is not None or begun is None:
                self._forget_states(
                    worker, [*ended.clients, *done.dropped_states]
                )  # the state that it holds now is not what was committed
            if begun is None:
                continue
            if done.error is not None:
                raise done.error from (RemoteTraceback(done.trace) if done.trace else None)
            self._settle(worker, ended, done)
            queue.mark_finished(begun)
            yield ended, done
            del ended, done

    def _make_job(
        self,
        worker: int,
        kind: Literal["answer", "read"],
        part: list[list[str]],
        requests: Messages,
        details: bool,
    ) -> WorkerJob:
        clients = [client for chunk in part for client in chunk]
        # first: a method's hook may fail in it
        sent = {client: requests[client] for client in clients}
        private: dict[str, bytes | None] = {}
        for client in clients:
            stamp = self.store.stamp(client)
            if not _needs_state(kind, sent[client]):
                continue
            if stamp is None or self._held.get(client) != (worker, stamp):
                private[client] = self.store.encoded(client)
            if self._tell is not None:
                self._tell(f"{client}: {'train' if kind == 'answer' else 'evaluation'}")
        self._jobs += 1
        for client in private:  # only once nothing can fail any more
            self._record_state(worker, client, self.store.stamp(client))
        notes = {
            client: self.store.notes[client] for client in clients if client in self.store.notes
        }
        return WorkerJob(self._jobs, kind, part, sent, private, details, notes)

    def _settle(self, worker: int, job: WorkerJob, done: JobResult) -> None:
        for client, private in done.private.items():
            self._record_state(worker, client, self.store.stage(client, private))
        for client in job.clients:
            self.store.notes.pop(client, None)
        self.store.notes.update(done.notes)
        self._forget_states(worker, done.dropped_states)
        if job.kind == "answer":
            self.costs.update(
                {c: s for c, s in done.seconds.items() if _needs_state(job.kind, job.requests[c])}
            )

    def _record_state(self, worker: int, client: str, stamp: int | None) -> None:
        """The worker has this client's state. Who has none costs nothing, and may go to any worker."""
        if stamp is None:
            self._held.pop(client, None)
        else:
            self._held[client] = (worker, stamp)

    def _forget_states(self, worker: int, clients: Iterable[str]) -> None:
        """The worker no longer has these clients' state."""
        for client in list(clients):
            if self._held.get(client, (None,))[0] == worker:
                del self._held[client]

    def _record_deaths(self, clients: Iterable[str], deaths: dict[str, int]) -> None:
        """Which of a job's clients it was is not known: each is counted."""
        for client in clients:
            deaths[client] = deaths.get(client, 0) + 1
            if deaths[client] == DEATHS:
                raise RunFailedError(f"{DEATHS} workers died on {client}; is there enough memory?")


def _needs_state(kind: str, request: Message) -> bool:
    """Whether a task reads a client's private state: in a protocol's other exchanges nothing is computed with it."""
    return kind == "read" or request.kind == "train"


class ChunkQueue:
    """What is still to be done. Costly chunks go first; in a large cohort only among those whose turn is near, so that
    results that wait for their turn stay few."""

    def __init__(self, parts: list[list[str]], costs: TaskCosts, workers: int) -> None:
        self._order = deque(parts)  # those not finished, in turn
        self._open = {part[0]: part for part in parts}  # those nobody has begun
        self._finished: set[str] = set()
        self._costs = {part[0]: sum(map(costs.cost_of, part)) for part in parts}
        self._ahead = AHEAD * workers if len(parts) > LARGE * workers else len(parts)
        # what makes a job worth sending
        self._least = sum(self._costs.values()) / (LARGE * workers)

    def __len__(self) -> int:
        return len(self._open)

    def take(self, held_states: Callable[[str], bool]) -> list[list[str]]:
        """The next chunks for a worker: the costliest that it or nobody else holds, with smaller ones up to a fair size."""
        near = [
            part
            for _, part in zip(range(self._ahead), self._order, strict=False)
            if part[0] in self._open
        ]
        near.sort(key=lambda part: (not held_states(part[0]), -self._costs[part[0]]))
        taken: list[list[str]] = []
        cost = 0.0
        for part in near[:MOST]:
            if taken and (cost + self._costs[part[0]] > self._least or not held_states(part[0])):
                break
            taken.append(part)
            cost += self._costs[part[0]]
            del self._open[part[0]]
        return taken

    def put_back(self, parts: list[list[str]]) -> None:
        """Chunks that were begun and came to nothing."""
        self._open.update({part[0]: part for part in parts})

    def mark_finished(self, parts: list[list[str]]) -> None:
        """Chunks that are done."""
        self._finished.update(part[0] for part in parts)
        while self._order and self._order[0][0] in self._finished:
            self._order.popleft()
