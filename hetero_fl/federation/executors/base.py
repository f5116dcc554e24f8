"""Who computes a cohort's tasks: the interfaces that runs use, and the executor that stays in this process.

An executor is handed requests by client id and gives replies in whatever order they come. Clients are put together in
chunks that follow from their ids and architectures alone, never from workers or the clock: the same chunks, the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from hetero_fl.communication.protocol import Message, Messages
from hetero_fl.core.participant import ClientInfo
from hetero_fl.engine.driver import Backend, DivergedError
from hetero_fl.federation.client_runtime import ClientEvaluation, ClientRuntime
from hetero_fl.federation.state_store import PrivateState, StateStore
from hetero_fl.utils.ordering import natural_order

T = TypeVar("T")
Reply = Message | DivergedError


class ClientAbsentError(DivergedError):
    """A client that gave no answer: it is not there, or refuses. Only where clients are on machines of their own."""


class ClientLateError(ClientAbsentError):
    """A client that had not answered when the time was over."""


class Executor(Protocol):
    """Computes clients' tasks somewhere."""

    # clients' private state; what a task writes is staged here by the time its reply comes
    store: StateStore
    backend: Backend  # for the server's own plans, in this process

    def run(self, requests: Messages) -> Iterator[tuple[str, Reply]]:
        """The clients' replies to one request each, in any order; tasks of several rounds may be computed together."""
        ...

    def evaluate(
        self, broadcasts: Mapping[str, bytes], round_idx: int, details: bool
    ) -> Iterator[tuple[str, ClientEvaluation | ClientAbsentError]]:
        """The clients' readings (see `ClientRuntime.evaluate`), in any order. Raises DivergedError."""
        ...

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        """Have somebody told what is being done."""
        ...

    def close(self) -> None:
        """Give everything back; the executor is of no use afterwards."""
        ...


class RemoteExecutor(Executor, Protocol):
    """An executor whose clients are on machines of their own: real time passes, and they come and go."""

    def connected_clients(self) -> Collection[str]:
        """The clients that are there now."""
        ...

    def dispatch(self, client: str, request: Message) -> None:
        """Have one client's task done beside others."""
        ...

    def next_reply(self, wait: float) -> tuple[str, Reply] | None:
        """The next reply to what was dispatched; None if none comes in so many seconds."""
        ...

    def send_states(self, states: Mapping[str, PrivateState]) -> None:
        """Hand clients the private state that they begin with; it is staged. Raises RunFailedError."""
        ...

    def on_checkpoint(self) -> None:
        """A checkpoint has been written: what it names must be there if the run falls back to it."""
        ...

    def pop_reset_clients(self) -> list[str]:
        """Clients that have lost their private state since this was last asked, and begin anew."""
        ...


class InProcessExecutor:
    """One site in this process; `chunk` clients of one architecture at a time."""

    def __init__(self, site: ClientRuntime, chunk: int = 1) -> None:
        self.runtime = site
        self.chunk = chunk
        self.store = site.store
        self.backend = site.backend

    def run(self, requests: Messages) -> Iterator[tuple[str, Reply]]:
        for ids in client_chunks(requests, self.runtime.federation.client_infos, self.chunk):
            yield from drain(self.runtime.run({c: requests[c] for c in ids}))

    def evaluate(
        self, broadcasts: Mapping[str, bytes], round_idx: int, details: bool
    ) -> Iterator[tuple[str, ClientEvaluation]]:
        for ids in client_chunks(broadcasts, self.runtime.federation.client_infos, self.chunk):
            yield from self.runtime.evaluate(
                {c: broadcasts[c] for c in ids}, round_idx, details
            ).items()

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        self.runtime.watch = listener

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


def order_arrivals(
    ids: Iterable[str], arrivals: Iterable[tuple[str, T]]
) -> Iterator[tuple[str, T]]:
    """Arrivals in the order of the ids; early ones wait, and who never comes is left out."""
    waiting: dict[str, T] = {}
    source = iter(arrivals)
    for id in ids:
        while id not in waiting and (arrival := next(source, None)) is not None:
            waiting[arrival[0]] = arrival[1]
            del arrival
        if id in waiting:
            yield id, waiting.pop(id)
