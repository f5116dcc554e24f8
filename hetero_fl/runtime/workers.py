"""Tasks computed by workers: which gets what and when, what happens when one dies, in which process private state lies.

Whole tasks travel, as a site receives them. A client's result depends on nothing but its own task, and chunks follow from the
cohort alone, so neither the number of workers nor who computes what, nor a death, changes a bit. Which kind of worker it is
(processes here, a cluster's) is the crew's affair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, Protocol

from hetero_fl.channel.protocol import Message, Messages
from hetero_fl.errors import RunFailed
from hetero_fl.lazy import Lazy
from hetero_fl.runtime.costs import Costs
from hetero_fl.runtime.executor import Reply, chunks, drained
from hetero_fl.runtime.jobs import Done, Job, Remote
from hetero_fl.runtime.plans import Performer
from hetero_fl.runtime.site import Reading
from hetero_fl.runtime.store import Store
from hetero_fl.state import Card

DEATHS = 3  # of workers on the same job, after which the run ends
AHEAD = 4  # chunks per worker that may be begun before the first missing one, in a large cohort
MOST = 2  # chunks in one job: their results come back together
LARGE = 16  # tasks per worker from which a cohort is large


class Crew(Protocol):
    """Workers, numbered from 0. Each takes one job at a time."""

    size: int

    def send(self, worker: int, job: Job) -> None:
        """Hand a job to an idle worker."""
        ...

    def receive(self) -> tuple[int, Done | None]:
        """Wait for the next result; None where the worker died. Another one stands in its place by then."""
        ...

    def close(self) -> None:
        """Let them go."""
        ...


class Workers:
    """An executor whose sites are elsewhere. The server's own plans are computed in this process."""

    def __init__(
        self, crew: Crew, cards: Mapping[str, Card], store: Store, performer: Performer, chunk: int = 1
    ) -> None:
        self.crew, self.cards, self.store, self.performer, self.chunk = crew, cards, store, performer, chunk
        self.costs = Costs(cards)
        self._held: dict[str, tuple[int, int]] = {}  # client -> (worker, stamp of the state that it holds)
        self._busy: dict[int, Job] = {}  # what each worker is at; of an earlier task, if that was given up
        self._jobs = 0
        self._tell: Callable[[str], None] | None = None

    def answer(self, requests: Messages) -> Iterator[tuple[str, Reply]]:
        for _, done in self._do("answer", requests):
            yield from drained(done.replies)

    def read(self, broadcasts: Mapping[str, bytes], round: int, details: bool) -> Iterator[tuple[str, Reading]]:
        requests = Lazy(broadcasts.keys(), lambda client: Message("read", broadcasts[client], round))
        for _, done in self._do("read", requests, details):
            yield from done.readings.items()

    def watch(self, listener: Callable[[str], None] | None) -> None:
        self._tell = listener

    def close(self) -> None:
        self.crew.close()

    def _do(
        self, kind: Literal["answer", "read"], requests: Messages, details: bool = False
    ) -> Iterator[tuple[Job, Done]]:
        """Have all tasks done; results as they come, private state staged."""
        queue = Queue(chunks(requests, self.cards, self.chunk), self.costs, self.crew.size)
        running: dict[int, list[list[str]]] = {}  # by number of the job
        deaths: dict[str, int] = {}
        while queue or running:
            for worker in range(self.crew.size):
                if worker in self._busy:
                    continue
                part = queue.take(lambda client, w=worker: self._held.get(client, (w,))[0] == w)  # type: ignore[misc]
                if part:
                    job = self._job(worker, kind, part, requests, details)
                    running[job.number], self._busy[worker] = part, job
                    self.crew.send(worker, job)
            worker, done = self.crew.receive()
            ended = self._busy.pop(worker, None)  # none: it was idle, and died
            begun = running.pop(ended.number, None) if ended is not None else None
            if done is None:
                self._disown(worker, self._held)
                if begun is not None:
                    self._mourn([client for chunk in begun for client in chunk], deaths)
                    queue.put_back(begun)
                continue
            assert ended is not None
            if done.error is not None or begun is None:
                self._disown(
                    worker, [*ended.clients, *done.forgot]
                )  # the state that it holds now is not what was committed
            if begun is None:
                continue
            if done.error is not None:
                raise done.error from (Remote(done.trace) if done.trace else None)
            self._settle(worker, ended, done)
            queue.finished(begun)
            yield ended, done
            del ended, done

    def _job(
        self,
        worker: int,
        kind: Literal["answer", "read"],
        part: list[list[str]],
        requests: Messages,
        details: bool,
    ) -> Job:
        clients = [client for chunk in part for client in chunk]
        sent = {client: requests[client] for client in clients}  # first: a method's hook may fail in it
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
            self._hold(worker, client, self.store.stamp(client))
        notes = {client: self.store.notes[client] for client in clients if client in self.store.notes}
        return Job(self._jobs, kind, part, sent, private, details, notes)

    def _settle(self, worker: int, job: Job, done: Done) -> None:
        for client, private in done.private.items():
            self._hold(worker, client, self.store.stage(client, private))
        for client in job.clients:
            self.store.notes.pop(client, None)
        self.store.notes.update(done.notes)
        self._disown(worker, done.forgot)
        if job.kind == "answer":
            self.costs.learn({c: s for c, s in done.seconds.items() if _needs_state(job.kind, job.requests[c])})

    def _hold(self, worker: int, client: str, stamp: int | None) -> None:
        """The worker has this client's state. Who has none costs nothing, and may go to any worker."""
        if stamp is None:
            self._held.pop(client, None)
        else:
            self._held[client] = (worker, stamp)

    def _disown(self, worker: int, clients: Iterable[str]) -> None:
        """The worker no longer has these clients' state."""
        for client in list(clients):
            if self._held.get(client, (None,))[0] == worker:
                del self._held[client]

    def _mourn(self, clients: Iterable[str], deaths: dict[str, int]) -> None:
        """Which of a job's clients it was is not known: each is counted."""
        for client in clients:
            deaths[client] = deaths.get(client, 0) + 1
            if deaths[client] == DEATHS:
                raise RunFailed(f"{DEATHS} workers died on {client}; is there enough memory?")


