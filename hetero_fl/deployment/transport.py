"""The transport interface: messages between server and nodes, and their delivery.

Imports the standard library only: a process that forwards messages starts quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

Head = dict[str, str | int | float | bool | bytes]

MESSAGE_BYTES = 2**30  # default limit of one message in bytes
MAX_HEAD_ENTRIES = 32
MAX_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class Envelope:
    """One message in either direction: a few plain values and a body of bytes."""

    head: Head = field(default_factory=dict)
    body: bytes = b""


Handle = Callable[[Envelope], Envelope]


def find_violation(envelope: Envelope, most: int) -> str:
    """Return what is out of bounds in a message, or an empty string.

    A head holds a few plain values that can be encoded as UTF-8.

    Args:
        envelope: The message, of which nothing was used yet.
        most: Maximum size of the body in bytes.
    """
    head = envelope.head
    size = 0
    if len(envelope.body) > most:
        return f"a message of {len(envelope.body):,} bytes; at most {most:,} are read"
    if len(head) > MAX_HEAD_ENTRIES:
        return f"a head of {len(head)} entries; at most {MAX_HEAD_ENTRIES} are read"
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
    return (
        f"a head of {size:,} bytes; at most {MAX_HEAD_BYTES:,} are read"
        if size > MAX_HEAD_BYTES
        else ""
    )


class UnreadableAnswer(Envelope):
    """Placeholder for an answer that was refused."""

    @classmethod
    def with_reason(cls, why: str) -> UnreadableAnswer:
        """Return an answer that reports why the node's own could not be read."""
        return cls({"ask": "refused", "why": why})


class Transport(Protocol):
    """The server's end. A node answers each message with one message."""

    def nodes(self) -> Mapping[int, bytes]:
        """Return the connected nodes, each with its public key in PEM.

        A key is empty where the transport does not authenticate nodes. A node that restarts may
        have another number.
        """

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """Send a message to a node and return the message's number.

        Args:
            node: The node's number.
            envelope: The message.
            within: Seconds after which the message and its answer expire.
        """

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Return answers that have come, waiting for the first up to `wait` seconds.

        None stands for an answer that will never come: the message expired, or its node has gone
        or failed.

        Raises:
            RunFailedError: If the transport itself has broken down.
        """

    def close(self) -> None:
        """Release what the transport holds."""


class BoundedTransport:
    """A transport whose answers are within bounds; `UnreadableAnswer` takes the place of others.

    Args:
        transport: The transport that carries the messages.
        most: Bytes of an answer's body, at most.
    """

    def __init__(self, transport: Transport, most: int) -> None:
        self.transport = transport
        self.most = most
        self.nodes = transport.nodes
        self.push = transport.push
        self.close = transport.close

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """See `Transport.pull`."""
        return {
            n: None if a is None else self._check_answer(a)
            for n, a in self.transport.pull(numbers, wait).items()
        }

    def _check_answer(self, answer: Envelope) -> Envelope:
        why = find_violation(answer, self.most)
        return UnreadableAnswer.with_reason(why) if why else answer
