"""Secure aggregation: the server learns the sum of a round's uploads and no single one (docs/secure_aggregation.md)."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Protocol as Interface

import numpy as np

from hetero_fl.channel.protocol import Message, Messages, Replies, Summed, Talk
from hetero_fl.channel.secure.client import Notes, Packer, answer
from hetero_fl.channel.secure.fixed_point import FixedPoint
from hetero_fl.channel.secure.graph import degree
from hetero_fl.channel.secure.layout import Layout
from hetero_fl.channel.secure.masks import Words
from hetero_fl.channel.secure.messages import sizes
from hetero_fl.channel.secure.server import Conversation
from hetero_fl.config.secure import SecureSumConfig
from hetero_fl.payload import Payload, PayloadError


class Agreed(Interface):
    """What server and clients know alike."""

    def layout(self, round: int) -> Layout:
        """Of everybody's vector in that round."""
        ...

    def group(self, client: str) -> str:
        """The architecture group of a client."""
        ...

    def noise(self, client: str, round: int, layout: Layout, unit: float, shares: int) -> np.ndarray | None:
        """What a client adds to its vector so that as many such shares are the noise of the sum; None: nothing."""
        ...

    def rows(self, client: str) -> int:
        """A client's training rows: the largest weight that an item of its has."""
        ...


class SecureSum:
    """Bonawitz et al. (2017), with the neighbour graph of Bell et al. (2020): keys, shares, masked vectors, unmasking.

    Training stands in the third exchange, so that whoever drops out or diverges in it costs the others nothing.
    """

    setup: tuple[str, ...] = ("keys", "shares")

    def __init__(self, config: SecureSumConfig, cohort: int, agreed: Agreed) -> None:
        self.config, self.agreed = config, agreed
        self.survivors, self.fixed = config.survivors(cohort), FixedPoint.of(config, cohort)

    def collect(self, broadcasts: Mapping[str, bytes], round: int) -> Generator[Messages, Replies, Summed]:
        """Raises GivenUp where too few stay."""
        layout = self.agreed.layout(round)
        held = Conversation(
            broadcasts, self.survivors, self.config.neighbours, (self._digest(layout), layout.size),
            self._unit(broadcasts), round,
        )  # fmt: skip
        held.advertised((yield held.requests()))
        sealed = held.shared((yield held.invitations()))
        summed, total = held.added((yield held.tasks(sealed)))
        return held.unmasked(summed, total, (yield held.questions(summed)))

    def answer(self, client: str, message: Message, round: int, notes: Notes) -> Talk:
        """The client's reply; "refused" to whatever an honest server would not ask."""

        def packer(digest: bytes) -> Packer:
            layout = self.agreed.layout(round)
            if digest != self._digest(layout):
                raise PayloadError("another layout of the sum than agreed")
            return lambda upload, unit: self.vector(client, Payload.decode(upload), layout, unit, round)

        return (yield from answer(client, message, notes, packer))

    def vector(self, client: str, payload: Payload, layout: Layout, unit: float, round: int) -> Words:
        """The integers of an upload, before they are masked. Raises PayloadError for what has no place or is too large."""
        packed = layout.pack(self.agreed.group(client), payload, unit)
        noise = self.agreed.noise(client, round, layout, unit, self.survivors)
        return self.fixed.encode(packed if noise is None else packed + noise)

    def sizes(self, cohort: int, round: int, broadcast: int, upload: int) -> dict[str, tuple[int, int]]:
        """How long an upload would be by itself is of no account: everybody sends the vector of all."""
        members = degree(cohort, self.survivors, self.config.neighbours) + 1
        return sizes(members, self.agreed.layout(round).size, broadcast)

    def _digest(self, layout: Layout) -> bytes:
        return layout.digest_with(repr(self.fixed))

    def _unit(self, clients: Mapping[str, bytes]) -> int:
        """The power of two that the cohort's weights do not exceed."""
        return math.ceil(math.log2(max(1, *map(self.agreed.rows, clients))))
