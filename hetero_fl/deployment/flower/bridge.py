"""Connection between Flower's ServerApp and `hetero-fl server`.

The command runs the federation in its own process, with its console, signal handlers and callbacks.
Flower runs the ServerApp in another process, which forwards messages until the command closes the
socket.
"""

from __future__ import annotations

import base64
import json
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_fl.deployment.flower.worker_socket import connect, receive, send
from hetero_fl.deployment.transport import (
    BoundedTransport,
    Envelope,
    Head,
    Transport,
    UnreadableAnswer,
)
from hetero_fl.utils.errors import RunFailedError

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

UNREADABLE = "unreadable"
# Memory limit of the app: this number of messages of the maximum size, and additional bytes.
MAX_MESSAGES = 16
RESERVED_BYTES = 2**30
# Seconds after which an app that does not respond is restarted.
STALL_SECONDS = 120.0


def serve_grid(grid: Grid, context: Context) -> None:
    """Serve Flower's grid over the socket in the run configuration.

    Args:
        grid: Flower's grid.
        context: Flower's context of the ServerApp.
    """
    from hetero_fl.deployment.flower.grid import GridTransport

    message_bytes = int(context.run_config["message-bytes"])
    limit_memory(message_bytes)
    with connect(Path(str(context.run_config["socket"]))) as connection:
        serve_transport(BoundedTransport(GridTransport(grid), message_bytes), connection)


def limit_memory(message_bytes: int) -> None:
    """Limit the memory of this process to a few messages.

    A small Flower message can expand to a large message, because an array may refer to the same
    chunk several times. With the limit, reading such a message fails, but other messages are not
    affected. On systems other than Linux, no limit is set.

    Args:
        message_bytes: Maximum size of a message in bytes.
    """
    if sys.platform != "linux":
        return
    # Windows does not have this module.
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + MAX_MESSAGES * message_bytes + RESERVED_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def serve_transport(transport: Transport, connection: Connection) -> None:
    """Serve the calls of a `RemoteTransport` until the connection is closed."""
    while True:
        try:
            call = receive(connection)
            _answer(transport, connection, call)
        except (EOFError, ConnectionError):
            return
        except RunFailedError as error:
            send(connection, Envelope({"error": str(error)}))


def _answer(transport: Transport, connection: Connection, call: Envelope) -> None:
    if call.head["call"] == "nodes":
        nodes = {n: base64.b64encode(key).decode() for n, key in transport.nodes().items()}
        send(connection, Envelope({}, json.dumps(nodes).encode()))
    elif call.head["call"] == "push":
        envelope = receive(connection)
        number = transport.push(int(call.head["node"]), envelope, float(call.head["within"]))
        send(connection, Envelope({"number": number}))
    else:
        answers = transport.pull(json.loads(call.body), float(call.head["wait"]))
        send(connection, Envelope({"count": len(answers)}))
        for number, answer in answers.items():
            about: Head = {"number": number, "is_lost": answer is None}
            about[UNREADABLE] = isinstance(answer, UnreadableAnswer)
            send(connection, Envelope(about))
            send(connection, answer or Envelope())


class RemoteTransport:
    """Transport whose calls are executed by `serve_transport` in another process.

    The methods raise EOFError or ConnectionError if the connection is lost.

    Args:
        connection: Connection to the process that runs `serve_transport`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _receive(self, seconds: float = 0.0) -> Envelope:
        """Receive a message within the given number of seconds plus `STALL_SECONDS`."""
        if not self._connection.poll(seconds + STALL_SECONDS):
            raise ConnectionError("the server's app does not answer")
        return receive(self._connection)

    def nodes(self) -> dict[int, bytes]:
        """See `Transport.nodes`."""
        answer = self._call(Envelope({"call": "nodes"}))
        return {int(n): base64.b64decode(key) for n, key in json.loads(answer.body).items()}

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """See `Transport.push`."""
        send(self._connection, Envelope({"call": "push", "node": node, "within": within}))
        send(self._connection, envelope)
        return str(self._checked(self._receive()).head["number"])

    def pull(self, numbers: list[str], wait: float) -> dict[str, Envelope | None]:
        """See `Transport.pull`."""
        call = Envelope({"call": "pull", "wait": wait}, json.dumps(numbers).encode())
        answers: dict[str, Envelope | None] = {}
        for _ in range(int(self._call(call, wait).head["count"])):
            about = self._receive().head
            answer = self._receive()
            if about[UNREADABLE]:
                answer = UnreadableAnswer(answer.head)
            answers[str(about["number"])] = None if about["is_lost"] else answer
        return answers

    def close(self) -> None:
        """Close the connection, which ends the app."""
        self._connection.close()

    def _call(self, call: Envelope, seconds: float = 0.0) -> Envelope:
        send(self._connection, call)
        return self._checked(self._receive(seconds))

    def _checked(self, answer: Envelope) -> Envelope:
        if "error" in answer.head:
            raise RunFailedError(str(answer.head["error"]))
        return answer
