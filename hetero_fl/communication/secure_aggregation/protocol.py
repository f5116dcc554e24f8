"""Secure aggregation as a round protocol, with the common layout of items."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol as Interface

import numpy as np
import torch
from torch import Tensor

from hetero_fl.communication.protocol import Exchanges, Message, TrainingRequest
from hetero_fl.communication.secure_aggregation.client import Notes, Packer, answer
from hetero_fl.communication.secure_aggregation.crypto import FixedPoint, Words, num_neighbours
from hetero_fl.communication.secure_aggregation.messages import message_sizes
from hetero_fl.communication.secure_aggregation.server import SecureAggregationRound
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.core.payload import Item, ItemSpec, Payload, PayloadError, loss_from_report

# Items of all clients in one common vector of numbers, so that a sum of vectors is a sum of items.
#
# Each tensor has a place for Σ w·v and one for Σ w: that of a model by its owner (the architecture
# group, or everybody), as in hetero_fl.aggregation.means. Every client sends the whole vector, with
# noughts where it owns nothing, so that neither its length nor its form tells what the client has.
# The last two numbers are the sum of training losses and how many told theirs.

SUMS = ("class_sums", "counts")  # kinds whose values are sums already
Weighted = tuple[Tensor, Tensor]  # Σ w·v, Σ w


@dataclass(frozen=True)
class TensorKey:
    """Which tensor: of an item that is one (`tensor` is ""), or a named one of a model; `group` "": everybody's."""

    item: str
    tensor: str
    group: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class VectorSlice:
    """Where a tensor's values stand, and the weights behind them."""

    start: int
    weight_shape: tuple[int, ...]
    dtype: torch.dtype

    def parts(self, place: TensorKey) -> tuple[slice, slice]:
        """Of the vector: values, weights."""
        middle = self.start + math.prod(place.shape)
        return slice(self.start, middle), slice(middle, middle + math.prod(self.weight_shape))


@dataclass
class VectorLayout:
    """The common vector of a round. The same forms give the same layout, in whatever order they come.

    Args:
        specs: what the method declares of its items.
        common: prefixes of tensors that are averaged across architectures.
    """

    specs: Mapping[str, ItemSpec]
    common: Sequence[str] = ()
    slices: dict[TensorKey, VectorSlice] = field(default_factory=dict)
    size: int = 2  # numbers in the vector

    @classmethod
    def from_forms(
        cls,
        forms: Iterable[tuple[str, Mapping[str, Item]]],
        specs: Mapping[str, ItemSpec],
        common: Sequence[str] = (),
    ) -> VectorLayout:
        """The layout for uploads of these forms: (architecture group, items whose numbers mean nothing)."""
        made = cls(specs, tuple(common))
        shapes: dict[TensorKey, tuple[tuple[int, ...], torch.dtype]] = {}
        for group, form in forms:
            for place, values, weight in made._terms(group, form):
                known = shapes.get(place, ((), values.dtype))
                shapes[place] = (tuple(torch.broadcast_shapes(known[0], weight.shape)), known[1])
        at = 0
        for place in sorted(shapes, key=lambda p: (p.item, p.tensor, p.group, p.shape)):
            made.slices[place] = VectorSlice(at, *shapes[place])
            at = made.slices[place].parts(place)[1].stop
        made.size = at + 2
        return made

    @cached_property
    def digest(self) -> bytes:
        """32 bytes by which two parties see that they mean the same layout."""
        return hashlib.sha256(repr((list(self.slices.items()), self.size)).encode()).digest()

    def digest_with(self, terms: str) -> bytes:
        """The digest of the layout and of what else was agreed."""
        return hashlib.sha256(self.digest + terms.encode()).digest()

    def _terms(
        self, group: str, items: Mapping[str, Item]
    ) -> Iterable[tuple[TensorKey, Tensor, Tensor]]:
        """Each tensor with its place and weight."""
        for name, item in items.items():
            weight = torch.as_tensor(item.weight, dtype=torch.float64)
            for tensor, values in item.tensors.items():
                is_common = not tensor or tensor.startswith(tuple(self.common))
                owner = "" if is_common or self.specs[name].across else group
                yield TensorKey(name, tensor, owner, tuple(values.shape)), values, weight

    def pack(self, group: str, payload: Payload, unit: float) -> np.ndarray:
        """A client's vector, float64 `[size]`: w·v and w in parts of `unit`, the cohort's largest weight.

        Raises PayloadError for items that have no place.
        """
        vector = np.zeros(self.size)
        items = {name: payload.item(name) for name in payload}
        for place, values, weight in self._terms(group, items):
            if (slot := self.slices.get(place)) is None:
                raise PayloadError(
                    f"item {place.item!r}: {place.tensor or 'values'}: has no place in the secure sum"
                )
            try:
                said = torch.broadcast_to(weight, slot.weight_shape)
            except RuntimeError:
                raise PayloadError(
                    f"item {place.item!r}: a weight of shape {tuple(weight.shape)}"
                ) from None
            term = values.double() if items[place.item].kind in SUMS else values.double() * weight
            here, beside = slot.parts(place)
            vector[here], vector[beside] = (
                (term / unit).reshape(-1).numpy(),
                (said / unit).reshape(-1).numpy(),
            )
        if (loss := loss_from_report(payload.report)) is not None:
            vector[-2:] = loss, 1
        return vector

    def read(self, place: TensorKey, vector: np.ndarray, unit: float) -> Weighted:
        """Σ w·v in the tensor's shape, and Σ w in the weights', both float64."""
        slot = self.slices[place]
        values, weights = (torch.from_numpy(vector[part] * unit) for part in slot.parts(place))
        return values.reshape(place.shape), weights.reshape(slot.weight_shape)

    def tensor_keys(self, group: str, items: Mapping[str, Item]) -> list[TensorKey]:
        """The places that an upload of this form fills."""
        return [place for place, _, _ in self._terms(group, items)]

    @staticmethod
    def mean_loss(vector: np.ndarray) -> float | None:
        """The mean training loss of those who told theirs."""
        return float(vector[-2] / vector[-1]) if vector[-1] >= 1 else None


