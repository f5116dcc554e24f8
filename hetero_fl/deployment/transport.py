"""Transport interface for the messages between the server and the nodes.

This module imports only the standard library, so that processes that forward messages start
quickly.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait as wait_for_futures
from dataclasses import dataclass, field
from typing import Protocol

Head = dict[str, str | int | float | bool | bytes]

# Default maximum size of the body of a message in bytes.
MESSAGE_BYTES = 2**30
MAX_HEAD_ENTRIES = 32
MAX_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class Envelope:
    """Message between the server and a node.

    Args:
        head: Strings, bytes and numbers, keyed by name.
        body: Encoded content.
    """

    head: Head = field(default_factory=dict)
    body: bytes = b""


Handle = Callable[[Envelope], Envelope]


def find_violation(envelope: Envelope, max_body_bytes: int) -> str:
    """Describe how a message violates the limits.

    A head must consist of at most `MAX_HEAD_ENTRIES` strings, bytes and numbers, with a total size
    of at most `MAX_HEAD_BYTES`. The size includes the names, and 8 bytes for each number and
    string. Names and strings must be valid Unicode, and integers must have at most 64 bits.

    Args:
        envelope: The received message.
        max_body_bytes: Maximum size of the body in bytes.

    Returns:
        The description, or an empty string if the message does not violate a limit.
    """
    head = envelope.head
    size = 0
    if len(envelope.body) > max_body_bytes:
        return f"message: must have <= {max_body_bytes:,} bytes, got {len(envelope.body):,}"
    if len(head) > MAX_HEAD_ENTRIES:
        return f"head: must have <= {MAX_HEAD_ENTRIES} entries, got {len(head)}"
    for name, value in head.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float | bytes):
            return f"head: expected strings, numbers and bytes, got {type(value).__name__}"
        if isinstance(value, int) and value.bit_length() > 64:
            return f"head: numbers must have <= 64 bits, got {value.bit_length()}"
        try:
            size += len(name.encode()) + len(value.encode() if isinstance(value, str) else b"")
        except UnicodeEncodeError:
            return "head: expected valid Unicode"
        size += len(value) if isinstance(value, bytes) else 8
    return (
        f"head: must have <= {MAX_HEAD_BYTES:,} bytes, got {size:,}"
        if size > MAX_HEAD_BYTES
        else ""
    )


class UnreadableAnswer(Envelope):
    """Placeholder for an answer that could not be read or exceeds the limits."""

    @classmethod
    def with_reason(cls, why: str) -> UnreadableAnswer:
        """Create a placeholder with the reason for which the answer was refused."""
        return cls({"ask": "refused", "why": why})


class Transport(Protocol):
    """Connection of the server to the nodes, which answer each message with one message."""

    def nodes(self) -> Mapping[int, bytes]:
        """Return the public keys of the connected nodes in PEM format, keyed by node number.

        The public keys are empty if the transport does not authenticate nodes. A node may have a
        new number after the node or the transport restarts.

        Raises:
            RunFailedError: If the transport fails.
        """

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """Send a message to a node and return the number of the message.

        If the node is not connected, the message is not sent, and its answer is None.

        Args:
            node: Number of the node.
            envelope: Message to send.
            within: Seconds after which the message and its answer expire.

        Raises:
            RunFailedError: If the transport fails.
        """

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Return the answers that have arrived, keyed by message number.

        An answer is None if it will never arrive, because the message expired, the node
        disconnected or failed, or the transport restarted. The mapping is empty if no answer
        arrives in time.

        Args:
            numbers: Numbers of the messages.
            wait: Maximum number of seconds to wait for the first answer.

        Raises:
            RunFailedError: If the transport fails.
        """

    def close(self) -> None:
        """Close the connection and release all resources."""


@dataclass(frozen=True)
class SentMessage:
    """Message that was sent to a node.

    Args:
        node: Number of the node.
        expires: Time of the monotonic clock at which the message and its answer expire.
        answer: The answer, for which a thread waits, or None if there is none.
    """

    node: int
    expires: float
    answer: Future[Envelope | None] = field(default_factory=Future)


class ThreadedTransport:
    """Base class of transports in which threads wait for the answers."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        # Messages whose answers have not been returned, keyed by message number.
        self._sent: dict[str, SentMessage] = {}

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Return the answers that have arrived (see `Transport.pull`)."""
        # These were not sent, or an earlier call has deleted them, because they expired.
        lost = {number: None for number in numbers if number not in self._sent}
        answers = {n: self._sent[n].answer for n in numbers if n not in lost}
        wait_for_futures(answers.values(), 0.0 if lost else wait, FIRST_COMPLETED)
        found = {n: answer.result() for n, answer in answers.items() if answer.done()}
        now = time.monotonic()
        expired = [n for n, m in self._sent.items() if m.expires < now and n not in numbers]
        for number in [*found, *expired]:
            del self._sent[number]
        return {**lost, **found}
