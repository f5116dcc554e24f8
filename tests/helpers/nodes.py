"""What tests of federations have in common: nodes within this process, and what befalls them at a message that a test names."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.deployment.config import DisclosureConfig, SiteConfig
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.node_storage import NodeStorage
from hetero_fl.deployment.server import run_federation
from hetero_fl.deployment.transport import Envelope
from hetero_fl.reporting.run import Run
from tests.helpers.loopback import LoopbackTransport

ALL = DisclosureConfig(labels=True, details=True, model=True)
LONG = 300.0  # seconds: for what has to happen, however slow the machine is
Point = tuple[str, int, str]  # client, round, what it is asked


class Died(Exception):
    """A node's process has ended."""


LOST = Envelope({"ask": "lost on its way"})


class Killed(BaseException):
    """The server's process has ended."""


class Clock:
    """The server's: time that a test has pass passes at once, and no other deadline does, however slow the machine is."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.late: set[str] = set()  # clients on whom the server has given up

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def forward(self) -> None:
        """Past whatever the server waits for."""
        self.ahead += 2 * LONG

    def after(self, count: int, said: list[str]) -> Callable[[str], None]:
        """What a server may say its lines to, which are kept: when there are so many, nobody else comes in time."""

        def say(line: str) -> None:
            said.append(line)
            if len(said) == count:
                self.forward()

        return say


class Losing(LoopbackTransport):
    """Some answers never come; the transport says so. The server dies at its message of number `last`; a user of the transport
    after that is another process, once `last` has been set anew. `open`: the nodes that were sent something whose answer the
    server has not had."""

    last: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[str, int] = {}

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        if self.last is not None:
            self.last -= 1
            if self.last <= 0:
                raise Killed
        with self._changed:
            number = super().push(node, envelope, within)
            self.open[number] = node
        return number

    def close(self) -> None:
        if self.last is None or self.last > 0:
            super().close()

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        found = super().pull(numbers, wait)
        with self._changed:
            for number in found:
                self.open.pop(number, None)
        return {number: None if answer is LOST else answer for number, answer in found.items()}


class InOrder(Losing):
    """Answers come in the order in which messages were sent, whoever is quicker."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        self.sent.append(super().push(node, envelope, within))
        return self.sent[-1]

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        first = [n for n in self.sent if n in numbers][:1]
        found = super().pull(first, wait)
        self.sent = [n for n in self.sent if n not in found]
        return found


