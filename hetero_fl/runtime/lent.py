"""Broadcasts that many clients read: decoded once, and lent to one client after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from hetero_fl.payload import Item, Payload

MOST = 8  # broadcasts kept: in most federations there are no more architectures


@dataclass
class Copy:
    """What a broadcast says, and its tensors' versions, by which changes in place are known."""

    round: int
    body: bytes
    payload: Payload
    versions: list[int]

    def untouched(self) -> bool:
        return self.versions == versions(self.payload)


class Lent:
    """Decoded broadcasts of a reading. Each is in one client's hands at a time, in dictionaries of that client's own, and is
    lent again only if nobody changed a tensor in place: nothing passes from client to client.

    `most`: broadcasts kept. None for code that may write past a tensor's version (`.data`, `.numpy()`): all are decoded anew.
    """

    def __init__(self, decode: Callable[[int, bytes], Payload], most: int = MOST) -> None:
        self._decode, self._most = decode, most
        self._idle: list[Copy] = []

    @contextmanager
    def to(self, broadcasts: Mapping[str, bytes], round: int) -> Iterator[dict[str, Payload]]:
        """What each of these clients was sent. Raises PayloadError."""
        copies = {client: self._take(round, body) for client, body in broadcasts.items()}
        yield {client: own(copy.payload) for client, copy in copies.items()}
        self._idle = [*copies.values(), *self._idle][: self._most]

    def forget(self) -> None:
        """Give the memory back."""
        self._idle.clear()

    def _take(self, round: int, body: bytes) -> Copy:
        """Messages are the same if they are one object: comparing them would take as long as reading them."""
        at = next((i for i, copy in enumerate(self._idle) if copy.body is body and copy.round == round), None)
        if at is not None and (copy := self._idle.pop(at)).untouched():
            return copy
        payload = self._decode(round, body)
        return Copy(round, body, payload, versions(payload))


def versions(payload: Payload) -> list[int]:
    """How often each tensor was changed in place."""
    return [t._version for item in payload.items_.values() for t in tensors(item)]


def tensors(item: Item) -> list[Tensor]:
    """All tensors of an item."""
    values = list(item.values.values()) if isinstance(item.values, dict) else [item.values]
    return [*values, item.weight] if isinstance(item.weight, Tensor) else values


def own(payload: Payload) -> Payload:
    """The same tensors in dictionaries of their own."""
    items = payload.items_.items()
    made = {n: replace(i, values=dict(i.values) if isinstance(i.values, dict) else i.values) for n, i in items}
    return Payload(made, payload.report)
