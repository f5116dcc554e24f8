"""Exchange messages with many nodes at once, one conversation for each node.

A conversation is a generator that yields a message for a node and receives the answer. If the node
is lost meanwhile, the conversation starts again once the node is back; the node then answers tasks
that it has completed from its store.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass

from hetero_fl.deployment.messages import (
    LOG,
    RequestRefusedError,
    body_of,
    message,
    reason,
    version_mismatch,
)
from hetero_fl.deployment.transport import Envelope, Transport
from hetero_fl.federation.executors.base import ClientAbsentError, ClientLateError

LOOK = 0.5  # seconds between two checks of the connected nodes
TRIES = 8  # attempts at a conversation before its node counts as absent

Conversation = Generator[Envelope, Envelope, Envelope]
End = tuple[str, Envelope | ClientAbsentError]


@dataclass
class PendingConversation:
    """A conversation that has to end within `seconds`, at `end` of the monotonic clock."""

    make: Callable[[], Conversation]
    end: float
    seconds: float
    attempts: int = 0


@dataclass
class MessageInFlight:
    """A message of a conversation that awaits its answer."""

    client: str
    conversation: Conversation
    node: int
    number: str


class Conversations:
    """Concurrent conversations with clients; more can be added at any time.

    Args:
        connections: Connections to the nodes.
        required: Number of clients without which the caller cannot proceed. While fewer are
            connected or have answered, lost nodes are awaited until their conversation expires;
            otherwise for the patience of the connections only.
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

    def add(self, client: str, make: Callable[[], Conversation], seconds: float) -> None:
        """Add a conversation. A client has at most one at a time.

        Args:
            client: The client.
            make: Makes the conversation, once for each attempt.
            seconds: Time limit.
        """
        self._pending[client] = PendingConversation(make, time.monotonic() + seconds, seconds)
        self._waiting[client] = None

    def next_finished(self, wait: float = float("inf")) -> End | None:
        """Wait for the next conversation to end.

        Args:
            wait: Seconds to wait.

        Returns:
            The client, and the last answer or the reason why there is none. None if no conversation
            ends in time or none is left.
        """
        until = time.monotonic() + wait
        while not self._finished and self._pending:
            left = until - time.monotonic()
            if left <= 0:
                return None
            self._advance(min(LOOK, left))
        return self._finished.popleft() if self._finished else None

    def _advance(self, wait: float) -> None:
        now = time.monotonic()
        if now - self._last_check > LOOK:
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
        soonest = min((pending.end for pending in self._pending.values()), default=now + wait)
        wait = max(0.0, min(wait, soonest - now))
        answers = self.connections.pull_answers(numbers, wait)
        for number, answer in answers.items():
            self._handle_answer(number, answer)
        if not answers and not numbers and not self.connections.has_pending_greeting:
            time.sleep(min(LOOK / 5, wait))
        self._abandon_expired()

    def _start(self, client: str) -> None:
        del self._waiting[client]
        pending = self._pending[client]
        pending.attempts += 1
        if pending.attempts > TRIES:
            self._finish(client, ClientAbsentError(f"its node disconnected {TRIES} times"))
            return
        try:
            conversation = pending.make()
            self._send(client, conversation, self.connections.node_of[client], next(conversation))
        except RequestRefusedError as error:
            self._finish(client, ClientAbsentError(str(error)))

    def _send(self, client: str, conversation: Conversation, node: int, envelope: Envelope) -> None:
        within = max(1.0, self._pending[client].end - time.monotonic())
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
        self.connections.log_heads.note(flight.client, answer)
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
        """Finish conversations that took too long, and those whose node has been gone too long."""
        now = time.monotonic()
        present = self._answered | (self._pending.keys() & self.connections.node_of.keys())
        is_patient = len(present) < self.required or self.connections.has_pending_greeting
        for client, pending in list(self._pending.items()):
            if pending.end <= now:
                if client in self._in_flight:
                    reason = ClientLateError(f"no answer within {pending.seconds:g} s")
                    self._finish(client, reason)
                else:
                    self._finish(client, ClientAbsentError("its node is not connected"))
            elif (
                client in self._waiting
                and not is_patient
                and self.connections.seconds_away(client) > self.connections.patience
            ):
                self._finish(client, ClientAbsentError("its node is not connected"))

    def _finish(self, client: str, result: Envelope | ClientAbsentError) -> None:
        self._waiting.pop(client, None)
        self._in_flight.pop(client, None)
        del self._pending[client]
        if not isinstance(result, ClientAbsentError):
            self._answered.add(client)
        self._finished.append((client, result))


