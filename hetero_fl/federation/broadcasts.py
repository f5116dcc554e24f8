"""How the server's models reach clients: as they are, or as changes of what clients hold.

With a sparse or low-rank stage on the way down, the server keeps an estimate of each model that it
broadcasts: what a client decodes from all messages so far. A message compresses the difference
between the model and the estimate, and both ends add it to the estimate. What compression leaves out
is part of the next difference (EF21-P: Gruntkowska, Tyurin and Richtárik 2023, Algorithm 1). All
clients that receive a model share its estimate: one that missed messages is sent them all, or the
estimate as it is.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from hetero_fl.communication.protocol import EncodeCache
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, Payload, PayloadError
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import as_bytes, as_tensor

KEPT_CHANGES = 16  # a client that missed more is sent the whole estimate
HELD = "received"  # key of a client's private state: the estimate that it holds, and its name
NOTHING = bytes(8)  # name of the estimate before the first message
HEADER = struct.Struct(">8s8sB")  # estimate before and after, number of changes
CHANGE_HEADER = struct.Struct(">II")  # number, bytes
WHOLE = 0  # number of a change that replaces the estimate, uncompressed


class Broadcasts(Protocol):
    """Encodes the server's broadcasts."""

    def begin(
        self,
        round_idx: int,
        version: int,
        archs: Iterable[ModelSpec],
        training: Collection[str] = (),
    ) -> None:
        """Forget encoded broadcasts.

        Args:
            round_idx: The round, which keys random draws.
            version: Number of times that the server's models have changed.
            archs: Architectures of the server's models.
            training: Clients that still train on an earlier version.
        """

    def encode(self, client_info: ClientInfo, payload: Payload) -> bytes:
        """Return the message to a client; one that several clients receive is encoded once."""

    def received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        """Return what a client decodes from the message."""

    def received_by(self, client_id: str, round_idx: int, body: bytes) -> Payload:
        """Return what a client decoded from an earlier message, on which it trains."""

    def reset(self, client_id: str) -> bytes | None:
        """Note that a client has lost its private state.

        Returns:
            The message on which it trains, for a client that holds nothing; None if that is the
            message that it was sent.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict`; the clients' states have been loaded."""