class Sites:
    """Nodes of some clients on a transport within this process; `folder` outlives them.

    `kills`: what befalls a node at a message. It dies `before` it looks at it, `during` (it has remembered what it must, and has
    not answered) or `after` (its answer is lost with it); the message is lost on its way (`unheard`), or its answer (`lost`);
    that takes `slow` seconds; it answers `last`, when the server has all the others' answers, or `late`, when its time is over,
    too; or it is `missing`: it dies, and that time passes. Once each. `away`: seconds until a node that died is back; None:
    never. `clock`: by which that time passes.
    """

    def __init__(
        self, clients: list[str], folder: Path, kills: Mapping[Point, str] | None = None, away: float | None = 0.0,
        slow: float = 3.0,
        transport: Losing | None = None, clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.transport, self.folder, self.clock = transport or Losing(), folder, clock or Clock()
        self.kills, self.away, self.slow = dict(kills or {}), away, slow
        self.asked: Counter[Point] = Counter()
        self.done: set[Point] = set()  # what has been answered, or never will be
        self.held: set[str] = set()  # who does not answer before the others
        self.passed: set[tuple[int, str]] = set()  # for what time has passed
        self._passing = threading.Lock()
        self.nodes: dict[str, int] = {}
        for client in clients:
            self.start(client)

    def start(self, client: str) -> None:
        """A node's process, from what its folder holds."""
        node = Node(SiteConfig(client=client, tells=ALL), self.folder / client)
        self.nodes[client] = self.transport.join(
            lambda envelope: self._handle(client, node, envelope)
        )

    def stop(self, client: str) -> None:
        """It is killed."""
        self.transport.leave(self.nodes.pop(client))

    def _handle(self, client: str, node: Node, envelope: Envelope) -> Envelope:
        head = envelope.head
        point = (client, int(str(head.get("round", -1))), str(head.get("what", head["ask"])))
        self.asked[point] += 1
        fate = self.kills.pop(point, None)
        if fate is None:
            answer = node.handle(envelope)
            self.done.add(point)
            return answer
        if fate == "unheard":
            return LOST
        if fate == "lost":
            node.handle(envelope)
            return LOST
        if fate == "slow":
            answer = node.handle(envelope)
            self.transport._working.release()  # the others go on
            time.sleep(self.slow)
            self.transport._working.acquire()
            return answer
        if fate in ("last", "late"):
            self.held.add(client)
            answer = node.handle(envelope)
            self.done.add(point)
            self.transport._working.release()
            self._after_the_others(point, fate == "late")
            self.held.discard(client)
            self.transport._working.acquire()
            return answer
        try:
            if fate == "missing":
                self.done.add(point)
                threading.Thread(
                    target=self._after_the_others, args=[point, True], daemon=True
                ).start()
            if fate in ("before", "missing"):
                raise Died
            if fate == "during":
                with unable_to_answer():
                    node.handle(envelope)
            node.handle(envelope)
            raise Died
        except Died:
            self.stop(client)
            if fate != "missing" and self.away is not None:
                threading.Timer(self.away, self.start, [client]).start()
            raise

    def _after_the_others(self, point: Point, over: bool) -> None:
        """Wait until the server has had all answers to this but those of who holds them back; `over`: and until it has given up
        on this client, since its time has passed."""
        client, *what = point
        clients = list(self.nodes)
        until(lambda: all((other, *what) in self.done for other in clients) and self._all_had())
        if over:
            with self._passing:
                if tuple(what) not in self.passed:
                    self.passed.add(tuple(what))  # type: ignore[arg-type]
                    self.clock.forward()
            until(lambda: client in self.clock.late)

    def _all_had(self) -> bool:
        held = {self.nodes.get(client) for client in self.held}
        with self.transport._changed:
            return held >= set(self.transport.open.values())


def until(what: Callable[[], object]) -> None:
    """Wait until it is so."""
    end = time.monotonic() + LONG
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def unable_to_answer() -> Iterator[None]:
    """A node dies in the moment in which it would keep its answer."""
    write = NodeStorage.write

    def die(self: NodeStorage, name: str, data: bytes) -> None:
        if name == "answer":
            raise Died
        write(self, name, data)

    NodeStorage.write = die  # type: ignore[method-assign]
    try:
        yield
    finally:
        NodeStorage.write = write  # type: ignore[method-assign]


def federation(
    made: dict[str, Any],
    sites: Sites,
    out: Path,
    deaths: Sequence[int] = (),
    closing: bool = True,
    **more: Any,
) -> Run:
    """The run of a configuration on these sites. The server dies when it has sent so many messages, and is started again."""
    more = {"wait": LONG, "deadline": LONG, "patience": 0.3, **more}
    try:
        for last in deaths:
            sites.transport.last = last
            with pytest.raises(Killed):
                run_federation(made, sites.transport, out=out, resume=True, **more)
        sites.transport.last = None if closing else sites.transport.last
        return run_federation(made, sites.transport, out=out, resume=True, **more)
    finally:
        if closing:
            sites.transport.last = None
            sites.transport.close()


def records(run: Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def figures(run: Run) -> list[dict[str, Any]]:
    """The same without what tells of real time."""
    timed = ("seconds", "wall", "tasks", "counts")
    return [{k: v for k, v in record.items() if k not in timed} for record in records(run)]


def models(run: Run) -> dict[str, bytes]:
    """The models of a finished run, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted((run.path / "models").iterdir())}


def same(one: Run, other: Run) -> None:
    """Both have come to the same, to the last bit."""
    assert figures(one) == figures(other)
    assert models(one) == models(other) and models(one)
    assert one.summary["communication"] == other.summary["communication"]
