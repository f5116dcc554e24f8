"""Conversations of the server with many nodes."""

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

# A conversation is a coroutine that yields what to send and is sent the answer. If its node is lost
# in the middle of it, it begins again once the node is back: a node answers a task that it has
# completed from its store.

LOOK = 0.5  # seconds between two looks at the connected nodes
TRIES = 8  # times that a conversation begins before its node is given up

Conversation = Generator[Envelope, Envelope, Envelope]
End = tuple[str, Envelope | ClientAbsentError]


@dataclass
class PendingConversation:
    """A conversation that is to be held until `end`, seconds of the monotonic clock."""

    make: Callable[[], Conversation]
    end: float
    seconds: float
    attempts: int = 0


@dataclass
class MessageInFlight:
    """A message of a conversation that has not been answered yet."""

    client: str
    conversation: Conversation
    node: int
    number: str


class Conversations:
    """Conversations that go on; more may come while others do.

    Args:
        required: whoever is gone is waited for to the end of its time as long as fewer clients than these are here or have
            answered; else only for as long as the connections are patient.
    """

    def __init__(self, connections: Connections, required: int = 0) -> None:
        self.connections = connections
        self.need = required
        self._errands: dict[str, PendingConversation] = {}
        self._waiting: dict[str, None] = {}  # for their nodes
        self._flying: dict[str, MessageInFlight] = {}
        self._ended: deque[End] = deque()
        self._answered: set[str] = set()
        self._looked = 0.0

    def __len__(self) -> int:
        return len(self._errands) + len(self._ended)

    def add(self, client: str, make: Callable[[], Conversation], seconds: float) -> None:
        """One more, which may take so many seconds; a client has at most one at a time."""
        self._errands[client] = PendingConversation(make, time.monotonic() + seconds, seconds)
        self._waiting[client] = None

    def next_finished(self, wait: float = float("inf")) -> End | None:
        """The next to end: its last answer, or why there is none. None if none does in so many seconds, or all have."""
        until = time.monotonic() + wait
        while not self._ended and self._errands:
            left = until - time.monotonic()
            if left <= 0:
                return None
            self._advance(min(LOOK, left))
        return self._ended.popleft() if self._ended else None

    # What happens next -------------------------------------------------------------------------------------------------
    def _advance(self, wait: float) -> None:
        now = time.monotonic()
        if now - self._looked > LOOK:
            self.connections.greet_new_nodes()
            for flight in [
                f for f in self._flying.values() if self.connections.node_of.get(f.client) != f.node
            ]:
                self._restart(flight)
            self._looked = now
        for client in [c for c in self._waiting if c in self.connections.node_of]:
            self._begin(client)
        numbers = {flight.number for flight in self._flying.values()}
        soonest = min((errand.end for errand in self._errands.values()), default=now + wait)
        wait = max(0.0, min(wait, soonest - now))
        came = self.connections.pull_answers(numbers, wait)
        for number, answer in came.items():
            self._take(number, answer)
        if not came and not numbers and not self.connections.has_pending_greeting:
            time.sleep(min(LOOK / 5, wait))
        self._abandon_expired()

    def _begin(self, client: str) -> None:
        del self._waiting[client]
        errand = self._errands[client]
        errand.attempts += 1
        if errand.attempts > TRIES:
            return self._end(client, ClientAbsentError(f"its node went away {TRIES} times"))
        try:
            conversation = errand.make()
            self._send(client, conversation, self.connections.node_of[client], next(conversation))
        except RequestRefusedError as error:
            self._end(client, ClientAbsentError(str(error)))

    def _send(self, client: str, conversation: Conversation, node: int, envelope: Envelope) -> None:
        within = max(1.0, self._errands[client].end - time.monotonic())
        number = self.connections.transport.push(node, envelope, within)
        self._flying[client] = MessageInFlight(client, conversation, node, number)

    def _take(self, number: str, answer: Envelope | None) -> None:
        flight = next((f for f in self._flying.values() if f.number == number), None)
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
            self._end(flight.client, stop.value)
        except RequestRefusedError as error:
            self._end(flight.client, ClientAbsentError(str(error)))
        else:
            self._send(flight.client, flight.conversation, flight.node, envelope)

    # How it ends -------------------------------------------------------------------------------------------------------
    def _restart(self, flight: MessageInFlight) -> None:
        del self._flying[flight.client]
        self._waiting[flight.client] = None

    def _abandon_expired(self) -> None:
        """On those whose time is over, and on those who are gone for longer than the connections are patient."""
        now = time.monotonic()
        here = self._answered | (self._errands.keys() & self.connections.node_of.keys())
        patient = len(here) < self.need or self.connections.has_pending_greeting
        for client, errand in list(self._errands.items()):
            if errand.end <= now:
                late = client in self._flying
                why = f"no answer within {errand.seconds:g} s" if late else "its node is not there"
                self._end(client, (ClientLateError if late else ClientAbsentError)(why))
            elif (
                client in self._waiting
                and not patient
                and self.connections.seconds_away(client) > self.connections.patience
            ):
                self._end(client, ClientAbsentError("its node is not there"))

    def _end(self, client: str, what: Envelope | ClientAbsentError) -> None:
        self._waiting.pop(client, None)
        self._flying.pop(client, None)
        del self._errands[client]
        if not isinstance(what, ClientAbsentError):
            self._answered.add(client)
        self._ended.append((client, what))


