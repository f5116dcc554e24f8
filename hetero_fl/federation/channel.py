"""Encoding of uploads and broadcasts. Clients and server use the same configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.compression import build_stages, with_worst_case_size
from hetero_fl.communication.compressor import Compressor, value_kinds
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, Payload
from hetero_fl.federation.federation import SERVER, FederationSpec
from hetero_fl.privacy.client_side import upload_specs
from hetero_fl.utils.seeding import Key


class FederationLinks:
    """Encoder and decoder of the messages between clients and server.

    Messages of methods whose communication is not counted (`Needs.counts_traffic`) are not
    compressed.

    Args:
        algorithm: The method.
        federation: The federation.
        bound: Whether to encode each message with the maximum size of messages with the same
            shapes.

    Attributes:
        is_upper_bound: Whether `bound` is True and the size of messages depends on values.
        up: Compressor of uploads, or None if uploads are not compressed.
        down: Compressor of broadcasts, or None if broadcasts are not compressed.
    """

    def __init__(
        self, algorithm: Algorithm, federation: FederationSpec, bound: bool = False
    ) -> None:
        config = federation.channel if algorithm.needs.counts_traffic else ChannelConfig()
        configured = build_stages(config.compress)
        up = with_worst_case_size(configured) if bound else configured
        down = build_stages(config.compress_down)
        self.is_upper_bound = up != configured
        self.seed = federation.seed
        self.summed = config.secure_sum is not None
        specs = upload_specs(algorithm, federation)
        outputs = federation.task.outputs
        self.up = Compressor(up, specs, outputs) if up else None
        self.down = Compressor(down, algorithm.downloads, outputs) if down else None
        self._buffers: dict[ModelSpec, frozenset[str]] = {}

    def encode_upload(
        self,
        client_info: ClientInfo,
        round_idx: int,
        payload: Payload,
        received: Payload,
        memory: dict[str, Any],
        *,
        attempt: int = 0,
    ) -> bytes:
        """Encode an upload on the client.

        With secure aggregation, the values are compressed and decompressed, and the decompressed
        values are encoded. Except for fixed-point rounding, the server therefore aggregates the
        same values as without secure aggregation.

        Args:
            client_info: The sender.
            round_idx: Index of the round, from 0.
            payload: The upload.
            received: The broadcast on which the client trained.
            memory: Private state of the client. Values that the compression omits are stored in
                `memory` and added to the next upload.
            attempt: Number of times that the client has already trained in this round, which seeds
                random draws together with `round_idx`.
        """
        if self.up is None:
            return payload.encode()
        key = self._key(client_info.client_id, round_idx, attempt)
        plain = self._buffer_names(client_info.models.values())
        sent = self.up.compress(payload, key, plain, received, memory)
        if self.summed:
            sent = self.up.decompress(sent, key, plain, received, payload.items_by_name)
        return sent.encode()

    def decode_upload(
        self,
        client_info: ClientInfo,
        round_idx: int,
        data: bytes,
        like: Mapping[str, Item],
        received: Payload,
        *,
        attempt: int = 0,
    ) -> Payload:
        """Decode an upload on the server.

        Args:
            client_info: The sender.
            round_idx: Index of the round, from 0.
            data: The encoded upload.
            like: Items with the expected names, shapes and dtypes, keyed by name.
            received: The broadcast on which the client trained.
            attempt: The number that was passed to `encode_upload`.

        Raises:
            PayloadError: If the upload is malformed.
        """
        payload = Payload.decode(data, like)
        if self.up is None:
            return payload
        key = self._key(client_info.client_id, round_idx, attempt)
        plain = self._buffer_names(client_info.models.values())
        return self.up.decompress(payload, key, plain, received, like)

    def encode_broadcast(
        self,
        round_idx: int,
        payload: Payload,
        archs: Iterable[ModelSpec],
    ) -> bytes:
        """Encode a broadcast on the server.

        Args:
            round_idx: Index of the round, from 0, which seeds random draws.
            payload: The broadcast.
            archs: Architectures of the server's models.
        """
        if self.down is None:
            return payload.encode()
        key = self._key(SERVER, round_idx)
        return self.down.compress(payload, key, self._buffer_names(archs)).encode()

    def decode_broadcast(self, round_idx: int, data: bytes) -> Payload:
        """Decode a broadcast on the client.

        Args:
            round_idx: The number that was passed to `encode_broadcast`.
            data: The encoded broadcast.

        Raises:
            PayloadError: If the broadcast is malformed.
        """
        payload = Payload.decode(data)
        if self.down is None:
            return payload
        return self.down.decompress(payload, self._key(SERVER, round_idx))

    def _key(self, sender: str, round_idx: int, attempt: int = 0) -> tuple[Key, ...]:
        return (self.seed, round_idx, sender, "link", *(("again", attempt) if attempt else ()))

    def _buffer_names(self, archs: Iterable[ModelSpec]) -> frozenset[str]:
        """Return the names of buffers such as running means, which are never compressed."""
        names: frozenset[str] = frozenset()
        for arch in archs:
            if arch not in self._buffers:
                self._buffers[arch] = frozenset(arch.shapes) - arch.parameter_names
            names |= self._buffers[arch]
        return names


def idle_stages(name: str, algorithm: Algorithm, federation: FederationSpec) -> list[str]:
    """Return a message for each compression setting that has no effect.

    Args:
        name: Name of the method.
        algorithm: The method.
        federation: The federation.
    """
    config = federation.channel
    if not algorithm.needs.counts_traffic:
        is_configured = config.compress or config.compress_down
        return [f"channel: has no effect, {name} sends no messages"] if is_configured else []
    sorts = {sort for spec in algorithm.uploads.values() for sort in value_kinds(spec)}
    stages = zip(config.compress, build_stages(config.compress), strict=True)
    notes = [
        f"channel.compress: {c.kind} has no effect on the uploads of {name}"
        for c, s in stages
        if not sorts & s.sorts
    ]
    classes = federation.task.outputs
    for key, chain in (("compress", config.compress), ("compress_down", config.compress_down)):
        notes += [
            f"channel.{key}: top_classes={c.top_classes} has no effect on predictions of "
            f"{classes} classes"
            for c in chain
            if c.top_classes is not None and c.top_classes + 1 >= classes
        ]
    return notes