def _needs_state(kind: str, request: Message) -> bool:
    """Whether a task reads a client's private state: in a protocol's other exchanges nothing is computed with it."""
    return kind == "read" or request.ask == "train"


class Queue:
    """What is still to be done. Costly chunks go first; in a large cohort only among those whose turn is near, so that
    results that wait for their turn stay few."""

    def __init__(self, parts: list[list[str]], costs: Costs, workers: int) -> None:
        self._order = deque(parts)  # those not finished, in turn
        self._open = {part[0]: part for part in parts}  # those nobody has begun
        self._finished: set[str] = set()
        self._costs = {part[0]: sum(map(costs.of, part)) for part in parts}
        self._ahead = AHEAD * workers if len(parts) > LARGE * workers else len(parts)
        self._least = sum(self._costs.values()) / (LARGE * workers)  # what makes a job worth sending

    def __len__(self) -> int:
        return len(self._open)

    def take(self, held: Callable[[str], bool]) -> list[list[str]]:
        """The next chunks for a worker: the costliest that it or nobody else holds, with smaller ones up to a fair size."""
        near = [part for _, part in zip(range(self._ahead), self._order, strict=False) if part[0] in self._open]
        near.sort(key=lambda part: (not held(part[0]), -self._costs[part[0]]))
        taken: list[list[str]] = []
        cost = 0.0
        for part in near[:MOST]:
            if taken and (cost + self._costs[part[0]] > self._least or not held(part[0])):
                break
            taken.append(part)
            cost += self._costs[part[0]]
            del self._open[part[0]]
        return taken

    def put_back(self, parts: list[list[str]]) -> None:
        """Chunks that were begun and came to nothing."""
        self._open.update({part[0]: part for part in parts})

    def finished(self, parts: list[list[str]]) -> None:
        """Chunks that are done."""
        self._finished.update(part[0] for part in parts)
        while self._order and self._order[0][0] in self._finished:
            self._order.popleft()