PATIENCE = 60.0  # seconds to wait for a node that has gone while others are connected
FAREWELL = 15.0  # seconds, at most, for telling nodes that a run is over
GREETING = 60.0  # seconds that a node may take to introduce itself before it is asked again
GREET_AGAIN = 10.0  # seconds until a node that names no client is asked again
SKEW = 10.0  # seconds by which the clocks of two machines may differ
HEAD = re.compile(r"(\d{1,12}):[0-9a-f]{64}")  # of an audit log


class LogHeads:
    """The heads of the sites' audit logs, as the answers carry them.

    A log that a site has cut off or rewritten does not verify against the head kept here.

    Args:
        say: Called with a line on each head that contradicts an earlier one.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.longest: dict[str, str] = {}  # client -> the head with the most lines
        self._last: dict[str, str] = {}

    def note(self, client: str, answer: Envelope) -> None:
        """Keep the head that a client's answer carries, if it has more lines than any before."""
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
    """The server's side of all conversations (see `conversations.py`).

    Args:
        transport: Carries the messages.
        clients: The expected clients; nodes of others are refused.
        say: Called with a line on each node that connects, disconnects or is refused.
        patience: Seconds to wait for a node that has gone while others are connected.
        keys: Public key of each client's node in PEM. None: a client belongs to the node that
            first claims it, until that node disconnects.
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
        self.connected_clients: dict[str, object] = {}  # what each said when it came
        self._began = time.monotonic()
        self._gone = dict[str, float]()  # when somebody went
        self._met: dict[int, str] = {}  # node -> client; "" if it was refused
        self._greet_again: dict[int, float] = {}  # node -> when
        self._refusals: set[tuple[int, str]] = set()  # that were reported
        self._greetings: dict[str, tuple[int, float]] = {}  # message -> node, and when it was sent

    def wait_for_clients(self, seconds: float) -> list[str]:
        """Wait until everybody is here, or so long. Returns who is missing."""
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
        """See who has come and who has gone."""
        self.greet_new_nodes()
        self.pull_answers((), 0.0)

    def converse(
        self,
        conversations: Mapping[str, Callable[[], Conversation]],
        seconds: float,
        required: int = 0,
    ) -> Iterator[tuple[str, Envelope | ClientAbsentError]]:
        """Hold a conversation with each of these clients; its last answer, as it comes, or why there is none."""
        held = Conversations(self, min(required, len(conversations)))
        for client, make in conversations.items():
            held.add(client, make, seconds)
        while (ended := held.next_finished()) is not None:
            yield ended
            del ended  # a model's worth

    def close(self, over: bool) -> None:
        """Let everybody go; told of it are they if the run is over: of one that was interrupted they wait for the rest."""
        if over:
            told = {
                self.transport.push(node, message("leave"), FAREWELL)
                for node in self.node_of.values()
            }
            end = time.monotonic() + FAREWELL
            while told and (left := end - time.monotonic()) > 0:
                told -= self.transport.pull(told, left).keys()
        self.transport.close()

    # Who is there ----------------------------------------------------------------------------------------------------
    @property
    def has_pending_greeting(self) -> bool:
        """Whether somebody has just come of whom it is not known yet who it is."""
        return any(time.monotonic() - sent < GREETING for _, sent in self._greetings.values())

    def seconds_away(self, client: str) -> float:
        """Seconds for which a client has been gone; nought if it is here."""
        return (
            0.0
            if client in self.node_of
            else time.monotonic() - self._gone.get(client, self._began)
        )

    def greet_new_nodes(self) -> None:
        """Greet who is new."""
        there = self.transport.nodes()
        self._key_of = there
        for node in [n for n in self._met if n not in there]:
            self.forget_node(node)
        now = time.monotonic()
        for node in [n for n, when in self._greet_again.items() if when < now]:
            self.forget_node(node)
        self._greetings = {
            m: (n, sent)
            for m, (n, sent) in self._greetings.items()
            if n in there and now - sent < GREETING
        }
        greeted = {node for node, _ in self._greetings.values()}
        for node in there:
            if node not in self._met and node not in greeted:
                self._greetings[self.transport.push(node, message("hello"), GREETING + SKEW)] = (
                    node,
                    now,
                )

    def forget_node(self, node: int) -> None:
        """A node has gone, or has lost what it was given; if it is there it is greeted anew."""
        client = self._met.pop(node, "")
        self._greet_again.pop(node, None)
        if client and self.node_of.get(client) == node:
            del self.node_of[client]
            self._gone[client] = time.monotonic()
            if not self._are_keys_known:
                # The node may come back with another key, which Flower draws without TLS.
                del self._keys[client]
            self.say(f"{client} has gone")

    def _register_node(self, node: int, answer: Envelope) -> None:
        """A node has said who it is."""
        client = str(answer.head.get("client", ""))
        why = ""
        if answer.head.get("ask") != "here":
            why = reason(answer) if "why" in answer.head else "it does not say who it is"
        why = why or version_mismatch(answer.head)
        if not why and client not in self.clients:
            why = "the configuration has no such client"
        why = why or self._key_mismatch(node, client)
        said: object = None
        try:
            said = body_of(answer) if not why else None
        except RequestRefusedError as error:
            why = str(error)
        self._met[node] = "" if why else client
        if why:
            if (node, why) not in self._refusals:
                self._refusals.add((node, why))
                self.say(f"refused a node that says it is {client[:80]!r}: {why}")
            if not client or (client in self.node_of and not self._are_keys_known):
                # Its worker did not start, or it has restarted and its earlier self is still
                # listed as connected: either may change.
                self._greet_again[node] = time.monotonic() + GREET_AGAIN
            else:
                self.transport.push(node, message("leave", why=why), 10.0)
            return
        again = " again" if client in self.connected_clients else ""
        self._keys.setdefault(client, self._key_of.get(node, b""))
        self.node_of[client] = node
        self.connected_clients[client] = said
        self.log_heads.note(client, answer)
        self.say(f"{client} is here{again}")

    def _key_mismatch(self, node: int, client: str) -> str:
        """Return why a node's key is not that of a client, or an empty string."""
        key = self._key_of.get(node, b"")
        if self._are_keys_known and client not in self._keys:
            return f"no key is known of '{client}'"
        if key.strip() != self._keys.get(client, key).strip():
            return f"its key is not that of '{client}'"
        return ""

    # Messages --------------------------------------------------------------------------------------------------------
    def pull_answers(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Answers to messages on their way; who answered a greeting is met."""
        came = self.transport.pull([*numbers, *self._greetings], wait)
        for number in [n for n in came if n in self._greetings]:
            answer = came.pop(number)
            (node, _) = self._greetings.pop(number)
            if answer is not None:
                self._register_node(node, answer)
        return came
