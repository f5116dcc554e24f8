"""The server's side of the secure sum: four exchanges, whoever leaves in between, and the masks that are left taken off.

A client is in the sum if its vector arrived, whether or not it stays for the last exchange.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from hetero_fl.communication.protocol import AggregatedUploads, Message, Messages, Replies
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.client import pair_mask
from hetero_fl.communication.secure_aggregation.crypto import (
    Words,
    apply_masks,
    draw_neighbourhoods,
    num_neighbours,
    share_threshold,
)
from hetero_fl.communication.secure_aggregation.messages import (
    REPLIES,
    SEALED,
    TAG,
    Arrays,
    byte_string_to_row,
    client_numbers,
    decode_arrays,
    encode_arrays,
)
from hetero_fl.core.payload import SPARE_BYTES, PayloadError
from hetero_fl.utils.caching import LazyMapping
from hetero_fl.utils.errors import RoundAbandonedError


@dataclass
class SecureAggregationRound:
    """One round of the protocol, seen from the server. Clients stand under their numbers.

    Args:
        survivors: how many have to stay.
        neighbours: of each client; none: as `graph.degree` has it.
        layout: digest and length of the vector that everybody sends.
        unit: the exponent of two in parts of which weights are sent.
    """

    broadcasts: Mapping[str, bytes]
    survivors: int
    neighbours: int | None
    layout: tuple[bytes, int]
    unit: int
    round: int
    dropouts: dict[str, str] = field(default_factory=dict)  # who left, and why
    tag: bytes = field(default_factory=lambda: os.urandom(TAG))
    names: dict[int, str] = field(init=False)
    public: dict[int, np.ndarray] = field(default_factory=dict)
    seen_public_keys: set[bytes] = field(default_factory=set)  # public keys
    seed_commitments: dict[int, bytes] = field(default_factory=dict)  # commitments to seeds
    # with whom each shares a mask
    mask_partners: dict[int, list[int]] = field(default_factory=dict)
    threshold: int = 0  # shares that make a secret

    def __post_init__(self) -> None:
        self.names = dict(enumerate(self.broadcasts, 1))

    # The exchanges ---------------------------------------------------------------------------------------------------
    def key_requests(self) -> Messages:
        """To everybody: keys are asked for."""
        return self._requests("keys", self.names, lambda number: {})

    def collect_keys(self, replies: Replies) -> None:
        """Exchange 1: the clients' public keys."""
        for number, got in self._valid_replies("keys", self.names, replies, self._check_keys):
            self.public[number] = got["keys"]
            self.seen_public_keys |= {
                public.tobytes() for public in got["keys"].reshape(2, crypto.KEY_LENGTH)
            }
        self._require_enough(self.public, "keys")

    def share_requests(self) -> Messages:
        """To each the keys of its neighbourhood, drawn among those who are there."""
        k = num_neighbours(len(self.public), min(self.survivors, len(self.public)), self.neighbours)
        self.mask_partners = draw_neighbourhoods(list(self.public), k)
        self.threshold = self.survivors if k == len(self.public) - 1 else share_threshold(k + 1)

        def share_request(number: int) -> dict[str, np.ndarray]:
            members = self.mask_partners[number]
            head = np.array([number, self.threshold], np.int32)
            public = np.stack([self.public[m] for m in members])
            return {"head": head, "numbers": np.array(members, np.int32), "keys": public}

        return self._requests("shares", self.mask_partners, share_request)

    def collect_shares(self, replies: Replies) -> dict[int, dict[int, np.ndarray]]:
        """Exchange 2: shares of everybody's secrets, sealed for each neighbour; by receiver and sender."""
        sealed: dict[int, dict[int, np.ndarray]] = {}
        for number, got in self._valid_replies(
            "shares", self.mask_partners, replies, self._check_vector
        ):
            sealed[number] = dict(zip(got["numbers"].tolist(), got["sealed"], strict=True))
            self.seed_commitments[number] = got["commitment"].tobytes()
        alive = set(sealed)
        while alone := {
            n for n in alive if len(alive.intersection(self.mask_partners[n])) < self.threshold
        }:
            self.dropouts.update(
                {self.names[n]: "too few of its neighbours are left" for n in alone}
            )
            alive -= alone
        self._require_enough(alive, "shares")
        self.mask_partners = {
            n: [m for m in self.mask_partners[n] if m in alive and m != n] for n in sorted(alive)
        }
        return {n: {m: sealed[m][n] for m in self.mask_partners[n]} for n in self.mask_partners}

    def train_requests(self, sealed: Mapping[int, Mapping[int, np.ndarray]]) -> Messages:
        """To each its neighbours' shares, and what it trains on."""

        def train_request(number: int) -> dict[str, np.ndarray]:
            senders = list(sealed[number])
            return {
                "head": np.array([self.unit], np.int32),
                "layout": byte_string_to_row(self.layout[0]),
                "numbers": np.array(senders, np.int32),
                "sealed": np.stack([sealed[number][m] for m in senders]),
                "broadcast": byte_string_to_row(self.broadcasts[self.names[number]]),
            }

        return self._requests("train", self.mask_partners, train_request)

    def collect_vectors(self, replies: Replies) -> tuple[list[int], Words]:
        """Exchange 3: whose masked vectors arrived, and their sum."""
        total = np.zeros(self.layout[1], np.uint64)
        summed = []
        for number, got in self._valid_replies(
            "train", self.mask_partners, replies, self._check_shares
        ):
            total += got["vector"].view(np.uint64)
            summed.append(number)
        self._require_enough(summed, "train")
        return summed, total

    def unmask_requests(self, summed: list[int]) -> Messages:
        """To each who among its neighbours is in the sum, and who is not."""
        asked = [n for n in summed if len(self._is_summed(summed, n)) >= self.threshold]

        def unmask_request(number: int) -> dict[str, np.ndarray]:
            here = self._is_summed(summed, number)
            gone = [m for m in self.mask_partners[number] if m not in here]
            return {"survivors": np.array(here, np.int32), "dropped": np.array(gone, np.int32)}

        return self._requests("unmask", asked, unmask_request)

    def remove_masks(self, summed: list[int], total: Words, replies: Replies) -> AggregatedUploads:
        """Exchange 4: what is left of masks taken off, with the secrets that enough holders give back."""
        shares: dict[int, dict[int, bytes]] = {}
        told = dict(self.dropouts)  # who leaves now is in the sum all the same
        for holder, got in self._valid_replies("unmask", summed, replies):
            for number, share in zip(got["numbers"].tolist(), got["shares"], strict=False):
                if number == holder or number in self.mask_partners[holder]:
                    shares.setdefault(number, {})[holder] = share.tobytes()
        streams: list[tuple[bytes, bool]] = []
        for number, mates in self.mask_partners.items():
            if number in summed:
                seed = self._reconstruct_secret(
                    number,
                    shares,
                    lambda s, n=number: self._is_seed(n, s),  # type: ignore[misc]
                )
                streams.append((seed, True))
            elif others := [m for m in mates if m in summed]:
                key = self._reconstruct_secret(
                    number,
                    shares,
                    lambda s, n=number: self._is_key(n, s),  # type: ignore[misc]
                )
                # its masks are added as it would have done itself
                loaded = crypto.load_private_key(key)
                streams += [
                    pair_mask(loaded, self.public[m].tobytes(), number, m, self.tag) for m in others
                ]
        apply_masks(total, streams)
        return AggregatedUploads([self.names[n] for n in summed], total, 2.0**self.unit, told)

    # Pieces ----------------------------------------------------------------------------------------------------------
    def _requests(
        self, ask: str, numbers: Iterable[int], make: Callable[[int], dict[str, np.ndarray]]
    ) -> Messages:
        by_name = {self.names[n]: n for n in numbers}
        tag = byte_string_to_row(self.tag)
        return LazyMapping(
            list(by_name),
            lambda name: Message(ask, encode_arrays({"tag": tag, **make(by_name[name])})),
        )

    def _valid_replies(
        self,
        ask: str,
        requested: Iterable[int],
        replies: Replies,
        check: Callable[[int, Arrays], None] | None = None,
    ) -> Iterator[tuple[int, Arrays]]:
        """The replies that are what they should be; who sends another, or none, has left."""
        silent = {self.names[n]: n for n in requested}
        for client, message in replies:
            if (number := silent.pop(client, None)) is None:
                continue
            try:
                yield number, self._decode_reply(ask, number, message, check)
            except PayloadError as error:
                self.dropouts[client] = str(error)
        self.dropouts.update(dict.fromkeys(silent, f"no answer to {ask!r} in the secure sum"))

    def _decode_reply(
        self, ask: str, number: int, message: Message, check: Callable[[int, Arrays], None] | None
    ) -> Arrays:
        if message.kind == "refused":
            raise PayloadError(f"it refused {ask!r}: {message.body[:200].decode(errors='replace')}")
        most = SPARE_BYTES + 8 * self.layout[1] + 2 * SEALED * len(self.names)
        if len(message.body) > most:
            raise PayloadError(
                f"{len(message.body):,} bytes; an answer to {ask!r} takes at most {most:,}"
            )
        got = decode_arrays(message.body, REPLIES[ask])
        if message.kind != ask or got["tag"].tobytes() != self.tag:
            raise PayloadError("a message of another round or exchange")
        if check is not None:
            check(number, got)
        return got

    def _check_keys(self, number: int, received: Arrays) -> None:
        # Its neighbors would all refuse what is refused here.
        pair = [public.tobytes() for public in received["keys"].reshape(2, crypto.KEY_LENGTH)]
        for public in pair:
            crypto.check_public_key(public)
        if pair[0] == pair[1] or not self.seen_public_keys.isdisjoint(pair):
            raise PayloadError("a public key that is there twice")

    def _check_vector(self, number: int, received: Arrays) -> None:
        if client_numbers(received["numbers"]) != [
            m for m in self.mask_partners[number] if m != number
        ]:
            raise PayloadError("shares for others than its neighbours")
        if len(received["sealed"]) != len(received["numbers"]):
            raise PayloadError("more or fewer shares than neighbours")

    def _check_shares(self, number: int, received: Arrays) -> None:
        if len(received["vector"]) != self.layout[1]:
            raise PayloadError(
                f"a vector of {len(received['vector'])} numbers where {self.layout[1]} were agreed"
            )

    def _is_summed(self, summed: Iterable[int], number: int) -> list[int]:
        among = {number, *self.mask_partners[number]}
        return [n for n in summed if n in among]

    def _require_enough(self, there: Iterable[int], ask: str) -> None:
        if (count := len(list(there))) < self.survivors:
            client, why = next(iter(self.dropouts.items()), ("nobody", "left"))
            raise RoundAbandonedError(
                f"round {self.round + 1}: the secure sum is given up at {ask!r}: {count} of {len(self.names)} clients are "
                f"left, channel.secure_sum.threshold asks for {self.survivors} ({client}: {why})"
            )

    def _reconstruct_secret(
        self, number: int, shares: Mapping[int, Mapping[int, bytes]], right: Callable[[bytes], bool]
    ) -> bytes:
        """From as many shares as it takes; with wrong ones among them, from others."""
        held = list(shares.get(number, {}).items())
        for start in range(len(held)) if len(held) >= self.threshold else ():
            found = crypto.combine_shares(dict((held + held)[start : start + self.threshold]))
            if found is not None and right(found):
                return found
        raise RoundAbandonedError(
            f"round {self.round + 1}: the secure sum is given up at 'unmask': of the {len(held)} shares of "
            f"{self.names[number]}'s secret too few are there or right, {self.threshold} are needed"
        )

    def _is_seed(self, number: int, secret: bytes) -> bool:
        return crypto.commit_to_seed(secret, self.tag) == self.seed_commitments[number]

    def _is_key(self, number: int, secret: bytes) -> bool:
        return crypto.public_key(secret) == self.public[number][32:].tobytes()
