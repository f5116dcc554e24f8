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
from hetero_fl.communication.compression import build_stages, with_worst_case_size
from hetero_fl.communication.link import Link, value_kinds
from hetero_fl.communication.protocol import AggregatedUploads, DirectProtocol, RoundProtocol
from hetero_fl.communication.secure_aggregation.crypto import FixedPoint
from hetero_fl.communication.secure_aggregation.protocol import (
    SecureAggregation,
    TensorKey,
    VectorLayout,
)
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, Payload, report_with_loss
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.federation.federation import SERVER, FederationSpec
from hetero_fl.federation.user_methods import call_broadcast
from hetero_fl.privacy.client import upload_specs
from hetero_fl.privacy.server import SumNoise
from hetero_fl.utils.caching import BoundedCache
from hetero_fl.utils.seeding import Key

# Both directions of a run's channel, as client and server make them alike from the method and the
# federation.


class FederationLinks:
    """What is sent and received on either side. Bounds, which send nothing that a federation would, are not compressed.

    `bound`: messages as long as they can be, where that depends on the numbers; `at_most`: whether it does.
    """

    def __init__(
        self, algorithm: Algorithm, federation: FederationSpec, bound: bool = False
    ) -> None:
        config = federation.channel if algorithm.needs.counts_traffic else ChannelConfig()
        up, down = (
            build_stages(chain, config.entropy) for chain in (config.compress, config.compress_down)
        )
        self.at_most = bound and with_worst_case_size(up) != up
        self.algorithm = algorithm
        self.seed = federation.seed
        self.summed = config.secure_sum is not None
        specs = upload_specs(algorithm, federation)
        if bound:
            up = with_worst_case_size(up)
        # None: payloads travel as they are, and clients receive what the server sends.
        outputs = federation.task.outputs
        self.up = Link(up, specs, outputs) if up else None
        self.down = Link(down, algorithm.downloads, outputs) if down else None
        self._statistics: dict[ModelSpec, frozenset[str]] = {}

    # Up --------------------------------------------------------------------------------------------------------------
    def encode_upload(
        self,
        client_info: ClientInfo,
        round_idx: int,
        payload: Payload,
        received: Payload,
        memory: dict[str, Any],
        attempt: int = 0,
    ) -> bytes:
        """A client's upload, which trained on what it `received`; `memory` is its private state. `attempt`: how often it was asked in
        that round before, for draws of their own.

        What is to be summed in secret is rounded as the chain has it, and goes on as the numbers that the chain's end reads.
        """
        if self.up is None:
            return payload.encode()
        sent = self.up.send(
            payload,
            self._key(client_info.client_id, round_idx, attempt),
            self._uncompressed_names(client_info),
            received,
            memory,
        )
        if not self.summed:
            return sent
        return self.decode_upload(
            client_info, round_idx, sent, payload.items_, received, attempt
        ).encode()

    def decode_upload(
        self,
        client_info: ClientInfo,
        round_idx: int,
        data: bytes,
        like: Mapping[str, Item],
        received: Payload,
        attempt: int = 0,
    ) -> Payload:
        """The upload at the server, which knows what the client `received` and what its upload is `like`. Raises PayloadError."""
        if self.up is None:
            return Payload.decode(data, like)
        return self.up.receive(
            data,
            self._key(client_info.client_id, round_idx, attempt),
            self._uncompressed_names(client_info),
            received,
            like,
        )

    def _uncompressed_names(self, client_info: ClientInfo) -> frozenset[str]:
        return self._buffer_names(client_info.models.values())

    # Down ------------------------------------------------------------------------------------------------------------
    def encode_broadcast(
        self, round_idx: int, payload: Payload, archs: Iterable[ModelSpec]
    ) -> bytes:
        """What the server, which holds models of these architectures, sends. Clients that are sent the same receive the same."""
        if self.down is None:
            return payload.encode()
        return self.down.send(payload, self._key(SERVER, round_idx), self._buffer_names(archs))

    def decode_broadcast(self, round_idx: int, data: bytes) -> Payload:
        """A broadcast at the client. Raises PayloadError."""
        if self.down is None:
            return Payload.decode(data)
        return self.down.receive(data, self._key(SERVER, round_idx))

    def simulate_broadcast(
        self, round_idx: int, payload: Payload, archs: Iterable[ModelSpec]
    ) -> Payload:
        """Return what a client decodes from a broadcast."""
        return self.decode_broadcast(round_idx, self.encode_broadcast(round_idx, payload, archs))

    def _key(self, sender: str, round_idx: int, attempt: int = 0) -> tuple[Key, ...]:
        return (self.seed, round_idx, sender, "link", *(("again", attempt) if attempt else ()))

    def _buffer_names(self, archs: Iterable[ModelSpec]) -> frozenset[str]:
        """Names of what is no parameter (running means and variances): averaged as it is, never cut or rounded."""
        found: frozenset[str] = frozenset()
        for arch in archs:
            if arch not in self._statistics:
                self._statistics[arch] = frozenset(arch.shapes) - arch.parameter_names
            found |= self._statistics[arch]
        return found


