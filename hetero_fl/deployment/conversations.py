"""Concurrent conversations of the server with nodes.

A conversation is a generator that yields messages for a node and receives the answers. If the node
disconnects, the conversation is restarted when the node reconnects. The node then answers completed
tasks from storage.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from hetero_fl.deployment.messages import (
    LOG,
    RequestRefusedError,
    decode_body,
    message,
    refusal_reason,
    version_mismatch,
)
from hetero_fl.deployment.transport import Envelope, Transport
from hetero_fl.federation.executors.base import ClientAbsentError, ClientLateError

# Seconds between checks of the connected nodes.
POLL_SECONDS = 0.5
# Number of attempts at a conversation before its client is treated as absent.
MAX_ATTEMPTS = 8

# Yields messages, receives the answers and returns the last answer.
Conversation = Generator[Envelope, Envelope, Envelope]
# A client, and the last answer or the reason why there is no answer.
End = tuple[str, Envelope | ClientAbsentError]


@dataclass
class PendingConversation:
    """Conversation that has not finished.

    Args:
        factory: Function that creates the conversation and is called once per attempt.
        deadline: Time of the monotonic clock at which the conversation expires.
        seconds: Time limit in seconds.
        attempts: Number of attempts so far.
    """

    factory: Callable[[], Conversation]
    deadline: float
    seconds: float
    attempts: int = 0


@dataclass
class MessageInFlight:
    """Message that was sent to a node and has not been answered yet.

    Args:
        client: Client of the node.
        conversation: Conversation to which the message belongs.
        node: Number of the node.
        number: Number of the message.
    """

    client: str
    conversation: Conversation
    node: int
    number: str


class Conversations:
    """Concurrent conversations with clients, to which conversations can be added at any time.

    Args:
        connections: Connections to the nodes.
        required: Minimum number of clients that the caller needs. While fewer clients are connected
            or have answered, disconnected nodes may reconnect until their conversations expire.
            Otherwise, they may reconnect within `connections.patience` seconds.
    """

    def __init__(self, connections: Connections, required: int = 0) -> None:
        self.connections = connections
        self.required = required
        self._pending: dict[str, PendingConversation] = {}
        # Clients whose node is not connected, in order of arrival.
        self._waiting: dict[str, None] = {}
        self._in_flight: dict[str, MessageInFlight] = {}
        self._finished: deque[End] = deque()
        self._answered: set[str] = set()
        self._last_check = 0.0

    def __len__(self) -> int:
        return len(self._pending) + len(self._finished)

    def add(self, client: str, factory: Callable[[], Conversation], seconds: float) -> None:
        """Add a conversation with a client, which must not have another pending conversation.

        Args:
            client: Name of the client.
            factory: Function that creates the conversation and is called once per attempt.
            seconds: Time limit in seconds.
        """
        self._pending[client] = PendingConversation(factory, time.monotonic() + seconds, seconds)
        self._waiting[client] = None

    def next_finished(self, wait: float = float("inf")) -> End | None:
        """Wait until a conversation finishes.

        Args:
            wait: Maximum number of seconds to wait. By default, there is no limit.

        Returns:
            The client, and the last answer or the error if there is no answer. If no conversation
            finishes in time or no conversation is pending, None is returned.
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
            self.connections.greet_new_nodes()
            for flight in [
                f
                for f in self._in_flight.values()
                if self.connections.node_of.get(f.client) != f.node
            ]:
                self._restart(flight)
            self._last_check = now
        for client in [c for c in self._waiting if c in self.connections.node_of]:
            self._start(client)
        numbers = {flight.number for flight in self._in_flight.values()}
        earliest = min((p.deadline for p in self._pending.values()), default=now + wait)
        wait = max(0.0, min(wait, earliest - now))
        answers = self.connections.pull_answers(numbers, wait)
        for number, answer in answers.items():
            self._handle_answer(number, answer)
        if not answers and not numbers and not self.connections.has_pending_greeting:
            time.sleep(min(POLL_SECONDS / 5, wait))
        self._abandon_expired()

    def _start(self, client: str) -> None:
        del self._waiting[client]
        pending = self._pending[client]
        pending.attempts += 1
        if pending.attempts > MAX_ATTEMPTS:
            self._finish(client, ClientAbsentError(f"its node disconnected {MAX_ATTEMPTS} times"))
            return
        try:
            conversation = pending.factory()
            self._send(client, conversation, self.connections.node_of[client], next(conversation))
        except RequestRefusedError as error:
            self._finish(client, ClientAbsentError(str(error)))

    def _send(self, client: str, conversation: Conversation, node: int, envelope: Envelope) -> None:
        within = max(1.0, self._pending[client].deadline - time.monotonic())
        number = self.connections.transport.push(node, envelope, within)
        self._in_flight[client] = MessageInFlight(client, conversation, node, number)

    def _handle_answer(self, number: str, answer: Envelope | None) -> None:
        flight = next((f for f in self._in_flight.values() if f.number == number), None)
        if flight is None:
            return
        if answer is None:
            self.connections.forget_node(flight.node)
            self._restart(flight)
            return
        self.connections.log_heads.update(flight.client, answer)
        try:
            envelope = flight.conversation.send(answer)
        except StopIteration as stop:
            self._finish(flight.client, stop.value)
        except RequestRefusedError as error:
            self._finish(flight.client, ClientAbsentError(str(error)))
        else:
            self._send(flight.client, flight.conversation, flight.node, envelope)

    def _restart(self, flight: MessageInFlight) -> None:
        del self._in_flight[flight.client]
        self._waiting[flight.client] = None

    def _abandon_expired(self) -> None:
        """Finish expired conversations and those whose node has been disconnected for too long."""
        now = time.monotonic()
        present = self._answered | (self._pending.keys() & self.connections.node_of.keys())
        waits_for_nodes = len(present) < self.required or self.connections.has_pending_greeting
        for client, pending in list(self._pending.items()):
            if pending.deadline <= now:
                if client in self._in_flight:
                    error = ClientLateError(f"no answer within {pending.seconds:g} s")
                    self._finish(client, error)
                else:
                    self._finish(client, ClientAbsentError("its node is not connected"))
            elif (
                client in self._waiting
                and not waits_for_nodes
                and self.connections.seconds_disconnected(client) > self.connections.patience
            ):
                self._finish(client, ClientAbsentError("its node is not connected"))

    def _finish(self, client: str, result: Envelope | ClientAbsentError) -> None:
        self._waiting.pop(client, None)
        self._in_flight.pop(client, None)
        del self._pending[client]
        if not isinstance(result, ClientAbsentError):
            self._answered.add(client)
        self._finished.append((client, result))


