"""A transport to nodes in this process."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Collection, Mapping

from hetero_fl.deployment.transport import Envelope, Handle


class LoopbackTransport:
    """A transport whose nodes are threads of this process."""

    def __init__(self) -> None:
        self._nodes: dict[
            int, tuple[queue.Queue[tuple[str, Envelope] | None], threading.Thread]
        ] = {}
        self._keys: dict[int, bytes] = {}
        self._numbers = itertools.count(1)
        self._messages = itertools.count(1)
        # Message to node.
        self._waiting: dict[str, int] = {}
        self._answers: dict[str, Envelope | None] = {}
        # Deadlines of the answers.
        self._ends: dict[str, float] = {}
        self._changed = threading.Condition()
        # One at a time, because torch's generator is global.
        self._working = threading.Lock()

    def join(self, handle: Handle, key: bytes = b"") -> int:
        """Connect a node and return its number.

        Args:
            handle: Function that answers the node's messages.
            key: The node's public key in PEM.
        """
        number = next(self._numbers)
        inbox = queue.Queue[tuple[str, Envelope] | None]()
        thread = threading.Thread(target=self._work, args=(inbox, handle), daemon=True)
        with self._changed:
            self._nodes[number] = inbox, thread
            self._keys[number] = key
        thread.start()
        return number

    def leave(self, node: int) -> None:
        """Disconnect a node; its pending answers are lost."""
        with self._changed:
            inbox, _ = self._nodes.pop(node)
            inbox.put(None)
            for message in [m for m, n in self._waiting.items() if n == node]:
                del self._waiting[message]
                self._answers[message] = None
            self._changed.notify_all()

    def nodes(self) -> Mapping[int, bytes]:
        with self._changed:
            return {number: self._keys[number] for number in self._nodes}

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        message = str(next(self._messages))
        now = time.monotonic()
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
            while not (
                found := {n: self._answers.pop(n) for n in list(numbers) if n in self._answers}
            ):
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
            except BaseException:
                # Like a node whose process has ended.
                answer = None
            with self._changed:
                if self._waiting.pop(message, None) is not None:
                    self._answers[message] = answer
                    self._changed.notify_all()
