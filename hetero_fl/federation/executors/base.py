"""Interface of executors, which run the tasks of clients, and an executor in this process.

Clients are processed in chunks that depend only on client ids and architectures, neither on the
number of workers nor on the duration of tasks, so that results are reproducible bit by bit.
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

T = TypeVar("T")


class ClientAbsentError(NoUploadError):
    """Raised when a client on another machine does not reply or refuses a request."""


class ClientLateError(ClientAbsentError):
    """Raised when a client has not replied in time."""


class Executor(Protocol):
    """Interface of executors, which run the tasks of clients.

    Attributes:
        store: The clients' private state. The new state of a client is staged before its reply is
            yielded.
        backend: Backend in this process for the server's plans.
        takes_payload: Whether clients run in this process, so that requests may contain broadcasts
            that are not encoded.
    """

    store: StateStore
    backend: Backend
    takes_payload: bool

    def run(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        """Yield the reply of each client to a request, in the order of `clients`.

        Clients that do not reply are left out.

        Args:
            clients: Client ids.
            request: Function that returns the request to a client. It is called each time the
                request is sent.

        Yields:
            Client ids and replies.
        """

    def evaluate(
        self,
        clients: Sequence[str],
        broadcast: Callable[[str], Content],
        round_idx: int,
        details: bool,
    ) -> Iterator[tuple[str, ClientEvaluation | ClientAbsentError]]:
        """Yield the evaluation of each client's model, in the order of `clients`.

        Args:
            clients: Client ids.
            broadcast: Function that returns the broadcast to a client.
            round_idx: Index of the next round, from 0.
            details: Whether to compute all results that a report shows.

        Yields:
            Client ids and evaluations.

        Raises:
            DivergedError: If training for deployment diverges.
        """

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        """Set a function that is called with a message when a task begins; None removes it."""

    def close(self) -> None:
        """Release all resources. The executor cannot be used afterwards."""


class RemoteExecutor(Executor, Protocol):
    """Executor whose clients are on other machines and may connect and disconnect at any time.

    Attributes:
        on_reset: Function that is called with the id of a client that has lost its private state,
            before the request to the client is created again.
    """

    on_reset: Callable[[str], object]

    def as_completed(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        """Yield the reply of each client to a request, in the order of arrival.

        Args:
            clients: Client ids.
            request: Function that returns the request to a client. It is called each time the
                request is sent.

        Yields:
            Client ids and replies.
        """

    def connected_clients(self) -> Collection[str]:
        """Return the ids of the clients that are connected now."""

    def dispatch(self, client: str, make_request: Callable[[str], Message]) -> None:
        """Start the task of a client without waiting for the reply.

        Args:
            client: The client.
            make_request: Function that returns the request to the client. It is called again if
                the client has lost its private state.
        """

    def next_reply(self, wait: float) -> tuple[str, Reply] | None:
        """Return the next reply to a dispatched request; None if none arrives in `wait` seconds."""

    def send_states(self, states: Mapping[str, PrivateState]) -> None:
        """Send clients their initial private states, and stage these states.

        Args:
            states: Private states by client id.

        Raises:
            RunFailedError: If a client cannot be reached.
        """

    def on_checkpoint(self) -> None:
        """Instruct clients to keep their states at a checkpoint, to which the run may fall back."""

    def pop_reset_clients(self) -> list[str]:
        """Return the ids of clients that have lost their private state since the last call."""


class InProcessExecutor(Executor):
    """Executor that runs clients in this process.

    Args:
        runtime: Runtime that executes the clients' plans.
        chunk: Number of clients of one architecture that are processed together.
    """

    takes_payload = True

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
    """Remove and yield the entries of a dictionary one by one, to free their memory."""
    while replies:
        client = next(iter(replies))
        yield client, replies.pop(client)


def client_chunks(
    client_ids: Iterable[str], client_infos: Mapping[str, ClientInfo], size: int
) -> list[list[str]]:
    """Divide clients into chunks that are processed together.

    Args:
        client_ids: The clients.
        client_infos: Information on each client, by client id.
        size: Maximum number of clients in a chunk.

    Returns:
        Chunks of clients with the same architecture, sorted by the id of their first client.
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
    """Yield pairs of client id and value in the order of `clients`, as soon as possible.

    Args:
        clients: Client ids.
        arrivals: Pairs of client id and value in any order. Clients that do not occur are left out.
    """
    waiting: dict[str, T] = {}
    source = iter(arrivals)
    for client_id in clients:
        while client_id not in waiting and (arrival := next(source, None)) is not None:
            waiting[arrival[0]] = arrival[1]
            del arrival
        if client_id in waiting:
            yield client_id, waiting.pop(client_id)
