"""Federations with nodes in this process, and faults at messages that a test names."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.deployment import sites as server_sites
from hetero_fl.deployment.config import DisclosureConfig, SiteConfig
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.node_files import NodeStorage
from hetero_fl.deployment.server import run_federation
from hetero_fl.deployment.sites import EventFunction
from hetero_fl.deployment.transport import Envelope
from hetero_fl.reporting.run import Run
from model_zoo import generators
from tests.support.loopback import LoopbackTransport

ALL = DisclosureConfig(labels=True, details=True, model=True, errors=True)
# In seconds; the machine may be busy.
LONG = 300.0
# Client, round, kind of message.
Point = tuple[str, int, str]


class NodeEndedError(BaseException):
    """Raised when a node's process ends."""


LOST = Envelope({"ask": "lost on its way"})


class ServerKilledError(BaseException):
    """Raised when the server's process ends."""


@contextmanager
def patient_nodes() -> Iterator[None]:
    """Give nodes ample time, and let server and nodes take turns with the global generators.

    Their process shares the generators, and two threads that read their state at the same time
    can also block each other forever.
    """
    lock = threading.RLock()
    keyed = generators.keyed_generators

    @contextmanager
    def locked(*args: Any, **kwargs: Any) -> Iterator[None]:
        with lock, keyed(*args, **kwargs):
            yield

    def locked_function(function: Any) -> Any:
        def call(*args: Any) -> Any:
            with lock:
                return function(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_sites, "GREETING_SECONDS", LONG)
        patch.setattr(server_sites, "LEAVE_SECONDS", LONG)
        for name in ("read_states", "write_states"):
            patch.setattr(generators, name, locked_function(getattr(generators, name)))
        for module in list(sys.modules.values()):
            if vars(module).get("keyed_generators") is keyed:
                patch.setattr(module, "keyed_generators", locked)
        yield


class EventLines(list[str]):
    """Log function that stores the lines of events, and the clients in `clients`."""

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[str | None] = []

    def __call__(self, line: str, *, client: str | None = None, **fields: Any) -> None:
        self.append(line)
        self.clients.append(client)


class Clock:
    """A server clock: deadlines that a test lets pass end at once, and others never end."""

    def __init__(self) -> None:
        self.ahead = 0.0
        # Clients whose deadline has passed.
        self.late: set[str] = set()

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    sleep = staticmethod(time.sleep)
    time = staticmethod(time.time)

    def forward(self) -> None:
        """Move the clock past the server's current deadline."""
        self.ahead += 2 * LONG

    def after(self, count: int, lines: list[str]) -> EventFunction:
        """Return a log function that stores lines and closes admission after a number of them."""

        def log_line(line: str, *, client: str | None = None) -> None:
            lines.append(line)
            if len(lines) == count:
                self.forward()

        return log_line


class LossyTransport(LoopbackTransport):
    """A transport that loses some answers and whose server ends at message number `last`.

    A user of the transport is a new process once `last` is set again. `open` contains the nodes
    with unanswered messages.
    """

    last: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[str, int] = {}

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        if self.last is not None:
            self.last -= 1
            if self.last <= 0:
                raise ServerKilledError
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