class UploadSizes:
    """Bytes of uploads, known before they are computed (but for the digits of a weight)."""

    def __init__(
        self, algorithm: Algorithm, federation: FederationSpec, expectations: ExpectedUploads
    ) -> None:
        self._expectations = expectations
        self._links = FederationLinks(algorithm, federation, bound=True)
        # by the expected items, which clients that are alike share
        self._sizes: dict[int, tuple[Mapping[str, Item], int]] = {}

    def __call__(self, client_info: ClientInfo, received: Payload, round_idx: int) -> int:
        """Return the bytes of a client's upload, its report included."""
        expected = self._expectations.expected_items(client_info, received, round_idx)
        known = self._sizes.get(id(expected))
        if known is None or known[0] is not expected:
            payload = Payload(dict(expected), report_with_loss(0.0))
            body = self._links.encode_upload(client_info, round_idx, payload, received, {})
            known = self._sizes[id(expected)] = (expected, len(body))
        return known[1]


def idle_stages(name: str, algorithm: Algorithm, federation: FederationSpec) -> list[str]:
    """Lines on stages that find nothing to do in what clients of this method send."""
    config = federation.channel
    if not algorithm.needs.counts_traffic:
        return (
            [f"channel is not used: {name} sends nothing"]
            if config.compress or config.compress_down
            else []
        )
    sorts = {sort for spec in algorithm.uploads.values() for sort in value_kinds(spec)}
    stages = zip(config.compress, build_stages(config.compress, config.entropy), strict=True)
    notes = [
        f"channel.compress: {c.kind} finds nothing to do in what {name} sends"
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


class DerivedSetup:
    """The layout of each round, from dry runs of one client's plan of each kind; what else both sides know."""

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.expectations = ExpectedUploads(algorithm, federation)
        self._layouts: BoundedCache[VectorLayout] = BoundedCache(RECENT)

    def layout(self, round_idx: int) -> VectorLayout:
        """Of all families' uploads in that round. Rounds of one phase share it."""
        kinds = self.federation.client_infos.profiles
        intervals = sorted({kind.settings.share_every for kind in kinds})
        phase = tuple(self.expectations.upload_phase(interval, round_idx) for interval in intervals)

        if phase not in self._layouts:
            forms = [
                (self.aggregation_group(kind.first), self.upload_form(kind.first, round_idx))
                for kind in kinds
            ]
            self._layouts[phase] = VectorLayout.from_forms(
                forms, self.expectations.specs, self.federation.common
            )
        return self._layouts[phase]

    def upload_form(self, client: str, round_idx: int) -> Mapping[str, Item]:
        """An upload as this client's would be in that round, from a server that has received nothing yet: of what it has
        learnt by then, the form must not depend."""
        card = self.federation.client_infos[client]
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}
        return self.expectations.expected_items(
            card, call_broadcast(self.algorithm, self.server, card), round_idx
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
        if privacy is None or not privacy.privacy.distributed:
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

    `forms`: of each client in the sum its card and what it was to send; `noise`: what makes the sums private. An element that
    nobody has given weight to was sent by nobody.
    """
    vector = fixed.decode(aggregated.total)
    common = layout.common
    senders: dict[str, list[ClientInfo]] = {}
    items: dict[str, ItemSum] = {}
    models: dict[str, OwnerMeans] = {}
    means: dict[TensorKey, Any] = {}
    for card, form in forms:
        for name in form:
            senders.setdefault(name, []).append(card)
        for place in layout.tensor_keys(card.arch.spec_id, form):
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
                held.set_mean("" if across else card.arch.spec_id, place.tensor, *means[place])
    return Uploads.from_sums(
        len(forms), senders, items, models, layout.specs, noise
    ), layout.mean_loss(vector)
