"""Transport interface for the messages between the server and the nodes.

This module imports only the standard library, so that processes that forward messages start
quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
