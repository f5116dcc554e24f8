"""Interface of executors, which run the tasks of a cohort, and the executor in this process.

Clients are computed in chunks that depend only on ids and architectures, not on the number of
workers or on time, so that results are reproducible bit by bit.
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
    """Runner of clients' tasks.

    Attributes:
        store: The clients' private state. A task's new state is staged before its reply is yielded.
        backend: Backend in this process for the server's plans.
        takes_payload: Whether clients run in this process, so that requests may contain broadcasts
            without encoding.
    """

    store: StateStore
    backend: Backend
    takes_payload: bool

    def run(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        """Yield each client's reply to one request, in the order of `clients`.

        Args:
            clients: Client ids. Clients without any reply are left out.
            request: Returns the request to a client. Called each time the request is sent.
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
            broadcast: Returns the broadcast to a client.
            round_idx: Index of the next round, from 0.
            details: Whether to compute everything that a report shows.

        Raises:
            DivergedError: If a model cannot be deployed.
        """

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        """Set the function that is called with a line for each task that begins."""

    def close(self) -> None:
        """Release all resources. The executor cannot be used afterwards."""


class RemoteExecutor(Executor, Protocol):
    """Executor whose clients are on other machines and may connect and disconnect at any time.

    Attributes:
        on_reset: Called with a client that has lost its private state, before its request is
            created again.
    """

    on_reset: Callable[[str], object]

    def as_completed(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        """Yield each client's reply to one request, in the order of arrival.

        Args:
            clients: Client ids.
            request: Returns the request to a client. Called each time the request is sent.
        """

    def connected_clients(self) -> Collection[str]:
        """Return the clients that are connected now."""

    def dispatch(self, client: str, make_request: Callable[[str], Message]) -> None:
        """Begin one client's task while others are running.

        Args:
            client: The client.
            make_request: Returns the request; called again if the client has lost its private
                state.
        """

    def next_reply(self, wait: float) -> tuple[str, Reply] | None:
        """Return the next reply to a dispatched request; None after `wait` seconds without one."""

    def send_states(self, states: Mapping[str, PrivateState]) -> None:
        """Send clients their initial private states, and stage them.

        Raises:
            RunFailedError: If a client cannot be reached.
        """

    def on_checkpoint(self) -> None:
        """Have clients keep the states of a checkpoint, in case the run falls back to it."""

    def pop_reset_clients(self) -> list[str]:
        """Return the clients that have lost their private state since the last call."""


class InProcessExecutor(Executor):
    """Executor in this process.

    Args:
        runtime: Runs the clients' plans.
        chunk: Number of clients of one architecture that are computed together.
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
    """Divide clients into chunks that are computed together.

    Args:
        client_ids: The clients.
        client_infos: What is known of each client.
        size: Largest number of clients in a chunk.

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
    # Results are yielded in id order, so the first ones are computed first.
    positions = {client_id: i for i, client_id in enumerate(client_ids)}
    return sorted(chunks, key=lambda chunk: positions[chunk[0]])


def in_order(clients: Iterable[str], arrivals: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield arrivals in the order of `clients`; clients without an arrival are left out."""
    waiting: dict[str, T] = {}
    source = iter(arrivals)
    for client_id in clients:
        while client_id not in waiting and (arrival := next(source, None)) is not None:
            waiting[arrival[0]] = arrival[1]
            del arrival
        if client_id in waiting:
            yield client_id, waiting.pop(client_id)
