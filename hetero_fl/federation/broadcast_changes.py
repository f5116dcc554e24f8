"""Broadcasts as changes of what each client received before.

What a client decodes from a message is a version of the server's model; sender and receiver compute
it alike. The next message tells the change from the version that the client holds. What compression
leaves out of a change is part of the next one, because that is taken against what the client holds
and not against what the server has (EF21-P: Gruntkowska, Tyurin and Richtárik 2023, Algorithm 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hetero_fl.communication.protocol import EncodeCache
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, Payload, PayloadError
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.utils.serialization import as_bytes, as_tensor

KEPT_ROUNDS = 8  # a client that received nothing in so many rounds is sent the whole model
NAME_BYTES = 8
WHOLE = bytes(NAME_BYTES)  # in place of a version's name: the message tells the whole model
HELD = "received"  # where a client keeps the version that it holds, in its private state


@dataclass
class Version:
    """What clients decode from a message, and the round in which it was sent."""

    payload: Payload
    round_idx: int


@dataclass
class SentVersion:
    """The version that a client was sent last, and the stamp of its state at that time."""

    name: bytes
    stamp: int | None


class VersionLedger:
    """Which version each client holds.

    A client keeps what it received together with its private state, that is once the server has
    used its upload.

    Args:
        stamp: Returns a number that changes with a client's committed state.
    """

    def __init__(self, stamp: Callable[[str], int | None]) -> None:
        self._stamp = stamp
        self._held: dict[str, bytes] = {}
        self._sent: dict[str, SentVersion] = {}

    def held_by(self, client_id: str) -> bytes:
        """Return the name of the version that a client holds, `WHOLE` if it holds none."""
        sent = self._sent.get(client_id)
        if sent is not None and sent.stamp != self._stamp(client_id):
            self._held[client_id] = sent.name
            del self._sent[client_id]
        return self._held.get(client_id, WHOLE)

    def add(self, client_id: str, name: bytes) -> None:
        """Note that a client was sent a version."""
        self.held_by(client_id)
        self._sent[client_id] = SentVersion(name, self._stamp(client_id))

    def sent_to(self, client_id: str) -> bytes:
        """Return the name of the version that a client was sent last."""
        return self._sent[client_id].name

    def forget(self, client_id: str) -> None:
        """Note that a client has lost what it held."""
        self._held.pop(client_id, None)
        self._sent.pop(client_id, None)

    def keep(self, recent: Collection[bytes]) -> set[bytes]:
        """Forget what clients hold, but for `recent` versions; return the versions still in use."""
        for client_id in list(self._sent):
            self.held_by(client_id)
        self._held = {client: name for client, name in self._held.items() if name in recent}
        return {*self._held.values(), *(sent.name for sent in self._sent.values())}

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger for a checkpoint."""
        for client_id in list(self._sent):
            self.held_by(client_id)
        held = {client: self._held[client].hex() for client in sorted(self._held)}
        sent = {client: self._sent[client].name.hex() for client in sorted(self._sent)}
        return {"held": held, "sent": sent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the clients' states have been loaded."""
        self._held = {client: bytes.fromhex(name) for client, name in state["held"].items()}
        self._sent = {
            client: SentVersion(bytes.fromhex(name), self._stamp(client))
            for client, name in state["sent"].items()
        }


class BroadcastChanges:
    """The server's side: encodes each broadcast as a change of the version that its client holds.

    Args:
        links: Encode and decode messages.
        stamp: Returns a number that changes with a client's committed state.
    """

    def __init__(self, links: FederationLinks, stamp: Callable[[str], int | None]) -> None:
        self._links = links
        self.ledger = VersionLedger(stamp)
        self._versions: dict[bytes, Version] = {}
        self._caches: dict[bytes, EncodeCache[tuple[bytes, bytes]]] = {}  # by held version
        self._round_idx = 0
        self._archs: tuple[ModelSpec, ...] = ()

    def begin(self, round_idx: int, archs: Iterable[ModelSpec]) -> None:
        """Go on to another round, or another state of the server.

        Args:
            round_idx: The round, which keys random draws.
            archs: Architectures of the server's models.
        """
        self._round_idx = round_idx
        self._archs = tuple(archs)
        self._caches.clear()
        oldest = round_idx - KEPT_ROUNDS
        in_use = self.ledger.keep({n for n, v in self._versions.items() if v.round_idx >= oldest})
        self._versions = {name: v for name, v in self._versions.items() if name in in_use}

    def encode(self, client_info: ClientInfo, payload: Payload) -> bytes:
        """Return the message to a client."""
        body, name = self._encode(client_info.client_id, payload)
        if client_info.purpose == "train":
            self.ledger.add(client_info.client_id, name)
        return body

    def received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        """Return what a client decodes from the message with that payload."""
        _, name = self._encode(client_info.client_id, payload)
        return self._versions[name].payload

    def received_last(self, client_id: str) -> Payload:
        """Return what a client decoded from the last message that it was sent to train on."""
        return self._versions[self.ledger.sent_to(client_id)].payload

    def _encode(self, client_id: str, payload: Payload) -> tuple[bytes, bytes]:
        held = self.ledger.held_by(client_id)
        if held not in self._versions:
            held = WHOLE
        if held not in self._caches:
            self._caches[held] = EncodeCache(lambda payload: self._encode_change(held, payload))
        return self._caches[held](payload)

    def _encode_change(self, held: bytes, payload: Payload) -> tuple[bytes, bytes]:
        reference = self._versions[held].payload if held in self._versions else None
        body = held + self._links.encode_broadcast(self._round_idx, payload, self._archs, reference)
        name = version_name(body)
        received = self._links.decode_broadcast(self._round_idx, body[NAME_BYTES:], reference)
        self._versions[name] = Version(received, self._round_idx)
        return body, name

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        versions = {
            name.hex(): [version.round_idx, as_tensor(version.payload.encode())]
            for name, version in sorted(self._versions.items(), key=lambda pair: pair[0])
        }
        return {"ledger": self.ledger.state_dict(), "versions": versions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the clients' states have been loaded."""
        self.ledger.load_state_dict(state["ledger"])
        self._versions = {
            bytes.fromhex(name): Version(Payload.decode(as_bytes(content)), round_idx)
            for name, (round_idx, content) in state["versions"].items()
        }


def version_name(body: bytes) -> bytes:
    """Return the name of the version that a message tells."""
    return hashlib.sha256(body).digest()[:NAME_BYTES]


def read_broadcast(
    links: FederationLinks, round_idx: int, body: bytes, state: dict[str, Any]
) -> Payload:
    """Decode a message on the client.

    Args:
        links: Decode messages.
        round_idx: The round.
        body: The message.
        state: The client's private state. If broadcasts tell changes it holds a version, and the
            new one takes its place.

    Raises:
        PayloadError: If the message is malformed, or tells the change of another version.
    """
    if not links.sends_changes:
        return links.decode_broadcast(round_idx, body)
    held = state.get(HELD)
    wanted = body[:NAME_BYTES]
    reference = None
    if wanted != WHOLE:
        if held is None or held["name"] != wanted.hex():
            raise PayloadError("tells the change of a broadcast that this client does not hold")
        reference = Payload({n: Item(v, kind="params") for n, v in held["models"].items()})
    payload = links.decode_broadcast(round_idx, body[NAME_BYTES:], reference)
    # Copies, because a hook may change what it received.
    models = {
        name: {n: t.clone() for n, t in item.tensors.items()}
        for name, item in payload.items_.items()
        if item.kind == "params"
    }
    state[HELD] = {"name": version_name(body).hex(), "models": models}
    return payload
