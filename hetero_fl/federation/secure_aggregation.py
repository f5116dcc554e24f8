"""Secure aggregation in a run: what both sides derive from the federation, and sums as uploads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hetero_fl.aggregation import Uploads
from hetero_fl.aggregation.means import ItemSum, OwnerMeans
from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.communication.protocol import AggregatedUploads, DirectProtocol, RoundProtocol
from hetero_fl.communication.secure_aggregation.crypto import FixedPoint
from hetero_fl.communication.secure_aggregation.protocol import (
    SecureAggregation,
    TensorKey,
    VectorLayout,
)
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.privacy.server_side import SumNoise
from hetero_fl.utils.caching import BoundedCache

RECENT = 8  # layouts that are kept


class DerivedSetup:
    """The layout of each round, from dry runs of one client's plan of each kind; what else both sides know."""

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.expectations = ExpectedUploads(algorithm, federation)
        self._layouts: BoundedCache[VectorLayout] = BoundedCache(RECENT)

    def layout(self, round_idx: int) -> VectorLayout:
        """Of all families' uploads in that round. Rounds of one phase share it."""
        phase = self.expectations.round_phase(round_idx)
        if phase not in self._layouts:
            forms = [
                (self.aggregation_group(kind.first), self.upload_form(kind.first, round_idx))
                for kind in self.federation.client_infos.profiles
            ]
            self._layouts[phase] = VectorLayout.from_forms(
                forms, self.expectations.specs, self.federation.common
            )
        return self._layouts[phase]

    def upload_form(self, client: str, round_idx: int) -> Mapping[str, Item]:
        """An upload as this client's would be in that round, from a server that has received nothing yet: of what it has
        learnt by then, the form must not depend."""
        client_info = self.federation.client_infos[client]
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}
        return self.expectations.expected_items(
            client_info, call_broadcast(self.algorithm, self.server, client_info), round_idx
        )

    @cached_property
    def server(self) -> Participant:
        """A server before the first round."""
        server = self.federation.server()
        self.algorithm.setup(server)
        return server

    def aggregation_group(self, client: str) -> str:
        return self.federation.client_infos[client].arch.spec_id

    def noise(
        self, client: str, round_idx: int, layout: VectorLayout, unit: float, shares: int
    ) -> np.ndarray | None:
        """A client's share of the noise on sums (`privacy.distributed`), on every number of the vector that is noised at the
        server otherwise, its own or not: N(0, deviation² / shares), of which so many and more are noise enough."""
        privacy = self.expectations.privacy
        if privacy is None or not privacy.config.distributed:
            return None
        vector = np.zeros(layout.size)
        for place, slot in layout.slices.items():
            values, weights = slot.parts(place)
            # its weights count private rows
            counted = layout.specs[place.item].kind == "class_sums"
            parts = slice(values.start, weights.stop) if counted else values
            draws = self.federation.noise.stream(
                "share", round_idx, client, *map(str, astuple(place))
            )
            drawn = draws.normal(torch.empty(parts.stop - parts.start, dtype=torch.float64), 1.0)
            vector[parts] = drawn.numpy() * (
                privacy.deviation(place.item) / math.sqrt(shares) / unit
            )
        return vector

    def num_rows(self, client: str) -> int:
        return self.federation.client_infos[client].num_rows


def make_protocol(algorithm: Algorithm, federation: FederationSpec) -> RoundProtocol:
    """How the run's uploads reach the server, at either side. What sends nothing has nothing to be summed."""
    config = federation.channel.secure_sum
    if config is None or not algorithm.uploads:
        return DirectProtocol()
    return SecureAggregation(config, federation.cohort, DerivedSetup(algorithm, federation))


def open_sums(
    aggregated: AggregatedUploads,
    layout: VectorLayout,
    fixed: FixedPoint,
    forms: Sequence[tuple[ClientInfo, Mapping[str, Item]]],
    noise: SumNoise | None = None,
) -> tuple[Uploads, float | None]:
    """A round's uploads as far as their sums tell, and the mean training loss.

    `forms`: of each client in the sum its `ClientInfo` and what it was to send; `noise`: what makes the sums private. An element that
    nobody has given weight to was sent by nobody.
    """
    vector = fixed.decode(aggregated.total)
    common = layout.common
    senders: dict[str, list[ClientInfo]] = {}
    items: dict[str, ItemSum] = {}
    models: dict[str, OwnerMeans] = {}
    means: dict[TensorKey, Any] = {}
    for client_info, form in forms:
        for name in form:
            senders.setdefault(name, []).append(client_info)
        for place in layout.tensor_keys(client_info.arch.spec_id, form):
            if place not in means:
                total, weight = layout.read(place, vector, aggregated.unit)
                dtype = layout.slices[place].dtype
                if place.tensor:
                    means[place] = (
                        ((total / weight).to(dtype), float(weight)) if weight > 0 else None
                    )
                else:
                    items[place.item] = ItemSum.from_total(total.to(dtype), weight.to(dtype))
                    means[place] = None
            if means[place] is not None:
                across = layout.specs[place.item].across
                held = models.setdefault(place.item, OwnerMeans(common))
                held.set_mean(
                    "" if across else client_info.arch.spec_id, place.tensor, *means[place]
                )
    return Uploads.from_sums(
        len(forms), senders, items, models, layout.specs, noise
    ), layout.mean_loss(vector)
