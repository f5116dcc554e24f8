"""Both directions of a run's channel, derived alike by client and server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.compression import build_stages, with_worst_case_size
from hetero_fl.communication.link import Link, value_kinds
from hetero_fl.config.communication import SPARSE, ChannelConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, Payload, report_with_loss
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.federation.federation import SERVER, FederationSpec
from hetero_fl.privacy.client_side import upload_specs
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
        up = build_stages(config.compress, config.entropy)
        down = build_stages(config.compress_down, config.entropy, has_feedback=True)
        self.at_most = bound and any(with_worst_case_size(c) != c for c in (up, down))
        self.algorithm = algorithm
        self.seed = federation.seed
        self.summed = config.secure_sum is not None
        specs = upload_specs(algorithm, federation)
        if bound:
            up = with_worst_case_size(up)
            down = with_worst_case_size(down)
        # None: payloads travel as they are, and clients receive what the server sends.
        outputs = federation.task.outputs
        self.up = Link(up, specs, outputs) if up else None
        self.down = Link(down, algorithm.downloads, outputs, includes_layout=True) if down else None
        # Whether broadcasts contain changes of an estimate that clients hold (`EstimateBroadcasts`).
        self.sends_changes = any(stage.kind in SPARSE for stage in config.compress_down)
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
        self,
        round_idx: int,
        payload: Payload,
        archs: Iterable[ModelSpec],
        reference: Payload | None = None,
    ) -> bytes:
        """What the server, which holds models of these architectures, sends to clients that hold `reference`."""
        if self.down is None:
            return payload.encode()
        key = self._key(SERVER, round_idx)
        return self.down.send(payload, key, self._buffer_names(archs), reference)

    def decode_broadcast(
        self, round_idx: int, data: bytes, reference: Payload | None = None
    ) -> Payload:
        """A broadcast at a client that holds `reference`. Raises PayloadError."""
        if self.down is None:
            return Payload.decode(data)
        return self.down.receive(data, self._key(SERVER, round_idx), reference=reference)

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


CACHED_SIZES = 64


class UploadSizes:
    """Bytes of uploads, known before they are computed (but for the digits of a weight)."""

    def __init__(
        self, algorithm: Algorithm, federation: FederationSpec, expectations: ExpectedUploads
    ) -> None:
        self._expectations = expectations
        self._links = FederationLinks(algorithm, federation, bound=True)
        # by the expected items, which clients that are alike share
        self._sizes: BoundedCache[tuple[Mapping[str, Item], int]] = BoundedCache(CACHED_SIZES)

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
    if config.entropy and not any(c.topk for c in (*config.compress, *config.compress_down)):
        notes.append("channel.entropy is not used: it codes the places that topk sends")
    return notes
