"""Binary format of messages with changes to models (see `hetero_fl.federation.broadcasts`).

An estimate is the model that a client has decoded so far. Each estimate is identified by a hash of
8 bytes, and a change updates one estimate to the next.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hetero_fl.core.payload import PayloadError

# Hash of the estimate before the first change.
NO_ESTIMATE = bytes(8)
# Number of models in a message.
COUNT = struct.Struct(">B")
# Header of a model: length of the item's name in bytes, hash of the estimate before the changes,
# hash of the estimate after the changes, number of changes.
HEADER = struct.Struct(">B8s8sB")
# Header of a change: number of the change, size of the body in bytes.
CHANGE_HEADER = struct.Struct(">II")
# Number of a change that replaces the estimate by a model without compression.
WHOLE = 0


class Change(NamedTuple):
    """Change of an estimate.

    Attributes:
        number: Number of the change, starting at 1, which seeds random draws. `WHOLE` if the change
            replaces the estimate.
        body: The encoded difference. If `number` is `WHOLE`, the encoded new estimate.
    """

    number: int
    body: bytes


class ModelPart(NamedTuple):
    """Part of a message with the changes to one model.

    Attributes:
        item: Name of the item that contains the model.
        before: Hash of the estimate that the client has.
        after: Hash of the estimate after the changes.
        changes: The changes, in the order in which the client applies them.
    """

    item: str
    before: bytes
    after: bytes
    changes: Sequence[Change]


def message_bytes(models: Mapping[str, Sequence[int]], rest: int) -> int:
    """Return the size of a message in bytes.

    Args:
        models: Size of each change in bytes, keyed by the name of the model's item.
        rest: Size in bytes of the part of the message without models.
    """
    parts = sum(
        HEADER.size + len(n.encode()) + sum(CHANGE_HEADER.size + size for size in sizes)
        for n, sizes in models.items()
    )
    return COUNT.size + parts + rest


def pack_changes(parts: Sequence[ModelPart], rest: bytes) -> bytes:
    """Encode a message.

    Args:
        parts: The parts with the changes to models.
        rest: The encoded items that are not models.
    """
    pieces = [COUNT.pack(len(parts))]
    for part in parts:
        name = part.item.encode()
        pieces += [HEADER.pack(len(name), part.before, part.after, len(part.changes)), name]
        for change in part.changes:
            pieces += [CHANGE_HEADER.pack(change.number, len(change.body)), change.body]
    return b"".join([*pieces, rest])


def unpack_changes(body: bytes) -> tuple[list[ModelPart], bytes]:
    """Decode a message that was encoded by `pack_changes`.

    Returns:
        The parts with the changes to models, and the encoded items that are not models.

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