class PlainBroadcasts:
    """Messages that do not depend on what clients hold.

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
        archs = tuple(archs)
        self._encoded = EncodeCache(
            lambda payload: self._links.encode_broadcast(round_idx, payload, archs)
        )
        self._decoded = EncodeCache(
            lambda payload: self._links.simulate_broadcast(round_idx, payload, archs)
        )

    def encode(self, client_info: ClientInfo, payload: Payload) -> bytes:
        return self._encoded(payload)

    def received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        return payload if self._links.down is None else self._decoded(payload)

    def received_by(self, client_id: str, round_idx: int, body: bytes) -> Payload:
        return self._links.decode_broadcast(round_idx, body)

    def reset(self, client_id: str) -> bytes | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Change(NamedTuple):
    """A message's part that leads from one estimate to the next.

    Attributes:
        number: Position among the changes of a model, from 1, which keys random draws; or `WHOLE`.
        body: The encoded difference; of `WHOLE`, the payload.
    """

    number: int
    body: bytes


class Estimate:
    """What clients decode from all messages of a model, and the last changes of it.

    Attributes:
        names: Of the estimates between the kept changes, the oldest first; the last is the present.
        changes: The kept changes, the oldest first.
        number: Number of changes so far.
        version: The server's version when it changed last.
        digest: Identifies the model that it was changed towards.
    """

    def __init__(self) -> None:
        self.names = deque([NOTHING], KEPT_CHANGES + 1)
        self.changes: deque[Change] = deque(maxlen=KEPT_CHANGES)
        self.number = 0
        self.version = -1
        self.digest = b""
        self.payload: Payload | None = None
        # Version, round and digest of the models that were sent last to train on.
        self.trained: tuple[int, int, bytes] = (-1, -1, b"")

    @property
    def name(self) -> bytes:
        """Name of the present estimate."""
        return self.names[-1]

    def move(
        self, links: FederationLinks, target: Payload, archs: Iterable[ModelSpec], version: int
    ) -> None:
        """Move towards a model by one change."""
        self.number += 1
        body = links.encode_broadcast(self.number, target, archs, self.payload)
        self.payload = links.decode_broadcast(self.number, body, self.payload)
        self.changes.append(Change(self.number, body))
        self.names.append(hashlib.sha256(self.name + body).digest()[: len(NOTHING)])
        self.version = version

    def changes_since(self, name: bytes) -> list[Change] | None:
        """Return what leads from an estimate to the present one; None if too much was missed."""
        if name not in self.names:
            return None
        return list(self.changes)[self.names.index(name) :]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        assert self.payload is not None
        return {
            "names": [name.hex() for name in self.names],
            "changes": [[change.number, as_tensor(change.body)] for change in self.changes],
            "version": self.version,
            "digest": self.digest.hex(),
            "payload": as_tensor(self.payload.encode()),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Estimate:
        """Restore an estimate."""
        estimate = cls()
        estimate.names = deque(map(bytes.fromhex, state["names"]), KEPT_CHANGES + 1)
        estimate.changes.extend(Change(n, as_bytes(body)) for n, body in state["changes"])
        estimate.number = estimate.changes[-1].number
        estimate.version = state["version"]
        estimate.digest = bytes.fromhex(state["digest"])
        estimate.payload = Payload.decode(as_bytes(state["payload"]))
        return estimate


@dataclass
class SentEstimate:
    """The estimate that a client was sent to train on.

    Attributes:
        name: Name of the estimate.
        received: What the client decoded.
        stamp: Of the client's private state at that time.
        version: The server's version at that time.
    """

    name: bytes
    received: Payload
    stamp: int | None
    version: int


class Ledger:
    """Which estimate each client holds.

    A client keeps what it received together with its private state, that is once the server has
    used its upload.

    Args:
        stamp: Returns a number that changes with each commit of a client's private state.
    """

    def __init__(self, stamp: Callable[[str], int | None]) -> None:
        self._stamp = stamp
        self.held: dict[str, bytes] = {}
        self.sent: dict[str, SentEstimate] = {}

    def held_by(self, client_id: str) -> bytes:
        """Return the name of the estimate that a client holds."""
        sent = self.sent.get(client_id)
        if sent is not None and sent.stamp != self._stamp(client_id):
            self.held[client_id] = sent.name
            del self.sent[client_id]
        return self.held.get(client_id, NOTHING)

    def send(self, client_id: str, name: bytes, received: Payload, version: int) -> None:
        """Note that a client was sent an estimate."""
        self.held_by(client_id)
        self.sent[client_id] = SentEstimate(name, received, self._stamp(client_id), version)

    def settle(self, version: int, training: Collection[str]) -> None:
        """Drop what was sent before a version to clients that no longer train on it."""
        for client_id in list(self.sent):
            self.held_by(client_id)
            sent = self.sent.get(client_id)
            if sent is not None and sent.version != version and client_id not in training:
                del self.sent[client_id]

    def forget(self, client_id: str) -> None:
        """Note that a client has lost what it held."""
        self.held.pop(client_id, None)
        self.sent.pop(client_id, None)


class EstimateBroadcasts:
    """Messages that change an estimate of the server's models, which clients hold.

    Args:
        links: Encode and decode messages.
        stamp: Returns a number that changes with each commit of a client's private state.
    """

    def __init__(self, links: FederationLinks, stamp: Callable[[str], int | None]) -> None:
        self._links = links
        self.ledger = Ledger(stamp)
        # Clients that receive models of the same names and shapes share an estimate.
        self.estimates: dict[Any, Estimate] = {}

    def begin(
        self,
        round_idx: int,
        version: int,
        archs: Iterable[ModelSpec],
        training: Collection[str] = (),
    ) -> None:
        self._round_idx = round_idx
        self._version = version
        self._archs = tuple(archs)
        self.ledger.settle(version, training)
        self._digests = EncodeCache(_digest)
        self._others = EncodeCache(self._encode_others)
        self._bodies: dict[Any, bytes] = {}
        self._received: dict[Any, Payload] = {}

    def encode(self, client_info: ClientInfo, payload: Payload) -> bytes:
        models, others = split_models(payload)
        rest, _ = self._others(others)
        if not models.items_:
            return _pack(NOTHING, NOTHING, [], rest)
        client_id = client_info.client_id
        estimate = self._move(client_info, models)
        received = self._decoded(estimate, others)
        held = self.ledger.held_by(client_id)
        if client_info.purpose == "train":
            self.ledger.send(client_id, estimate.name, received, self._version)
        changes = estimate.changes_since(held)
        key = estimate.name, rest, None if changes is None else held
        if key not in self._bodies:
            if changes is None:
                self._bodies[key] = _pack_whole(estimate.name, received)
            else:
                self._bodies[key] = _pack(held, estimate.name, changes, rest)
        return self._bodies[key]

    def received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        sent = self.ledger.sent.get(client_info.client_id)
        if sent is not None and sent.version == self._version:
            return sent.received
        models, others = split_models(payload)
        if not models.items_:
            return self._others(others)[1]
        return self._decoded(self._move(client_info, models), others)

    def received_by(self, client_id: str, round_idx: int, body: bytes) -> Payload:
        sent = self.ledger.sent.get(client_id)
        if sent is None:  # no model was in the message
            return read_broadcast(self._links, round_idx, body, None)
        return sent.received

    def reset(self, client_id: str) -> bytes | None:
        sent = self.ledger.sent.get(client_id)
        self.ledger.forget(client_id)
        if sent is None:
            return None
        self.ledger.send(client_id, sent.name, sent.received, sent.version)
        return _pack_whole(sent.name, sent.received)

    def _move(self, client_info: ClientInfo, models: Payload) -> Estimate:
        """Return the estimate of these models, moved towards them unless it has been already.

        Raises:
            UserError: If clients that should share an estimate are sent different models.
        """
        per_client = self._links.algorithm.needs.models_per_client
        key = tensor_structure(models), client_info.client_id if per_client else ""
        estimate = self.estimates.setdefault(key, Estimate())
        digest = self._digests(models)
        if (estimate.version, estimate.digest) != (self._version, digest):
            estimate.move(self._links, models, self._archs, self._version)
            estimate.digest = digest
        if client_info.purpose == "train":
            trained = self._version, self._round_idx, digest
            if estimate.trained[:2] == trained[:2] and estimate.trained != trained:
                raise UserError(
                    "channel.compress_down: the method sends different models of the same shapes "
                    "to clients; say so: needs = Needs(models_per_client=True)"
                )
            estimate.trained = trained
        return estimate

    def _decoded(self, estimate: Estimate, others: Payload) -> Payload:
        """Return what clients decode; the same object for all of them."""
        rest, decoded = self._others(others)
        key = estimate.name, rest
        if key not in self._received:
            assert estimate.payload is not None
            items = {**estimate.payload.items_, **decoded.items_}
            self._received[key] = Payload(items, decoded.report)
        return self._received[key]

    def _encode_others(self, others: Payload) -> tuple[bytes, Payload]:
        body = self._links.encode_broadcast(self._round_idx, others, self._archs)
        return body, self._links.decode_broadcast(self._round_idx, body)

    def state_dict(self) -> dict[str, Any]:
        for client_id in list(self.ledger.sent):
            self.ledger.held_by(client_id)
        # Sorted, because workers are given clients in an order of their own.
        sent = dict(sorted(self.ledger.sent.items()))
        payloads = {id(each.received): each.received for each in sent.values()}
        places = {key: place for place, key in enumerate(payloads)}
        return {
            "estimates": [
                [client_id, self.estimates[structure, client_id].state_dict()]
                for structure, client_id in sorted(self.estimates)
            ],
            "held": {client: name.hex() for client, name in sorted(self.ledger.held.items())},
            "sent": {
                client: [each.name.hex(), places[id(each.received)], each.version]
                for client, each in sent.items()
            },
            "received": [as_tensor(payload.encode()) for payload in payloads.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.estimates = {}
        for client_id, saved in state["estimates"]:
            estimate = Estimate.from_state_dict(saved)
            assert estimate.payload is not None
            self.estimates[tensor_structure(estimate.payload), client_id] = estimate
        received = [Payload.decode(as_bytes(content)) for content in state["received"]]
        ledger = self.ledger
        ledger.sent.clear()
        ledger.held = {client: bytes.fromhex(name) for client, name in state["held"].items()}
        for client, (name, place, version) in state["sent"].items():
            ledger.send(client, bytes.fromhex(name), received[place], version)


def make_broadcasts(links: FederationLinks, stamp: Callable[[str], int | None]) -> Broadcasts:
    """Return what encodes the broadcasts of a federation."""
    return EstimateBroadcasts(links, stamp) if links.sends_changes else PlainBroadcasts(links)


def read_broadcast(
    links: FederationLinks, round_idx: int, body: bytes, held: Mapping[str, Any] | None
) -> Payload:
    """Decode a message on the client.

    Args:
        links: Decode messages.
        round_idx: The round.
        body: The message.
        held: The estimate that the client holds (`HELD` of its private state); None if it holds
            none.

    Raises:
        PayloadError: If the message is malformed, or changes an estimate that the client does not
            hold.
    """
    if not links.sends_changes:
        return links.decode_broadcast(round_idx, body)
    before, after, changes, rest = _unpack(body)
    if after == NOTHING:
        return links.decode_broadcast(round_idx, rest)
    if changes and changes[0].number == WHOLE:
        return Payload.decode(changes[0].body)
    models = _find_reference(held, before)
    for change in changes:
        models = links.decode_broadcast(change.number, change.body, models)
    if models is None:
        raise PayloadError("names an estimate without a change that leads to it")
    others = links.decode_broadcast(round_idx, rest)
    return Payload({**models.items_, **others.items_}, others.report)


def hold(body: bytes, received: Payload, held: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what a client that received a message holds, in memory of its own.

    Args:
        body: The message, which `read_broadcast` has read.
        received: What it contains.
        held: The estimate that the client held.
    """
    _, after, _ = HEADER.unpack_from(body)
    if after == NOTHING:
        return held
    models = {
        name: {n: tensor.clone() for n, tensor in item.tensors.items()}
        for name, item in split_models(received)[0].items_.items()
    }
    return {"name": after.hex(), "models": models}


