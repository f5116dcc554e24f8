"""Server side of homomorphic encryption, which has no key."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import numpy as np
from typing_extensions import override

from hetero_fl.communication.homomorphic.ckks import EncryptedSum
from hetero_fl.communication.homomorphic.messages import REPLIES
from hetero_fl.communication.named_arrays import (
    Arrays,
    byte_string_to_row,
    decode_arrays,
    encode_arrays,
)
from hetero_fl.communication.protocol import (
    Content,
    Exchange,
    Exchanges,
    Message,
    SealedAggregate,
    check_accepted,
    check_reply_size,
    encoded,
)
from hetero_fl.core.payload import SPARE_BYTES, PayloadError
from hetero_fl.utils.errors import RoundAbandonedError


class EncryptedExchange(Exchange):
    """One exchange of homomorphic encryption.

    Args:
        kind: Kind of the request.
        clients: Ids of the clients that receive the request.
        arrays: Arrays of the request besides the server's state.
        take: Function that processes a reply, with the client id. It raises PayloadError for an
            invalid reply.

    Attributes:
        dropouts: Reasons why replies cannot be used, keyed by client id.
    """

    def __init__(
        self,
        kind: str,
        clients: Sequence[str],
        arrays: Mapping[str, np.ndarray],
        take: Callable[[str, Message], None],
    ) -> None:
        self.kind = kind
        self.clients = clients
        self._arrays = arrays
        self._take = take
        self._waiting = set(clients)
        # Another client can decrypt the sum.
        self.waits_for_nodes = kind != "aggregate"
        self.dropouts: dict[str, str] = {}

    @override
    def request(self, client_id: str, broadcast_to: Callable[[str], Content]) -> Message:
        state = byte_string_to_row(encoded(broadcast_to(client_id)))
        return Message(self.kind, encode_arrays({**self._arrays, "state": state}))

    @override
    def accept(self, client_id: str, reply: Message) -> None:
        if client_id not in self._waiting:
            return
        self._waiting.remove(client_id)
        try:
            check_accepted(reply, self.kind)
            self._take(client_id, reply)
        except PayloadError as error:
            self.dropouts[client_id] = str(error)


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
        # Name of the key of the first upload.
        self.key_name = b""
        self._terms = {"unit": np.array([unit], np.int32), "layout": byte_string_to_row(layout[0])}

    def exchanges(self) -> Exchanges:
        """Yield the exchanges, and return the server's new state, which the server cannot read.

        Raises:
            RoundAbandonedError: If no client decrypts the sum.
        """
        train = EncryptedExchange("train", self.cohort, self._terms, self._add)
        yield train
        if not self.summed:
            return SealedAggregate([], b"", dropouts=train.dropouts)
        result = yield from self._aggregate()
        result.dropouts = train.dropouts
        return result

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
            exchange = EncryptedExchange("aggregate", [client_id], arrays, take)
            yield exchange
            if results:
                return results[0]
            reasons[client_id] = exchange.dropouts.get(client_id, "no reply")
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
        check_reply_size(reply, kind, num_bytes + SPARE_BYTES)
    if reply.kind != kind:
        raise PayloadError(f"expected a reply to {kind!r}, got {reply.kind[:20]!r}")
    return decode_arrays(reply.body, REPLIES[kind])