# Seconds to wait for a disconnected node while other nodes are connected.
PATIENCE = 60.0
# Maximum number of seconds to notify nodes of the end of a run.
LEAVE_SECONDS = 15.0
# Seconds after which a greeting that was not answered is repeated.
GREETING_SECONDS = 60.0
# Seconds until a node that did not name a client is greeted again.
GREETING_RETRY_SECONDS = 10.0
# Maximum difference between the clocks of two machines in seconds.
MAX_CLOCK_SKEW = 10.0
# Head of an audit log: number of lines and hash of the last line.
HEAD_PATTERN = re.compile(r"(\d{1,12}):[0-9a-f]{64}")


class EventFunction(Protocol):
    """Type of functions that report an event at the server."""

    def __call__(self, line: str, *, client: str | None = None) -> None:
        """Report an event.

        Args:
            line: Message of the event.
            client: Name of the client of the event, or None.
        """


class LogHeads:
    """Heads of the audit logs of all sites.

    Every answer of a node contains the head of the site's audit log, which consists of the number
    of lines and the hash of the last line. If a site truncates or rewrites its log, the new head
    contradicts an earlier head.

    Args:
        log: Function that is called for each head that contradicts an earlier head.

    Attributes:
        longest: The head with the most lines, keyed by client.
    """

    def __init__(self, log: EventFunction) -> None:
        self.log = log
        self.longest: dict[str, str] = {}
        # The most recent head, keyed by client.
        self._last: dict[str, str] = {}

    def update(self, client: str, answer: Envelope) -> None:
        """Compare the head in a client's answer with earlier heads, and store the longer head.

        A contradiction is logged. An answer without a valid head is ignored.

        Args:
            client: Name of the client.
            answer: Answer of the client's node.
        """
        head = str(answer.head.get(LOG, ""))
        if HEAD_PATTERN.fullmatch(head) is None:
            return
        kept = self.longest.setdefault(client, head)
        last = self._last.get(client, head)
        self._last[client] = head
        if _lines(head) < _lines(last):
            self.log(
                f"the audit log of '{client}' has {_lines(head)} lines; "
                f"it had {_lines(last)} (kept: {kept})",
                client=client,
            )
        elif any(_lines(head) == _lines(before) and head != before for before in (last, kept)):
            self.log(
                f"line {_lines(head)} of the audit log of '{client}' was replaced: "
                f"found {head} (kept: {kept})",
                client=client,
            )
        if _lines(head) > _lines(kept):
            self.longest[client] = head


