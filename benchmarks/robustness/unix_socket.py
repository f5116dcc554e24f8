"""A federation of processes on this machine, with messages through a Unix socket.

It allows measurements without a network, with nodes that can be killed. Messages are pickled, so
this transport must not be used for anything else.
"""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from collections.abc import Collection, Mapping
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from hetero_fl.deployment.config import DisclosureConfig, SiteConfig
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.transport import Envelope

# The fork server imports modules once for all nodes.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hetero_fl.deployment.node", "sklearn.datasets", "torch._dynamo"])
# Seconds until a node tries to connect again.
REST = 0.1


class UnixSocket:
    """The transport of the server."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._listener = Listener(str(path), "AF_UNIX")
        self._nodes: dict[int, Connection] = {}
        # message -> node, and until when an answer is of use
        self._waiting: dict[str, tuple[int, float]] = {}
        self._answers: dict[str, Envelope | None] = {}
        self._numbers, self._messages = itertools.count(1), itertools.count(1)
        self._changed, self._open = threading.Condition(), True
        threading.Thread(target=self._accept, daemon=True).start()

    def nodes(self) -> Mapping[int, bytes]:
        """Return the connected nodes."""
        with self._changed:
            return dict.fromkeys(self._nodes, b"")

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """Send a message and return its number."""
        number, now = str(next(self._messages)), time.monotonic()
        with self._changed:
            for old in [m for m, (_, end) in self._waiting.items() if end < now]:
                del self._waiting[old]
                self._answers.pop(old, None)
            self._waiting[number] = node, now + within
            connection = self._nodes.get(node)
        try:
            if connection is None:
                raise OSError
            connection.send((number, envelope))
        except OSError:
            self._lose(node)
        return number

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Return replies; wait up to `wait` seconds for the first one."""
        end = time.monotonic() + wait
        with self._changed:
            while not (found := {n: self._answers.pop(n) for n in numbers if n in self._answers}):
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            for number in found:
                self._waiting.pop(number, None)
        return found

    def close(self) -> None:
        """Disconnect all nodes."""
        self._open = False
        self._listener.close()
        for node in list(self._nodes):
            self._lose(node)

    def _accept(self) -> None:
        while self._open:
            try:
                connection = self._listener.accept()
            except OSError:
                continue
            with self._changed:
                node = next(self._numbers)
                self._nodes[node] = connection
            threading.Thread(target=self._hear, args=(node, connection), daemon=True).start()

    def _hear(self, node: int, connection: Connection) -> None:
        try:
            while True:
                number, answer = connection.recv()
                with self._changed:
                    if number in self._waiting:
                        self._answers[number] = answer
                        self._changed.notify_all()
        # TypeError: another thread closed the connection.
        except (OSError, EOFError, TypeError):
            self._lose(node)

    def _lose(self, node: int) -> None:
        with self._changed:
            connection = self._nodes.pop(node, None)
            for number, (at, _) in self._waiting.items():
                if at == node and number not in self._answers:
                    self._answers[number] = None
            self._changed.notify_all()
        if connection is not None:
            connection.close()


def attend(path: str, client: str, folder: str) -> None:
    """Run a node that serves any server at the path until it is killed."""
    import torch

    torch.set_num_threads(1)
    tells = DisclosureConfig(labels=True, details=True, model=True)
    node = Node(SiteConfig(client=client, tells=tells), Path(folder) / client)
    while True:
        try:
            with Client(path, "AF_UNIX") as connection:
                while True:
                    number, envelope = connection.recv()
                    connection.send((number, node.handle(envelope)))
        except (OSError, EOFError):
            time.sleep(REST)


def start_node(path: Path, client: str, folder: Path) -> Any:
    """Start a node in a new process."""
    process = CONTEXT.Process(target=attend, args=(str(path), client, str(folder)), daemon=True)
    process.start()
    return process
