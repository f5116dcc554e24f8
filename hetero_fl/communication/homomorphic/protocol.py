"""Homomorphic encryption as a round protocol. See docs/how_to/secure_aggregation.md.

The server adds ciphertexts and cannot decrypt the sum. A client decrypts the sum, aggregates it as
the server would, and returns the server's new state, which is sealed for all clients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol as Interface

import numpy as np
from typing_extensions import override

from hetero_fl.communication.homomorphic import ckks
from hetero_fl.communication.homomorphic.ckks import EncryptedSum
from hetero_fl.communication.homomorphic.key import SharedKey
from hetero_fl.communication.homomorphic.messages import (
    REPLIES,
    REQUESTS,
    aggregate_sizes,
    seal_state,
    train_sizes,
    unseal_state,
)
from hetero_fl.communication.named_arrays import (
    Arrays,
    byte_string_to_row,
    decode_arrays,
    encode_arrays,
)
from hetero_fl.communication.protocol import (
    AggregationRequest,
    BroadcastTo,
    Content,
    Exchange,
    Exchanges,
    Message,
    RoundProtocol,
    SealedAggregate,
    TrainingRequest,
    check_accepted,
    encoded,
    refusal,
)
from hetero_fl.communication.vector_layout import FixedPoint, SharedSetup, VectorLayout, weight_unit
from hetero_fl.config.communication import HomomorphicConfig
from hetero_fl.core.payload import SPARE_BYTES, Payload, PayloadError
from hetero_fl.utils.errors import NoUploadError, RoundAbandonedError

Purpose = Literal["train", "evaluate"]


class HomomorphicRound:
    """One round of homomorphic encryption on the server.

    Args:
        cohort: Ids of the clients in the round.
        client_ids: Ids of all clients of the federation, in order.
        layout: Digest of the layout and length of the vector.
        unit: Exponent of the power of two by which clients divide values and weights.
        round_idx: Index of the round.
    """

    def __init__(
        self,
        cohort: Sequence[str],
        client_ids: Sequence[str],
        layout: tuple[bytes, int],
        *,
        unit: int,
        round_idx: int,
    ) -> None:
        self.cohort = cohort
        self.positions = {client_id: at for at, client_id in enumerate(client_ids)}
        self.round_idx = round_idx
        self.total = EncryptedSum(layout[1])
        self.summed: list[str] = []
        self.dropouts: dict[str, str] = {}
        # Name of the key of the first upload.
        self.key_name = b""
        self._terms = {"unit": np.array([unit], np.int32), "layout": byte_string_to_row(layout[0])}

    def exchanges(self) -> Exchanges:
        """Yield the exchanges, and return the server's new state, which the server cannot read.

        Raises:
            RoundAbandonedError: If no client decrypts the sum.
        """
        yield self._exchange("train", self.cohort, self._terms, self._add)
        dropouts = dict(self.dropouts)
        if not self.summed:
            return SealedAggregate([], b"", dropouts=dropouts)
        result = yield from self._aggregate()
        result.dropouts = dropouts
        return result

    def _exchange(
        self,
        kind: str,
        clients: Sequence[str],
        arrays: Mapping[str, np.ndarray],
        take: Callable[[str, Message], None],
    ) -> Exchange:
        """Return an exchange.

        Args:
            kind: Kind of the request.
            clients: Ids of the clients that receive the request.
            arrays: Arrays of the request besides the server's state.
            take: Function that processes a reply, with the client id. It raises PayloadError for an
                invalid reply.
        """
        silent = set(clients)

        def content(client_id: str, broadcast_to: BroadcastTo) -> bytes:
            state = byte_string_to_row(encoded(broadcast_to(client_id)))
            return encode_arrays({**arrays, "state": state})

        def accept(client_id: str, reply: Message) -> None:
            if client_id not in silent:
                return
            silent.remove(client_id)
            try:
                check_accepted(reply, kind)
                take(client_id, reply)
            except PayloadError as error:
                self.dropouts[client_id] = str(error)

        # If a client does not aggregate, another client can.
        return Exchange(kind, clients, content, accept, waits_for_nodes=kind != "aggregate")

    def _add(self, client_id: str, reply: Message) -> None:
        rows, columns = self.total.shape
        arrays = _decode(reply, "train", rows * columns)
        name = arrays["key"].tobytes()
        if self.key_name and name != self.key_name:
            raise PayloadError(
                "upload: encrypted with another key than that of the other clients; copy the key "
                "file of one client to all clients"
            )
        self.total.add(arrays["ciphertexts"])
        self.key_name = name
        self.summed.append(client_id)

    def _aggregate(self) -> Generator[Exchange, None, SealedAggregate]:
        """Have one client decrypt the sum and aggregate.

        Clients are asked one by one until one replies.
        """
        results: list[SealedAggregate] = []
        positions = np.array([self.positions[client_id] for client_id in self.summed], np.int32)
        arrays = {**self._terms, "clients": positions, "sum": self.total.rows()}

        def take(_client_id: str, reply: Message) -> None:
            if reply.kind == "diverged":
                reason = reply.body[:400].decode(errors="replace")
                results.append(SealedAggregate(self.summed, b"", diverged=reason))
                return
            state = _decode(reply, "aggregate", None)["state"]
            results.append(SealedAggregate(self.summed, state.tobytes()))

        reasons: dict[str, str] = {}
        for client_id in aggregation_order(self.summed, self.round_idx):
            yield self._exchange("aggregate", [client_id], arrays, take)
            if results:
                return results[0]
            reasons[client_id] = self.dropouts.get(client_id, "no reply")
        client_id, reason = next(iter(reasons.items()))
        raise RoundAbandonedError(
            f"round {self.round_idx + 1}: none of {len(self.summed)} clients decrypted the sum "
            f"({client_id}: {reason})"
        )


def aggregation_order(summed: Sequence[str], round_idx: int) -> Iterator[str]:
    """Yield the clients of a sum in the order in which they are asked to decrypt it.

    The first client changes with the round, so that all clients take turns.
    """
    for at in range(len(summed)):
        yield summed[(round_idx + at) % len(summed)]


def _decode(reply: Message, kind: str, num_bytes: int | None) -> Arrays:
    if num_bytes is not None:
        check_accepted(reply, kind, num_bytes + SPARE_BYTES)
    if reply.kind != kind:
        raise PayloadError(f"expected a reply to {kind!r}, got {reply.kind[:20]!r}")
    return decode_arrays(reply.body, REPLIES[kind])


class DecryptedSum(NamedTuple):
    """Sum of the uploads of a round, as a client decrypts it.

    Attributes:
        clients: Ids of the clients in the sum.
        vector: Sum of the clients' vectors, dtype float64.
        unit: Factor by which the clients divided values and weights.
    """

    clients: list[str]
    vector: np.ndarray
    unit: float


class ServerReplica(SharedSetup, Interface):
    """Interface of the setup that all clients share, with which they compute the server's part."""

    def broadcast(self, client: str, state: bytes, round_idx: int, purpose: Purpose) -> bytes:
        """Return the encoded broadcast of the server to a client.

        Args:
            client: The client.
            state: The server's encoded state.
            round_idx: Index of the round.
            purpose: "train" or "evaluate".

        Raises:
            PayloadError: If the state is malformed.
        """

    def aggregate(
        self, state: bytes, decrypted: DecryptedSum, round_idx: int, backend: Any
    ) -> bytes:
        """Aggregate the uploads of a round as the server would, and return its encoded state.

        Args:
            state: The server's encoded state before the aggregation.
            decrypted: The sum of the uploads.
            round_idx: Index of the round.
            backend: Backend that computes the steps of the server's plan.

        Raises:
            DivergedError: If training in the aggregation diverges.
            PayloadError: If the state is malformed.
        """


