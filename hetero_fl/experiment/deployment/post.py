"""The server's post: which node stands for which client, and what is sent to whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping

from hetero_fl.experiment.deployment.messages import Refused, body_of, differing, message, reason
from hetero_fl.experiment.deployment.talks import LOOK, SETTLE, Talk, Talks
from hetero_fl.experiment.deployment.transport import Envelope, Transport
from hetero_fl.runtime.executor import Absent

FAREWELL = 5.0  # seconds, at most, for telling nodes that a run is over
PATIENCE = 60.0  # seconds that a node which has gone is waited for, as long as others are there
GREETING = 60.0  # seconds that a node may take to say who it is, before it is asked again
SKEW = 10.0  # seconds by which clocks may differ: a greeting that is waited for has not expired at a node that was busy
NUDGE = 30.0  # seconds of silence after which a node is asked whether it is there; then twice as many, and so on


class Post:
    """The server's side of all conversations (see `talks.py`).

    Args:
        clients: those who are expected; a node that says it is somebody else is refused.
        say: told, in one line, of whoever comes, goes or is refused.
    """

    def __init__(
        self,
        transport: Transport,
        clients: Collection[str],
        say: Callable[[str], None],
        patience: float = PATIENCE,
        nudge: float = NUDGE,
    ) -> None:
        self.transport, self.clients, self.say = transport, frozenset(clients), say
        self.patience, self.nudge = patience, nudge
        self.node_of: dict[str, int] = {}
        self.here: dict[str, object] = {}  # what each said when it came
        self._began, self._gone = time.monotonic(), dict[str, float]()  # when somebody went
        self._met: dict[int, str] = {}  # node -> client; "" if it was refused
        self._greetings: dict[str, tuple[int, float]] = {}  # message -> node, and when it was sent

    def gather(self, seconds: float) -> list[str]:
        """Wait until everybody is here, or so long. Returns who is missing."""
        end = time.monotonic() + seconds
        while missing := sorted(self.clients - self.node_of.keys()):
            self.look()
            left = end - time.monotonic()
            if left <= 0:
                return missing
            self.pull((), min(LOOK, left))
            if not self._greetings:
                time.sleep(min(LOOK / 5, left))
        return []

    def refresh(self) -> None:
        """See who has come and who has gone."""
        self.look()
        self.pull((), 0.0)

    def converse(
        self, talks: Mapping[str, Callable[[], Talk]], seconds: float, need: int = 0
    ) -> Iterator[tuple[str, Envelope | Absent]]:
        """Hold a conversation with each of these clients; its last answer, as it comes, or why there is none."""
        held = Talks(self, min(need, len(talks)))
        for client, make in talks.items():
            held.add(client, make, seconds)
        while (ended := held.next()) is not None:
            yield ended
            del ended  # a model's worth

    def close(self, over: bool) -> None:
        """Let everybody go; told of it are they if the run is over: of one that was interrupted they wait for the rest."""
        if over:
            told = {self.transport.push(node, message("leave"), FAREWELL) for node in self.node_of.values()}
            end = time.monotonic() + FAREWELL
            while told and (left := end - time.monotonic()) > 0:
                told -= self.transport.pull(told, left).keys()
        self.transport.close()

    # Who is there ----------------------------------------------------------------------------------------------------
    @property
    def greeting(self) -> bool:
        """Whether somebody has just come of whom it is not known yet who it is."""
        return any(time.monotonic() - sent < SETTLE for _, sent in self._greetings.values())

    def away(self, client: str) -> float:
        """Seconds for which a client has been gone; nought if it is here."""
        return 0.0 if client in self.node_of else time.monotonic() - self._gone.get(client, self._began)

    def look(self) -> None:
        """Greet who is new."""
        there = self.transport.nodes()
        for node in [n for n in self._met if n not in there]:
            self.forget(node)
        now = time.monotonic()
        self._greetings = {
            m: (n, sent) for m, (n, sent) in self._greetings.items() if n in there and now - sent < GREETING
        }
        greeted = {node for node, _ in self._greetings.values()}
        for node in there:
            if node not in self._met and node not in greeted:
                self._greetings[self.transport.push(node, message("hello"), GREETING + SKEW)] = node, now

    def forget(self, node: int) -> None:
        """A node has gone, or has lost what it was given; if it is there it is greeted anew."""
        client = self._met.pop(node, "")
        if client and self.node_of.get(client) == node:
            del self.node_of[client]
            self._gone[client] = time.monotonic()
            self.say(f"{client} has gone")

    def _meet(self, node: int, answer: Envelope) -> None:
        """A node has said who it is."""
        client, why = str(answer.head.get("client", "")), ""
        if answer.head.get("ask") != "here":
            why = reason(answer) if "why" in answer.head else "it does not say who it is"
        why = why or differing(answer.head)
        if not why and client not in self.clients:
            why = "the configuration has no such client"
        said: object = None
        try:
            said = body_of(answer) if not why else None
        except Refused as error:
            why = str(error)
        self._met[node] = "" if why else client
        if why:
            self.say(f"refused a node that says it is {client[:80]!r}: {why}")
            self.transport.push(node, message("leave", why=why), 10.0)
            return
        again = " again" if client in self.here else ""
        self.node_of[client], self.here[client] = node, said
        self.say(f"{client} is here{again}")

    # Messages --------------------------------------------------------------------------------------------------------
    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Answers to messages on their way; who answered a greeting is met."""
        came = self.transport.pull([*numbers, *self._greetings], wait)
        for number in [n for n in came if n in self._greetings]:
            (node, _), answer = self._greetings.pop(number), came.pop(number)
            if answer is not None:
                self._meet(node, answer)
        return came
