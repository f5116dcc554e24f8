"""Base classes of executors, which run the tasks of clients, and an executor in this process.

The clock of a run belongs to its executor: in this process it stands still, in a simulation it
advances with the tasks, and with clients on other machines it is a stopwatch.

A chunk consists of clients that are processed together. Chunks depend only on client ids and
architectures. Results are therefore bit-identical for any number of workers and any duration of
tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from typing_extensions import override

from hetero_fl.communication.protocol import BroadcastTo, Message, Reply
from hetero_fl.core.participant import ClientInfo
from hetero_fl.engine.driver import Backend
from hetero_fl.federation.client_runtime import ClientEvaluation, ClientRuntime
from hetero_fl.federation.store import PrivateState, StateStore
from hetero_fl.utils.errors import NoUploadError
from hetero_fl.utils.ordering import natural_order

# Name of the executor in runs on several machines, whose sites do not have to upload their models.
NODES = "nodes"

T = TypeVar("T")


class ClientAbsentError(NoUploadError):
    """Raised when a client on another machine does not reply or refuses a request."""


class ClientLateError(ClientAbsentError):
    """Raised when a client has not replied in time."""


# Client ids with evaluations, or with the reason why a client could not be evaluated.
Evaluations = Iterator[tuple[str, ClientEvaluation | ClientAbsentError]]


@dataclass(frozen=True)
class Arrival:
    """End of a client's task as the server observes it, in seconds on the clock of the run.

    Attributes:
        client: Id of the client.
        reply: The reply. A `NoUploadError` if the client did not reply.
        start: Time at which the client was asked.
        end: Time at which the reply arrived or the task failed. Infinite if unknown.
        unused_bytes: Bytes that the client sent besides the reply, such as a repeated upload.
    """

    client: str
    reply: Reply
    start: float = 0.0
    end: float = 0.0
    unused_bytes: int = 0


@dataclass(frozen=True)
class Until:
    """When the server stops waiting for replies. Clients that have not replied are late.

    Attributes:
        deadline: Seconds for which the server waits. None if there is no deadline.
        uploads: Number of uploads after which the server stops waiting. None if it waits for all.
            Replies to exchanges without uploads do not count.
    """

    deadline: float | None = None
    uploads: int | None = None


ALL_REPLIES = Until()


class Executor(ABC):
    """Base class of executors, which run the tasks of clients and own the clock of a run.

    In this process, tasks take no time that counts.

    Args:
        store: Store of the clients' private states.
        backend: Backend in this process, which computes the server's plans.

    Attributes:
        store: Store of the clients' private states. The new state of a client is staged before the
            reply of the client is yielded.
        backend: Backend in this process, which computes the server's plans.
        accepts_unencoded: Whether requests may contain broadcasts that are not encoded, because
            clients run in this process.
        clock: Kind of the clock, which is the key of the times in the record of a round. None if
            tasks take no time.
        now: Time since the start of the run in seconds.
        listener: Function that is called with a message when a task begins. If None, no function is
            called.
    """

    accepts_unencoded = False
    clock: Literal["simulated", "wall"] | None = None
    now = 0.0
    listener: Callable[[str], None] | None = None

    def __init__(self, store: StateStore, backend: Backend) -> None:
        self.store = store
        self.backend = backend

    @abstractmethod
    def run(
        self, clients: Sequence[str], request: Callable[[str], Message], until: Until = ALL_REPLIES
    ) -> Iterator[Arrival]:
        """Send a request to each client, and yield the replies in the order of `clients`.

        Args:
            clients: Client ids.
            request: Function that returns the request to a client id. The function is called again
                if a request is sent again.
            until: When to stop waiting. Ignored by executors without a clock.

        Yields:
            The arrivals. The reply of a late client is a `ClientLateError`.
        """

    @abstractmethod
    def evaluate(
        self, clients: Sequence[str], broadcast: BroadcastTo, round_idx: int, details: bool
    ) -> Evaluations:
        """Evaluate the models of clients, and yield the evaluations in the order of `clients`.

        Args:
            clients: Client ids.
            broadcast: Function that returns the broadcast to a client id.
            round_idx: Index of the next round, from 0.
            details: Whether to compute all results that a report shows.

        Yields:
            Pairs of client id and evaluation. If a client on another machine does not reply, the
            second element is a `ClientAbsentError`.

        Raises:
            DivergedError: If training for deployment diverges.
        """

    def wait_for_clients(self, round_idx: int, count: int, least: int) -> Sequence[str] | None:
        """Wait until clients for a round are available, and return their ids.

        Args:
            round_idx: Index of the round, from 0.
            count: Number of clients that are sampled.
            least: Minimum number of available clients.

        Returns:
            The ids of available clients, or None if all clients are available.

        Raises:
            RunFailedError: If too few clients are available for a long time.
        """
        return None

    def record(self) -> dict[str, Any]:
        """Return further entries of a round's record, which are returned only once."""
        return {}

    def load_states(self, states: Mapping[str, PrivateState]) -> None:
        """Set the initial private states of clients.

        Args:
            states: Private states, keyed by client id.

        Raises:
            RunFailedError: If a client cannot be reached.
        """
        for client_id, state in states.items():
            self.store.stage(client_id, state)
        self.store.commit()

    def on_checkpoint(self) -> None:
        """Handle a checkpoint that has been written or loaded."""
        return

    def resume(self, now: float) -> None:
        """Continue a run at a time in seconds, without tasks in flight."""
        self.now = now

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        """Set a function that is called with a message when a task begins.

        Args:
            listener: The function. If None, no function is called.
        """
        self.listener = listener

    def close(self) -> None:
        """Release all resources. The executor cannot be used afterwards."""
        return


