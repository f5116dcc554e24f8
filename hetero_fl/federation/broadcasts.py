"""Encoding of the server's broadcasts, either in full or as changes to models that clients have.

With a sparse or low-rank stage in `channel.compress_down`, the server and the clients store an
estimate of each model. A message then contains the compressed difference between a model and the
estimate, which the server and the clients add to the estimate (EF21-P: Gruntkowska, Tyurin and
Richtárik 2023, Algorithm 1). The name of an estimate is a hash of all differences so far.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from typing_extensions import override

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.model_changes import (
    CHANGE_HEADER,
    NO_ESTIMATE,
    WHOLE,
    Change,
    ModelPart,
    pack_changes,
    unpack_changes,
)
from hetero_fl.communication.protocol import Content, EncodeCache
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, Payload, PayloadError
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import as_bytes, as_tensor

# Number of changes that the server stores. A client that missed more changes receives the whole
# estimate.
KEPT_CHANGES = 16
# Name of the entry in a client's private state that contains the client's estimates, keyed by item.
ESTIMATES_KEY = "received"


class Broadcasts(ABC):
    """Base class for encoders of the server's broadcasts.

    Args:
        links: The links that encode and decode messages.
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
        """Begin a round, and drop the messages of earlier rounds.

        Messages on which clients still train are not dropped.

        Args:
            round_idx: Index of the round, from 0, which seeds random draws.
            version: Number of completed rounds. In an asynchronous run, number of aggregations.
            archs: Architectures of the server's models.
            training: Ids of clients that still train on an earlier version.
        """
        self._round_idx = round_idx
        self._version = version
        self._archs = tuple(archs)
        self._clear(training)

    @abstractmethod
    def _clear(self, training: Collection[str]) -> None:
        """Drop all messages except those on which the clients in `training` still train."""

    @abstractmethod
    def content(self, client_info: ClientInfo, payload: Payload) -> Content:
        """Return the message to a client.

        Clients with the same message receive the same object.

        Args:
            client_info: The client.
            payload: The broadcast.
        """

    @abstractmethod
    def received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        """Return the payload that a client decodes from the message.

        Args:
            client_info: The client.
            payload: The broadcast before encoding.
        """

    @abstractmethod
    def received_by(self, client_id: str, round_idx: int, body: bytes) -> Payload:
        """Return the payload that a client decoded from an earlier message.

        Args:
            client_id: The client, which still trains on the message.
            round_idx: Index of the round in which the message was sent, from 0.
            body: The message.
        """

    def reset(self, client_id: str) -> bytes | None:
        """Record that a client has lost its private state.

        Returns:
            A message that replaces the message on which the client trains, and that can be decoded
            without private state. None if no replacement is needed.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from the return value of `state_dict`.

        The clients' private states must be loaded first.
        """
        return


class PlainBroadcasts(Broadcasts):
    """Encoder of broadcasts that do not depend on earlier messages.

    Args:
        links: The links that encode and decode messages.
        skips_encoding: Whether payloads are passed to clients in this process without encoding.
            Ignored if broadcasts are compressed.
    """

    def __init__(self, links: FederationLinks, skips_encoding: bool = False) -> None:
        super().__init__(links)
        self._skips_encoding = skips_encoding and links.down is None

    @override
    def _clear(self, training: Collection[str]) -> None:
        round_idx = self._round_idx
        archs = self._archs
        self._contents: EncodeCache[Content] = EncodeCache(
            lambda payload: (
                payload
                if self._skips_encoding
                else self._links.encode_broadcast(round_idx, payload, archs)
            )
        )
        self._decoded = EncodeCache(
            lambda payload: self._links.simulate_broadcast(round_idx, payload, archs)
        )

    @override
    def content(self, client_info: ClientInfo, payload: Payload) -> Content:
        return self._contents(payload)

    @override
    def received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        return payload if self._links.down is None else self._decoded(payload)

    @override
    def received_by(self, client_id: str, round_idx: int, body: bytes) -> Payload:
        return self._links.decode_broadcast(round_idx, body)


@dataclass
class EstimateStep:
    """Update of an estimate toward a model.

    Attributes:
        version: Number of completed rounds or aggregations when the step was computed.
        digest: Digest of the model.
        name: Name of the estimate after the step.
        payload: The estimate after the step, as a payload of one item.
        change: The encoded change. None if the step has been applied to the estimate.
    """

    version: int
    digest: bytes
    name: bytes
    payload: Payload
    change: Change | None