class HomomorphicEncryption(RoundProtocol):
    """Sum of uploads that are encrypted with CKKS (Cheon et al. 2017) under a key of the clients.

    In the exchange "train", clients train and send encrypted vectors. In the exchange "aggregate",
    one client of the sum decrypts the sum and aggregates. If this client does not reply, the next
    one receives the request. A client that drops out is not part of the sum.

    The server is assumed to follow the protocol. Clients cannot tell whether the ciphertexts and
    states that they receive are those that other clients sent.

    Args:
        config: Settings of homomorphic encryption.
        cohort: Number of clients in a round.
        replica: The setup that all clients share.
        key: Key of the clients. None at the server.
    """

    requests: tuple[str, ...] = tuple(REQUESTS)
    hides_server = True

    def __init__(
        self,
        config: HomomorphicConfig,
        cohort: int,
        replica: ServerReplica,
        key: SharedKey | None = None,
    ) -> None:
        self.fixed = FixedPoint.from_config(config, cohort, "channel.homomorphic")
        self.noise_bits = config.num_noise_bits(cohort)
        self.agreed = replica
        self._key = key

    @property
    def key(self) -> SharedKey:
        """Key of the clients.

        Raises:
            PayloadError: If this participant has no key.
        """
        if self._key is None:
            raise PayloadError("channel.homomorphic: this participant does not have the shared key")
        return self._key

    @override
    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        layout = self.agreed.layout(round_idx)
        server = HomomorphicRound(
            cohort,
            self.agreed.client_ids,
            (self._digest(layout), layout.size),
            unit=weight_unit(map(self.agreed.num_rows, cohort)),
            round_idx=round_idx,
        )
        return server.exchanges()

    @override
    def answer(
        self, client_id: str, message: Message, round_idx: int, notes: MutableMapping[str, bytes]
    ) -> Message | TrainingRequest | AggregationRequest:
        try:
            if message.kind not in REQUESTS:
                raise PayloadError(f"unknown request {message.kind[:20]!r}")
            request = decode_arrays(message.body, REQUESTS[message.kind])
            layout = self.agreed.layout(round_idx)
            if request["layout"].tobytes() != self._digest(layout):
                raise PayloadError("layout: differs from the layout of this client")
            if not 0 <= int(request["unit"][0]) < 64:
                raise PayloadError("unit of weights: exponent must be between 0 and 63")
            if message.kind == "aggregate":
                return AggregationRequest(partial(self._aggregate, request, layout, round_idx))
            broadcast = self._broadcast(client_id, request["state"].tobytes(), round_idx, "train")
        except PayloadError as error:
            return refusal(error)

        def encrypt(upload: Content) -> Message:
            try:
                unit = 2.0 ** int(request["unit"][0])
                payload = Payload.decode(encoded(upload))
                packed = layout.pack(self.agreed.aggregation_group(client_id), payload, unit)
                words = self.fixed.encode(packed)
            except PayloadError as error:
                return refusal(error)
            rows = ckks.encrypt(self.key.context, words, self.noise_bits)
            name = byte_string_to_row(self.key.name)
            return Message("train", encode_arrays({"key": name, "ciphertexts": rows}))

        return TrainingRequest(broadcast, encrypt)

    def _aggregate(
        self, request: Arrays, layout: VectorLayout, round_idx: int, backend: Any
    ) -> Message:
        """Decrypt a sum, aggregate, and return a reply with the server's new state."""
        try:
            positions = request["clients"].tolist()
            if not all(0 <= at < len(self.agreed.client_ids) for at in positions):
                raise PayloadError("clients: positions outside the federation")
            words = ckks.decrypt(self.key.context, request["sum"], layout.size, self.noise_bits)
            state = self.agreed.aggregate(
                unseal_state(request["state"].tobytes(), self.key),
                DecryptedSum(
                    [self.agreed.client_ids[at] for at in positions],
                    self.fixed.decode(words),
                    2.0 ** int(request["unit"][0]),
                ),
                round_idx,
                backend,
            )
        except PayloadError as error:
            return refusal(error)
        except NoUploadError as error:
            return Message("diverged", str(error).encode())
        sealed = byte_string_to_row(seal_state(state, self.key))
        return Message("aggregate", encode_arrays({"state": sealed}))

    @override
    def broadcast_in(self, client_id: str, message: Message) -> Content:
        if message.kind == "train":
            state = decode_arrays(message.body, REQUESTS["train"])["state"].tobytes()
            return self._broadcast(client_id, state, message.round_idx, "train")
        return self._broadcast(client_id, message.body, message.round_idx, "evaluate")

    @override
    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        # The exchange "aggregate" takes place with one client only.
        return {"train": train_sizes(self.agreed.layout(round_idx).size, broadcast)}

    @override
    def aggregation_sizes(
        self, cohort: Sequence[str], round_idx: int, before: int, after: int
    ) -> tuple[str, tuple[int, int]] | None:
        length = self.agreed.layout(round_idx).size
        first = next(aggregation_order(cohort, round_idx))
        return first, aggregate_sizes(length, len(cohort), before, after)

    def _broadcast(self, client_id: str, state: bytes, round_idx: int, purpose: Purpose) -> bytes:
        return self.agreed.broadcast(client_id, unseal_state(state, self.key), round_idx, purpose)

    def _digest(self, layout: VectorLayout) -> bytes:
        return layout.digest_with(repr((self.fixed, self.noise_bits, sorted(layout.unit_weights))))