class TimedExecutor(Executor):
    """Base class of executors with a clock, whose tasks may be in flight at the same time."""

    @property
    @abstractmethod
    def has_arrival(self) -> bool:
        """Whether a task has ended by now that `next_arrival` has not returned."""

    @abstractmethod
    def start(self, client: str, request: Message, number: int, start: float | None = None) -> None:
        """Start the task of a client without waiting for the reply.

        Args:
            client: The client.
            request: The request.
            number: Number of the task in the run.
            start: Time at which the task was started before the run was resumed. If None, now.
        """

    @abstractmethod
    def next_arrival(self) -> Arrival | None:
        """Wait for the next end of a task in flight.

        Returns:
            The arrival, or None if no task ended within a short time.
        """

    def available(self) -> Collection[str] | None:
        """Return the ids of the clients that can be asked now, or None for all clients."""
        return None


class InProcessExecutor(Executor):
    """Executor that runs clients in this process.

    Args:
        runtime: Runtime that executes the clients' plans.
        chunk: Number of clients of one architecture that are processed together.
    """

    accepts_unencoded = True

    def __init__(self, runtime: ClientRuntime, chunk: int = 1) -> None:
        super().__init__(runtime.store, runtime.backend)
        self.runtime = runtime
        self.chunk = chunk

    @override
    def run(
        self, clients: Sequence[str], request: Callable[[str], Message], until: Until = ALL_REPLIES
    ) -> Iterator[Arrival]:
        order = deque(clients)
        finished: dict[str, Reply] = {}
        try:
            for chunk in client_chunks(clients, self.runtime.federation.client_infos, self.chunk):
                finished.update(self.runtime.run({c: request(c) for c in chunk}, self.listener))
                yield from arrivals(take_finished(order, finished))
        finally:
            # Free memory before the server aggregates.
            self.runtime.clear_caches()

    @override
    def evaluate(
        self, clients: Sequence[str], broadcast: BroadcastTo, round_idx: int, details: bool
    ) -> Evaluations:
        order = deque(clients)
        finished: dict[str, ClientEvaluation] = {}
        try:
            for chunk in client_chunks(clients, self.runtime.federation.client_infos, self.chunk):
                broadcasts = {c: broadcast(c) for c in chunk}
                finished.update(
                    self.runtime.evaluate(broadcasts, round_idx, details, self.listener)
                )
                yield from take_finished(order, finished)
        finally:
            self.runtime.clear_caches()


def arrivals(replies: Iterable[tuple[str, Reply]]) -> Iterator[Arrival]:
    """Yield the arrival of each pair of client id and reply, without times."""
    for client, reply in replies:
        yield Arrival(client, reply)
        # Free the upload before the next client trains.
        del reply


def drain(replies: dict[str, T]) -> Iterator[tuple[str, T]]:
    """Remove and yield the entries of a dictionary one by one, to free memory."""
    while replies:
        client = next(iter(replies))
        yield client, replies.pop(client)


def client_chunks(
    client_ids: Iterable[str], client_infos: Mapping[str, ClientInfo], size: int
) -> list[list[str]]:
    """Divide clients into chunks that are processed together.

    Args:
        client_ids: The clients.
        client_infos: Information on each client, keyed by client id.
        size: Maximum number of clients in a chunk.

    Returns:
        Chunks of clients with the same architecture, in natural order of the first client id. If
        `size` is 1, in the order of `client_ids`.
    """
    if size == 1:
        return [[client_id] for client_id in client_ids]
    client_ids = natural_order(client_ids)
    groups: dict[str, list[str]] = {}
    for client_id in client_ids:
        groups.setdefault(client_infos[client_id].arch.spec_id, []).append(client_id)
    chunks = [
        members[i : i + size] for members in groups.values() for i in range(0, len(members), size)
    ]
    # Results are yielded in the order of ids, so the first clients are processed first.
    positions = {client_id: i for i, client_id in enumerate(client_ids)}
    return sorted(chunks, key=lambda chunk: positions[chunk[0]])


def take_finished(order: deque[str], finished: dict[str, T]) -> Iterator[tuple[str, T]]:
    """Remove and yield the results of clients, up to the first client without a result.

    Args:
        order: The clients whose results have not been yielded.
        finished: Results, keyed by client id.
    """
    while order and order[0] in finished:
        client_id = order.popleft()
        yield client_id, finished.pop(client_id)


def in_order(clients: Iterable[str], arrivals: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield pairs of client id and value in the order of `clients`.

    A pair is yielded as soon as all earlier pairs have arrived. Clients without a pair in
    `arrivals` are omitted.

    Args:
        clients: Client ids.
        arrivals: Pairs of client id and value, in any order.
    """
    order = deque(clients)
    finished: dict[str, T] = {}
    for client_id, value in arrivals:
        finished[client_id] = value
        # Free the value when it has been used.
        del value
        yield from take_finished(order, finished)
    yield from take_finished(deque(c for c in order if c in finished), finished)
