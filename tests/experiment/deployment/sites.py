"""What tests of federations have in common: nodes within this process, and what befalls them at a message that a test names."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.experiment.deployment.node import Node
from hetero_fl.experiment.deployment.serving import serve
from hetero_fl.experiment.deployment.site_file import SiteConfig, TellsConfig
from hetero_fl.experiment.deployment.transport import Envelope, Loopback
from hetero_fl.experiment.deployment.vault import Vault
from hetero_fl.reporting.run import Run

ALL = TellsConfig(labels=True, details=True, model=True)
QUICK = {"output": {"plots": False, "report": False}}
Point = tuple[str, int, str]  # client, round, what it is asked


class Died(Exception):
    """A node's process has ended."""


LOST = Envelope({"ask": "lost on its way"})


class Killed(BaseException):
    """The server's process has ended."""


class Losing(Loopback):
    """Some answers never come, and nobody is told. The server dies at its message of number `last`; whoever uses the transport
    after that is another process, once `last` has been set anew."""

    last: int | None = None

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        if self.last is not None:
            self.last -= 1
            if self.last <= 0:
                raise Killed
        return super().push(node, envelope, within)

    def close(self) -> None:
        if self.last is None or self.last > 0:
            super().close()

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        return {number: answer for number, answer in super().pull(numbers, wait).items() if answer is not LOST}


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
    not answered) or `after` (its answer is lost with it); the message is lost on its way (`unheard`), or its answer (`lost`); or
    that takes `slow` seconds. Once each. `away`: seconds until a node that died is back; None: never.
    """

    def __init__(
        self, clients: list[str], folder: Path, kills: Mapping[Point, str] | None = None, away: float | None = 0.0,
        slow: float = 3.0,
        transport: Losing | None = None,
    ) -> None:  # fmt: skip
        self.transport, self.folder = transport or Losing(), folder
        self.kills, self.away, self.slow = dict(kills or {}), away, slow
        self.asked: Counter[Point] = Counter()
        self.nodes: dict[str, int] = {}
        for client in clients:
            self.start(client)

    def start(self, client: str) -> None:
        """A node's process, from what its folder holds."""
        node = Node(SiteConfig(client=client, tells=ALL), self.folder / client)
        self.nodes[client] = self.transport.join(lambda envelope: self._handle(client, node, envelope))

    def stop(self, client: str) -> None:
        """It is killed."""
        self.transport.leave(self.nodes.pop(client))

    def _handle(self, client: str, node: Node, envelope: Envelope) -> Envelope:
        head = envelope.head
        point = (client, int(str(head.get("round", -1))), str(head.get("what", head["ask"])))
        self.asked[point] += 1
        fate = self.kills.pop(point, None)
        if fate is None:
            return node.handle(envelope)
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
        try:
            if fate == "before":
                raise Died
            if fate == "during":
                with unable_to_answer():
                    node.handle(envelope)
            node.handle(envelope)
            raise Died
        except Died:
            self.stop(client)
            if self.away is not None:
                threading.Timer(self.away, self.start, [client]).start()
            raise


@contextmanager
def unable_to_answer() -> Iterator[None]:
    """A node dies in the moment in which it would keep its answer."""
    write = Vault.write

    def die(self: Vault, name: str, data: bytes) -> None:
        if name == "answer":
            raise Died
        write(self, name, data)

    Vault.write = die  # type: ignore[method-assign]
    try:
        yield
    finally:
        Vault.write = write  # type: ignore[method-assign]


def federation(
    made: dict[str, Any], sites: Sites, out: Path, deaths: Sequence[int] = (), closing: bool = True, **more: Any
) -> Run:
    """The run of a configuration on these sites. The server dies when it has sent so many messages, and is started again."""
    more = {"wait": 20.0, "deadline": 60.0, "patience": 0.3, **more}
    try:
        for last in deaths:
            sites.transport.last = last
            with pytest.raises(Killed):
                serve({**made, **QUICK}, sites.transport, out=out, resume=True, **more)
        sites.transport.last = None if closing else sites.transport.last
        return serve({**made, **QUICK}, sites.transport, out=out, resume=True, **more)
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