class RecordingTransport(LossyTransport):
    """A transport that records messages, and can repeat one after the server is gone.

    Attributes:
        requests: What the server sends.
        tasks: The tasks among these, with their nodes.
        received: What the server receives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Envelope] = []
        self.tasks: list[tuple[int, Envelope]] = []
        self.received: list[Envelope] = []

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        number = super().push(node, envelope, within)
        self.requests.append(envelope)
        if envelope.head["ask"] == "do" and envelope.head["kind"] == "answer":
            self.tasks.append((node, envelope))
        return number

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        found = super().pull(numbers, wait)
        self.received += [answer for answer in found.values() if answer is not None]
        return found

    def repeat(self, node: int, envelope: Envelope) -> Envelope:
        """Repeat a request as another task."""
        task = "another" + str(envelope.head["task"])[7:]
        head = {**envelope.head, "task": task, "expires": time.time() + LONG}
        self.last = None
        number = LossyTransport.push(self, node, Envelope(head, envelope.body), LONG)
        while not (found := self.pull([number], 1.0)):
            pass
        answer = found[number]
        assert answer is not None
        return answer


class OrderedTransport(LossyTransport):
    """A transport whose answers arrive in the order in which messages were sent."""

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

    `kills` maps a message to the node's fault. A node ends `before` it reads the message, `during`
    its handling (state stored, no answer) or `after` answering (the answer is lost). The message
    can be `unheard`, the answer `lost` or delayed by `slow` seconds. A node can answer `last`
    (after all others), `late` (after its deadline too), or be `missing` (it ends, and its deadline
    passes). Each fault occurs once. `away` is the number of seconds until an ended node returns,
    None for never; `clock` lets deadlines pass.
    """

    def __init__(
        self,
        clients: list[str],
        folder: Path,
        kills: Mapping[Point, str] | None = None,
        away: float | None = 0.0,
        slow: float = 3.0,
        transport: LossyTransport | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.transport, self.folder, self.clock = (
            transport or LossyTransport(),
            folder,
            clock or Clock(),
        )
        self.kills, self.away, self.slow = dict(kills or {}), away, slow
        self.request_counts: Counter[Point] = Counter()
        # Messages that are answered or never will be.
        self.done: set[Point] = set()
        # Clients that answer after the others.
        self.delayed: set[str] = set()
        # Messages whose deadline has passed.
        self.passed: set[tuple[int, str]] = set()
        self._passing = threading.Lock()
        self.nodes: dict[str, int] = {}
        for client in clients:
            self.start(client)

    def start(self, client: str) -> None:
        """Start a node's process with the content of its folder."""
        node = Node(self.site(client), self.folder / client)
        self.nodes[client] = self.transport.join(
            lambda envelope: self._handle(client, node, envelope)
        )

    def site(self, client: str) -> SiteConfig:
        """Return the content of a node's site file."""
        return SiteConfig(client=client, tells=ALL)

    def stop(self, client: str) -> None:
        """Kill the node's process."""
        self.transport.leave(self.nodes.pop(client))

    def lose_state(self, client: str) -> None:
        """Delete the stored states of a client."""
        for file in (self.folder / client).rglob("states/*/*"):
            file.unlink()

    def _handle(self, client: str, node: Node, envelope: Envelope) -> Envelope:
        head = envelope.head
        point = (client, int(str(head.get("round", -1))), str(head.get("what", head["ask"])))
        self.request_counts[point] += 1
        fault = self.kills.pop(point, None)
        if fault == "unheard":
            return LOST
        if fault in ("last", "late"):
            return self._answer_last(client, node, envelope, point, fault == "late")
        if fault not in (None, "lost", "slow"):
            return self._end(client, node, envelope, point, fault)
        answer = node.handle(envelope)
        if fault == "lost":
            return LOST
        if fault == "slow":
            # The other nodes continue.
            self.transport._working.release()
            time.sleep(self.slow)
            self.transport._working.acquire()
            return answer
        self.done.add(point)
        return answer

    def _answer_last(
        self, client: str, node: Node, envelope: Envelope, point: Point, late: bool
    ) -> Envelope:
        self.delayed.add(client)
        answer = node.handle(envelope)
        self.done.add(point)
        self.transport._working.release()
        self._after_the_others(point, late)
        self.delayed.discard(client)
        self.transport._working.acquire()
        return answer

    def _end(
        self, client: str, node: Node, envelope: Envelope, point: Point, fault: str
    ) -> Envelope:
        try:
            if fault == "missing":
                self.done.add(point)
                threading.Thread(
                    target=self._after_the_others, args=[point, True], daemon=True
                ).start()
            if fault in ("before", "missing"):
                raise NodeEndedError
            if fault == "during":
                with unable_to_answer():
                    node.handle(envelope)
            node.handle(envelope)
            raise NodeEndedError
        except NodeEndedError:
            self.stop(client)
            if fault != "missing" and self.away is not None:
                threading.Timer(self.away, self.start, [client]).start()
            raise

    def _after_the_others(self, point: Point, over: bool) -> None:
        """Wait until the server has all other answers and, if `over`, has dropped this client."""
        client, *what = point
        clients = list(self.nodes)
        until(
            lambda: (
                all((other, *what) in self.done for other in clients) and self._all_others_arrived()
            )
        )
        if over:
            with self._passing:
                if tuple(what) not in self.passed:
                    self.passed.add(tuple(what))  # type: ignore[arg-type]
                    self.clock.forward()
            until(lambda: client in self.clock.late)

    def _all_others_arrived(self) -> bool:
        delayed_nodes = {self.nodes.get(client) for client in self.delayed}
        with self.transport._changed:
            return delayed_nodes >= set(self.transport.open.values())


def until(what: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + LONG
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def unable_to_answer() -> Iterator[None]:
    """Let a node end at the moment when it stores its answer."""
    write = NodeStorage.write

    def crash(self: NodeStorage, name: str, data: bytes) -> None:
        if name == "answer":
            raise NodeEndedError
        write(self, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NodeStorage, "write", crash)
        yield


def federation(
    source: dict[str, Any],
    sites: Sites,
    out: Path,
    crashes: Sequence[int] = (),
    closing: bool = True,
    **more: Any,
) -> Run:
    """Run a configuration on these sites, restarting the server when it ends."""
    more = {"wait": LONG, "deadline": LONG, "patience": 0.3, **more}

    def serve() -> Run:
        # As the commands do, continue with the configuration of the run.
        saved = out / "config.yaml"
        begun = saved if saved.exists() else source
        return run_federation(begun, sites.transport, out=out, resume=True, **more)

    try:
        for last in crashes:
            sites.transport.last = last
            with pytest.raises(ServerKilledError):
                serve()
        sites.transport.last = None if closing else sites.transport.last
        return serve()
    finally:
        if closing:
            sites.transport.last = None
            sites.transport.close()


def records(run: Run) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def figures(run: Run) -> list[dict[str, Any]]:
    """Return the records without measured times."""
    timed = ("seconds", "wall", "tasks", "counts")
    return [{k: v for k, v in record.items() if k not in timed} for record in records(run)]


def models(run: Run) -> dict[str, bytes]:
    """Return the bytes of the models of a finished run."""
    folder = run.path / "models"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def same(one: Run, other: Run) -> None:
    """Check that two runs have bit-identical results."""
    assert figures(one) == figures(other)
    assert models(one) == models(other) and models(one)
    assert one.summary["communication"] == other.summary["communication"]
