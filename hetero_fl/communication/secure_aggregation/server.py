"""Server side of secure aggregation: the five exchanges and the removal of masks from the sum.

A client's vector is part of the sum if the server received the vector, even if the client drops out
afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from typing_extensions import override

from hetero_fl.communication.named_arrays import (
    Arrays,
    byte_string_to_row,
    decode_arrays,
    encode_arrays,
)
from hetero_fl.communication.protocol import (
    AggregatedUploads,
    Content,
    Exchange,
    Exchanges,
    Message,
    check_accepted,
    check_reply_size,
    encoded,
)
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.client import pair_mask
from hetero_fl.communication.secure_aggregation.crypto import apply_masks
from hetero_fl.communication.secure_aggregation.messages import (
    REPLIES,
    SEALED,
    TAG,
    check_signatures,
    client_numbers,
    survivors_statement,
)
from hetero_fl.communication.vector_layout import Words
from hetero_fl.core.payload import SPARE_BYTES, PayloadError
from hetero_fl.utils.errors import RoundAbandonedError


@dataclass
class SecureExchange(Exchange):
    """One exchange of secure aggregation (see `Exchange`).

    Args:
        secure_round: The round to which the exchange belongs.
        kind: Kind of the request.
        numbers: Numbers of the clients that receive a request.
        arrays: Function that returns the arrays of the request to a client. The arguments are the
            client's number and a function that returns the broadcast to a client id.
        take: Function that processes a valid reply. The arguments are the client's number and the
            arrays of the reply.
        check: Function with the same arguments that raises PayloadError for an invalid reply. If
            None, only names, data types and shapes of the arrays are checked.
        waits_for_nodes: Whether the server waits for disconnected clients (see `Exchange`).

    Attributes:
        clients: Ids of the clients that receive a request.
    """

    secure_round: SecureAggregationRound
    kind: str
    numbers: Iterable[int]
    arrays: Callable[[int, Callable[[str], Content]], Arrays]
    take: Callable[[int, Arrays], None]
    check: Callable[[int, Arrays], None] | None = None
    waits_for_nodes: bool = True

    def __post_init__(self) -> None:
        self._silent = {self.secure_round.names[number]: number for number in self.numbers}
        self.clients: Sequence[str] = list(self._silent)

    @override
    def request(self, client_id: str, broadcast_to: Callable[[str], Content]) -> Message:
        arrays = self.arrays(self.secure_round.numbers[client_id], broadcast_to)
        tag = byte_string_to_row(self.secure_round.tag)
        return Message(self.kind, encode_arrays({"tag": tag, **arrays}))

    @override
    def accept(self, client_id: str, reply: Message) -> None:
        """Process the reply of a client.

        If the reply is invalid, the client drops out of the round. Further replies of the client
        are ignored.
        """
        number = self._silent.pop(client_id, None)
        if number is None:
            return
        try:
            self.take(number, self.secure_round.decode_reply(self.kind, number, reply, self.check))
        except PayloadError as error:
            self.secure_round.dropouts[client_id] = str(error)

    def close(self) -> None:
        """Record that the clients without a reply drop out of the round."""
        reason = f"no reply to {self.kind!r} of the secure aggregation"
        self.secure_round.dropouts.update(dict.fromkeys(self._silent, reason))


class SecureAggregationRound:
    """One round of secure aggregation on the server.

    Args:
        names: Ids of the clients in the cohort, keyed by their numbers in the federation.
        threshold: Number of clients that must remain until the end of the round, and of shares that
            are needed to reconstruct a secret.
        layout: Digest of the layout and length of the vector.
        unit: Exponent of the power of two by which clients divide values and weights.
        round_idx: Index of the round.

    Attributes:
        dropouts: Reasons why clients dropped out, keyed by client id.
        members: Numbers of the clients that share masks with each other.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        threshold: int,
        layout: tuple[bytes, int],
        *,
        unit: int,
        round_idx: int,
    ) -> None:
        self.threshold = threshold
        self.layout = layout
        self.unit = unit
        self.round_idx = round_idx
        self.tag = os.urandom(TAG)
        self.names = names
        self.numbers = {client_id: number for number, client_id in self.names.items()}
        self.dropouts: dict[str, str] = {}
        self.public: dict[int, np.ndarray] = {}
        self.endorsements: dict[int, np.ndarray] = {}
        self.seen_public_keys: set[bytes] = set()
        self.seed_commitments: dict[int, bytes] = {}
        self.members: list[int] = []

    def exchanges(self) -> Exchanges:
        """Yield the five exchanges, and return the unmasked sum.

        Raises:
            RoundAbandonedError: If too few clients are left, or a secret cannot be reconstructed.
        """
        yield from self._exchange_keys()
        shares = yield from self._exchange_shares()
        summed, total = yield from self._collect_vectors(shares)
        signatures = yield from self._collect_signatures(summed)
        yield from self._remove_masks(summed, total, signatures)
        clients = [self.names[number] for number in summed]
        # A client that drops out in the last exchange is in the sum nevertheless.
        dropouts = {c: reason for c, reason in self.dropouts.items() if c not in clients}
        return AggregatedUploads(clients, total, 2.0**self.unit, dropouts)

    def _exchange_keys(self) -> Iterator[SecureExchange]:
        """Collect the public keys of the clients."""

        def take(number: int, reply: Arrays) -> None:
            self.public[number] = reply["keys"]
            self.endorsements[number] = reply["endorsement"]
            self.seen_public_keys |= set(_parts(reply["keys"]))

        exchange = SecureExchange(
            self, "keys", self.names, lambda _number, _broadcast_to: {}, take, self._check_keys
        )
        yield exchange
        exchange.close()
        self.public = {number: self.public[number] for number in sorted(self.public)}
        self._require_enough(self.public, "keys")

    def _exchange_shares(
        self,
    ) -> Generator[SecureExchange, None, dict[int, dict[int, np.ndarray]]]:
        """Return the encrypted shares, keyed by receiver and sender."""
        numbers = np.array(list(self.public), np.int32)
        keys = np.stack(list(self.public.values()))
        endorsements = np.stack([self.endorsements[number] for number in self.public])
        sealed: dict[int, dict[int, np.ndarray]] = {}

        def arrays(number: int, _broadcast_to: Callable[[str], Content]) -> Arrays:
            head = np.array([number], np.int32)
            return {"head": head, "numbers": numbers, "keys": keys, "endorsements": endorsements}

        def take(number: int, reply: Arrays) -> None:
            sealed[number] = dict(zip(reply["numbers"].tolist(), reply["sealed"], strict=True))
            self.seed_commitments[number] = reply["commitment"].tobytes()

        exchange = SecureExchange(self, "shares", self.public, arrays, take, self._check_receivers)
        yield exchange
        exchange.close()
        self._require_enough(sealed, "shares")
        self.members = sorted(sealed)
        return {n: {m: sealed[m][n] for m in self.members if m != n} for n in self.members}

    def _collect_vectors(
        self, shares: Mapping[int, Mapping[int, np.ndarray]]
    ) -> Generator[SecureExchange, None, tuple[list[int], Words]]:
        """Send the shares and the broadcasts, and add up the masked vectors."""
        total = np.zeros(self.layout[1], np.uint64)
        summed: list[int] = []

        def arrays(number: int, broadcast_to: Callable[[str], Content]) -> Arrays:
            senders = list(shares[number])
            return {
                "head": np.array([self.unit], np.int32),
                "layout": byte_string_to_row(self.layout[0]),
                "numbers": np.array(senders, np.int32),
                "sealed": np.stack([shares[number][m] for m in senders]),
                "broadcast": byte_string_to_row(encoded(broadcast_to(self.names[number]))),
            }

        def take(number: int, reply: Arrays) -> None:
            np.add(total, reply["vector"].view(np.uint64), out=total)
            summed.append(number)

        exchange = SecureExchange(self, "train", self.members, arrays, take, self._check_vector)
        yield exchange
        exchange.close()
        self._require_enough(summed, "train")
        return sorted(summed), total

    def _collect_signatures(
        self, summed: list[int]
    ) -> Generator[SecureExchange, None, dict[int, np.ndarray]]:
        """Let the clients in the sum sign the set of these clients, and return the signatures."""
        statement = survivors_statement(self.tag, self.public, summed)
        signatures: dict[int, np.ndarray] = {}

        def arrays(_number: int, _broadcast_to: Callable[[str], Content]) -> Arrays:
            return {"survivors": np.array(summed, np.int32)}

        def take(number: int, reply: Arrays) -> None:
            signatures[number] = reply["signature"]

        def check(number: int, received: Arrays) -> None:
            check_signatures(statement, [number], received["signature"][None], self.public)

        exchange = SecureExchange(self, "consistency", summed, arrays, take, check)
        yield exchange
        exchange.close()
        self._require_enough(signatures, "consistency")
        return signatures

    def _remove_masks(
        self, summed: list[int], total: Words, signatures: Mapping[int, np.ndarray]
    ) -> Iterator[SecureExchange]:
        """Collect shares of secrets and remove the remaining masks from `total` in place."""
        signers = np.array(list(signatures), np.int32)
        signed = np.stack(list(signatures.values()))
        shares: dict[int, dict[int, bytes]] = {}

        def arrays(_number: int, _broadcast_to: Callable[[str], Content]) -> Arrays:
            return {"signers": signers, "signatures": signed}

        def take(holder: int, reply: Arrays) -> None:
            for number, share in zip(reply["numbers"].tolist(), reply["shares"], strict=False):
                if number in self.members:
                    shares.setdefault(number, {})[holder] = share.tobytes()

        yield SecureExchange(self, "unmask", signatures, arrays, take)
        self._require_enough({h for holders in shares.values() for h in holders}, "unmask")
        streams: list[tuple[bytes, bool]] = []
        for number in self.members:
            if number in summed:
                seed = self._reconstruct_secret(number, shares, partial(self._is_seed, number))
                streams.append((seed, True))
            else:
                key = self._reconstruct_secret(number, shares, partial(self._is_key, number))
                # Add the masks that the client would have added.
                loaded = crypto.load_private_key(key)
                streams += [
                    pair_mask(loaded, self.public[m].tobytes(), number, m, self.tag) for m in summed
                ]
        apply_masks(total, streams)

    def decode_reply(
        self, kind: str, number: int, message: Message, check: Callable[[int, Arrays], None] | None
    ) -> Arrays:
        """Decode and check a reply.

        Args:
            kind: Kind of the request.
            number: Number of the client.
            message: The reply.
            check: Function that raises PayloadError for an invalid reply (see `SecureExchange`). If
                None, no further check is made.

        Raises:
            PayloadError: If the client refused the request or the reply is invalid.
        """
        check_accepted(message, kind)
        max_bytes = SPARE_BYTES + 8 * self.layout[1] + 2 * SEALED * len(self.names)
        check_reply_size(message, kind, max_bytes)
        reply = decode_arrays(message.body, REPLIES[kind])
        if message.kind != kind or reply["tag"].tobytes() != self.tag:
            raise PayloadError("message of another round or exchange")
        if check is not None:
            check(number, reply)
        return reply

    def _check_keys(self, _number: int, received: Arrays) -> None:
        # All other clients would refuse these keys.
        parts = _parts(received["keys"])
        for public in parts[:2]:
            crypto.check_public_key(public)
        if len(set(parts)) < len(parts) or not self.seen_public_keys.isdisjoint(parts):
            raise PayloadError("duplicate public key")

    def _check_receivers(self, number: int, received: Arrays) -> None:
        if client_numbers(received["numbers"]) != [m for m in self.public if m != number]:
            raise PayloadError("shares: receivers are not the other clients")
        if len(received["sealed"]) != len(received["numbers"]):
            raise PayloadError(
                f"shares: expected {len(received['numbers'])}, got {len(received['sealed'])}"
            )

    def _check_vector(self, _number: int, received: Arrays) -> None:
        if len(received["vector"]) != self.layout[1]:
            raise PayloadError(
                f"vector: expected {self.layout[1]} numbers, got {len(received['vector'])}"
            )

    def _require_enough(self, remaining: Iterable[int], kind: str) -> None:
        if (count := len(list(remaining))) < self.threshold:
            client, reason = next(reversed(self.dropouts.items()), ("no client", "dropped out"))
            raise RoundAbandonedError(
                f"round {self.round_idx + 1}: secure aggregation stopped at {kind!r}: "
                f"{count} of {len(self.names)} clients are left, but channel.secure_sum.threshold "
                f"requires {self.threshold} ({client}: {reason})"
            )

    def _reconstruct_secret(
        self,
        number: int,
        shares: Mapping[int, Mapping[int, bytes]],
        is_valid: Callable[[bytes], bool],
    ) -> bytes:
        """Return the secret of a client, trying different shares if some are invalid."""
        available = list(shares.get(number, {}).items())
        for start in range(len(available)) if len(available) >= self.threshold else ():
            chosen = (available + available)[start : start + self.threshold]
            secret = crypto.combine_shares(dict(chosen))
            if secret is not None and is_valid(secret):
                return secret
        raise RoundAbandonedError(
            f"round {self.round_idx + 1}: secure aggregation stopped at 'unmask': "
            f"received {len(available)} shares of the secret of {self.names[number]}, but "
            f"{self.threshold} valid shares are needed"
        )

    def _is_seed(self, number: int, secret: bytes) -> bool:
        return crypto.commit_to_seed(secret, self.tag) == self.seed_commitments[number]

    def _is_key(self, number: int, secret: bytes) -> bool:
        return crypto.public_key(secret) == self.public[number][32:64].tobytes()


def _parts(keys: np.ndarray) -> list[bytes]:
    """Return the public keys of a client: for shares, for masks and for signatures."""
    return [part.tobytes() for part in keys.reshape(-1, crypto.KEY_LENGTH)]
