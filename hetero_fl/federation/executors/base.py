"""Interface of executors, which run the tasks of clients, and an executor in this process.

A chunk consists of clients that are processed together. Chunks depend only on client ids and
architectures. Results are therefore bit-identical for any number of workers and any duration of
tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from typing_extensions import override

from hetero_fl.communication.protocol import Content, Message, Reply
from hetero_fl.core.participant import ClientInfo
from hetero_fl.engine.driver import Backend
from hetero_fl.federation.client_runtime import ClientEvaluation, ClientRuntime
from hetero_fl.federation.state_store import PrivateState, StateStore
from hetero_fl.utils.errors import NoUploadError
from hetero_fl.utils.ordering import natural_order

# Name of the executor in runs on several machines, whose sites do not have to upload their models.
NODES = "nodes"

T = TypeVar("T")


class ClientAbsentError(NoUploadError):
    """Raised when a client on another machine does not reply or refuses a request."""


class ClientLateError(ClientAbsentError):
    """Raised when a client has not replied in time."""


class Executor(Protocol):
    """Interface of executors, which run the tasks of clients.

    Attributes:
        store: Store of the clients' private states. The new state of a client is staged before the
            reply of the client is yielded.
        backend: Backend in this process, which computes the server's plans.
        accepts_unencoded: Whether requests may contain broadcasts that are not encoded, because
            clients run in this process.
    """

    store: StateStore
    backend: Backend
    accepts_unencoded: bool

    def run(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        """Send a request to each client, and yield the replies in the order of `clients`.

        Clients that do not reply are omitted.

        Args:
            clients: Client ids.
            request: Function that returns the request to a client id. The function is called again
                if a request is sent again.

        Yields:
            Pairs of client id and reply.
        """

    def evaluate(
        self,
        clients: Sequence[str],
        broadcast: Callable[[str], Content],
        round_idx: int,
        details: bool,
    ) -> Iterator[tuple[str, ClientEvaluation | ClientAbsentError]]:
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

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        """Set a function that is called with a message when a task begins.

        Args:
            listener: The function. If None, no function is called.
        """

    def close(self) -> None:
        """Release all resources. The executor cannot be used afterwards."""


class RemoteExecutor(Executor, Protocol):
    """Interface of executors whose clients are on other machines.

    Clients may connect and disconnect at any time.
    """

    def as_completed(
        self, clients: Sequence[str], request: Callable[[str], Message], *, waits: bool = True
    ) -> Iterator[tuple[str, Reply]]:
        """Send a request to each client, and yield the replies in the order of arrival.

        Args:
            clients: Client ids.
            request: Function that returns the request to a client id.
            waits: Whether to wait for disconnected clients if too few clients are left.

        Yields:
            Pairs of client id and reply.
        """

    def connected_clients(self) -> Collection[str]:
        """Return the ids of the clients that are connected now."""

    def dispatch(self, client: str, make_request: Callable[[str], Message]) -> None:
        """Start the task of a client without waiting for the reply.

        Args:
            client: The client.
            make_request: Function that returns the request to a client id. The function is called
                again if the client has lost its private state.
        """

    def next_reply(self, wait: float) -> tuple[str, Reply] | None:
        """Return the next reply to a dispatched request.

        Args:
            wait: Maximum waiting time in seconds.

        Returns:
            The client id and the reply, or None if no reply arrives in time.
        """

    def send_states(self, states: Mapping[str, PrivateState]) -> None:
        """Send initial private states to clients, and stage these states.

        Args:
            states: Private states, keyed by client id.

        Raises:
            RunFailedError: If a client cannot be reached.
        """

    def on_checkpoint(self) -> None:
        """Instruct clients to keep their present private states, to which the run may be reset."""

    def pop_reset_clients(self) -> list[str]:
        """Return the ids of clients that have lost their private state since the previous call."""


class InProcessExecutor(Executor):
    """Executor that runs clients in this process.

    Args:
        runtime: Runtime that executes the clients' plans.
        chunk: Number of clients of one architecture that are processed together.
    """

    accepts_unencoded = True

    def __init__(self, runtime: ClientRuntime, chunk: int = 1) -> None:
        self.runtime = runtime
        self.chunk = chunk
        self.store = runtime.store
        self.backend = runtime.backend

    @override
    def run(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        try:
            if self.chunk == 1:
                for client_id in clients:
                    yield from drain(self.runtime.run({client_id: request(client_id)}))
            else:
                yield from in_order(clients, self._run_chunks(clients, request))
        finally:
            # Free memory before the server aggregates.
            self.runtime.clear_caches()

    def _run_chunks(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        for chunk in client_chunks(clients, self.runtime.federation.client_infos, self.chunk):
            yield from drain(self.runtime.run({c: request(c) for c in chunk}))

    @override
    def evaluate(
        self,
        clients: Sequence[str],
        broadcast: Callable[[str], Content],
        round_idx: int,
        details: bool,
    ) -> Iterator[tuple[str, ClientEvaluation]]:
        chunks = client_chunks(clients, self.runtime.federation.client_infos, self.chunk)
        evaluations = (
            self.runtime.evaluate({c: broadcast(c) for c in chunk}, round_idx, details).items()
            for chunk in chunks
        )
        try:
            yield from in_order(clients, (pair for chunk in evaluations for pair in chunk))
        finally:
            self.runtime.clear_caches()

    @override
    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        self.runtime.listener = listener

    @override
    def close(self) -> None:
        pass


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
        client_ids: The clients, in any order.
        client_infos: Information on each client, keyed by client id.
        size: Maximum number of clients in a chunk.

    Returns:
        Chunks of clients with the same architecture, in natural order of the first client id.
    """
    client_ids = natural_order(client_ids)
    if size == 1:
        return [[client_id] for client_id in client_ids]
    groups: dict[str, list[str]] = {}
    for client_id in client_ids:
        groups.setdefault(client_infos[client_id].arch.spec_id, []).append(client_id)
    chunks = [
        members[i : i + size] for members in groups.values() for i in range(0, len(members), size)
    ]
    # Results are yielded in the order of ids, so the first clients are processed first.
    positions = {client_id: i for i, client_id in enumerate(client_ids)}
    return sorted(chunks, key=lambda chunk: positions[chunk[0]])


def in_order(clients: Iterable[str], arrivals: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield pairs of client id and value in the order of `clients`.

    A pair is yielded as soon as all earlier pairs have arrived. Clients without a pair in
    `arrivals` are omitted.

    Args:
        clients: Client ids.
        arrivals: Pairs of client id and value, in any order.
    """
    waiting: dict[str, T] = {}
    source = iter(arrivals)
    for client_id in clients:
        while client_id not in waiting and (arrival := next(source, None)) is not None:
            waiting[arrival[0]] = arrival[1]
            del arrival
        if client_id in waiting:
            yield client_id, waiting.pop(client_id)
