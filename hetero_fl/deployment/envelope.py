"""The message that server and nodes exchange, independent of what carries it.

Imports the standard library only: a process that forwards messages starts quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Head = dict[str, str | int | float | bool | bytes]

MESSAGE_BYTES = 2**30  # default limit of one message in bytes
MOST_HEAD_ENTRIES = 32
MOST_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class Envelope:
    """One message in either direction: a few plain values and a body of bytes."""

    head: Head = field(default_factory=dict)
    body: bytes = b""


Handle = Callable[[Envelope], Envelope]


def find_fault(envelope: Envelope, most: int) -> str:
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
    return (
        f"a head of {size:,} bytes; at most {MOST_HEAD_BYTES:,} are read"
        if size > MOST_HEAD_BYTES
        else ""
    )
