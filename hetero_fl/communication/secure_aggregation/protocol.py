"""Secure aggregation as a round protocol. See docs/how_to/secure_aggregation.md."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from typing_extensions import override

from hetero_fl.communication.named_arrays import decode_arrays
from hetero_fl.communication.protocol import (
    Content,
    Exchanges,
    Message,
    RoundProtocol,
    TrainingRequest,
)
from hetero_fl.communication.secure_aggregation.client import (
    Notes,
    Packer,
    SecureAggregationClient,
)
from hetero_fl.communication.secure_aggregation.messages import REQUESTS, message_sizes
from hetero_fl.communication.secure_aggregation.server import SecureAggregationRound
from hetero_fl.communication.secure_aggregation.site_keys import SiteKeys
from hetero_fl.communication.vector_layout import (
    FixedPoint,
    SharedSetup,
    VectorLayout,
    Words,
    weight_unit,
)
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.utils.ordering import natural_key


class SecureAggregation(RoundProtocol):
    """Secure aggregation against a server that lies (Bonawitz et al. 2017, section 6.2).

    The five exchanges are "keys", "shares", "train", "consistency" and "unmask". In the exchange
    "train", clients train and send masked vectors. In "consistency", they sign whose vectors are in
    the sum. The sum can be unmasked even if some clients drop out or diverge during training.

    A server that colludes with at most `2 * threshold - cohort - 1` clients learns only the sum of
    the uploads of all other survivors. The server may send each client different information: no
    two sets of survivors can have `threshold` signatures, and no client reveals shares for two sets
    in the same round.

    Args:
        config: Settings of secure aggregation.
        cohort: Number of clients in a round.
        shared_setup: The setup that the server and all clients share.
        site_keys: Keys that sign the keys of a round. If None, clients sign and check no keys.
    """

    setup: tuple[str, ...] = ("keys", "shares")
    requests: tuple[str, ...] = tuple(REQUESTS)
    accepts_unencoded = False
    has_one_time_requests = True
    hides_server = False

    def __init__(
        self,
        config: SecureAggregationConfig,
        cohort: int,
        shared_setup: SharedSetup,
        site_keys: SiteKeys | None = None,
    ) -> None:
        self.site_keys = site_keys or SiteKeys()
        self.agreed = shared_setup
        self.survivors = config.min_survivors(cohort)
        self.fixed = FixedPoint.from_config(config, cohort, "channel.secure_sum")

    @override
    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        layout = self.agreed.layout(round_idx)
        ids = self.agreed.client_ids
        server = SecureAggregationRound(
            {bisect_left(ids, natural_key(c), key=natural_key) + 1: c for c in cohort},
            self.survivors,
            (self._digest(layout), layout.size),
            unit=weight_unit(map(self.agreed.num_rows, cohort)),
            round_idx=round_idx,
        )
        return server.exchanges()

    @override
    def answer(
        self, client_id: str, message: Message, round_idx: int, notes: Notes
    ) -> Message | TrainingRequest:
        def packer(digest: bytes) -> Packer:
            layout = self.agreed.layout(round_idx)
            if digest != self._digest(layout):
                raise PayloadError("layout: differs from the layout of this client")
            return lambda upload, unit: self.encode_upload(
                client_id, Payload.decode(upload), layout, unit, round_idx
            )

        client = SecureAggregationClient(
            client_id, self.agreed.client_ids, round_idx, self.survivors, self.site_keys, notes
        )
        return client.answer(message, packer)

    @override
    def broadcast_in(self, client_id: str, message: Message) -> Content:
        if message.kind != "train":
            return message.content
        return decode_arrays(message.body, REQUESTS["train"])["broadcast"].tobytes()

    def encode_upload(
        self, client: str, payload: Payload, layout: VectorLayout, unit: float, round_idx: int
    ) -> Words:
        """Convert an upload to the integers that are masked and summed.

        The integers include the client's share of the privacy noise.

        Args:
            client: The client.
            payload: The upload.
            layout: The layout of the vector.
            unit: Factor by which values and weights are divided.
            round_idx: Index of the round.

        Raises:
            PayloadError: If an item is not part of the layout or a value is too large.
        """
        packed = layout.pack(self.agreed.aggregation_group(client), payload, unit)
        noise = self.agreed.noise(client, round_idx, layout, unit, self.survivors)
        return self.fixed.encode(packed if noise is None else packed + noise)

    @override
    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        # All clients send a vector of the same length, regardless of the size of their uploads.
        return message_sizes(cohort, self.agreed.layout(round_idx).size, broadcast)

    def _digest(self, layout: VectorLayout) -> bytes:
        return layout.digest_with(repr(self.fixed))
