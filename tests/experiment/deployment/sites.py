"""What tests of federations have in common: nodes within this process, and what befalls them at a message that a test names."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
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
from hetero_fl.runtime.site import Site

ALL = TellsConfig(labels=True, details=True, model=True)
QUICK = {"output": {"plots": False, "report": False}}
Point = tuple[str, int, str]  # client, round, what it is asked


class Died(Exception):
    """A node's process has ended."""


LOST = Envelope({"ask": "lost on its way"})


class Losing(Loopback):
    """Some answers never come, and nobody is told."""

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        return {number: answer for number, answer in super().pull(numbers, wait).items() if answer is not LOST}


class Sites:
    """Nodes of some clients on a transport within this process; `folder` outlives them.

    `kills`: what befalls a node at a message: it dies `before` it looks at it, `during` (having remembered what it must, not having
    answered), `after` (its answer is lost with it). Or the message is lost on its way (`unheard`), or its answer (`lost`); or that
    takes `slow` seconds. Once each. `away`: seconds until a node that died is back; None: never.
    """

    def __init__(
        self, clients: list[str], folder: Path, kills: Mapping[Point, str] | None = None, away: float | None = 0.0,
        slow: float = 3.0,
    ) -> None:  # fmt: skip
        self.transport, self.folder, self.kills, self.away, self.slow = Losing(), folder, dict(kills or {}), away, slow
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
            time.sleep(self.slow)
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


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each client has trained in each round, at whatever node."""
    counts: Counter[tuple[str, int]] = Counter()
    train = Site._train

    def counted(self: Site, broadcasts: Any, requests: Any) -> Any:
        counts.update((client, requests[client].round) for client in broadcasts)
        return train(self, broadcasts, requests)

    monkeypatch.setattr(Site, "_train", counted)
    return counts


def federation(made: dict[str, Any], sites: Sites, out: Path, **more: Any) -> Run:
    """The run of a configuration on these sites."""
    more = {"wait": 20.0, "deadline": 60.0, "patience": 0.3, **more}
    try:
        return serve({**made, **QUICK}, sites.transport, out=out, **more)
    finally:
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
