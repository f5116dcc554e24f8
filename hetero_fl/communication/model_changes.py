"""Binary form of messages with changes to models (see `hetero_fl.federation.broadcasts`)."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hetero_fl.core.payload import PayloadError

# Name of an estimate before the first change.
NO_ESTIMATE = bytes(8)
# Number of models in a message.
COUNT = struct.Struct(">B")
# Header of a model: length of the item's name in bytes, names of the estimates before and after,
# number of changes.
HEADER = struct.Struct(">B8s8sB")
# Header of a change: number and size in bytes.
CHANGE_HEADER = struct.Struct(">II")
# Number of a change that replaces the estimate by a model without compression.
WHOLE = 0


class Change(NamedTuple):
    """The part of a message that updates an estimate of a model.

    Attributes:
        number: Number of the change, from 1, which keys random draws; or `WHOLE`.
        body: The encoded difference, or the encoded estimate if `number` is `WHOLE`.
    """

    number: int
    body: bytes


class ModelPart(NamedTuple):
    """The part of a message that concerns one model.

    Attributes:
        item: Name of the item.
        before: Name of the estimate that the client has.
        after: Name of the estimate after the changes.
        changes: The changes from one estimate to the other, in order.
    """

    item: str
    before: bytes
    after: bytes
    changes: Sequence[Change]


def message_bytes(models: Mapping[str, Sequence[int]], rest: int) -> int:
    """Return the size of a message in bytes.

    Args:
        models: Sizes of the changes of each model in bytes, by item.
        rest: Size of the part of the message that contains no models, in bytes.
    """
    parts = sum(
        HEADER.size + len(n.encode()) + sum(CHANGE_HEADER.size + size for size in sizes)
        for n, sizes in models.items()
    )
    return COUNT.size + parts + rest


def pack_changes(parts: Sequence[ModelPart], rest: bytes) -> bytes:
    """Return a message of the parts that concern models, and the rest."""
    pieces = [COUNT.pack(len(parts))]
    for part in parts:
        name = part.item.encode()
        pieces += [HEADER.pack(len(name), part.before, part.after, len(part.changes)), name]
        for change in part.changes:
            pieces += [CHANGE_HEADER.pack(change.number, len(change.body)), change.body]
    return b"".join([*pieces, rest])


def unpack_changes(body: bytes) -> tuple[list[ModelPart], bytes]:
    """Return the parts of a message that concern models, and the rest of the message.

    Raises:
        PayloadError: If the message is malformed.
    """
    start = 0

    def take(size: int) -> bytes:
        nonlocal start
        start += size
        if start > len(body):
            raise PayloadError(f"broadcast: truncated: expected {start:,} bytes, got {len(body):,}")
        return body[start - size : start]

    parts = []
    for _ in range(*COUNT.unpack(take(COUNT.size))):
        length, before, after, count = HEADER.unpack(take(HEADER.size))
        try:
            name = take(length).decode()
        except UnicodeDecodeError:
            raise PayloadError("broadcast: expected an item name in UTF-8") from None
        changes = []
        for _ in range(count):
            number, size = CHANGE_HEADER.unpack(take(CHANGE_HEADER.size))
            changes.append(Change(number, take(size)))
        parts.append(ModelPart(name, before, after, changes))
    return parts, body[start:]