# Seconds to wait for a node that disconnected while others are connected.
PATIENCE = 60.0
# Seconds, at most, to notify nodes of the end of a run.
FAREWELL = 15.0
# Seconds that a node may take to answer a greeting before it is greeted again.
GREETING = 60.0
# Seconds until a node that named no client is greeted again.
GREET_AGAIN = 10.0
# Seconds by which the clocks of two machines may differ.
SKEW = 10.0
# Head of an audit log: number of lines, and hash of the last one.
HEAD = re.compile(r"(\d{1,12}):[0-9a-f]{64}")


class LogHeads:
    """The heads of the sites' audit logs, which every answer carries.

    A log that a site truncated or rewrote does not verify against the head kept here.

    Args:
        say: Called with a line on each head that contradicts an earlier one.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.longest: dict[str, str] = {}  # client -> the head with the most lines
        self._last: dict[str, str] = {}

    def note(self, client: str, answer: Envelope) -> None:
        """Keep the head in a client's answer if it has more lines than any earlier one."""
        head = str(answer.head.get(LOG, ""))
        if HEAD.fullmatch(head) is None:
            return
        kept = self.longest.setdefault(client, head)
        last = self._last.get(client, head)
        self._last[client] = head
        if _lines(head) < _lines(last):
            self.say(
                f"the audit log of '{client}' has {_lines(head)} lines; "
                f"it had {_lines(last)} (kept: {kept})"
            )
        elif any(_lines(head) == _lines(before) and head != before for before in (last, kept)):
            self.say(
                f"line {_lines(head)} of the audit log of '{client}' was replaced: "
                f"found {head} (kept: {kept})"
            )
        if _lines(head) > _lines(kept):
            self.longest[client] = head


def _lines(head: str) -> int:
    """Return the number of lines of an audit log, from its head."""
    return int(head.partition(":")[0])


