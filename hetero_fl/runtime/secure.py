"""The secure sum in a run: what server and clients derive alike from the federation, and uploads made of a round's sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hetero_fl.aggregation import Uploads
from hetero_fl.aggregation.averaging import OwnerMeans
from hetero_fl.aggregation.noised import SumNoise
from hetero_fl.aggregation.sums import ItemSum
from hetero_fl.algorithms import Algorithm
from hetero_fl.channel.protocol import Direct, Protocol, Summed
from hetero_fl.channel.secure import FixedPoint, Layout, SecureSum
from hetero_fl.channel.secure.layout import Place
from hetero_fl.lazy import Recent
from hetero_fl.payload import Item
from hetero_fl.runtime.dry import Expectations
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.hooks import broadcast
from hetero_fl.state import Card, Participant

RECENT = 8  # layouts that are kept


class Derived:
    """The layout of each round, from dry runs of one client's plan of each kind; what else both sides know."""

    def __init__(self, algorithm: Algorithm, federation: Federation) -> None:
        self.algorithm, self.federation = algorithm, federation
        self.expectations = Expectations(algorithm, federation)
        self._layouts: Recent[Layout] = Recent(RECENT)

    def layout(self, round: int) -> Layout:
        """Of all families' uploads in that round. Rounds of one phase share it."""
        kinds = self.federation.cards.kinds
        intervals = sorted({kind.settings.share_every for kind in kinds})
        phase = tuple(self.expectations.phase(interval, round) for interval in intervals)

        def make() -> Layout:
            forms = [(self.group(kind.first), self.form(kind.first, round)) for kind in kinds]
            return Layout.of(forms, self.expectations.protection.specs, self.federation.common)

        return self._layouts.get(phase, make)

    def form(self, client: str, round: int) -> Mapping[str, Item]:
        """An upload as this client's would be in that round, from a server that has received nothing yet: of what it has
        learnt by then, the form must not depend."""
        card = self.federation.cards[client]
        self.server.clock, self.server.uses = self.federation.clock(round), {}
        return self.expectations.of(card, broadcast(self.algorithm, self.server, card), round)

    @cached_property
    def server(self) -> Participant:
        """A server before the first round."""
        server = self.federation.server()
        self.algorithm.start(server)
        return server

    def group(self, client: str) -> str:
        return self.federation.cards[client].arch.id

    def noise(self, client: str, round: int, layout: Layout, unit: float, shares: int) -> np.ndarray | None:
        """A client's share of the noise on sums (`privacy.distributed`), on every number of the vector that is noised at the
        server otherwise, its own or not: N(0, deviation² / shares), of which so many and more are noise enough."""
        protection = self.expectations.protection
        if protection.privacy is None or not protection.privacy.distributed:
            return None
        vector = np.zeros(layout.size)
        for place, slot in layout.slots.items():
            values, weights = slot.parts(place)
            counted = layout.specs[place.item].kind == "class_sums"  # its weights count private rows
            parts = slice(values.start, weights.stop) if counted else values
            draws = self.federation.noise.stream("share", round, client, *map(str, astuple(place)))
            drawn = draws.normal(torch.empty(parts.stop - parts.start, dtype=torch.float64), 1.0)
            vector[parts] = drawn.numpy() * (protection.deviation(place.item) / math.sqrt(shares) / unit)
        return vector

    def rows(self, client: str) -> int:
        return self.federation.cards[client].n


def make_protocol(algorithm: Algorithm, federation: Federation) -> Protocol:
    """How the run's uploads reach the server, at either side. What sends nothing has nothing to be summed."""
    config = federation.channel.secure_sum
    if config is None or not algorithm.uploads:
        return Direct()
    return SecureSum(config, federation.cohort, Derived(algorithm, federation))


def opened(
    summed: Summed,
    layout: Layout,
    fixed: FixedPoint,
    forms: Sequence[tuple[Card, Mapping[str, Item]]],
    noise: SumNoise | None = None,
) -> tuple[Uploads, float | None]:
    """A round's uploads as far as their sums tell, and the mean training loss.

    `forms`: of each client in the sum its card and what it was to send; `noise`: what makes the sums private. An element that
    nobody has given weight to was sent by nobody.
    """
    vector, common = fixed.decode(summed.total), layout.common
    senders: dict[str, list[Card]] = {}
    items: dict[str, ItemSum] = {}
    models: dict[str, OwnerMeans] = {}
    means: dict[Place, Any] = {}
    for card, form in forms:
        for name in form:
            senders.setdefault(name, []).append(card)
        for place in layout.places(card.arch.id, form):
            if place not in means:
                total, weight = layout.read(place, vector, summed.unit)
                dtype = layout.slots[place].dtype
                if place.tensor:
                    means[place] = ((total / weight).to(dtype), float(weight)) if weight > 0 else None
                else:
                    items[place.item] = ItemSum.of(total.to(dtype), weight.to(dtype))
                    means[place] = None
            if means[place] is not None:
                across = layout.specs[place.item].across
                held = models.setdefault(place.item, OwnerMeans(common))
                held.put("" if across else card.arch.id, place.tensor, *means[place])
    return Uploads.summed(len(forms), senders, items, models, layout.specs, noise), layout.loss(vector)
