"""Executors compute the tasks of a cohort; here the interface, and the executor in this process.

Clients are computed in chunks that follow from their ids and architectures alone, never from the
number of workers or the clock: the same chunks give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from hetero_fl.communication.protocol import Content, Message, Reply
from hetero_fl.core.participant import ClientInfo
from hetero_fl.engine.driver import Backend
from hetero_fl.federation.client_runtime import ClientEvaluation, ClientRuntime
from hetero_fl.federation.state_store import PrivateState, StateStore
from hetero_fl.utils.errors import NoUploadError
from hetero_fl.utils.ordering import natural_order

T = TypeVar("T")


class ClientAbsentError(NoUploadError):
    """A client on another machine gave no answer: it is not connected, or refused."""


class ClientLateError(ClientAbsentError):
    """A client had not answered when the time was over."""


class Executor(Protocol):
    """Computes clients' tasks.

    Attributes:
        store: The clients' private state. What a task writes is staged by the time its reply comes.
        backend: Computes the server's own plans, in this process.
        takes_payload: Whether clients are computed in this process, so that requests may hold
            broadcasts that are not encoded.
    """

    store: StateStore
    backend: Backend
    takes_payload: bool

    def run(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        """Yield each client's reply to one request, in the order of `clients`.

        Args:
            clients: Client ids. A client that gives no reply at all is left out.
            request: Returns the request to a client. Called when the request is sent; again if it
                has to be sent again.
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
            round_idx: The round that comes next.
            details: Whether to include all that a report shows.

        Raises:
            DivergedError: If a model cannot be deployed.
        """

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        """Report what is being computed to `listener`."""

    def close(self) -> None:
        """Release all resources. The executor cannot be used afterwards."""


class RemoteExecutor(Executor, Protocol):
    """An executor whose clients are on machines of their own: real time passes, and they come and go.

    Attributes:
        on_reset: Called with a client that has lost its private state, before its request is made
            again.
    """

    on_reset: Callable[[str], object]

    def as_completed(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        """Yield replies as `run` does, in the order in which they come."""

    def connected_clients(self) -> Collection[str]:
        """The clients that are there now."""

    def dispatch(self, client: str, make_request: Callable[[str], Message]) -> None:
        """Begin one client's task while others are running.

        Args:
            client: The client.
            make_request: Returns its request; called again if the client has lost its private
                state.
        """

    def next_reply(self, wait: float) -> tuple[str, Reply] | None:
        """The next reply to what was dispatched; None if none comes in so many seconds."""

    def send_states(self, states: Mapping[str, PrivateState]) -> None:
        """Hand clients the private state that they begin with; it is staged. Raises RunFailedError."""

    def on_checkpoint(self) -> None:
        """A checkpoint has been written: what it names must be there if the run falls back to it."""

    def pop_reset_clients(self) -> list[str]:
        """Clients that have lost their private state since this was last asked, and begin anew."""


class InProcessExecutor:
    """Computes tasks in this process, `chunk` clients of one architecture at a time."""

    takes_payload = True

    def __init__(self, runtime: ClientRuntime, chunk: int = 1) -> None:
        self.runtime = runtime
        self.chunk = chunk
        self.store = runtime.store
        self.backend = runtime.backend

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
            self.runtime.clear_caches()  # before the server aggregates

    def _run_chunks(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        for chunk in client_chunks(clients, self.runtime.federation.client_infos, self.chunk):
            yield from drain(self.runtime.run({c: request(c) for c in chunk}))

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

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        self.runtime.listener = listener

    def close(self) -> None:
        pass


def drain(replies: dict[str, T]) -> Iterator[tuple[str, T]]:
    """The entries, each forgotten here as it is handed on."""
    while replies:
        client = next(iter(replies))
        yield client, replies.pop(client)


def client_chunks(
    ids: Iterable[str], client_infos: Mapping[str, ClientInfo], size: int
) -> list[list[str]]:
    """Clients that are computed together: at most `size` of one architecture, in id order."""
    ids = natural_order(ids)
    if size == 1:
        return [[id] for id in ids]
    groups: dict[str, list[str]] = {}
    for id in ids:
        groups.setdefault(client_infos[id].arch.spec_id, []).append(id)
    made = [
        members[i : i + size] for members in groups.values() for i in range(0, len(members), size)
    ]
    turn = {id: i for i, id in enumerate(ids)}
    # results wait for their turn: the nearest first
    return sorted(made, key=lambda chunk: turn[chunk[0]])


def in_order(clients: Iterable[str], arrivals: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield the arrivals in the order of `clients`. Early ones wait; what never comes is left out."""
    waiting: dict[str, T] = {}
    source = iter(arrivals)
    for client_id in clients:
        while client_id not in waiting and (arrival := next(source, None)) is not None:
            waiting[arrival[0]] = arrival[1]
            del arrival
        if client_id in waiting:
            yield client_id, waiting.pop(client_id)