class Estimate:
    """Estimate of a model: the model that clients decode from all changes so far.

    The server stores the latest changes, because some clients may not have received all changes.
    After each change, the name of the estimate is a new hash.
    """

    def __init__(self) -> None:
        # Names of the estimates before, between and after the stored changes.
        self._names = deque([NO_ESTIMATE], KEPT_CHANGES + 1)
        self._changes: deque[Change] = deque(maxlen=KEPT_CHANGES)
        # Number of changes so far.
        self._number = 0
        self._last: EstimateStep | None = None
        self._next: EstimateStep | None = None

    def step(
        self,
        links: FederationLinks,
        target: Payload,
        digest: bytes,
        archs: Iterable[ModelSpec],
        version: int,
    ) -> EstimateStep:
        """Return the step toward a model, without applying the step.

        Repeated calls with the same model and version return the same step.

        Args:
            links: The links that encode and decode the change.
            target: The model, as a payload of one item.
            digest: Digest of the model.
            archs: Architectures of the server's models.
            version: Number of completed rounds or aggregations.
        """
        for step in (self._last, self._next):
            if step is not None and (step.version, step.digest) == (version, digest):
                return step
        before = self._last.payload if self._last is not None else None
        number = self._number + 1
        body = links.encode_broadcast(number, target, archs, before)
        after = links.decode_broadcast(number, body, before)
        name = hashlib.sha256(self._names[-1] + body).digest()[: len(NO_ESTIMATE)]
        self._next = EstimateStep(version, digest, name, after, Change(number, body))
        return self._next

    def apply(self, step: EstimateStep) -> EstimateStep:
        """Apply a step to the estimate.

        If the step has already been applied, the estimate does not change.

        Returns:
            The applied step, without the change.
        """
        if step.change is not None:
            self._number = step.change.number
            self._changes.append(step.change)
            self._names.append(step.name)
            self._last = replace(step, change=None)
            self._next = None
        assert self._last is not None
        return self._last

    def changes_to(self, step: EstimateStep, before: bytes) -> list[Change]:
        """Return the changes that update a client's estimate to the estimate after a step.

        Args:
            step: The step.
            before: Name of the client's estimate.

        Returns:
            The changes that the client does not have, in order. If some changes are no longer
            stored or the whole estimate is shorter, a single change that replaces the estimate.
        """
        whole = step.payload.encoded_size
        if before in self._names:
            changes = list(self._changes)[self._names.index(before) :]
            if step.change is not None:
                changes.append(step.change)
            size = sum(CHANGE_HEADER.size + len(change.body) for change in changes)
            if size <= CHANGE_HEADER.size + whole:
                return changes
        return [Change(WHOLE, step.payload.encode())]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. `has_moved` must be True."""
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
        """Whether a step has been applied to the estimate."""
        return self._last is not None

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Estimate:
        """Create an estimate from the return value of `state_dict`."""
        estimate = cls()
        estimate._names = deque(map(bytes.fromhex, state["names"]), KEPT_CHANGES + 1)
        estimate._changes.extend(Change(n, as_bytes(body)) for n, body in state["changes"])
        estimate._number = estimate._changes[-1].number
        estimate._last = EstimateStep(
            state["version"],
            bytes.fromhex(state["digest"]),
            estimate._names[-1],
            Payload.decode(as_bytes(state["payload"])),
            None,
        )
        return estimate


@dataclass
class SentBroadcast:
    """Broadcast on which a client trains.

    Attributes:
        names: Names of the client's estimates after the broadcast, keyed by item.
        received: The payload that the client decodes.
        rest: The part of the message without models.
        stamp: Version number of the client's private state when the broadcast was sent (see
            `StateStore.stamp`).
        version: Number of completed rounds or aggregations when the broadcast was sent.
    """

    names: dict[str, bytes]
    received: Payload
    rest: bytes
    stamp: int | None
    version: int


class ClientEstimates:
    """Record of the estimates that each client has.

    A client stores estimates in the private state. The estimates after a broadcast are recorded
    only when the private state is committed, which happens when the server has used the client's
    upload.

    Args:
        stamp: Function that returns the version number of a client's private state
            (`StateStore.stamp`).

    Attributes:
        names: Names of the estimates that each client has, keyed by client id and item.
        sent: The last broadcast to each client, keyed by client id. An entry is removed after the
            private state of the client has been committed.
    """

    def __init__(self, stamp: Callable[[str], int | None]) -> None:
        self._stamp = stamp
        self.names: dict[str, dict[str, bytes]] = {}
        self.sent: dict[str, SentBroadcast] = {}

    def record_commit(self, client_id: str) -> None:
        """Record the estimates after the last broadcast if the private state was committed."""
        sent = self.sent.get(client_id)
        if sent is not None and sent.stamp != self._stamp(client_id):
            self.names[client_id] = {**self.names.get(client_id, {}), **sent.names}
            del self.sent[client_id]

    def names_of(self, client_id: str) -> Mapping[str, bytes]:
        """Return the names of the estimates that a client has, keyed by item."""
        self.record_commit(client_id)
        return self.names.get(client_id, {})

    def send(
        self, client_id: str, names: dict[str, bytes], received: Payload, rest: bytes, version: int
    ) -> None:
        """Record the broadcast on which a client will train.

        Args:
            client_id: The client.
            names: Names of the client's estimates after the broadcast, keyed by item.
            received: The payload that the client decodes.
            rest: The part of the message without models.
            version: Number of completed rounds or aggregations.
        """
        self.record_commit(client_id)
        self.sent[client_id] = SentBroadcast(names, received, rest, self._stamp(client_id), version)

    def drop_unused(self, version: int, training: Collection[str]) -> None:
        """Drop broadcasts of earlier versions, except those on which clients still train.

        Args:
            version: Current number of completed rounds or aggregations.
            training: Ids of clients that still train on an earlier version.
        """
        for client_id in list(self.sent):
            self.record_commit(client_id)
            sent = self.sent.get(client_id)
            if sent is not None and sent.version != version and client_id not in training:
                del self.sent[client_id]

    def forget(self, client_id: str) -> None:
        """Record that a client has lost its estimates."""
        self.names.pop(client_id, None)
        self.sent.pop(client_id, None)


class EstimateBroadcasts(Broadcasts):
    """Encoder of broadcasts that contain compressed changes to estimates of the models.

    All recipients of a model share one estimate. A client that missed changes receives the missed
    changes or the whole estimate. Broadcasts for evaluation do not change the estimates.

    Args:
        links: The links that encode and decode messages.
        stamp: Function that returns the version number of a client's private state
            (`StateStore.stamp`).

    Attributes:
        known: Record of the estimates that each client has.
        estimates: The estimates, keyed by item and group of clients (see `estimate_group`).
    """

    def __init__(self, links: FederationLinks, stamp: Callable[[str], int | None]) -> None:
        super().__init__(links)
        self.known = ClientEstimates(stamp)
        self.estimates: dict[tuple[str, str], Estimate] = {}

    @override
    def _clear(self, training: Collection[str]) -> None:
        self.known.drop_unused(self._version, training)
        self._digests = EncodeCache(_digest)
        self._others = EncodeCache(self._encode_others)
        self._bodies: dict[Any, bytes] = {}
        self._received: dict[Any, Payload] = {}
        self._sent_digests: dict[Any, bytes] = {}

    @override
    def content(self, client_info: ClientInfo, payload: Payload) -> bytes:
        client_id = client_info.client_id
        models, others = split_models(payload)
        rest, _ = self._others(others)
        steps = self._steps(client_info, models)
        names_before = dict(self.known.names_of(client_id))
        received = self._decoded(steps, others)
        if client_info.purpose == "train":
            steps = {key: self.estimates[key].apply(step) for key, step in steps.items()}
            names = {item: step.name for (item, _), step in steps.items()}
            self.known.send(client_id, names, received, rest, self._version)
        parts = tuple(
            (item, group, step.name, names_before.get(item, NO_ESTIMATE))
            for (item, group), step in steps.items()
        )
        key = parts, rest
        if key not in self._bodies:
            self._bodies[key] = pack_changes(
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

    @override
    def received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        sent = self.known.sent.get(client_info.client_id)
        if sent is not None and sent.version == self._version:
            return sent.received
        models, others = split_models(payload)
        return self._decoded(self._steps(client_info, models), others)

    @override
    def received_by(self, client_id: str, round_idx: int, body: bytes) -> Payload:
        return self.known.sent[client_id].received

    @override
    def reset(self, client_id: str) -> bytes | None:
        sent = self.known.sent.get(client_id)
        self.known.forget(client_id)
        if sent is None:
            return None
        self.known.send(client_id, sent.names, sent.received, sent.rest, sent.version)
        models, _ = split_models(sent.received)
        parts = [
            ModelPart(
                name, NO_ESTIMATE, sent.names[name], [Change(WHOLE, Payload({name: item}).encode())]
            )
            for name, item in models.items_by_name.items()
        ]
        return pack_changes(parts, sent.rest)

    def _steps(
        self, client_info: ClientInfo, models: Payload
    ) -> dict[tuple[str, str], EstimateStep]:
        """Return the steps toward the models in a client's broadcast, keyed by item and group.

        Raises:
            UserError: If the models differ between clients that share an estimate.
        """
        group = estimate_group(self._links.algorithm, client_info)
        steps = {}
        for name, item in models.items_by_name.items():
            target = Payload({name: item})
            digest = self._digests(target)
            key = name, group, client_info.purpose, self._round_idx
            if self._sent_digests.setdefault(key, digest) != digest:
                raise UserError(
                    "channel.compress_down: the method sends different models to clients with the "
                    "same architecture; declare it by needs = Needs(models_per_client=True)"
                )
            estimate = self.estimates.setdefault((name, group), Estimate())
            steps[name, group] = estimate.step(
                self._links, target, digest, self._archs, self._version
            )
        return steps

    def _decoded(self, steps: Mapping[tuple[str, str], EstimateStep], others: Payload) -> Payload:
        """Return the payload that clients decode.

        The same object is returned for all clients with the same broadcast.
        """
        rest, decoded = self._others(others)
        key = tuple((place, step.name) for place, step in steps.items()), rest
        if key not in self._received:
            payloads = [step.payload for step in steps.values()]
            models = {n: i for payload in payloads for n, i in payload.items_by_name.items()}
            self._received[key] = Payload({**models, **decoded.items_by_name}, decoded.report)
        return self._received[key]

    def _encode_others(self, others: Payload) -> tuple[bytes, Payload]:
        body = self._links.encode_broadcast(self._round_idx, others, self._archs)
        return body, self._links.decode_broadcast(self._round_idx, body)

    @override
    def state_dict(self) -> dict[str, Any]:
        for client_id in list(self.known.sent):
            self.known.record_commit(client_id)
        # Sorted, because the order in which workers process clients varies.
        sent = dict(sorted(self.known.sent.items()))
        received = {id(each.received): each for each in sent.values()}
        positions = {key: position for position, key in enumerate(received)}
        return {
            "estimates": [
                [item, group, self.estimates[item, group].state_dict()]
                for item, group in sorted(self.estimates)
                if self.estimates[item, group].has_moved
            ],
            "held": {client: _to_hex(names) for client, names in sorted(self.known.names.items())},
            "sent": {
                client: [_to_hex(each.names), positions[id(each.received)], each.version]
                for client, each in sent.items()
            },
            "received": [
                [as_tensor(each.received.encode()), as_tensor(each.rest)]
                for each in received.values()
            ],
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.estimates = {
            (item, group): Estimate.from_state_dict(saved)
            for item, group, saved in state["estimates"]
        }
        received = [
            (Payload.decode(as_bytes(content)), as_bytes(rest))
            for content, rest in state["received"]
        ]
        self.known.sent.clear()
        self.known.names = {client: _from_hex(names) for client, names in state["held"].items()}
        for client, (names, position, version) in state["sent"].items():
            payload, rest = received[position]
            self.known.send(client, _from_hex(names), payload, rest, version)


def make_broadcasts(
    links: FederationLinks, stamp: Callable[[str], int | None], skips_encoding: bool = False
) -> Broadcasts:
    """Create the encoder of broadcasts that the configuration of the channel requires.

    Args:
        links: The links that encode and decode messages.
        stamp: Function that returns the version number of a client's private state
            (`StateStore.stamp`).
        skips_encoding: Whether payloads are passed to clients in this process without encoding.
            Ignored if broadcasts are compressed.
    """
    if links.sends_changes:
        return EstimateBroadcasts(links, stamp)
    return PlainBroadcasts(links, skips_encoding)


def estimate_group(algorithm: Algorithm, client_info: ClientInfo) -> str:
    """Return the name of the group of clients with which a client shares estimates.

    Clients with the same models share estimates. If the method sends individual models
    (`Needs.models_per_client`), each client forms a separate group.
    """
    if algorithm.needs.models_per_client:
        return client_info.client_id
    return ",".join(f"{slot}={arch.spec_id}" for slot, arch in sorted(client_info.models.items()))


def read_broadcast(
    links: FederationLinks, round_idx: int, body: bytes, estimates: Mapping[str, Any] | None
) -> Payload:
    """Decode a message on the client.

    Args:
        links: The links that decode messages.
        round_idx: Index of the round, from 0.
        body: The message.
        estimates: The client's estimates (`ESTIMATES_KEY` of the private state). If None, the
            client has no estimates.

    Raises:
        PayloadError: If the message is malformed, or contains changes to an estimate that the
            client does not have.
    """
    if not links.sends_changes:
        return links.decode_broadcast(round_idx, body)
    parts, rest = unpack_changes(body)
    others = links.decode_broadcast(round_idx, rest)
    items: dict[str, Item] = {}
    for part in parts:
        is_whole = part.before == NO_ESTIMATE or any(c.number == WHOLE for c in part.changes)
        estimate = None if is_whole else _find_estimate(estimates, part)
        for change in part.changes:
            if change.number == WHOLE:
                estimate = Payload.decode(change.body)
            else:
                estimate = links.decode_broadcast(change.number, change.body, estimate)
        if estimate is None or list(estimate.items_by_name) != [part.item]:
            raise PayloadError(f"broadcast: item {part.item!r}: contains no change")
        items |= estimate.items_by_name
    return Payload({**items, **others.items_by_name}, others.report)


def updated_estimates(
    body: bytes, received: Payload, estimates: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return copies of the estimates that a client has after a message.

    Args:
        body: The message.
        received: The decoded message.
        estimates: The client's estimates before the message. If None, the client has no estimates.

    Returns:
        For each item, a dictionary with the entries `name` and `tensors`.
    """
    after = dict(estimates or {})
    for part in unpack_changes(body)[0]:
        tensors = {n: t.clone() for n, t in received.items_by_name[part.item].tensors.items()}
        after[part.item] = {"name": part.after.hex(), "tensors": tensors}
    return after


