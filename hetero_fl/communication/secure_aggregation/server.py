"""The server's side of the secure sum: four exchanges, whoever leaves in between, and the masks that are left taken off.

A client is in the sum if its vector arrived, whether or not it stays for the last exchange.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hetero_fl.communication.protocol import (
    AggregatedUploads,
    Content,
    Exchanges,
    Message,
    encoded,
)
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
from hetero_fl.utils.errors import RoundAbandonedError


@dataclass
class SecureExchange:
    """One exchange of the protocol.

    Args:
        round: The round it belongs to.
        kind: What is asked.
        numbers: The clients that are asked, by their numbers.
        arrays: Returns the content of the request to a client.
        take: Takes a valid reply.
        check: Raises PayloadError for a reply that is not valid.
    """

    round: SecureAggregationRound
    kind: str
    numbers: Iterable[int]
    arrays: Callable[[int, Callable[[str], Content]], Arrays]
    take: Callable[[int, Arrays], None]
    check: Callable[[int, Arrays], None] | None = None

    def __post_init__(self) -> None:
        self._silent = {self.round.names[number]: number for number in self.numbers}
        self.clients: Sequence[str] = list(self._silent)

    def request(self, client_id: str, broadcast_to: Callable[[str], Content]) -> Message:
        """Return the request to a client."""
        arrays = self.arrays(self.round.numbers[client_id], broadcast_to)
        tag = byte_string_to_row(self.round.tag)
        return Message(self.kind, encode_arrays({"tag": tag, **arrays}))

    def accept(self, client_id: str, reply: Message) -> None:
        """Take a reply; a client that sends another one than it should has left."""
        number = self._silent.pop(client_id, None)
        if number is None:
            return
        try:
            self.take(number, self.round.decode_reply(self.kind, number, reply, self.check))
        except PayloadError as error:
            self.round.dropouts[client_id] = str(error)

    def close(self) -> None:
        """Note that the clients without a reply have left."""
        why = f"no answer to {self.kind!r} in the secure sum"
        self.round.dropouts.update(dict.fromkeys(self._silent, why))


class SecureAggregationRound:
    """One round of the protocol on the server. Clients are known by numbers, starting at 1.

    Args:
        cohort: The clients.
        survivors: How many have to stay.
        neighbours: Neighbours of each client; None: as many as `num_neighbours` returns.
        layout: Digest and length of the vector that every client sends.
        unit: Exponent of two of the unit in which weights are sent.
        round_idx: The round.
    """

    def __init__(
        self,
        cohort: Sequence[str],
        survivors: int,
        neighbours: int | None,
        layout: tuple[bytes, int],
        unit: int,
        round_idx: int,
    ) -> None:
        self.survivors = survivors
        self.neighbours = neighbours
        self.layout = layout
        self.unit = unit
        self.round_idx = round_idx
        self.tag = os.urandom(TAG)
        self.names = dict(enumerate(cohort, 1))
        self.numbers = {client_id: number for number, client_id in self.names.items()}
        self.dropouts: dict[str, str] = {}  # why clients left
        self.public: dict[int, np.ndarray] = {}
        self.seen_public_keys: set[bytes] = set()
        self.seed_commitments: dict[int, bytes] = {}
        # with whom each shares a mask
        self.mask_partners: dict[int, list[int]] = {}
        self.threshold = 0  # shares that reconstruct a secret

    def exchanges(self) -> Exchanges:
        """Yield the four exchanges; return the unmasked sum.

        Raises:
            RoundAbandonedError: If too few clients are left, or a secret cannot be reconstructed.
        """
        yield from self._exchange_keys()
        shares = yield from self._exchange_shares()
        summed, total = yield from self._collect_vectors(shares)
        yield from self._remove_masks(summed, total)
        clients = [self.names[number] for number in summed]
        # A client that leaves in the last exchange is in the sum all the same.
        dropouts = {c: why for c, why in self.dropouts.items() if c not in clients}
        return AggregatedUploads(clients, total, 2.0**self.unit, dropouts)

    def _exchange_keys(self) -> Iterator[SecureExchange]:
        """Collect the clients' public keys."""

        def take(number: int, reply: Arrays) -> None:
            self.public[number] = reply["keys"]
            pair = reply["keys"].reshape(2, crypto.KEY_LENGTH)
            self.seen_public_keys |= {public.tobytes() for public in pair}

        exchange = SecureExchange(
            self, "keys", self.names, lambda number, broadcast_to: {}, take, self._check_keys
        )
        yield exchange
        exchange.close()
        self.public = {number: self.public[number] for number in sorted(self.public)}
        self._require_enough(self.public, "keys")

    def _exchange_shares(
        self,
    ) -> Generator[SecureExchange, None, dict[int, dict[int, np.ndarray]]]:
        """Draw neighbourhoods; collect sealed shares of secrets, by receiver and sender."""
        k = num_neighbours(len(self.public), min(self.survivors, len(self.public)), self.neighbours)
        self.mask_partners = draw_neighbourhoods(list(self.public), k)
        self.threshold = self.survivors if k == len(self.public) - 1 else share_threshold(k + 1)
        sealed: dict[int, dict[int, np.ndarray]] = {}

        def arrays(number: int, broadcast_to: Callable[[str], Content]) -> Arrays:
            members = self.mask_partners[number]
            head = np.array([number, self.threshold], np.int32)
            public = np.stack([self.public[m] for m in members])
            return {"head": head, "numbers": np.array(members, np.int32), "keys": public}

        def take(number: int, reply: Arrays) -> None:
            sealed[number] = dict(zip(reply["numbers"].tolist(), reply["sealed"], strict=True))
            self.seed_commitments[number] = reply["commitment"].tobytes()

        exchange = SecureExchange(
            self, "shares", self.mask_partners, arrays, take, self._check_receivers
        )
        yield exchange
        exchange.close()
        alive = set(sealed)
        while alone := {
            n for n in alive if len(alive.intersection(self.mask_partners[n])) < self.threshold
        }:
            why = "too few of its neighbours are left"
            self.dropouts.update({self.names[number]: why for number in alone})
            alive -= alone
        self._require_enough(alive, "shares")
        self.mask_partners = {
            n: [m for m in self.mask_partners[n] if m in alive and m != n] for n in sorted(alive)
        }
        return {n: {m: sealed[m][n] for m in self.mask_partners[n]} for n in self.mask_partners}

    def _collect_vectors(
        self, shares: Mapping[int, Mapping[int, np.ndarray]]
    ) -> Generator[SecureExchange, None, tuple[list[int], Words]]:
        """Hand out the shares and the broadcasts; add up the masked vectors."""
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

        exchange = SecureExchange(
            self, "train", self.mask_partners, arrays, take, self._check_vector
        )
        yield exchange
        exchange.close()
        self._require_enough(summed, "train")
        return sorted(summed), total

    def _remove_masks(self, summed: list[int], total: Words) -> Iterator[SecureExchange]:
        """Take the remaining masks off `total`, with the shares that enough holders give back."""
        shares: dict[int, dict[int, bytes]] = {}

        def arrays(number: int, broadcast_to: Callable[[str], Content]) -> Arrays:
            here = self._summed_neighbours(summed, number)
            gone = [m for m in self.mask_partners[number] if m not in here]
            return {"survivors": np.array(here, np.int32), "dropped": np.array(gone, np.int32)}

        def take(holder: int, reply: Arrays) -> None:
            for number, share in zip(reply["numbers"].tolist(), reply["shares"], strict=False):
                if number == holder or number in self.mask_partners[holder]:
                    shares.setdefault(number, {})[holder] = share.tobytes()

        asked = [n for n in summed if len(self._summed_neighbours(summed, n)) >= self.threshold]
        yield SecureExchange(self, "unmask", asked, arrays, take)
        streams: list[tuple[bytes, bool]] = []
        for number, mates in self.mask_partners.items():
            if number in summed:
                seed = self._reconstruct_secret(number, shares, partial(self._is_seed, number))
                streams.append((seed, True))
            elif others := [m for m in mates if m in summed]:
                key = self._reconstruct_secret(number, shares, partial(self._is_key, number))
                # its masks are added as it would have done itself
                loaded = crypto.load_private_key(key)
                streams += [
                    pair_mask(loaded, self.public[m].tobytes(), number, m, self.tag) for m in others
                ]
        apply_masks(total, streams)

    def decode_reply(
        self, ask: str, number: int, message: Message, check: Callable[[int, Arrays], None] | None
    ) -> Arrays:
        """Decode and check a reply. Raises PayloadError."""
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

    def _check_receivers(self, number: int, received: Arrays) -> None:
        if client_numbers(received["numbers"]) != [
            m for m in self.mask_partners[number] if m != number
        ]:
            raise PayloadError("shares for others than its neighbours")
        if len(received["sealed"]) != len(received["numbers"]):
            raise PayloadError("more or fewer shares than neighbours")

    def _check_vector(self, number: int, received: Arrays) -> None:
        if len(received["vector"]) != self.layout[1]:
            raise PayloadError(
                f"a vector of {len(received['vector'])} numbers where {self.layout[1]} were agreed"
            )

    def _summed_neighbours(self, summed: Iterable[int], number: int) -> list[int]:
        among = {number, *self.mask_partners[number]}
        return [n for n in summed if n in among]

    def _require_enough(self, there: Iterable[int], ask: str) -> None:
        if (count := len(list(there))) < self.survivors:
            client, why = next(iter(self.dropouts.items()), ("nobody", "left"))
            raise RoundAbandonedError(
                f"round {self.round_idx + 1}: the secure sum is given up at {ask!r}: {count} of {len(self.names)} clients are "
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
            f"round {self.round_idx + 1}: the secure sum is given up at 'unmask': of the {len(held)} shares of "
            f"{self.names[number]}'s secret too few are there or right, {self.threshold} are needed"
        )

    def _is_seed(self, number: int, secret: bytes) -> bool:
        return crypto.commit_to_seed(secret, self.tag) == self.seed_commitments[number]

    def _is_key(self, number: int, secret: bytes) -> bool:
        return crypto.public_key(secret) == self.public[number][32:].tobytes()
