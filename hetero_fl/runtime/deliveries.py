"""What happens to uploads on their way: some come twice, some with other bytes; the server's door tells both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from hetero_fl.channel.protocol import Message
from hetero_fl.runtime.executor import Reply
from hetero_fl.runtime.faults import Fate
from hetero_fl.seeding import Key, key

MOST = 8  # bytes that change


def befallen(
    replies: Iterator[tuple[str, Reply]], fates: Mapping[str, Fate], *parts: Key
) -> Iterator[tuple[str, Reply]]:
    """The replies as they arrive. `parts`: the key of these tasks, by which bytes are changed."""
    for client, reply in replies:
        what = fates[client].what
        if isinstance(reply, Message) and what == "corrupted":
            reply = replace(reply.sealed(), body=flipped(reply.body, *parts, client))
        yield client, reply
        if what == "twice":
            yield client, reply
        del reply  # a model's worth


def once(replies: Iterator[tuple[str, Reply]]) -> Iterator[tuple[str, Reply]]:
    """Each task's first reply; a second one of the same task is dropped."""
    answered: set[str] = set()
    for client, reply in replies:
        if client not in answered:
            answered.add(client)
            yield client, reply
        del reply  # a model's worth


def flipped(body: bytes, *parts: Key) -> bytes:
    """The bytes with up to MOST of them changed, at least one, drawn by the parts."""
    changed = bytearray(body)
    for i in range(1 + key(*parts, "bytes") % MOST if changed else 0):
        changed[key(*parts, i, "place") % len(changed)] ^= 1 + key(*parts, i, "bits") % 255
    return bytes(changed) if bytes(changed) != body else bytes([body[0] ^ 1]) + body[1:] if body else b"\0"