def _find_estimate(estimates: Mapping[str, Any] | None, part: ModelPart) -> Payload:
    """Return the client's estimate to which a part of a message applies.

    Raises:
        PayloadError: If the client does not have this estimate.
    """
    known = (estimates or {}).get(part.item)
    if known is None or known["name"] != part.before.hex():
        raise PayloadError(f"broadcast: item {part.item!r}: changes an unknown estimate")
    return Payload({part.item: Item(known["tensors"], kind="params")})


def split_models(payload: Payload) -> tuple[Payload, Payload]:
    """Split a payload into a payload with the models and a payload with all other items.

    The report is part of the second payload.
    """
    models = {name: item for name, item in payload.items_by_name.items() if item.kind == "params"}
    others = {name: item for name, item in payload.items_by_name.items() if item.kind != "params"}
    return Payload(models), Payload(others, payload.report)


def _digest(models: Payload) -> bytes:
    """Return a digest of the names, shapes and values of models."""
    digest = hashlib.sha256()
    for name, item in sorted(models.items_by_name.items()):
        for key, tensor in sorted(item.tensors.items()):
            digest.update(repr((name, key, tuple(tensor.shape), str(tensor.dtype))).encode())
            values = tensor.detach().cpu().contiguous().numpy().reshape(-1)
            digest.update(values.view(np.uint8).data)
    return digest.digest()


def _to_hex(names: Mapping[str, bytes]) -> dict[str, str]:
    return {item: name.hex() for item, name in names.items()}


def _from_hex(names: Mapping[str, str]) -> dict[str, bytes]:
    return {item: bytes.fromhex(name) for item, name in names.items()}