def _lines(head: str) -> int:
    """Return the number of lines that the head of an audit log states."""
    return int(head.partition(":")[0])


class Connections:
    """Connections of the server to the nodes of all clients.

    Args:
        transport: Transport for the messages.
        clients: Names of the expected clients. Nodes of other clients are refused.
        log: Function that is called for each node that connects, disconnects or is refused.
        patience: Seconds to wait for a disconnected node while other nodes are connected.
        keys: Public key of each client's node in PEM format. If None, a client belongs to the first
            node that claims to be the client, until that node disconnects.

    Attributes:
        node_of: Node number of each connected client, keyed by client.
        reports: Report of each client that has connected at least once, keyed by client.
        refusals: Reason for each refusal, keyed by node number and claimed client.
        log_heads: Heads of the sites' audit logs.
    """

    def __init__(
        self,
        transport: Transport,
        clients: Collection[str],
        log: EventFunction,
        patience: float = PATIENCE,
        keys: Mapping[str, bytes] | None = None,
    ) -> None:
        self.transport = transport
        self.clients = frozenset(clients)
        self.log = log
        self.patience = patience
        self.log_heads = LogHeads(log)
        self._keys: dict[str, bytes] = dict(keys or {})
        self._are_keys_known = keys is not None
        # Public key of each connected node.
        self._key_of: Mapping[int, bytes] = {}
        self.node_of: dict[str, int] = {}
        self.reports: dict[str, object] = {}
        self.refusals: dict[tuple[int, str], str] = {}
        self._created = time.monotonic()
        # Time at which each client disconnected.
        self._disconnected: dict[str, float] = {}
        # Client of each greeted node, or "" if the node was refused.
        self._client_of: dict[int, str] = {}
        # Time at which to greet a node again.
        self._greet_again: dict[int, float] = {}
        # The greeted node and the time of the greeting, keyed by message number.
        self._greetings: dict[str, tuple[int, float]] = {}

    def wait_for_clients(self, seconds: float) -> list[str]:
        """Wait up to `seconds` for the nodes of all clients and return the missing clients."""
        deadline = time.monotonic() + seconds
        while missing := sorted(self.clients - self.node_of.keys()):
            self.greet_new_nodes()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return missing
            self.pull_answers((), min(POLL_SECONDS, remaining))
            if not self._greetings:
                time.sleep(min(POLL_SECONDS / 5, remaining))
        return []

    def refresh(self) -> None:
        """Update the list of connected nodes."""
        self.greet_new_nodes()
        self.pull_answers((), 0.0)

    def converse(
        self,
        conversations: Mapping[str, Callable[[], Conversation]],
        seconds: float,
        required: int = 0,
    ) -> Iterator[tuple[str, Envelope | ClientAbsentError]]:
        """Run conversations with several clients concurrently.

        Args:
            conversations: Functions that create the conversations, keyed by client.
            seconds: Time limit of each conversation in seconds.
            required: Minimum number of clients, see `Conversations`.

        Yields:
            For each conversation that finishes, the client, and the last answer or the error if
            there is no answer.
        """
        running = Conversations(self, min(required, len(conversations)))
        for client, factory in conversations.items():
            running.add(client, factory, seconds)
        while (finished := running.next_finished()) is not None:
            yield finished
            # The answer may contain a model; free it before the next answer arrives.
            del finished

    def close(self, is_complete: bool) -> None:
        """Disconnect from all nodes.

        Args:
            is_complete: Whether the run is complete. If not, the nodes are not notified and wait
                until the run is resumed.
        """
        if is_complete:
            messages = {
                self.transport.push(node, message("leave"), LEAVE_SECONDS)
                for node in self.node_of.values()
            }
            deadline = time.monotonic() + LEAVE_SECONDS
            while messages and (remaining := deadline - time.monotonic()) > 0:
                messages -= self.transport.pull(messages, remaining).keys()
        self.transport.close()

    @property
    def has_pending_greeting(self) -> bool:
        """Whether a greeting of a connected node has not been answered yet."""
        return any(
            time.monotonic() - sent < GREETING_SECONDS for _, sent in self._greetings.values()
        )

    def seconds_disconnected(self, client: str) -> float:
        """Return the number of seconds since a client disconnected, or 0 if it is connected.

        For a client that has never connected, the time since the creation of this object is
        returned.
        """
        if client in self.node_of:
            return 0.0
        return time.monotonic() - self._disconnected.get(client, self._created)

    def greet_new_nodes(self) -> None:
        """Greet nodes that have connected, and forget those that have disconnected."""
        connected = self.transport.nodes()
        self._key_of = connected
        for node in [n for n in self._client_of if n not in connected]:
            self.forget_node(node)
        now = time.monotonic()
        for node in [n for n, when in self._greet_again.items() if when < now]:
            self.forget_node(node)
        self._greetings = {
            m: (n, sent)
            for m, (n, sent) in self._greetings.items()
            if n in connected and now - sent < GREETING_SECONDS
        }
        greeted = {node for node, _ in self._greetings.values()}
        for node in connected:
            if node not in self._client_of and node not in greeted:
                number = self.transport.push(
                    node, message("hello"), GREETING_SECONDS + MAX_CLOCK_SKEW
                )
                self._greetings[number] = (node, now)

    def forget_node(self, node: int) -> None:
        """Forget a node that disconnected or lost a message.

        If the node is still connected, it is greeted again.
        """
        client = self._client_of.pop(node, "")
        self._greet_again.pop(node, None)
        if client and self.node_of.get(client) == node:
            del self.node_of[client]
            self._disconnected[client] = time.monotonic()
            if not self._are_keys_known:
                # Without TLS, Flower generates a new key for a node that reconnects.
                del self._keys[client]
            self.log(f"{client} disconnected", client=client)

    def _register_node(self, node: int, answer: Envelope) -> None:
        """Register a node for the client that the answer names, or refuse the node."""
        client = str(answer.head.get("client", ""))
        why = ""
        if answer.head.get("ask") != "here":
            why = refusal_reason(answer) if "why" in answer.head else "its answer names no client"
        why = why or version_mismatch(answer.head)
        if not why and client not in self.clients:
            why = "the configuration has no such client"
        why = why or self._key_mismatch(node, client)
        reported: object = None
        try:
            reported = decode_body(answer) if not why else None
        except RequestRefusedError as error:
            why = str(error)
        self._client_of[node] = "" if why else client
        if why:
            if self.refusals.get((node, client)) != why:
                self.refusals[node, client] = why
                known = client if client in self.clients else None
                self.log(f"refused a node for client {client[:80]!r}: {why}", client=known)
            if not client or (client in self.node_of and not self._are_keys_known):
                # The node's worker did not start, or the node restarted while its old connection is
                # still listed. Both may be temporary.
                self._greet_again[node] = time.monotonic() + GREETING_RETRY_SECONDS
            else:
                self.transport.push(node, message("leave", why=why), 10.0)
            return
        event = "reconnected" if client in self.reports else "connected"
        self._keys.setdefault(client, self._key_of.get(node, b""))
        self.node_of[client] = node
        self.reports[client] = reported
        self.log_heads.update(client, answer)
        self.log(f"{client} {event}", client=client)

    def _key_mismatch(self, node: int, client: str) -> str:
        """Return why a node's key is not the key of a client, or an empty string if it is."""
        key = self._key_of.get(node, b"")
        if self._are_keys_known and client not in self._keys:
            return f"no key is known for client '{client}'"
        if key.strip() != self._keys.get(client, key).strip():
            return f"its key is not the key of client '{client}'"
        return ""

    def pull_answers(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Return the answers to messages, and register nodes that answered a greeting.

        Args:
            numbers: Numbers of the messages with a pending answer.
            wait: Seconds to wait for the first answer.

        Returns:
            The answers, keyed by message number. An answer is None if it will never arrive.
        """
        answers = self.transport.pull([*numbers, *self._greetings], wait)
        for number in [n for n in answers if n in self._greetings]:
            answer = answers.pop(number)
            node, _ = self._greetings.pop(number)
            if answer is not None:
                self._register_node(node, answer)
        return answers