def _find_reference(held: Mapping[str, Any] | None, name: bytes) -> Payload | None:
    """Return the estimate that a client holds, which a message says to change."""
    if name == NOTHING:
        return None
    if held is None or held["name"] != name.hex():
        raise PayloadError("changes an estimate that this client does not hold")
    return Payload({n: Item(tensors, kind="params") for n, tensors in held["models"].items()})


def message_bytes(changes: Iterable[int], rest: int) -> int:
    """Return the bytes of a message, given those of its changes and of all else in it."""
    return HEADER.size + sum(CHANGE_HEADER.size + size for size in changes) + rest


def _pack(before: bytes, after: bytes, changes: Collection[Change], rest: bytes) -> bytes:
    parts = [HEADER.pack(before, after, len(changes))]
    for change in changes:
        parts += [CHANGE_HEADER.pack(change.number, len(change.body)), change.body]
    return b"".join([*parts, rest])


def _pack_whole(name: bytes, payload: Payload) -> bytes:
    return _pack(NOTHING, name, [Change(WHOLE, payload.encode())], b"")


def _unpack(body: bytes) -> tuple[bytes, bytes, list[Change], bytes]:
    """Return the names before and after, the changes and the rest of a message."""
    try:
        before, after, count = HEADER.unpack_from(body)
        start = HEADER.size
        changes = []
        for _ in range(count):
            number, size = CHANGE_HEADER.unpack_from(body, start)
            start += CHANGE_HEADER.size
            if start + size > len(body):
                raise PayloadError("ends within a change")
            changes.append(Change(number, body[start : start + size]))
            start += size
    except struct.error:
        raise PayloadError("ends within a header") from None
    return before, after, changes, body[start:]


def split_models(payload: Payload) -> tuple[Payload, Payload]:
    """Return the models of a payload, and everything else."""
    models = {name: item for name, item in payload.items_.items() if item.kind == "params"}
    others = {name: item for name, item in payload.items_.items() if item.kind != "params"}
    return Payload(models), Payload(others, payload.report)


def tensor_structure(payload: Payload) -> Any:
    """Return the names, shapes and types of the tensors of a payload."""
    return tuple(
        (name, tuple((n, tuple(t.shape), str(t.dtype)) for n, t in sorted(item.tensors.items())))
        for name, item in sorted(payload.items_.items())
    )


def _digest(models: Payload) -> bytes:
    """Return a digest of the numbers of models."""
    digest = hashlib.sha256()
    for _, item in sorted(models.items_.items()):
        for _, tensor in sorted(item.tensors.items()):
            array = tensor.detach().cpu().contiguous().numpy()
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()
