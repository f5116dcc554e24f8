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

MESSAGE_BYTES = 2**30  # of one message, unless a server's or a site's file says otherwise
MOST_HEAD_ENTRIES = 32
MOST_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class Envelope:
    """One message, either way: what it is about, and bytes."""

    head: Head = field(default_factory=dict)
    body: bytes = b""


class Unread(Envelope):
    """Placeholder for an answer that was refused."""

    @classmethod
    def because(cls, why: str) -> Unread:
        return cls({"ask": "refused", "why": why})


def fault_of(envelope: Envelope, most: int) -> str:
    """Return what is out of bounds in a message, before anything in it is used; empty if nothing is.

    A head is a few plain values that can be encoded as UTF-8; a body has at most `most` bytes.
    """
    head, size = envelope.head, 0
    if len(envelope.body) > most:
        return f"a message of {len(envelope.body):,} bytes; at most {most:,} are read"
    if len(head) > MOST_HEAD_ENTRIES:
        return f"a head of {len(head)} entries; at most {MOST_HEAD_ENTRIES} are read"
    for name, value in head.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float | bytes):
            return f"a head with {type(value).__name__} in it; expected plain values"
        if isinstance(value, int) and value.bit_length() > 64:
            return f"a head with a number of {value.bit_length()} bits; expected at most 64"
        try:
            size += len(name.encode()) + len(value.encode() if isinstance(value, str) else b"")
        except UnicodeEncodeError:
            return "a head whose text is not valid Unicode"
        size += len(value) if isinstance(value, bytes) else 8
    return f"a head of {size:,} bytes; at most {MOST_HEAD_BYTES:,} are read" if size > MOST_HEAD_BYTES else ""


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


class Bounded:
    """A transport whose answers are within bounds; `Unread` takes the place of others.

    Args:
        transport: The transport that carries the messages.
        most: Bytes of an answer's body, at most.
    """

    def __init__(self, transport: Transport, most: int) -> None:
        self.transport, self.most = transport, most
        self.nodes, self.push, self.close = transport.nodes, transport.push, transport.close

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """As any transport."""
        return {n: None if a is None else self._taken(a) for n, a in self.transport.pull(numbers, wait).items()}

    def _taken(self, answer: Envelope) -> Envelope:
        why = fault_of(answer, self.most)
        return Unread.because(why) if why else answer


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
            for number in found:
                self._ends.pop(number, None)
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
