"""How the server's models reach clients: as they are, or as changes of what clients hold.

With a sparse or low-rank stage on the way down, the server keeps an estimate of each model that it
broadcasts: what a client decodes from all messages so far. A message compresses the difference
between the model and the estimate, and both ends add it to the estimate. What compression leaves out
is part of the next difference (EF21-P: Gruntkowska, Tyurin and Richtárik 2023, Algorithm 1). All
clients that receive a model share its estimate: one that missed changes is sent them all, or the
estimate as it is. An evaluation receives what a training in its place would, and changes nothing.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import Content, EncodeCache
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, Payload, PayloadError
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import as_bytes, as_tensor

KEPT_CHANGES = 16  # a client that missed more is sent the whole estimate
HELD = "received"  # key of a client's private state: the estimates that it holds, by item
NOTHING = bytes(8)  # name of an estimate before the first change
COUNT = struct.Struct(">B")  # number of models in a message
HEADER = struct.Struct(">B8s8sB")  # bytes of the item's name; estimate before, after; changes
CHANGE_HEADER = struct.Struct(">II")  # number, bytes
WHOLE = 0  # number of a change that replaces the estimate, uncompressed


class Broadcasts(ABC):
    """Makes messages of the server's broadcasts.

    Args:
        links: Encode and decode messages.
    """

    def __init__(self, links: FederationLinks) -> None:
        self._links = links

    def begin(
        self,
        round_idx: int,
        version: int,
        archs: Iterable[ModelSpec],
        training: Collection[str] = (),
    ) -> None:
        """Forget the messages of earlier rounds.

        Args:
            round_idx: The round, which keys random draws.
            version: Rounds completed; of an asynchronous run, aggregations.
            archs: Architectures of the server's models.
            training: Clients that still train on an earlier version.
        """
        self._round_idx = round_idx
        self._version = version
        self._archs = tuple(archs)
        self._clear(training)

    @abstractmethod
    def _clear(self, training: Collection[str]) -> None:
        """Forget messages, but not what clients still train on."""

    @abstractmethod
    def content(self, client_info: ClientInfo, payload: Payload) -> Content:
        """Return the message to a client; clients that receive the same are given one object."""

    @abstractmethod
    def received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        """Return what a client decodes from the message."""

    @abstractmethod
    def received_by(self, client_id: str, round_idx: int, body: bytes) -> Payload:
        """Return what a client decoded from an earlier message, on which it trains."""

    def reset(self, client_id: str) -> bytes | None:
        """Note that a client has lost its private state.

        Returns:
            The message on which it trains, for a client that holds nothing; None if that is the
            message that it was sent.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict`; the clients' states have been loaded."""
        return


class PlainBroadcasts(Broadcasts):
    """Messages that do not depend on what clients hold.

    Args:
        links: Encode and decode messages.
        hand_over: Whether clients take payloads as they are. What must be compressed is encoded all
            the same.
    """

    def __init__(self, links: FederationLinks, hand_over: bool = False) -> None:
        super().__init__(links)
        self._hands_over = hand_over and links.down is None

    def _clear(self, training: Collection[str]) -> None:
        round_idx = self._round_idx
        archs = self._archs
        self._contents: EncodeCache[Content] = EncodeCache(
            lambda payload: (
                payload
                if self._hands_over
                else self._links.encode_broadcast(round_idx, payload, archs)
            )
        )
        self._decoded = EncodeCache(
            lambda payload: self._links.simulate_broadcast(round_idx, payload, archs)
        )

    def content(self, client_info: ClientInfo, payload: Payload) -> Content:
        return self._contents(payload)

    def received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        return payload if self._links.down is None else self._decoded(payload)

    def received_by(self, client_id: str, round_idx: int, body: bytes) -> Payload:
        return self._links.decode_broadcast(round_idx, body)


class Change(NamedTuple):
    """A part of a message that leads from one estimate of a model to the next.

    Attributes:
        number: Position among the changes of the model, from 1, which keys random draws; or `WHOLE`.
        body: The encoded difference; of `WHOLE`, the estimate.
    """

    number: int
    body: bytes


class ModelPart(NamedTuple):
    """The part of a message that concerns one model.

    Attributes:
        item: Name of the item.
        before: Name of the estimate that the client holds.
        after: Name of the estimate to which the changes lead.
        changes: The changes.
    """

    item: str
    before: bytes
    after: bytes
    changes: Sequence[Change]


@dataclass
class Step:
    """A move of an estimate towards a model.

    Attributes:
        version: The server's version.
        digest: Identifies the model.
        name: Name of the estimate after the move.
        payload: The estimate after the move, as a payload of one item.
        change: What leads to it; None if the estimate is there already.
    """

    version: int
    digest: bytes
    name: bytes
    payload: Payload
    change: Change | None


class Estimate:
    """What clients decode from all changes of a model, and the last ones of them."""

    def __init__(self) -> None:
        self._names = deque([NOTHING], KEPT_CHANGES + 1)  # before, between and after the changes
        self._changes: deque[Change] = deque(maxlen=KEPT_CHANGES)
        self._number = 0  # of changes so far
        self._last: Step | None = None
        self._next: Step | None = None

    def step(
        self,
        links: FederationLinks,
        target: Payload,
        digest: bytes,
        archs: Iterable[ModelSpec],
        version: int,
    ) -> Step:
        """Return the move towards a model; there is one for each version of the server.

        Args:
            links: Encode and decode the change.
            target: The model, as a payload of one item.
            digest: Identifies the model.
            archs: Architectures of the server's models.
            version: The server's version.
        """
        for step in (self._last, self._next):
            if step is not None and (step.version, step.digest) == (version, digest):
                return step
        held = self._last.payload if self._last is not None else None
        number = self._number + 1
        body = links.encode_broadcast(number, target, archs, held)
        after = links.decode_broadcast(number, body, held)
        name = hashlib.sha256(self._names[-1] + body).digest()[: len(NOTHING)]
        self._next = Step(version, digest, name, after, Change(number, body))
        return self._next

    def move(self, step: Step) -> Step:
        """Make a move that `step` has returned, unless it has been made; return it without change."""
        if step.change is not None:
            self._number = step.change.number
            self._changes.append(step.change)
            self._names.append(step.name)
            self._last = replace(step, change=None)
            self._next = None
        assert self._last is not None
        return self._last

    def changes_to(self, step: Step, held: bytes) -> list[Change]:
        """Return what leads from an estimate that a client holds to that of a step."""
        whole = step.payload.encoded_size
        if held in self._names:
            changes = list(self._changes)[self._names.index(held) :]
            if step.change is not None:
                changes.append(step.change)
            if _size(len(change.body) for change in changes) <= _size([whole]):
                return changes
        return [Change(WHOLE, step.payload.encode())]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs of an estimate that has moved."""
        assert self._last is not None
        return {
            "names": [name.hex() for name in self._names],
            "changes": [[change.number, as_tensor(change.body)] for change in self._changes],
            "version": self._last.version,
            "digest": self._last.digest.hex(),
            "payload": as_tensor(self._last.payload.encode()),
        }

    @property
    def has_moved(self) -> bool:
        """Whether there is anything in `state_dict`."""
        return self._last is not None

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Estimate:
        """Restore an estimate."""
        estimate = cls()
        estimate._names = deque(map(bytes.fromhex, state["names"]), KEPT_CHANGES + 1)
        estimate._changes.extend(Change(n, as_bytes(body)) for n, body in state["changes"])
        estimate._number = estimate._changes[-1].number
        estimate._last = Step(
            state["version"],
            bytes.fromhex(state["digest"]),
            estimate._names[-1],
            Payload.decode(as_bytes(state["payload"])),
            None,
        )
        return estimate


@dataclass
class Sent:
    """What a client was sent to train on.

    Attributes:
        names: Names of the estimates, by item.
        received: What the client decoded.
        rest: The part of the message that contains no models.
        stamp: Of the client's private state at that time.
        version: The server's version at that time.
    """

    names: dict[str, bytes]
    received: Payload
    rest: bytes
    stamp: int | None
    version: int


class Ledger:
    """Which estimates each client holds.

    A client keeps what it received together with its private state, that is once the server has
    used its upload.

    Args:
        stamp: Returns a number that changes with each commit of a client's private state.
    """

    def __init__(self, stamp: Callable[[str], int | None]) -> None:
        self._stamp = stamp
        self.held: dict[str, dict[str, bytes]] = {}
        self.sent: dict[str, Sent] = {}

    def held_by(self, client_id: str) -> Mapping[str, bytes]:
        """Return the names of the estimates that a client holds, by item."""
        sent = self.sent.get(client_id)
        if sent is not None and sent.stamp != self._stamp(client_id):
            self.held[client_id] = {**self.held.get(client_id, {}), **sent.names}
            del self.sent[client_id]
        return self.held.get(client_id, {})

    def send(
        self, client_id: str, names: dict[str, bytes], received: Payload, rest: bytes, version: int
    ) -> None:
        """Note what a client was sent to train on."""
        self.held_by(client_id)
        self.sent[client_id] = Sent(names, received, rest, self._stamp(client_id), version)

    def drop_unused(self, version: int, training: Collection[str]) -> None:
        """Forget what was sent before a version, but for clients that still train on it."""
        for client_id in list(self.sent):
            self.held_by(client_id)
            sent = self.sent.get(client_id)
            if sent is not None and sent.version != version and client_id not in training:
                del self.sent[client_id]

    def forget(self, client_id: str) -> None:
        """Note that a client has lost what it held."""
        self.held.pop(client_id, None)
        self.sent.pop(client_id, None)


class EstimateBroadcasts(Broadcasts):
    """Messages that change estimates of the server's models, which clients hold.

    Args:
        links: Encode and decode messages.
        stamp: Returns a number that changes with each commit of a client's private state.
    """

    def __init__(self, links: FederationLinks, stamp: Callable[[str], int | None]) -> None:
        super().__init__(links)
        self.ledger = Ledger(stamp)
        # By item and by group of clients (`estimate_group`).
        self.estimates: dict[tuple[str, str], Estimate] = {}

    def _clear(self, training: Collection[str]) -> None:
        self.ledger.drop_unused(self._version, training)
        self._digests = EncodeCache(_digest)
        self._others = EncodeCache(self._encode_others)
        self._bodies: dict[Any, bytes] = {}
        self._received: dict[Any, Payload] = {}
        self._sent_digests: dict[Any, bytes] = {}

    def content(self, client_info: ClientInfo, payload: Payload) -> bytes:
        client_id = client_info.client_id
        models, others = split_models(payload)
        rest, _ = self._others(others)
        steps = self._steps(client_info, models)
        held = dict(self.ledger.held_by(client_id))
        received = self._decoded(steps, others)
        if client_info.purpose == "train":
            steps = {place: self.estimates[place].move(step) for place, step in steps.items()}
            names = {item: step.name for (item, _), step in steps.items()}
            self.ledger.send(client_id, names, received, rest, self._version)
        parts = tuple(
            (item, group, step.name, held.get(item, NOTHING))
            for (item, group), step in steps.items()
        )
        key = parts, rest
        if key not in self._bodies:
            self._bodies[key] = _pack(
                [
                    ModelPart(
                        item, before, after, self.estimates[item, group].changes_to(step, before)
                    )
                    for (item, group, after, before), step in zip(
                        parts, steps.values(), strict=True
                    )
                ],
                rest,
            )
        return self._bodies[key]

    def received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        sent = self.ledger.sent.get(client_info.client_id)
        if sent is not None and sent.version == self._version:
            return sent.received
        models, others = split_models(payload)
        return self._decoded(self._steps(client_info, models), others)

    def received_by(self, client_id: str, round_idx: int, body: bytes) -> Payload:
        return self.ledger.sent[client_id].received

    def reset(self, client_id: str) -> bytes | None:
        sent = self.ledger.sent.get(client_id)
        self.ledger.forget(client_id)
        if sent is None:
            return None
        self.ledger.send(client_id, sent.names, sent.received, sent.rest, sent.version)
        models, _ = split_models(sent.received)
        parts = [
            ModelPart(name, NOTHING, sent.names[name], [Change(WHOLE, _only(name, item).encode())])
            for name, item in models.items_.items()
        ]
        return _pack(parts, sent.rest)

    def _steps(self, client_info: ClientInfo, models: Payload) -> dict[tuple[str, str], Step]:
        """Return the moves towards the models that a client is sent, by item and group.

        Raises:
            UserError: If clients that should share an estimate are sent different models.
        """
        group = estimate_group(self._links.algorithm, client_info)
        steps = {}
        for name, item in models.items_.items():
            target = _only(name, item)
            digest = self._digests(target)
            key = name, group, client_info.purpose, self._round_idx
            if self._sent_digests.setdefault(key, digest) != digest:
                raise UserError(
                    "channel.compress_down: the method sends different models to clients with the "
                    "same architecture; say so: needs = Needs(models_per_client=True)"
                )
            estimate = self.estimates.setdefault((name, group), Estimate())
            steps[name, group] = estimate.step(
                self._links, target, digest, self._archs, self._version
            )
        return steps

    def _decoded(self, steps: Mapping[tuple[str, str], Step], others: Payload) -> Payload:
        """Return what clients decode; the same object for all of them."""
        rest, decoded = self._others(others)
        key = tuple((place, step.name) for place, step in steps.items()), rest
        if key not in self._received:
            models = {n: i for step in steps.values() for n, i in step.payload.items_.items()}
            self._received[key] = Payload({**models, **decoded.items_}, decoded.report)
        return self._received[key]

    def _encode_others(self, others: Payload) -> tuple[bytes, Payload]:
        body = self._links.encode_broadcast(self._round_idx, others, self._archs)
        return body, self._links.decode_broadcast(self._round_idx, body)

    def state_dict(self) -> dict[str, Any]:
        for client_id in list(self.ledger.sent):
            self.ledger.held_by(client_id)
        # Sorted, because workers are given clients in an order of their own.
        sent = dict(sorted(self.ledger.sent.items()))
        received = {id(each.received): each for each in sent.values()}
        places = {key: place for place, key in enumerate(received)}
        return {
            "estimates": [
                [item, group, self.estimates[item, group].state_dict()]
                for item, group in sorted(self.estimates)
                if self.estimates[item, group].has_moved
            ],
            "held": {client: _to_hex(names) for client, names in sorted(self.ledger.held.items())},
            "sent": {
                client: [_to_hex(each.names), places[id(each.received)], each.version]
                for client, each in sent.items()
            },
            "received": [
                [as_tensor(each.received.encode()), as_tensor(each.rest)]
                for each in received.values()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.estimates = {
            (item, group): Estimate.from_state_dict(saved)
            for item, group, saved in state["estimates"]
        }
        received = [
            (Payload.decode(as_bytes(content)), as_bytes(rest))
            for content, rest in state["received"]
        ]
        self.ledger.sent.clear()
        self.ledger.held = {client: _from_hex(names) for client, names in state["held"].items()}
        for client, (names, place, version) in state["sent"].items():
            payload, rest = received[place]
            self.ledger.send(client, _from_hex(names), payload, rest, version)


def make_broadcasts(
    links: FederationLinks, stamp: Callable[[str], int | None], hand_over: bool = False
) -> Broadcasts:
    """Return what makes messages of a federation's broadcasts.

    Args:
        links: Encode and decode messages.
        stamp: Returns the number of a client's private state, see `StateStore.stamp`.
        hand_over: Whether clients take payloads as they are.
    """
    if links.sends_changes:
        return EstimateBroadcasts(links, stamp)
    return PlainBroadcasts(links, hand_over)


def estimate_group(algorithm: Algorithm, client_info: ClientInfo) -> str:
    """Return the name of the clients that share the estimates of what they are sent."""
    if algorithm.needs.models_per_client:
        return client_info.client_id
    return ",".join(f"{slot}={arch.spec_id}" for slot, arch in sorted(client_info.models.items()))


def read_broadcast(
    links: FederationLinks, round_idx: int, body: bytes, held: Mapping[str, Any] | None
) -> Payload:
    """Decode a message on the client.

    Args:
        links: Decode messages.
        round_idx: The round.
        body: The message.
        held: The estimates that the client holds (`HELD` of its private state); None if it holds
            none.

    Raises:
        PayloadError: If the message is malformed, or changes an estimate that the client does not
            hold.
    """
    if not links.sends_changes:
        return links.decode_broadcast(round_idx, body)
    parts, rest = _unpack(body)
    others = links.decode_broadcast(round_idx, rest)
    items: dict[str, Item] = {}
    for part in parts:
        is_whole = part.before == NOTHING or any(c.number == WHOLE for c in part.changes)
        estimate = None if is_whole else _find_held(held, part)
        for change in part.changes:
            if change.number == WHOLE:
                estimate = Payload.decode(change.body)
            else:
                estimate = links.decode_broadcast(change.number, change.body, estimate)
        if estimate is None or list(estimate.items_) != [part.item]:
            raise PayloadError(f"contains no change that leads to its estimate of {part.item!r}")
        items |= estimate.items_
    return Payload({**items, **others.items_}, others.report)


def hold(body: bytes, received: Payload, held: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the estimates that a client holds after a message, in memory of their own.

    Args:
        body: The message, which `read_broadcast` has read.
        received: What it contains.
        held: The estimates that the client held.
    """
    after = dict(held or {})
    for part in _unpack(body)[0]:
        tensors = {n: t.clone() for n, t in received.items_[part.item].tensors.items()}
        after[part.item] = {"name": part.after.hex(), "tensors": tensors}
    return after


def _find_held(held: Mapping[str, Any] | None, part: ModelPart) -> Payload:
    """Return the estimate that a client holds, which a message says to change."""
    known = (held or {}).get(part.item)
    if known is None or known["name"] != part.before.hex():
        raise PayloadError("changes an estimate that this client does not hold")
    return _only(part.item, Item(known["tensors"], kind="params"))


def message_bytes(models: Mapping[str, Sequence[int]], rest: int) -> int:
    """Return the bytes of a message.

    Args:
        models: Bytes of each change, by item.
        rest: Bytes of everything else.
    """
    parts = sum(HEADER.size + len(n.encode()) + _size(sizes) for n, sizes in models.items())
    return COUNT.size + parts + rest


def _size(sizes: Iterable[int]) -> int:
    """Return the bytes of changes with their headers."""
    return sum(CHANGE_HEADER.size + size for size in sizes)


def _pack(parts: Sequence[ModelPart], rest: bytes) -> bytes:
    pieces = [COUNT.pack(len(parts))]
    for part in parts:
        name = part.item.encode()
        pieces += [HEADER.pack(len(name), part.before, part.after, len(part.changes)), name]
        for change in part.changes:
            pieces += [CHANGE_HEADER.pack(change.number, len(change.body)), change.body]
    return b"".join([*pieces, rest])


def _unpack(body: bytes) -> tuple[list[ModelPart], bytes]:
    """Return the parts of a message that concern models, and the rest."""
    start = 0

    def take(size: int) -> bytes:
        nonlocal start
        start += size
        if start > len(body):
            raise PayloadError("ends within a header or a change")
        return body[start - size : start]

    parts = []
    for _ in range(*COUNT.unpack(take(COUNT.size))):
        length, before, after, count = HEADER.unpack(take(HEADER.size))
        try:
            name = take(length).decode()
        except UnicodeDecodeError:
            raise PayloadError("names an item in another encoding than UTF-8") from None
        changes = []
        for _ in range(count):
            number, size = CHANGE_HEADER.unpack(take(CHANGE_HEADER.size))
            changes.append(Change(number, take(size)))
        parts.append(ModelPart(name, before, after, changes))
    return parts, body[start:]


def split_models(payload: Payload) -> tuple[Payload, Payload]:
    """Return the models of a payload, and everything else."""
    models = {name: item for name, item in payload.items_.items() if item.kind == "params"}
    others = {name: item for name, item in payload.items_.items() if item.kind != "params"}
    return Payload(models), Payload(others, payload.report)


def _only(name: str, item: Item) -> Payload:
    """Return a payload of one item."""
    return Payload({name: item})


def _digest(models: Payload) -> bytes:
    """Return a digest of names, shapes and numbers of models."""
    digest = hashlib.sha256()
    for name, item in sorted(models.items_.items()):
        for key, tensor in sorted(item.tensors.items()):
            digest.update(repr((name, key, tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(
                tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8).data
            )
    return digest.digest()


def _to_hex(names: Mapping[str, bytes]) -> dict[str, str]:
    return {item: name.hex() for item, name in names.items()}


def _from_hex(names: Mapping[str, str]) -> dict[str, bytes]:
    return {item: bytes.fromhex(name) for item, name in names.items()}
