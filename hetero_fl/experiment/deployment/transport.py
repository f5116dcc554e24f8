"""What carries messages between the server and its nodes, and one that carries them within this process."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

Head = dict[str, str | int | float | bool | bytes]


@dataclass(frozen=True)
class Envelope:
    """One message, either way: what it is about, and bytes."""

    head: Head = field(default_factory=dict)
    body: bytes = b""


Handle = Callable[[Envelope], Envelope]


class Transport(Protocol):
    """The server's end. A node answers each message with one."""

    def nodes(self) -> Collection[int]:
        """The nodes that are connected now. One that comes back may have another number."""
        ...

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """Hand over a message, which is of no use after so many seconds: an answer that nobody has had by then may be thrown
        away. Returns its number."""
        ...

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Answers that have come, waiting up to so many seconds for the first; None where none will ever come (it expired, the
        node is gone or has failed). Raises RunFailed if the transport itself has broken down."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Loopback:
    """Nodes in this process, a thread each: for tests, and for whoever wants to try a node without a network."""

    def __init__(self) -> None:
        self._nodes: dict[int, tuple[queue.Queue[tuple[str, Envelope] | None], threading.Thread]] = {}
        self._numbers, self._messages = itertools.count(1), itertools.count(1)
        self._waiting: dict[str, int] = {}  # message -> node
        self._answers: dict[str, Envelope | None] = {}
        self._ends: dict[str, float] = {}  # when an answer is of no use any more
        self._changed = threading.Condition()
        self._working = threading.Lock()  # one at a time: torch's generator is the process's

    def join(self, handle: Handle) -> int:
        """A node comes. Returns its number."""
        number, inbox = next(self._numbers), queue.Queue[tuple[str, Envelope] | None]()
        thread = threading.Thread(target=self._work, args=(inbox, handle), daemon=True)
        with self._changed:
            self._nodes[number] = inbox, thread
        thread.start()
        return number

    def leave(self, node: int) -> None:
        """A node goes, in the midst of whatever it does: its answers are lost."""
        with self._changed:
            inbox, _ = self._nodes.pop(node)
            inbox.put(None)
            for message in [m for m, n in self._waiting.items() if n == node]:
                del self._waiting[message]
                self._answers[message] = None
            self._changed.notify_all()

    def nodes(self) -> Collection[int]:
        with self._changed:
            return list(self._nodes)

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        message, now = str(next(self._messages)), time.monotonic()
        with self._changed:
            for old in [m for m, end in self._ends.items() if end < now]:
                del self._ends[old]
                self._answers.pop(old, None)
            self._ends[message] = now + within
            if node not in self._nodes:
                self._answers[message] = None
            else:
                self._waiting[message] = node
                self._nodes[node][0].put((message, envelope))
        return message

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        end = time.monotonic() + wait
        with self._changed:
            while not (found := {n: self._answers.pop(n) for n in list(numbers) if n in self._answers}):
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
        return found

    def close(self) -> None:
        for node in list(self._nodes):
            self.leave(node)

    def _work(self, inbox: queue.Queue[tuple[str, Envelope] | None], handle: Handle) -> None:
        while (given := inbox.get()) is not None:
            message, envelope = given
            try:
                with self._working:
                    answer: Envelope | None = handle(envelope)
            except Exception:  # as a node whose process has died
                answer = None
            with self._changed:
                if self._waiting.pop(message, None) is not None:
                    self._answers[message] = answer
                    self._changed.notify_all()
