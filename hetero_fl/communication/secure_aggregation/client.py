"""Client side of secure aggregation: messages, and five replies that are sent once per round.

See Bonawitz et al. (2017), figure 4 and section 6.2. Messages are named arrays. Clients are
identified by their position among all clients of the federation, starting at 1, so that the length
of a message does not depend on client ids.

Between two replies, the client's secrets are stored in `notes`, which the server never receives and
which are deleted when the round ends. In a deployment, the notes are also written to the disk of
the client's machine, because the process may be killed between two replies.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
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
    zero_arrays,
)
from hetero_fl.communication.protocol import Message, TrainingRequest, refusal
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.crypto import SiteKeys, apply_masks
from hetero_fl.communication.vector_layout import Words
from hetero_fl.core.payload import PayloadError

# Function that converts an encoded upload to the integers that are summed. The second argument is
# the factor by which values and weights are divided. Raises PayloadError for an invalid upload.
Pack = Callable[[bytes, float], Words]
Notes = MutableMapping[str, bytes]
# Number of random bytes that identify a round, so that messages of other rounds are refused.
TAG = 16
# Length in bytes of two encrypted shares, which are encrypted together.
SEALED = 2 * crypto.SHARE_LENGTH + authenticated_encryption.OVERHEAD
# Length in bytes of the public keys of a client: for shares, for masks and for signatures.
KEYS = 3 * crypto.KEY_LENGTH
# Number of rounds in the state of a client. Shares of earlier rounds are not revealed any more.
KEPT_ROUNDS = 16

TAGGED: Field = (np.uint8, (TAG,))
NUMBER: Field = (np.int32, (1,))
NUMBERS: Field = (np.int32, (None,))
DIGEST: Field = (np.uint8, (32,))
ALL_KEYS: Field = (np.uint8, (None, KEYS))
ALL_SEALED: Field = (np.uint8, (None, SEALED))
REQUESTS: dict[str, dict[str, Field]] = {
    "keys": {"tag": TAGGED},
    "shares": {
        "tag": TAGGED,
        "head": NUMBER,
        "numbers": NUMBERS,
        "keys": ALL_KEYS,
        "endorsements": (np.uint8, (None, crypto.ENDORSEMENT)),
    },
    "train": {
        "tag": TAGGED,
        "head": NUMBER,
        "layout": DIGEST,
        "numbers": NUMBERS,
        "sealed": ALL_SEALED,
        "broadcast": (np.uint8, (None,)),
    },
    "consistency": {"tag": TAGGED, "survivors": NUMBERS},
    "unmask": {
        "tag": TAGGED,
        "signers": NUMBERS,
        "signatures": (np.uint8, (None, crypto.SIGNATURE)),
    },
}
# The only request that a client answers after each request.
NEXT_REQUEST = {
    "keys": "shares",
    "shares": "train",
    "train": "consistency",
    "consistency": "unmask",
    "unmask": "keys",
}
REPLIES: dict[str, dict[str, Field]] = {
    "keys": {
        "tag": TAGGED,
        "keys": (np.uint8, (KEYS,)),
        "endorsement": (np.uint8, (crypto.ENDORSEMENT,)),
    },
    "shares": {"tag": TAGGED, "commitment": DIGEST, "numbers": NUMBERS, "sealed": ALL_SEALED},
    "train": {"tag": TAGGED, "vector": (np.int64, (None,))},
    "consistency": {"tag": TAGGED, "signature": (np.uint8, (crypto.SIGNATURE,))},
    "unmask": {
        "tag": TAGGED,
        "numbers": NUMBERS,
        "shares": (np.uint8, (None, crypto.SHARE_LENGTH)),
    },
}
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
    "tag": TAGGED,
    "secrets": (np.uint8, (4, 32)),
    "head": NUMBER,
    "numbers": NUMBERS,
    "keys": ALL_KEYS,
    "own": (np.uint8, (2 * crypto.SHARE_LENGTH,)),
    "pairs": (np.uint8, (None, 32)),
    "mates": NUMBERS,
    "sealed": ALL_SEALED,
    "round": NUMBER,
    "survivors": NUMBERS,
    "rounds": NUMBERS,
    "sums": (np.uint8, (None, 32)),
}


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
        layout_digest: Digest of the layout of the vector.
        pack: Function that converts an upload to the vector.
    """

    client_id: str
    client_ids: Sequence[str]
    round_idx: int
    threshold: int
    site_keys: SiteKeys
    notes: Notes
    layout_digest: bytes
    pack: Pack

    def answer(self, message: Message) -> Message | TrainingRequest:
        """Answer one request of the server.

        Args:
            message: The request.

        Returns:
            The reply, or a request to train. If the request is invalid or out of order, the reply
            has the kind "refused" and contains the reason.
        """
        kind = message.kind
        try:
            if kind not in REQUESTS:
                raise PayloadError(f"unknown request {kind[:20]!r}")
            request = decode_arrays(message.body, REQUESTS[kind])
            state = self._idle_state() if kind == "keys" else self._load_state(kind, request)
            if kind == "train":
                return self._train(state, request)
            replies = {
                "keys": self._advertise,
                "shares": self._share,
                "consistency": self._confirm,
                "unmask": self._unmask,
            }
            arrays = replies[kind](state, request)
            return self._store_and_reply(kind, state, {"tag": request["tag"], **arrays})
        except PayloadError as error:
            return refusal(error)

    def _advertise(self, state: Arrays, request: Arrays) -> Arrays:
        """Send new public keys."""
        secrets = (crypto.new_key(), crypto.new_key(), os.urandom(32), os.urandom(32))
        public = crypto.public_key(secrets[0]) + crypto.public_key(secrets[1])
        public += crypto.verification_key(secrets[2])
        state |= {
            "tag": request["tag"],
            "secrets": stack_byte_strings(*secrets),
            "keys": stack_byte_strings(public),
        }
        endorsement = self.site_keys.endorse(request["tag"].tobytes(), public)
        return {
            "keys": byte_string_to_row(public),
            "endorsement": byte_string_to_row(endorsement),
        }

    def _share(self, state: Arrays, request: Arrays) -> Arrays:
        """Send encrypted shares of the secrets to the other clients."""
        (own_number,) = request["head"].tolist()
        self._check_keys(state, request)
        tag = state["tag"].tobytes()
        secret, masking, _, seed = (bytes(s) for s in state["secrets"])
        numbers = request["numbers"].tolist()
        pairs = {
            number: key_share + seed_share
            for number, key_share, seed_share in zip(
                numbers,
                crypto.split_secret(masking, self.threshold, numbers),
                crypto.split_secret(seed, self.threshold, numbers),
                strict=True,
            )
        }
        own_pair = pairs.pop(own_number)
        private = crypto.load_private_key(secret)
        public = dict(zip(numbers, request["keys"], strict=True))
        shared = {
            n: crypto.derive_shared_key(private, public[n][:32].tobytes(), b"shares") for n in pairs
        }
        sealed = [
            authenticated_encryption.encrypt(shared[n], pair, _associated_data(tag, own_number, n))
            for n, pair in pairs.items()
        ]
        state |= {
            "head": request["head"],
            "numbers": request["numbers"],
            "keys": request["keys"],
            "pairs": stack_byte_strings(*shared.values()),
            "own": byte_string_to_row(own_pair),
        }
        return {
            "commitment": byte_string_to_row(crypto.commit_to_seed(seed, tag)),
            "numbers": np.array(list(pairs), np.int32),
            "sealed": stack_byte_strings(*sealed),
        }

    def _check_keys(self, state: Arrays, request: Arrays) -> None:
        """Check the public keys of the clients that will hold shares.

        Raises:
            PayloadError: If a key is wrong, or there are too many or too few clients.
        """
        (own_number,) = request["head"].tolist()
        numbers = client_numbers(request["numbers"])
        keys = request["keys"]
        if max(numbers, default=1) > len(self.client_ids):
            raise PayloadError("client numbers: expected clients of the federation")
        clients = [self.client_ids[number - 1] for number in numbers]
        if (
            not len(numbers) == len(keys) == len(request["endorsements"])
            or own_number not in numbers
            or clients[numbers.index(own_number)] != self.client_id
            or keys[numbers.index(own_number)].tobytes() != state["keys"].tobytes()
        ):
            raise PayloadError("the public keys of this client are not those that it sent")
        parts = keys.reshape(-1, crypto.KEY_LENGTH)
        if len({part.tobytes() for part in parts}) < len(parts):
            raise PayloadError("duplicate public keys")
        # With more than half of the holders, only one secret of a client can be reconstructed.
        if not len(numbers) < 2 * self.threshold <= 2 * len(numbers):
            raise PayloadError(
                f"clients of the secure sum: expected {self.threshold} to "
                f"{2 * self.threshold - 1} (channel.secure_sum.threshold), got {len(numbers)}"
            )
        for client, public, signature in zip(clients, keys, request["endorsements"], strict=True):
            if client != self.client_id:
                tag = state["tag"].tobytes()
                self.site_keys.check(tag, client, public.tobytes(), signature.tobytes())

    def _train(self, state: Arrays, request: Arrays) -> TrainingRequest:
        """Train, and send the masked vector.

        The masks are the client's own mask and one mask for each other client that still
        participates.
        """
        if request["layout"].tobytes() != self.layout_digest:
            raise PayloadError("layout: differs from the layout of this client")
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
        unit = int(request["head"][0])
        if not 0 <= unit < 64:
            raise PayloadError("unit of weights: exponent must be between 0 and 63")
        _, masking, _, seed = (bytes(s) for s in state["secrets"])
        private = crypto.load_private_key(masking)
        tag = request["tag"].tobytes()
        pair_masks = [pair_mask(private, public[m].tobytes(), own_number, m, tag) for m in mates]

        def mask(upload: bytes) -> Message:
            try:
                vector = self.pack(upload, 2.0**unit)
            except PayloadError as error:
                return refusal(error)
            apply_masks(vector, [(seed, False), *pair_masks])
            updated = {
                "round": np.array([self.round_idx], np.int32),
                "mates": request["numbers"],
                "sealed": request["sealed"],
            }
            arrays = {"tag": request["tag"], "vector": vector.view(np.int64)}
            return self._store_and_reply("train", {**state, **updated}, arrays)

        return TrainingRequest(request["broadcast"].tobytes(), mask)

    def _confirm(self, state: Arrays, request: Arrays) -> Arrays:
        """Sign whose vectors are in the sum. The client signs and unmasks no other set."""
        survivors = client_numbers(request["survivors"])
        if not {int(state["head"][0])} <= set(survivors) <= set(_members(state)):
            raise PayloadError("survivors: expected this client and clients that share its masks")
        self._require_enough(len(survivors), "survivors are left")
        state["survivors"] = request["survivors"]
        signature = crypto.sign(state["secrets"][2].tobytes(), _statement(state))
        return {"signature": byte_string_to_row(signature)}

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
        shares = {}
        for number in _members(state):
            pair = state["own"].tobytes()
            if number != own_number:
                context = _associated_data(state["tag"].tobytes(), number, own_number)
                try:
                    pair = authenticated_encryption.decrypt(
                        pairs[number].tobytes(), sealed[number].tobytes(), context
                    )
                except PayloadError:
                    # The client sent an invalid share. The shares of other clients may suffice.
                    continue
            key_share = pair[: crypto.SHARE_LENGTH]
            seed_share = pair[crypto.SHARE_LENGTH :]
            shares[number] = seed_share if number in survivors else key_share
        state |= {**self._idle_state(), **revealed}
        return {
            "numbers": np.array(list(shares), np.int32),
            "shares": stack_byte_strings(*shares.values()),
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
        empty = zero_arrays(STATE_FIELDS)
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

    def _store_and_reply(self, kind: str, state: Arrays, arrays: Arrays) -> Message:
        """Store the state, in which only the next request is valid, and return the reply."""
        next_request = byte_string_to_row(NEXT_REQUEST[kind].encode())
        self.notes[self.client_id] = encode_arrays({**state, "next": next_request})
        return Message(kind, encode_arrays(arrays))


def client_numbers(array: np.ndarray) -> list[int]:
    """Convert an array of client numbers to a list, and check the numbers.

    Raises:
        PayloadError: If the numbers are not distinct and positive.
    """
    numbers = array.tolist()
    if len(set(numbers)) < len(numbers) or min(numbers, default=1) < 1:
        raise PayloadError("client numbers: expected distinct positive integers")
    return numbers


def survivors_statement(
    tag: bytes, public: Mapping[int, np.ndarray], survivors: Iterable[int]
) -> bytes:
    """Return what a client signs before it reveals shares: whose vectors are in the sum.

    The statement covers the keys of all clients, which are new in each round, so that no signature
    of another round is valid.

    Args:
        tag: Bytes that identify the round.
        public: Public keys of the clients that hold shares, keyed by number.
        survivors: Numbers of the clients whose vectors are in the sum.
    """
    keys = b"".join(keys.tobytes() for keys in public.values())
    numbers = [np.array(group, np.int32).tobytes() for group in (list(public), sorted(survivors))]
    content = b"".join([tag, len(public).to_bytes(4, "little"), *numbers, keys])
    return b"hetero_fl secure sum: survivors" + hashlib.sha256(content).digest()


def check_signatures(
    statement: bytes, numbers: list[int], signatures: np.ndarray, public: Mapping[int, np.ndarray]
) -> None:
    """Check that clients signed a statement.

    Args:
        statement: The statement.
        numbers: Numbers of the clients.
        signatures: Their signatures, shape `[len(numbers), 64]`.
        public: Public keys of the clients, keyed by number.

    Raises:
        PayloadError: If a signature is missing or invalid.
    """
    if len(numbers) != len(signatures):
        raise PayloadError(f"signatures: expected {len(numbers)}, got {len(signatures)}")
    for number, signature in zip(numbers, signatures, strict=True):
        key = public[number][2 * crypto.KEY_LENGTH :].tobytes()
        if not crypto.is_signed(key, signature.tobytes(), statement):
            raise PayloadError(f"client number {number} did not sign the same survivors")


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