# Secure aggregation: the server learns the sum of a round's uploads and no single one
# (docs/secure_aggregation.md).


class SharedSetup(Interface):
    """What server and clients know alike."""

    def layout(self, round_idx: int) -> VectorLayout:
        """Of everybody's vector in that round."""

    def aggregation_group(self, client: str) -> str:
        """The architecture group of a client."""

    def noise(
        self, client: str, round_idx: int, layout: VectorLayout, unit: float, shares: int
    ) -> np.ndarray | None:
        """What a client adds to its vector so that as many such shares are the noise of the sum; None: nothing."""

    def num_rows(self, client: str) -> int:
        """A client's training rows: the largest weight that an item of its has."""


class SecureAggregation:
    """Bonawitz et al. (2017), with the neighbour graph of Bell et al. (2020): keys, shares, masked vectors, unmasking.

    Training stands in the third exchange, so that whoever drops out or diverges in it costs the others nothing.
    """

    setup: tuple[str, ...] = ("keys", "shares")
    takes_payload = False

    def __init__(
        self, config: SecureAggregationConfig, cohort: int, shared_setup: SharedSetup
    ) -> None:
        self.config = config
        self.agreed = shared_setup
        self.survivors = config.min_survivors(cohort)
        self.fixed = FixedPoint.from_config(config, cohort)

    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        layout = self.agreed.layout(round_idx)
        server = SecureAggregationRound(
            cohort,
            self.survivors,
            self.config.neighbours,
            (self._digest(layout), layout.size),
            self._unit(cohort),
            round_idx,
        )
        return server.exchanges()

    def answer(
        self, client_id: str, message: Message, round_idx: int, notes: Notes
    ) -> Message | TrainingRequest:
        def packer(digest: bytes) -> Packer:
            layout = self.agreed.layout(round_idx)
            if digest != self._digest(layout):
                raise PayloadError("another layout of the sum than agreed")
            return lambda upload, unit: self.encode_upload(
                client_id, Payload.decode(upload), layout, unit, round_idx
            )

        return answer(client_id, message, notes, packer)

    def encode_upload(
        self, client: str, payload: Payload, layout: VectorLayout, unit: float, round_idx: int
    ) -> Words:
        """The integers of an upload, before they are masked. Raises PayloadError for what has no place or is too large."""
        packed = layout.pack(self.agreed.aggregation_group(client), payload, unit)
        noise = self.agreed.noise(client, round_idx, layout, unit, self.survivors)
        return self.fixed.encode(packed if noise is None else packed + noise)

    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        """How long an upload would be by itself is of no account: everybody sends the vector of all."""
        members = num_neighbours(cohort, self.survivors, self.config.neighbours) + 1
        return message_sizes(members, self.agreed.layout(round_idx).size, broadcast)

    def _digest(self, layout: VectorLayout) -> bytes:
        return layout.digest_with(repr(self.fixed))

    def _unit(self, clients: Sequence[str]) -> int:
        """The power of two that the cohort's weights do not exceed."""
        return math.ceil(math.log2(max(1, *map(self.agreed.num_rows, clients))))
