"""Both directions of a run's channel and its secure aggregation, derived by client and server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hetero_fl.aggregation import Uploads
from hetero_fl.aggregation.means import ItemSum, OwnerMeans
from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.compression import dearest, stages_of
from hetero_fl.communication.link import Link, sorts_of
from hetero_fl.communication.protocol import Direct, Protocol, Summed
from hetero_fl.communication.secure_aggregation.crypto import FixedPoint
from hetero_fl.communication.secure_aggregation.protocol import Layout, Place, SecureSum
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.core.model_spec import Architecture
from hetero_fl.core.participant import Card, Participant
from hetero_fl.core.payload import Item, Payload
from hetero_fl.federation.dry_run import Expectations
from hetero_fl.federation.federation import SERVER, Federation
from hetero_fl.federation.method_calls import broadcast
from hetero_fl.privacy.client import Protection
from hetero_fl.privacy.server import SumNoise
from hetero_fl.utils.caching import Recent
from hetero_fl.utils.seeding import Key

# Both directions of a run's channel, as client and server make them alike from the method and the
# federation.


class Links:
    """What is sent and received on either side. Bounds, which send nothing that a federation would, are not compressed.

    `bound`: messages as long as they can be, where that depends on the numbers; `at_most`: whether it does.
    """

    def __init__(self, algorithm: Algorithm, federation: Federation, bound: bool = False) -> None:
        config = federation.channel if algorithm.counted else ChannelConfig()
        up, down = (
            stages_of(chain, config.entropy) for chain in (config.compress, config.compress_down)
        )
        self.at_most = bound and dearest(up) != up
        self.algorithm, self.seed = algorithm, federation.seed
        self.summed = config.secure_sum is not None
        specs = Protection.of(algorithm, federation).specs
        self.up = Link(dearest(up) if bound else up, specs, federation.task.outputs)
        self.down = Link(down, algorithm.downloads, federation.task.outputs)
        self._statistics: dict[Architecture, frozenset[str]] = {}

    # Up --------------------------------------------------------------------------------------------------------------
    def upload(
        self,
        card: Card,
        round: int,
        payload: Payload,
        got: Payload,
        memory: dict[str, Any],
        again: int = 0,
    ) -> bytes:
        """A client's upload, which trained on what it `got`; `memory` is its private state. `again`: how often it was asked in
        that round before, for draws of their own.

        What is to be summed in secret is rounded as the chain has it, and goes on as the numbers that the chain's end reads.
        """
        sent = self.up.send(
            payload, self._key(card.id, round, again), self._untouched(card), got, memory
        )
        if not self.summed or self.up.streams is None:
            return sent
        return self.uploaded(card, round, sent, payload.items_, got, again).encode()

    def uploaded(
        self,
        card: Card,
        round: int,
        data: bytes,
        like: Mapping[str, Item],
        got: Payload,
        again: int = 0,
    ) -> Payload:
        """The upload at the server, which knows what the client `got` and what its upload is `like`. Raises PayloadError."""
        return self.up.receive(
            data, self._key(card.id, round, again), self._untouched(card), got, like
        )

    def _untouched(self, card: Card) -> frozenset[str]:
        return self._buffers([card.arch, *self.algorithm.extras(card.arch).values()])

    # Down ------------------------------------------------------------------------------------------------------------
    def broadcast(self, round: int, payload: Payload, archs: Iterable[Architecture]) -> bytes:
        """What the server, which holds models of these architectures, sends. Clients that are sent the same receive the same."""
        return self.down.send(payload, self._key(SERVER, round), self._buffers(archs))

    def received(self, round: int, data: bytes) -> Payload:
        """A broadcast at the client. Raises PayloadError."""
        return self.down.receive(data, self._key(SERVER, round))

    def heard(self, round: int, payload: Payload, archs: Iterable[Architecture]) -> Payload:
        """What a client makes of a broadcast."""
        if self.down.streams is None:
            return payload
        return self.received(round, self.broadcast(round, payload, archs))

    def _key(self, sender: str, round: int, again: int = 0) -> tuple[Key, ...]:
        return (self.seed, round, sender, "link", *(("again", again) if again else ()))

    def _buffers(self, archs: Iterable[Architecture]) -> frozenset[str]:
        """Names of what is no parameter (running means and variances): averaged as it is, never cut or rounded."""
        found: frozenset[str] = frozenset()
        for arch in archs:
            if arch not in self._statistics:
                self._statistics[arch] = frozenset(arch.shapes) - arch.parameter_names
            found |= self._statistics[arch]
        return found


def idle(name: str, algorithm: Algorithm, federation: Federation) -> list[str]:
    """Lines on stages that find nothing to do in what clients of this method send."""
    config = federation.channel
    if not algorithm.counted:
        return (
            [f"channel is not used: {name} sends nothing"]
            if config.compress or config.compress_down
            else []
        )
    sorts = {sort for spec in algorithm.uploads.values() for sort in sorts_of(spec)}
    stages = zip(config.compress, stages_of(config.compress, config.entropy), strict=True)
    notes = [
        f"channel.compress: {c.name} finds nothing to do in what {name} sends"
        for c, s in stages
        if not sorts & s.sorts
    ]
    classes = federation.task.outputs
    for key, chain in (("compress", config.compress), ("compress_down", config.compress_down)):
        notes += [
            f"channel.{key}: top_classes {c.top_classes} leaves predictions of {classes} classes as they are"
            for c in chain
            if c.top_classes is not None and c.top_classes + 1 >= classes
        ]
    if config.entropy and not any(c.topk for c in config.compress):
        notes.append("channel.entropy is not used: it codes the places that topk sends")
    return notes


# The secure sum in a run: what server and clients derive alike from the federation, and uploads
# made of a round's sums.

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

    def noise(
        self, client: str, round: int, layout: Layout, unit: float, shares: int
    ) -> np.ndarray | None:
        """A client's share of the noise on sums (`privacy.distributed`), on every number of the vector that is noised at the
        server otherwise, its own or not: N(0, deviation² / shares), of which so many and more are noise enough."""
        protection = self.expectations.protection
        if protection.privacy is None or not protection.privacy.distributed:
            return None
        vector = np.zeros(layout.size)
        for place, slot in layout.slots.items():
            values, weights = slot.parts(place)
            # its weights count private rows
            counted = layout.specs[place.item].kind == "class_sums"
            parts = slice(values.start, weights.stop) if counted else values
            draws = self.federation.noise.stream("share", round, client, *map(str, astuple(place)))
            drawn = draws.normal(torch.empty(parts.stop - parts.start, dtype=torch.float64), 1.0)
            vector[parts] = drawn.numpy() * (
                protection.deviation(place.item) / math.sqrt(shares) / unit
            )
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
                    means[place] = (
                        ((total / weight).to(dtype), float(weight)) if weight > 0 else None
                    )
                else:
                    items[place.item] = ItemSum.of(total.to(dtype), weight.to(dtype))
                    means[place] = None
            if means[place] is not None:
                across = layout.specs[place.item].across
                held = models.setdefault(place.item, OwnerMeans(common))
                held.put("" if across else card.arch.id, place.tensor, *means[place])
    return Uploads.summed(len(forms), senders, items, models, layout.specs, noise), layout.loss(
        vector
    )
