"""Requests to several sites at the same time, with one answer to each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetero_fl.deployment.messages import refusal_reason
from hetero_fl.deployment.transport import Envelope
from hetero_fl.engine.driver import DivergedError
from hetero_fl.federation.executors.base import ClientAbsentError, ClientLateError
from hetero_fl.utils.errors import NoUploadError, one_line

if TYPE_CHECKING:
    from hetero_fl.deployment.sites import Sites

# Seconds between checks of the connected nodes.
POLL_SECONDS = 0.5
# Number of times that a request is sent before its client is treated as absent.
MAX_ATTEMPTS = 8

# A client, and the successful answer or the reason why there is none.
End = tuple[str, Envelope | NoUploadError]


@dataclass
class PendingRequest:
    """Request that has not been answered.

    Attributes:
        make: Function that creates the request each time that it is sent.
        seconds: Time limit in seconds.
        deadline: Time of the monotonic clock at which the request expires.
        attempts: Number of times that the request was sent.
        node: Number of the node that the request was sent to.
        number: Number of the message, or an empty string if it has to be sent.
        task: Name of the task in the request, which the answer must repeat.
    """

    make: Callable[[str], Envelope]
    seconds: float
    deadline: float
    attempts: int = 0
    node: int = 0
    number: str = ""
    task: object = None


class Requests:
    """Requests to clients, to which requests can be added at any time.

    A request is sent when the client's node is connected. If the node disconnects, restarts or is
    no longer part of the run, the request is sent again after the node has joined, and the node
    answers completed tasks from storage.

    Args:
        sites: The sites.
        quorum: Minimum number of clients that the caller needs. While fewer clients are connected
            or have answered, disconnected nodes may reconnect until their requests expire.
            Otherwise, they may reconnect within `sites.patience` seconds.
    """

    def __init__(self, sites: Sites, quorum: int = 0) -> None:
        self.sites = sites
        self.quorum = quorum
        self._pending: dict[str, PendingRequest] = {}
        self._finished: deque[End] = deque()
        self._answered: set[str] = set()
        self._last_check = 0.0

    def __len__(self) -> int:
        return len(self._pending) + len(self._finished)

    def add(self, client: str, make: Callable[[str], Envelope], seconds: float) -> None:
        """Add a request to a client, which must not have another pending request.

        Args:
            client: Name of the client.
            make: Function that creates the request each time that it is sent.
            seconds: Time limit in seconds.
        """
        self._pending[client] = PendingRequest(make, seconds, time.monotonic() + seconds)

    def next_finished(self, wait: float = float("inf")) -> End | None:
        """Wait until a request is answered or fails.

        Args:
            wait: Maximum number of seconds to wait. By default, there is no limit.

        Returns:
            The client, and the answer or the error. None if no request finishes in time or no
            request is pending.
        """
        deadline = time.monotonic() + wait
        while not self._finished and self._pending:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            self._advance(min(POLL_SECONDS, remaining))
        return self._finished.popleft() if self._finished else None

    def _advance(self, wait: float) -> None:
        now = time.monotonic()
        if now - self._last_check > POLL_SECONDS:
            self.sites.refresh()
            self._last_check = now
        for client, pending in list(self._pending.items()):
            node = self.sites.node_of(client)
            if pending.node != node:
                # The node has disconnected, or another node speaks for the client.
                pending.number = ""
            if not pending.number and node is not None:
                self._send(client, pending, node)
        clients = {p.number: client for client, p in self._pending.items() if p.number}
        earliest = min((p.deadline for p in self._pending.values()), default=now)
        wait = max(0.0, min(wait, earliest - now))
        answers = self.sites.pull(clients, wait)
        for number, answer in answers.items():
            self._handle_answer(clients[number], answer)
        if not answers and not clients and not self.sites.has_pending_step:
            time.sleep(min(POLL_SECONDS / 5, wait))
        self._abandon_expired()

    def _send(self, client: str, pending: PendingRequest, node: int) -> None:
        pending.attempts += 1
        if pending.attempts > MAX_ATTEMPTS:
            self._finish(client, ClientAbsentError(f"its node disconnected {MAX_ATTEMPTS} times"))
            return
        envelope = pending.make(client)
        within = max(1.0, pending.deadline - time.monotonic())
        pending.node = node
        pending.task = envelope.head.get("task")
        pending.number = self.sites.transport.push(node, envelope, within)

    def _handle_answer(self, client: str, answer: Envelope | None) -> None:
        pending = self._pending[client]
        if answer is not None:
            self.sites.log_heads.update(client, answer)
        # A node that is not part of the run, such as one that lost its files, joins it again.
        if answer is None or answer.head.get("code") == "left":
            self.sites.forget_node(pending.node)
            pending.number = ""
            return
        task = answer.head.get("task", pending.task)
        if task != pending.task:
            expected = one_line(pending.task, 12)
            error = f"answer: expected task {expected}, got task {one_line(task, 12)}"
            self._finish(client, ClientAbsentError(error))
            return
        self._answered.add(client)
        self._finish(client, _answer_or_error(answer))

    def _abandon_expired(self) -> None:
        """Finish expired requests and those whose node has been disconnected for too long."""
        now = time.monotonic()
        connected = {c for c in self._pending if self.sites.node_of(c) is not None}
        num_present = len(self._answered | connected)
        has_quorum = num_present >= self.quorum
        for client, pending in list(self._pending.items()):
            if pending.deadline <= now and pending.number:
                error = ClientLateError(f"no answer within {pending.seconds:g} s")
                self._finish(client, error)
                continue
            seconds = self.sites.seconds_disconnected(client)
            is_away = not pending.number and seconds > self.sites.patience
            is_given_up = is_away and has_quorum and not self.sites.is_joining(client)
            if pending.deadline <= now or is_given_up:
                self._finish(client, ClientAbsentError("its node is not connected"))

    def _finish(self, client: str, result: Envelope | NoUploadError) -> None:
        del self._pending[client]
        self._finished.append((client, result))


def _answer_or_error(answer: Envelope) -> Envelope | NoUploadError:
    """Return a successful answer, or the error that an unsuccessful one reports."""
    kind = answer.head.get("ask")
    if kind == "done":
        return answer
    why = refusal_reason(answer)
    return DivergedError(why) if kind == "failed" else ClientAbsentError(why)
