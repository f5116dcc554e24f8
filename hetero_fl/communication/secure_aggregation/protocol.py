"""Secure aggregation as a round protocol, and its server. See docs/how_to/secure_aggregation.md.

A client's vector is part of the sum if the server received the vector, even if the client drops out
afterwards.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from typing_extensions import override

from hetero_fl.communication.named_arrays import (
    Arrays,
    Field,
    byte_string_to_row,
    decode_arrays,
    encode_arrays,
    zero_arrays,
)
from hetero_fl.communication.protocol import (
    AggregatedUploads,
    BroadcastTo,
    Content,
    Exchange,
    Exchanges,
    Message,
    RoundProtocol,
    TrainingRequest,
    check_accepted,
    encoded,
)
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.client import (
    REPLIES,
    REQUESTS,
    SEALED,
    TAG,
    Notes,
    SecureAggregationClient,
    check_signatures,
    client_numbers,
    pair_mask,
    survivors_statement,
)
from hetero_fl.communication.secure_aggregation.crypto import SiteKeys, apply_masks
from hetero_fl.communication.vector_layout import (
    FixedPoint,
    SharedSetup,
    VectorLayout,
    Words,
    weight_unit,
)
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.core.payload import SPARE_BYTES, Payload, PayloadError
from hetero_fl.utils.errors import RoundAbandonedError
from hetero_fl.utils.ordering import natural_key

T = TypeVar("T")


class SecureAggregation(RoundProtocol):
    """Secure aggregation against a server that lies (Bonawitz et al. 2017, section 6.2).

    The five exchanges are "keys", "shares", "train", "consistency" and "unmask". In the exchange
    "train", clients train and send masked vectors. In "consistency", they sign whose vectors are in
    the sum. The sum can be unmasked even if some clients drop out or diverge during training.

    A server that colludes with at most `2 * threshold - cohort - 1` clients learns only the sum of
    the uploads of all other survivors. The server may send each client different information: no
    two sets of survivors can have `threshold` signatures, and no client reveals shares for two sets
    in the same round.

    Args:
        config: Settings of secure aggregation.
        cohort: Number of clients in a round.
        shared_setup: The setup that the server and all clients share.
        site_keys: Keys that sign the keys of a round. If None, clients sign and check no keys.
    """

    setup: tuple[str, ...] = ("keys", "shares")
    requests: tuple[str, ...] = tuple(REQUESTS)
    has_one_time_requests = True

    def __init__(
        self,
        config: SecureAggregationConfig,
        cohort: int,
        shared_setup: SharedSetup,
        site_keys: SiteKeys | None = None,
    ) -> None:
        self.site_keys = site_keys or SiteKeys()
        self.shared_setup = shared_setup
        self.threshold = config.min_survivors(cohort)
        self.fixed = FixedPoint.from_config(config, cohort, "channel.secure_sum")

    @override
    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        layout = self.shared_setup.layout(round_idx)
        ids = self.shared_setup.client_ids
        server = SecureAggregationServer(
            {bisect_left(ids, natural_key(c), key=natural_key) + 1: c for c in cohort},
            self.threshold,
            (self._digest(layout), layout.size),
            unit=weight_unit(map(self.shared_setup.num_rows, cohort)),
            round_idx=round_idx,
        )
        return server.exchanges()

    @override
    def answer(
        self, client_id: str, message: Message, round_idx: int, notes: Notes
    ) -> Message | TrainingRequest:
        layout = self.shared_setup.layout(round_idx)

        def pack(upload: bytes, unit: float) -> Words:
            return self.encode_upload(client_id, Payload.decode(upload), layout, unit, round_idx)

        client = SecureAggregationClient(
            client_id,
            self.shared_setup.client_ids,
            round_idx,
            self.threshold,
            self.site_keys,
            notes,
            self._digest(layout),
            pack,
        )
        return client.answer(message)

    @override
    def broadcast_in(self, client_id: str, message: Message) -> Content:
        if message.kind != "train":
            return message.content
        return decode_arrays(message.body, REQUESTS["train"])["broadcast"].tobytes()

    def encode_upload(
        self, client: str, payload: Payload, layout: VectorLayout, unit: float, round_idx: int
    ) -> Words:
        """Convert an upload to the integers that are masked and summed.

        The integers include the client's share of the privacy noise.

        Args:
            client: The client.
            payload: The upload.
            layout: The layout of the vector.
            unit: Factor by which values and weights are divided.
            round_idx: Index of the round.

        Raises:
            PayloadError: If an item is not part of the layout or a value is too large.
        """
        packed = layout.pack(self.shared_setup.aggregation_group(client), payload, unit)
        noise = self.shared_setup.noise(client, round_idx, layout, unit, self.threshold)
        return self.fixed.encode(packed if noise is None else packed + noise)

    @override
    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        # All clients send a vector of the same length, regardless of the size of their uploads.
        lengths = {"vector": self.shared_setup.layout(round_idx).size, "broadcast": broadcast}

        def size(fields: Mapping[str, Field]) -> int:
            # Clients exchange shares with all others.
            peers = cohort - 1 if "sealed" in fields else cohort
            return len(encode_arrays(zero_arrays(fields, lengths, peers)))

        return {kind: (size(REQUESTS[kind]), size(REPLIES[kind])) for kind in REQUESTS}

    def _digest(self, layout: VectorLayout) -> bytes:
        return layout.digest_with(repr(self.fixed))


class SecureAggregationServer:
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
        self.layout_digest, length = layout
        self.unit = unit
        self.round_idx = round_idx
        self.tag = os.urandom(TAG)
        self.names = names
        self.dropouts: dict[str, str] = {}
        self.total: Words = np.zeros(length, np.uint64)
        # Public keys of the clients that hold shares, keyed by number.
        self.public: dict[int, np.ndarray] = {}
        # Shares that clients encrypted for each other, keyed by the numbers of sender and receiver.
        self.sealed: dict[int, dict[int, np.ndarray]] = {}
        self.commitments: dict[int, bytes] = {}
        # What clients sign about the sum.
        self.statement = b""
        # Shares of the secrets of clients, keyed by the numbers of the holder and the client.
        self.shares: dict[int, dict[int, bytes]] = {}

    def exchanges(self) -> Exchanges:
        """Yield the five exchanges, and return the unmasked sum.

        Raises:
            RoundAbandonedError: If too few clients are left, or a secret cannot be reconstructed.
        """
        endorsements = yield from self._exchange("keys", self.names, lambda *_: {}, self._take_keys)
        public = {number: self.public[number] for number in endorsements}
        told = {
            "numbers": np.array(list(public), np.int32),
            "keys": np.stack(list(public.values())),
            "endorsements": np.stack(list(endorsements.values())),
        }
        members = yield from self._exchange(
            "shares",
            public,
            lambda number, _: {"head": np.array([number], np.int32), **told},
            self._take_shares,
        )
        summed = yield from self._exchange("train", members, self._train_request, self._take_vector)
        self.statement = survivors_statement(self.tag, public, summed)
        survivors = {"survivors": np.array(list(summed), np.int32)}
        signatures = yield from self._exchange(
            "consistency", summed, lambda *_: survivors, self._take_signature
        )
        signed = {
            "signers": np.array(list(signatures), np.int32),
            "signatures": np.stack(list(signatures.values())),
        }
        self.shares = yield from self._exchange(
            "unmask", signatures, lambda *_: signed, self._take_secrets
        )
        apply_masks(self.total, self._remaining_masks(members, summed))
        clients = [self.names[number] for number in summed]
        # A client that drops out in the last exchange is in the sum nevertheless.
        dropouts = {c: reason for c, reason in self.dropouts.items() if c not in clients}
        return AggregatedUploads(clients, self.total, 2.0**self.unit, dropouts)

    def _exchange(
        self,
        kind: str,
        numbers: Iterable[int],
        arrays: Callable[[int, BroadcastTo], Arrays],
        take: Callable[[int, Arrays], T],
    ) -> Generator[Exchange, None, dict[int, T]]:
        """Yield an exchange, and return what `take` returns for each client with a valid reply.

        Args:
            kind: Kind of the request.
            numbers: Numbers of the clients that receive the request.
            arrays: Function that returns the arrays of the request to a client. The arguments are
                the client's number and a function that returns the broadcast to a client id.
            take: Function that processes a reply, with the client's number and the arrays of the
                reply. It raises PayloadError for an invalid reply, with which the client drops out.

        Returns:
            The results of `take`, keyed by the number of the client in ascending order.

        Raises:
            RoundAbandonedError: If too few clients are left.
        """
        numbers_by_id = {self.names[number]: number for number in numbers}
        silent = set(numbers_by_id)
        accepted: dict[int, T] = {}

        def content(client_id: str, broadcast_to: BroadcastTo) -> bytes:
            tag = byte_string_to_row(self.tag)
            return encode_arrays({"tag": tag, **arrays(numbers_by_id[client_id], broadcast_to)})

        def accept(client_id: str, reply: Message) -> None:
            if client_id not in silent:
                return
            silent.remove(client_id)
            number = numbers_by_id[client_id]
            try:
                accepted[number] = take(number, self._decode_reply(kind, reply))
            except PayloadError as error:
                self.dropouts[client_id] = str(error)

        yield Exchange(kind, list(numbers_by_id), content, accept)
        reason = f"no reply to {kind!r} of the secure aggregation"
        self.dropouts |= {c: reason for c in numbers_by_id if c in silent}
        if len(accepted) < self.threshold:
            client, reason = next(reversed(self.dropouts.items()), ("no client", "dropped out"))
            raise RoundAbandonedError(
                f"round {self.round_idx + 1}: secure aggregation stopped at {kind!r}: "
                f"{len(accepted)} of {len(self.names)} clients are left, but "
                f"channel.secure_sum.threshold requires {self.threshold} ({client}: {reason})"
            )
        return dict(sorted(accepted.items()))

    def _train_request(self, number: int, broadcast_to: BroadcastTo) -> Arrays:
        senders = [sender for sender in sorted(self.sealed) if sender != number]
        return {
            "head": np.array([self.unit], np.int32),
            "layout": byte_string_to_row(self.layout_digest),
            "numbers": np.array(senders, np.int32),
            "sealed": np.stack([self.sealed[sender][number] for sender in senders]),
            "broadcast": byte_string_to_row(encoded(broadcast_to(self.names[number]))),
        }

    def _decode_reply(self, kind: str, message: Message) -> Arrays:
        """Decode a reply.

        Args:
            kind: Kind of the request.
            message: The reply.

        Raises:
            PayloadError: If the client refused the request or the reply is malformed.
        """
        max_bytes = SPARE_BYTES + self.total.nbytes + 2 * SEALED * len(self.names)
        check_accepted(message, kind, max_bytes)
        reply = decode_arrays(message.body, REPLIES[kind])
        if message.kind != kind or reply["tag"].tobytes() != self.tag:
            raise PayloadError("message of another round or exchange")
        return reply

    def _take_keys(self, number: int, reply: Arrays) -> np.ndarray:
        # All other clients would refuse these keys.
        parts = _parts(reply["keys"])
        for public in parts[:2]:
            crypto.check_public_key(public)
        known = {part for keys in self.public.values() for part in _parts(keys)}
        if len(set(parts)) < len(parts) or not known.isdisjoint(parts):
            raise PayloadError("duplicate public key")
        self.public[number] = reply["keys"]
        return reply["endorsement"]

    def _take_shares(self, number: int, reply: Arrays) -> None:
        receivers = client_numbers(reply["numbers"])
        if receivers != [other for other in sorted(self.public) if other != number]:
            raise PayloadError("shares: receivers are not the other clients")
        if len(reply["sealed"]) != len(receivers):
            raise PayloadError(f"shares: expected {len(receivers)}, got {len(reply['sealed'])}")
        self.sealed[number] = dict(zip(receivers, reply["sealed"], strict=True))
        self.commitments[number] = reply["commitment"].tobytes()

    def _take_vector(self, number: int, reply: Arrays) -> None:
        vector = reply["vector"].view(np.uint64)
        if len(vector) != len(self.total):
            raise PayloadError(f"vector: expected {len(self.total)} numbers, got {len(vector)}")
        np.add(self.total, vector, out=self.total)

    def _take_signature(self, number: int, reply: Arrays) -> np.ndarray:
        check_signatures(self.statement, [number], reply["signature"][None], self.public)
        return reply["signature"]

    @staticmethod
    def _take_secrets(_holder: int, reply: Arrays) -> dict[int, bytes]:
        shares = [share.tobytes() for share in reply["shares"]]
        return dict(zip(reply["numbers"].tolist(), shares, strict=False))

    def _remaining_masks(
        self, members: Iterable[int], summed: Collection[int]
    ) -> list[tuple[bytes, bool]]:
        """Return the key of each mask in the total, and whether to subtract the mask.

        Args:
            members: Numbers of the clients that share masks with each other.
            summed: Numbers of the clients whose vectors are in the total.
        """
        masks: list[tuple[bytes, bool]] = []
        for number in members:
            if number in summed:
                masks.append((self._reconstruct_secret(number, is_seed=True), True))
            else:
                # Add the masks that the client would have added.
                private = crypto.load_private_key(self._reconstruct_secret(number, is_seed=False))
                masks += [
                    pair_mask(private, self.public[other].tobytes(), number, other, self.tag)
                    for other in summed
                ]
        return masks

    def _reconstruct_secret(self, number: int, is_seed: bool) -> bytes:
        """Return the seed or the masking key of a client.

        Different shares are tried if some are invalid.
        """
        available = [(holder, s[number]) for holder, s in self.shares.items() if number in s]
        for start in range(len(available)) if len(available) >= self.threshold else ():
            chosen = (available + available)[start : start + self.threshold]
            secret = crypto.combine_shares(dict(chosen))
            if secret is not None and self._is_secret(secret, number, is_seed):
                return secret
        raise RoundAbandonedError(
            f"round {self.round_idx + 1}: secure aggregation stopped at 'unmask': "
            f"received {len(available)} shares of the secret of {self.names[number]}, but "
            f"{self.threshold} valid shares are needed"
        )

    def _is_secret(self, secret: bytes, number: int, is_seed: bool) -> bool:
        if is_seed:
            return crypto.commit_to_seed(secret, self.tag) == self.commitments[number]
        return crypto.public_key(secret) == self.public[number][32:64].tobytes()


def _parts(keys: np.ndarray) -> list[bytes]:
    """Return the public keys of a client: for shares, for masks and for signatures."""
    return [part.tobytes() for part in keys.reshape(-1, crypto.KEY_LENGTH)]