class Connections:
    """Connections of the server to the nodes of its clients.

    Args:
        transport: Carries the messages.
        clients: The expected clients; nodes of others are refused.
        say: Called with a line on each node that connects, disconnects or is refused.
        patience: Seconds to wait for a node that disconnected while others are connected.
        keys: Public key of each client's node in PEM. None: a client belongs to the node that
            first claims it, until that node disconnects.

    Attributes:
        node_of: By connected client, its node.
        connected_clients: By client that has ever connected, what its node reported.
        refusals: By node and the client that it claimed to be, why it was refused.
        log_heads: The heads of the sites' audit logs.
    """

    def __init__(
        self,
        transport: Transport,
        clients: Collection[str],
        say: Callable[[str], None],
        patience: float = PATIENCE,
        keys: Mapping[str, bytes] | None = None,
    ) -> None:
        self.transport = transport
        self.clients = frozenset(clients)
        self.say = say
        self.patience = patience
        self.log_heads = LogHeads(say)
        self._keys: dict[str, bytes] = dict(keys or {})
        self._are_keys_known = keys is not None
        self._key_of: Mapping[int, bytes] = {}  # of connected nodes
        self.node_of: dict[str, int] = {}
        self.connected_clients: dict[str, object] = {}
        self.refusals: dict[tuple[int, str], str] = {}
        self._created = time.monotonic()
        # By client: when it disconnected.
        self._disconnected: dict[str, float] = {}
        # By greeted node: its client, or "" if it was refused.
        self._client_of: dict[int, str] = {}
        # By node: when to greet it again.
        self._greet_again: dict[int, float] = {}
        # By message: the greeted node, and when the message was sent.
        self._greetings: dict[str, tuple[int, float]] = {}

    def wait_for_clients(self, seconds: float) -> list[str]:
        """Wait for the nodes of all clients, up to `seconds`. Return the missing clients."""
        end = time.monotonic() + seconds
        while missing := sorted(self.clients - self.node_of.keys()):
            self.greet_new_nodes()
            left = end - time.monotonic()
            if left <= 0:
                return missing
            self.pull_answers((), min(LOOK, left))
            if not self._greetings:
                time.sleep(min(LOOK / 5, left))
        return []

    def refresh(self) -> None:
        """Update which nodes are connected."""
        self.greet_new_nodes()
        self.pull_answers((), 0.0)

    def converse(
        self,
        conversations: Mapping[str, Callable[[], Conversation]],
        seconds: float,
        required: int = 0,
    ) -> Iterator[tuple[str, Envelope | ClientAbsentError]]:
        """Hold a conversation with each of these clients.

        Args:
            conversations: By client, what makes the conversation.
            seconds: Time limit of each conversation.
            required: See `Conversations`.

        Yields:
            Each client as its conversation ends, and the last answer or why there is none.
        """
        running = Conversations(self, min(required, len(conversations)))
        for client, make in conversations.items():
            running.add(client, make, seconds)
        while (finished := running.next_finished()) is not None:
            yield finished
            # It may hold a model; free it before the next one arrives.
            del finished

    def close(self, over: bool) -> None:
        """Disconnect from all nodes.

        Args:
            over: Whether the run is complete. Nodes of an interrupted run are not notified: they
                wait for it to resume.
        """
        if over:
            messages = {
                self.transport.push(node, message("leave"), FAREWELL)
                for node in self.node_of.values()
            }
            end = time.monotonic() + FAREWELL
            while messages and (left := end - time.monotonic()) > 0:
                messages -= self.transport.pull(messages, left).keys()
        self.transport.close()

    @property
    def has_pending_greeting(self) -> bool:
        """Whether a node has connected that has not named its client yet."""
        return any(time.monotonic() - sent < GREETING for _, sent in self._greetings.values())

    def seconds_away(self, client: str) -> float:
        """Return for how many seconds a client has been disconnected; 0 if it is connected."""
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
            if n in connected and now - sent < GREETING
        }
        greeted = {node for node, _ in self._greetings.values()}
        for node in connected:
            if node not in self._client_of and node not in greeted:
                number = self.transport.push(node, message("hello"), GREETING + SKEW)
                self._greetings[number] = (node, now)

    def forget_node(self, node: int) -> None:
        """Forget a node that disconnected or lost a message; greet it again if it is connected."""
        client = self._client_of.pop(node, "")
        self._greet_again.pop(node, None)
        if client and self.node_of.get(client) == node:
            del self.node_of[client]
            self._disconnected[client] = time.monotonic()
            if not self._are_keys_known:
                # Without TLS, Flower draws a new key for a node that reconnects.
                del self._keys[client]
            self.say(f"{client} disconnected")

    def _register_node(self, node: int, answer: Envelope) -> None:
        """Register a node under the client that it names, or refuse it."""
        client = str(answer.head.get("client", ""))
        why = ""
        if answer.head.get("ask") != "here":
            why = reason(answer) if "why" in answer.head else "it names no client"
        why = why or version_mismatch(answer.head)
        if not why and client not in self.clients:
            why = "the configuration has no such client"
        why = why or self._key_mismatch(node, client)
        reported: object = None
        try:
            reported = body_of(answer) if not why else None
        except RequestRefusedError as error:
            why = str(error)
        self._client_of[node] = "" if why else client
        if why:
            if self.refusals.get((node, client)) != why:
                self.refusals[node, client] = why
                self.say(f"refused a node for client {client[:80]!r}: {why}")
            if not client or (client in self.node_of and not self._are_keys_known):
                # Its worker did not start, or it restarted while its old connection is still
                # listed; either may change.
                self._greet_again[node] = time.monotonic() + GREET_AGAIN
            else:
                self.transport.push(node, message("leave", why=why), 10.0)
            return
        event = "reconnected" if client in self.connected_clients else "connected"
        self._keys.setdefault(client, self._key_of.get(node, b""))
        self.node_of[client] = node
        self.connected_clients[client] = reported
        self.log_heads.note(client, answer)
        self.say(f"{client} {event}")

    def _key_mismatch(self, node: int, client: str) -> str:
        """Return why a node's key is not that of a client, or an empty string."""
        key = self._key_of.get(node, b"")
        if self._are_keys_known and client not in self._keys:
            return f"no key is known for client '{client}'"
        if key.strip() != self._keys.get(client, key).strip():
            return f"its key is not the key of client '{client}'"
        return ""

    def pull_answers(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Return answers to messages, and register the nodes that answered a greeting.

        Args:
            numbers: The awaited messages.
            wait: Seconds to wait for the first answer.

        Returns:
            By message, its answer; None for an answer that will never come.
        """
        answers = self.transport.pull([*numbers, *self._greetings], wait)
        for number in [n for n in answers if n in self._greetings]:
            answer = answers.pop(number)
            (node, _) = self._greetings.pop(number)
            if answer is not None:
                self._register_node(node, answer)
        return answers
