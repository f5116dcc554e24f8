"""A server of secure aggregation that lies to clients, to learn single uploads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hetero_fl.communication.named_arrays import decode_arrays, encode_arrays
from hetero_fl.communication.protocol import Message
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.client import REPLIES, REQUESTS, TAG, pair_mask
from hetero_fl.communication.secure_aggregation.crypto import apply_masks
from tests.support.secure_aggregation import Party

Arrays = dict[str, np.ndarray]
Numbers = Iterable[int]


class LyingServer:
    """The keys and shares of an honest round, from which the server can start again.

    Clients have the numbers 1 to n. A secret that enough clients gave away is known for good.
    """

    def __init__(self, party: Party) -> None:
        self.party = party
        self.tag = bytes(TAG)
        self.everyone = range(1, len(party.clients) + 1)
        replies = {number: self._ask(number, "keys", {}) for number in self.everyone}
        self.public = {number: reply["keys"] for number, reply in replies.items() if reply}
        numbers = np.array(list(self.everyone), np.int32)
        told = {
            "numbers": numbers,
            "keys": np.stack(list(self.public.values())),
            "endorsements": np.stack([replies[n]["endorsement"] for n in self.everyone]),
        }
        self.sealed: dict[int, dict[int, np.ndarray]] = {}
        self.commitments: dict[int, bytes] = {}
        for number in self.everyone:
            reply = self._ask(number, "shares", {"head": np.array([number], np.int32), **told})
            self.sealed[number] = dict(zip(reply["numbers"].tolist(), reply["sealed"], strict=True))
            self.commitments[number] = reply["commitment"].tobytes()
        self._notes = {client: dict(notes) for client, notes in party.notes.items()}

    def attack(
        self, partners: Mapping[int, Numbers], survivors: Mapping[int, Numbers], signed: bool = True
    ) -> list[int]:
        """Run the rest of the round, and return the clients whose uploads the server learned."""
        self.train(partners)
        return self.unmask(survivors, signed)

    def train(self, partners: Mapping[int, Numbers]) -> None:
        """Collect the masked vectors, from which the server can start again.

        Args:
            partners: Clients with which each client shares masks, as the server tells it.
        """
        self.party.notes = {client: dict(notes) for client, notes in self._notes.items()}
        self.partners = {number: sorted(set(them) - {number}) for number, them in partners.items()}
        self.vectors = {number: self._train(number) for number in self.everyone}
        self._trained = {client: dict(notes) for client, notes in self.party.notes.items()}

    def unmask(self, survivors: Mapping[int, Numbers], signed: bool = True) -> list[int]:
        """Run the rest of the round, and return the clients whose uploads the server learned.

        Args:
            survivors: Clients whose vectors are in the sum, as the server tells each client,
                including the client itself.
            signed: Whether each client receives the signatures of those with the same survivors.
                Otherwise, the server names all survivors and forges missing signatures.
        """
        self.party.notes = {client: dict(notes) for client, notes in self._trained.items()}
        told = {number: sorted({number, *them}) for number, them in survivors.items()}
        confirmed: dict[int, Arrays] = {}
        for number, them in told.items():
            if reply := self._ask(number, "consistency", {"survivors": np.array(them, np.int32)}):
                confirmed[number] = reply
        self.seeds: dict[int, dict[int, bytes]] = {}
        self.keys: dict[int, dict[int, bytes]] = {}
        for number, reply in confirmed.items():
            signers = told[number]
            if signed:
                signers = [m for m in confirmed if told[m] == told[number]]
            signatures = np.stack([confirmed.get(m, reply)["signature"] for m in signers])
            request = {"signers": np.array(signers, np.int32), "signatures": signatures}
            if revealed := self._ask(number, "unmask", request):
                shares = zip(revealed["numbers"].tolist(), revealed["shares"], strict=True)
                for owner, share in shares:
                    found = self.seeds if owner in told[number] else self.keys
                    found.setdefault(owner, {})[number] = share.tobytes()
        return [number for number in self.everyone if self._learns(number, self.vectors[number])]

    def _train(self, number: int) -> Arrays:
        layout = self.party.layout(0)
        senders = self.partners[number]
        request = {
            "head": np.array([3], np.int32),
            "layout": np.frombuffer(bytearray(self.party.protocol._digest(layout)), np.uint8),
            "numbers": np.array(senders, np.int32),
            "sealed": np.stack([self.sealed[m][number] for m in senders]),
            "broadcast": np.zeros(1, np.uint8),
        }
        reply = self._ask(number, "train", request)
        assert reply
        return reply

    def _learns(self, number: int, sent: Arrays) -> bool:
        """Return whether the masks of a client can be removed from its vector."""
        seed = self._secret(self.seeds.get(number, {}))
        if seed is None or crypto.commit_to_seed(seed, self.tag) != self.commitments[number]:
            return False
        streams = [(seed, True)]
        for mate in self.partners[number]:
            for owner, other in ((number, mate), (mate, number)):
                key = self._secret(self.keys.get(owner, {}))
                if key is not None and self._owns(key, owner):
                    private = crypto.load_private_key(key)
                    public = self.public[other].tobytes()
                    mask, is_subtracted = pair_mask(private, public, owner, other, self.tag)
                    streams.append((mask, is_subtracted == (owner == mate)))
                    break
            else:
                return False
        vector = sent["vector"].view(np.uint64).copy()
        apply_masks(vector, streams)
        return np.array_equal(vector, self.party.plain([self.party.clients[number - 1]]))

    def _owns(self, key: bytes, owner: int) -> bool:
        return crypto.public_key(key) == self.public[owner].tobytes()[32:64]

    def _secret(self, shares: Mapping[int, bytes]) -> bytes | None:
        threshold = self.party.protocol.threshold
        if len(shares) < threshold:
            return None
        return crypto.combine_shares(dict(list(shares.items())[:threshold]))

    def _ask(self, number: int, kind: str, request: Mapping[str, Any]) -> Arrays:
        """Return the reply of a client, empty if it refuses."""
        tag = np.frombuffer(bytearray(self.tag), np.uint8)
        arrays = {name: {"tag": tag, **request}[name] for name in REQUESTS[kind]}
        message = Message(kind, encode_arrays(arrays))
        reply = self.party.reply(self.party.clients[number - 1], message)
        return {} if reply.kind == "refused" else decode_arrays(reply.body, REPLIES[kind])
