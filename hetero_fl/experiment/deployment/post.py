"""Conversations of the server with many nodes side by side: who stands for which client, who is gone, who came back.

A conversation is a coroutine that yields what to send and is sent the answer. Whoever is lost in the midst of one begins it
anew when it is back: a node answers a task that it has done from what it kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass

from hetero_fl.experiment.deployment.messages import Refused, body_of, differing, message
from hetero_fl.experiment.deployment.transport import Envelope, Transport
from hetero_fl.runtime.plans import Diverged

LOOK = 0.5  # seconds between two looks at who is there

Talk = Generator[Envelope, Envelope, Envelope]


class Absent(Diverged):
    """A client that gave no answer: its node is not there, too slow, or refuses."""


@dataclass
class Flight:
    """A message on its way."""

    client: str
    talk: Talk
    node: int


class Post:
    """The server's side of all conversations.

    Args:
        clients: those who are expected; a node that says it is somebody else is refused.
        say: told, in one line, of whoever comes, goes or is refused.
    """

    def __init__(self, transport: Transport, clients: Collection[str], say: Callable[[str], None]) -> None:
        self.transport, self.clients, self.say = transport, frozenset(clients), say
        self.node_of: dict[str, int] = {}
        self.here: dict[str, dict[str, object]] = {}  # what each said when it came
        self._met: dict[int, str] = {}  # node -> client; "" if it was refused
        self._greetings: dict[str, int] = {}

    def gather(self, seconds: float) -> list[str]:
        """Wait until everybody is here, or so long. Returns who is missing."""
        end = time.monotonic() + seconds
        while missing := sorted(self.clients - self.node_of.keys()):
            self._look()
            left = end - time.monotonic()
            if left <= 0:
                return missing
            self._pull({}, min(LOOK, left))
            if not self._greetings:
                time.sleep(min(LOOK / 5, left))
        return []

    def converse(
        self, talks: Mapping[str, Callable[[], Talk]], seconds: float
    ) -> Iterator[tuple[str, Envelope | Absent]]:
        """Hold a conversation with each of these clients; its last answer, as it comes, or why there is none."""
        end = time.monotonic() + seconds
        waiting, flying = dict(talks), dict[str, Flight]()
        looked = 0.0
        while waiting or flying:
            if time.monotonic() - looked > LOOK:
                waiting |= {c: talks[c] for c in self._lost(flying)}
                looked = time.monotonic()
            for client in [c for c in waiting if c in self.node_of]:
                talk = waiting.pop(client)()
                self._push(Flight(client, talk, self.node_of[client]), next(talk), end, flying)
            left = end - time.monotonic()
            if left <= 0:
                for client in [*waiting, *(flight.client for flight in flying.values())]:
                    why = "no answer" if client not in waiting else "its node is not there"
                    yield client, Absent(f"{why} within {seconds:g} s")
                return
            if not flying and not self._greetings:
                time.sleep(min(LOOK / 5, left))
            for number, answer in self._pull(flying, min(LOOK, left)).items():
                flight = flying.pop(number)
                if answer is None:
                    waiting[flight.client] = talks[flight.client]
                    self._forget(flight.node)
                    continue
                try:
                    self._push(flight, flight.talk.send(answer), end, flying)
                except StopIteration as stop:
                    yield flight.client, stop.value
                except Refused as error:
                    yield flight.client, Absent(str(error))

    def close(self) -> None:
        """Tell everybody that it is over, and let them go."""
        for node in self.node_of.values():
            self.transport.push(node, message("leave"), 10.0)
        self.transport.close()

    # Who is there ----------------------------------------------------------------------------------------------------
    def _look(self) -> None:
        """Greet who is new."""
        there = self.transport.nodes()
        for node in [n for n in self._met if n not in there]:
            self._forget(node)
        for node in there:
            if node not in self._met and node not in self._greetings.values():
                self._greetings[self.transport.push(node, message("hello"), 60.0)] = node

    def _lost(self, flying: dict[str, Flight]) -> list[str]:
        """Clients whose node went with a message on its way to it."""
        self._look()
        gone = [number for number, flight in flying.items() if self.node_of.get(flight.client) != flight.node]
        return [flying.pop(number).client for number in gone]

    def _forget(self, node: int) -> None:
        client = self._met.pop(node, "")
        if client and self.node_of.get(client) == node:
            del self.node_of[client]
            self.say(f"{client} has gone")

    def _meet(self, node: int, answer: Envelope) -> None:
        """A node has said who it is."""
        client, why = str(answer.head.get("client", "")), ""
        if answer.head.get("ask") != "here":
            why = str(answer.head.get("why", "it does not say who it is"))
        why = why or differing(answer.head)
        if not why and client not in self.clients:
            why = "the configuration has no such client"
        said: dict[str, object] = {}
        try:
            said = body_of(answer) if not why else {}
        except Refused as error:
            why = str(error)
        self._met[node] = "" if why else client
        if why:
            self.say(f"refused a node that says it is '{client}': {why}")
            self.transport.push(node, message("leave", why=why), 10.0)
            return
        self.say(f"{client} is here" + (" again" if client in self.here else ""))
        self.node_of[client], self.here[client] = node, said

    # Messages --------------------------------------------------------------------------------------------------------
    def _push(self, flight: Flight, envelope: Envelope, end: float, flying: dict[str, Flight]) -> None:
        within = max(1.0, end - time.monotonic())
        flying[self.transport.push(flight.node, envelope, within)] = flight

    def _pull(self, flying: Mapping[str, Flight], wait: float) -> dict[str, Envelope | None]:
        """Answers to messages on their way; who answered a greeting is met."""
        came = self.transport.pull([*flying, *self._greetings], wait)
        for number in [n for n in came if n in self._greetings]:
            node, answer = self._greetings.pop(number), came.pop(number)
            if answer is not None:
                self._meet(node, answer)
        return came
