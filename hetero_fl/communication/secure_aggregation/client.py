"""Client side of secure aggregation: five replies, each of which is sent once per round.

See Bonawitz et al. (2017), figure 4 and section 6.2. Between two replies, the client's secrets are
stored in `notes`, which the server never receives and which are deleted when the round ends. In a
deployment, the notes are also written to the disk of the client's machine, because the process may
be killed between two replies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from hetero_fl.communication import authenticated_encryption
from hetero_fl.communication.named_arrays import (
    Arrays,
    Field,
    byte_string_to_row,
    decode_arrays,
    encode_arrays,
    stack_byte_strings,
)
from hetero_fl.communication.protocol import Message, TrainingRequest, refusal
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.crypto import apply_masks
from hetero_fl.communication.secure_aggregation.messages import (
    KEYS,
    REQUESTS,
    SEALED,
    TAG,
    check_signatures,
    client_numbers,
    survivors_statement,
)
from hetero_fl.communication.secure_aggregation.site_keys import SiteKeys
from hetero_fl.communication.vector_layout import Words
from hetero_fl.core.payload import PayloadError

# Function that converts an encoded upload to the integers that are summed. The second argument is
# the factor by which values and weights are divided. Raises PayloadError for an invalid upload.
Packer = Callable[[bytes, float], Words]
Notes = MutableMapping[str, bytes]
# The state of a client between two requests:
#   next       the only request that the client will answer
#   tag        identifies the round
#   secrets    private keys for shares, masks and signatures, and the seed of the client's own mask
#   head       number of the client
#   numbers    numbers of the clients that hold shares, including the client
#   keys       public keys of these clients, for shares, masks and signatures
#   own        the client's shares of its own secrets
#   pairs      keys that encrypt the shares of each other client
#   mates      numbers of the clients with which the client shares a mask
#   sealed     encrypted shares from these clients
#   round      index of the round for which the client trained
#   survivors  numbers of the clients whose vectors are in the sum
#   rounds     the last rounds of which the client revealed shares
#   sums       digests of the survivors of these rounds
STATE_FIELDS: dict[str, Field] = {
    "next": (np.uint8, (None,)),
    "tag": (np.uint8, (TAG,)),
    "secrets": (np.uint8, (4, 32)),
    "head": (np.int32, (1,)),
    "numbers": (np.int32, (None,)),
    "keys": (np.uint8, (None, KEYS)),
    "own": (np.uint8, (2, crypto.SHARE_LENGTH)),
    "pairs": (np.uint8, (None, 32)),
    "mates": (np.int32, (None,)),
    "sealed": (np.uint8, (None, SEALED)),
    "round": (np.int32, (1,)),
    "survivors": (np.int32, (None,)),
    "rounds": (np.int32, (None,)),
    "sums": (np.uint8, (None, 32)),
}
# Number of rounds in `rounds`. Shares of earlier rounds are not revealed any more.
KEPT_ROUNDS = 16


@dataclass(frozen=True)
class SecureAggregationClient:
    """A client of secure aggregation.

    Args:
        client_id: The client.
        client_ids: Ids of all clients of the federation, in natural order.
        round_idx: Index of the round in the request.
        threshold: Number of clients that must remain until the end of the round. The server cannot
            choose another number.
        site_keys: Keys that sign the keys of a round.
        notes: Encoded state of the clients between exchanges, keyed by client id. Modified in
            place.
    """

    client_id: str
    client_ids: Sequence[str]
    round_idx: int
    threshold: int
    site_keys: SiteKeys
    notes: Notes

    def answer(
        self, message: Message, packer: Callable[[bytes], Packer]
    ) -> Message | TrainingRequest:
        """Answer one request of the server.

        Args:
            message: The request.
            packer: Function that returns the packer for the digest of a layout, or raises
                PayloadError for an unknown layout.

        Returns:
            The reply, or a request to train. If the request is invalid or out of order, the reply
            has the kind "refused" and contains the reason.
        """
        try:
            if message.kind not in REQUESTS:
                raise PayloadError(f"unknown request {message.kind[:20]!r}")
            request = decode_arrays(message.body, REQUESTS[message.kind])
            if message.kind == "keys":
                return self._reply("keys", self._advertise(request))
            state = self._load_state(message.kind, request)
            if message.kind == "shares":
                return self._reply("shares", self._share(state, request))
            if message.kind == "consistency":
                return self._reply("consistency", self._confirm(state, request))
            if message.kind == "unmask":
                return self._reply("unmask", self._unmask(state, request))
            streams = self._streams(state, request)
            pack = packer(request["layout"].tobytes())
        except PayloadError as error:
            return refusal(error)

        def mask(upload: bytes) -> Message:
            try:
                vector = pack(upload, 2.0 ** int(request["head"][0]))
            except PayloadError as error:
                return refusal(error)
            apply_masks(vector, streams)
            updated = {
                "round": np.array([self.round_idx], np.int32),
                "mates": request["numbers"],
                "sealed": request["sealed"],
            }
            self._store_state("consistency", {**state, **updated})
            return self._reply("train", {"tag": state["tag"], "vector": vector.view(np.int64)})

        return TrainingRequest(request["broadcast"].tobytes(), mask)

    def _advertise(self, request: Arrays) -> Arrays:
        secrets = (crypto.new_key(), crypto.new_key(), crypto.new_seed(), crypto.new_seed())
        public = crypto.public_key(secrets[0]) + crypto.public_key(secrets[1])
        public += crypto.verification_key(secrets[2])
        updated = {
            "tag": request["tag"],
            "secrets": stack_byte_strings(*secrets),
            "keys": stack_byte_strings(public),
        }
        self._store_state("shares", {**self._idle_state(), **updated})
        endorsement = self.site_keys.endorse(request["tag"].tobytes(), public)
        return {
            "tag": request["tag"],
            "keys": byte_string_to_row(public),
            "endorsement": byte_string_to_row(endorsement),
        }

    def _share(self, state: Arrays, request: Arrays) -> Arrays:
        own_number = int(request["head"][0])
        numbers = client_numbers(request["numbers"])
        if max(numbers, default=1) > len(self.client_ids):
            raise PayloadError("client numbers: expected clients of the federation")
        clients = [self.client_ids[number - 1] for number in numbers]
        public = dict(zip(numbers, request["keys"], strict=False))
        if (
            not len(numbers) == len(request["keys"]) == len(request["endorsements"])
            or own_number not in numbers
            or clients[numbers.index(own_number)] != self.client_id
            or public[own_number].tobytes() != state["keys"][0].tobytes()
        ):
            raise PayloadError("the public keys of this client are not those that it sent")
        parts = request["keys"].reshape(-1, crypto.KEY_LENGTH)
        if len({part.tobytes() for part in parts}) < len(parts):
            raise PayloadError("duplicate public keys")
        # With more than half of the holders, only one secret of a client can be reconstructed.
        if not len(numbers) < 2 * self.threshold <= 2 * len(numbers):
            raise PayloadError(
                f"clients of the secure sum: expected {self.threshold} to "
                f"{2 * self.threshold - 1} (channel.secure_sum.threshold), got {len(numbers)}"
            )
        tag = state["tag"].tobytes()
        for client, keys, signature in zip(
            clients, request["keys"], request["endorsements"], strict=True
        ):
            if client != self.client_id:
                self.site_keys.check(tag, client, keys.tobytes(), signature.tobytes())
        secret, masking, _, seed = (bytes(s) for s in state["secrets"])
        pairs = {
            number: a + b
            for number, a, b in zip(
                numbers,
                *(crypto.split_secret(s, self.threshold, numbers) for s in (masking, seed)),
                strict=True,
            )
        }
        own_pair = pairs.pop(own_number)
        loaded = crypto.load_private_key(secret)
        shared = {
            n: crypto.derive_shared_key(loaded, public[n][:32].tobytes(), b"shares") for n in pairs
        }
        sealed = [
            authenticated_encryption.encrypt(shared[n], pair, _associated_data(tag, own_number, n))
            for n, pair in pairs.items()
        ]
        updated = {
            "head": request["head"],
            "numbers": request["numbers"],
            "keys": request["keys"],
            "pairs": stack_byte_strings(*shared.values()),
            "own": stack_byte_strings(
                own_pair[: crypto.SHARE_LENGTH], own_pair[crypto.SHARE_LENGTH :]
            ),
        }
        self._store_state("train", {**state, **updated})
        return {
            "tag": state["tag"],
            "commitment": byte_string_to_row(crypto.commit_to_seed(seed, tag)),
            "numbers": np.array(list(pairs), np.int32),
            "sealed": stack_byte_strings(*sealed),
        }

    def _streams(self, state: Arrays, request: Arrays) -> list[tuple[bytes, bool]]:
        """Return the key of each mask on the client's vector, and whether to subtract the mask.

        The masks are the client's own mask and one mask for each other client that still
        participates.
        """
        own_number = int(state["head"][0])
        mates = client_numbers(request["numbers"])
        public = _public_keys(state)
        if (
            len(mates) != len(request["sealed"])
            or own_number in mates
            or not set(mates) <= set(public)
        ):
            raise PayloadError("shares: expected exactly one from each other client")
        self._require_enough(len(mates) + 1, "clients are left")
        if not 0 <= int(request["head"][0]) < 64:
            raise PayloadError("unit of weights: exponent must be between 0 and 63")
        _, masking, _, seed = (bytes(s) for s in state["secrets"])
        key = crypto.load_private_key(masking)
        tag = state["tag"].tobytes()
        pair_masks = [pair_mask(key, public[m].tobytes(), own_number, m, tag) for m in mates]
        return [(seed, False), *pair_masks]

    def _confirm(self, state: Arrays, request: Arrays) -> Arrays:
        """Sign whose vectors are in the sum. The client signs and unmasks no other set."""
        survivors = client_numbers(request["survivors"])
        if not {int(state["head"][0])} <= set(survivors) <= set(_members(state)):
            raise PayloadError("survivors: expected this client and clients that share its masks")
        self._require_enough(len(survivors), "survivors are left")
        updated = {**state, "survivors": request["survivors"]}
        self._store_state("unmask", updated)
        signature = crypto.sign(state["secrets"][2].tobytes(), _statement(updated))
        return {"tag": state["tag"], "signature": byte_string_to_row(signature)}

    def _unmask(self, state: Arrays, request: Arrays) -> Arrays:
        """Return a share of one secret of each client, if enough clients signed the survivors.

        If a client's vector is in the sum, the secret is the seed of the client's own mask. If the
        client dropped out, the secret is its masking key. Shares of both secrets are never
        returned. The secrets are deleted, so that a second request in the same round is refused.

        The sum of the same round over other survivors is not unmasked either: training is
        reproducible, so the difference of the two sums would reveal the uploads of the others.
        """
        own_number = int(state["head"][0])
        survivors = set(state["survivors"].tolist())
        signers = client_numbers(request["signers"])
        if not set(signers) <= survivors:
            raise PayloadError("signers: expected clients that are in the sum")
        self._require_enough(len(signers), "clients signed the survivors")
        check_signatures(_statement(state), signers, request["signatures"], _public_keys(state))
        revealed = self._add_sum(state)
        others = [number for number in state["numbers"].tolist() if number != own_number]
        pairs = dict(zip(others, state["pairs"], strict=True))
        sealed = dict(zip(state["mates"].tolist(), state["sealed"], strict=True))
        numbers = []
        shares = []
        for number in _members(state):
            try:
                if number == own_number:
                    pair = state["own"].tobytes()
                else:
                    context = _associated_data(state["tag"].tobytes(), number, own_number)
                    pair = authenticated_encryption.decrypt(
                        pairs[number].tobytes(), sealed[number].tobytes(), context
                    )
            except PayloadError:
                # The client sent an invalid share. The shares of other clients may suffice.
                continue
            numbers.append(number)
            shares.append(
                pair[crypto.SHARE_LENGTH :] if number in survivors else pair[: crypto.SHARE_LENGTH]
            )
        self._store_state("keys", {**self._idle_state(), **revealed})
        return {
            "tag": state["tag"],
            "numbers": np.array(numbers, np.int32),
            "shares": stack_byte_strings(*shares),
        }

    def _add_sum(self, state: Arrays) -> Arrays:
        """Return the rounds of which the client revealed shares, including the current one.

        Raises:
            PayloadError: If the client revealed shares of this round for other survivors.
        """
        (current,) = state["round"].tolist()
        digest = hashlib.sha256(np.sort(state["survivors"]).tobytes()).digest()
        sums = dict(zip(state["rounds"].tolist(), state["sums"], strict=True))
        is_forgotten = len(sums) == KEPT_ROUNDS and current < min(sums)
        if is_forgotten or bytes(sums.get(current, digest)) != digest:
            raise PayloadError("this round has been summed over other clients")
        sums[current] = byte_string_to_row(digest)
        rounds = sorted(sums)[-KEPT_ROUNDS:]
        return {
            "rounds": np.array(rounds, np.int32),
            "sums": np.stack([sums[round_idx] for round_idx in rounds]),
        }

    def _idle_state(self) -> Arrays:
        """Return the state between two rounds, which contains no secrets."""
        empty = {
            name: np.zeros([d or 0 for d in shape], dtype)
            for name, (dtype, shape) in STATE_FIELDS.items()
        }
        if self.client_id not in self.notes:
            return empty
        state = decode_arrays(self.notes[self.client_id], STATE_FIELDS)
        return {**empty, "rounds": state["rounds"], "sums": state["sums"]}

    def _require_enough(self, count: int, what: str) -> None:
        if count < self.threshold:
            raise PayloadError(f"{count} {what}, {self.threshold} are needed")

    def _load_state(self, kind: str, request: Arrays) -> Arrays:
        if self.client_id not in self.notes:
            raise PayloadError(f"request {kind!r} outside a round")
        state = decode_arrays(self.notes[self.client_id], STATE_FIELDS)
        if request["tag"].tobytes() != state["tag"].tobytes():
            raise PayloadError("message of another round")
        if kind.encode() != state["next"].tobytes():
            raise PayloadError(f"request {kind!r} out of order")
        return state

    def _store_state(self, next_request: str, state: Arrays) -> None:
        arrays = {**state, "next": byte_string_to_row(next_request.encode())}
        self.notes[self.client_id] = encode_arrays(arrays)

    @staticmethod
    def _reply(kind: str, arrays: Arrays) -> Message:
        return Message(kind, encode_arrays(arrays))


def pair_mask(
    private: X25519PrivateKey, public: bytes, number: int, other: int, tag: bytes
) -> tuple[bytes, bool]:
    """Return the key and the sign of the mask that two clients share.

    Args:
        private: Private masking key of the first client.
        public: Public keys of the second client.
        number: Number of the first client.
        other: Number of the second client.
        tag: Bytes that identify the round.

    Returns:
        The key of the mask, and whether the first client subtracts the mask. The client with the
        lower number subtracts the mask, and the other client adds the mask.
    """
    low, high = sorted((number, other))
    purpose = b"mask" + _associated_data(tag, low, high)
    return crypto.derive_shared_key(private, public[32:64], purpose), number == low


def _associated_data(tag: bytes, first: int, second: int) -> bytes:
    return tag + first.to_bytes(4, "little") + second.to_bytes(4, "little")


def _public_keys(state: Arrays) -> dict[int, np.ndarray]:
    return dict(zip(state["numbers"].tolist(), state["keys"], strict=True))


def _members(state: Arrays) -> list[int]:
    """Return the numbers of the clients that share masks, including the client itself."""
    return sorted([*state["head"].tolist(), *state["mates"].tolist()])


def _statement(state: Arrays) -> bytes:
    survivors = state["survivors"].tolist()
    return survivors_statement(state["tag"].tobytes(), _public_keys(state), survivors)
