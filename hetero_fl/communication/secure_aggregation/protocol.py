"""Secure aggregation as a round protocol, and the layout of the vector that clients send.

All clients of a round use the same layout, so that a sum of vectors contains the sums of items.
Every client sends the whole vector. The length of the vector therefore does not reveal which
tensors the client has. See docs/how_to/secure_aggregation.md.
"""

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
from typing_extensions import override

from hetero_fl.communication.protocol import Exchanges, Message, RoundProtocol, TrainingRequest
from hetero_fl.communication.secure_aggregation.client import Notes, Packer, answer
from hetero_fl.communication.secure_aggregation.crypto import FixedPoint, Words, num_neighbours
from hetero_fl.communication.secure_aggregation.messages import message_sizes
from hetero_fl.communication.secure_aggregation.server import SecureAggregationRound
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.core.payload import Item, ItemSpec, Payload, PayloadError, loss_from_report

# Kinds of items whose values are already sums.
SUMS = ("class_sums", "counts")
# The totals Σ w v and Σ w over clients.
Weighted = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TensorKey:
    """Identifier of a tensor in the vector that clients send.

    Attributes:
        item: Name of the item.
        tensor: Name of the tensor. "" for a single-tensor item.
        group: Architecture group. "" if the tensor is averaged over all groups.
        shape: Shape of the tensor.
    """

    item: str
    tensor: str
    group: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class VectorSlice:
    """Position of a tensor's values and weights in the vector that clients send.

    Attributes:
        start: Index of the first value. The weights follow the values.
        weight_shape: Shape of the weights.
        dtype: Data type of the tensor.
    """

    start: int
    weight_shape: tuple[int, ...]
    dtype: torch.dtype

    def parts(self, key: TensorKey) -> tuple[slice, slice]:
        """Return the slices of the vector with the values and the weights.

        Args:
            key: Identifier of the tensor, which contains the shape of the values.
        """
        middle = self.start + math.prod(key.shape)
        return slice(self.start, middle), slice(middle, middle + math.prod(self.weight_shape))


@dataclass
class VectorLayout:
    """Layout of the vector that every client sends in a round.

    The last two elements of the vector are the training loss and 1, or zeros if the client reports
    no training loss.

    Args:
        specs: Declarations of the method's items, keyed by name.
        common: Prefixes of the names of tensors that are averaged across architectures.
        slices: Position of each tensor.
        size: Length of the vector.
    """

    specs: Mapping[str, ItemSpec]
    common: Sequence[str] = ()
    slices: dict[TensorKey, VectorSlice] = field(default_factory=dict)
    size: int = 2

    @classmethod
    def from_forms(
        cls,
        forms: Iterable[tuple[str, Mapping[str, Item]]],
        specs: Mapping[str, ItemSpec],
        common: Sequence[str] = (),
    ) -> VectorLayout:
        """Create a layout that contains the tensors of all given uploads.

        The result does not depend on the order of the uploads.

        Args:
            forms: Pairs of an architecture group and example items, keyed by name. The values of
                the items are not used.
            specs: Declarations of the method's items, keyed by name.
            common: Prefixes of the names of tensors that are averaged across architectures.
        """
        layout = cls(specs, tuple(common))
        shapes: dict[TensorKey, tuple[tuple[int, ...], torch.dtype]] = {}
        for group, form in forms:
            for key, values, weight in layout._terms(group, form):
                known = shapes.get(key, ((), values.dtype))
                shapes[key] = (tuple(torch.broadcast_shapes(known[0], weight.shape)), known[1])
        at = 0
        for key in sorted(shapes, key=lambda k: (k.item, k.tensor, k.group, k.shape)):
            layout.slices[key] = VectorSlice(at, *shapes[key])
            at = layout.slices[key].parts(key)[1].stop
        layout.size = at + 2
        return layout

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 digest of the layout."""
        return hashlib.sha256(repr((list(self.slices.items()), self.size)).encode()).digest()

    def digest_with(self, terms: str) -> bytes:
        """Return the SHA-256 digest of the layout and of further parameters as a string."""
        return hashlib.sha256(self.digest + terms.encode()).digest()

    def _terms(
        self, group: str, items: Mapping[str, Item]
    ) -> Iterable[tuple[TensorKey, Tensor, Tensor]]:
        """Yield the identifier, values and weight of each tensor."""
        for name, item in items.items():
            weight = torch.as_tensor(item.weight, dtype=torch.float64)
            for tensor, values in item.tensors.items():
                is_common = not tensor or tensor.startswith(tuple(self.common))
                owner = "" if is_common or self.specs[name].across_architectures else group
                yield TensorKey(name, tensor, owner, tuple(values.shape)), values, weight

    def pack(self, group: str, payload: Payload, unit: float) -> np.ndarray:
        """Convert an upload to the vector that the client sends.

        Args:
            group: Architecture group of the client.
            payload: The upload.
            unit: Power of two by which values and weights are divided. No weight of a client in the
                cohort exceeds `unit`.

        Returns:
            The elements w v / unit and w / unit of all tensors, dtype float64, shape `[size]`. For
            values that are already sums, v / unit replaces w v / unit. Elements of tensors that the
            upload does not contain are zero.

        Raises:
            PayloadError: If a tensor is not part of the layout or a weight has the wrong shape.
        """
        vector = np.zeros(self.size)
        items = {name: payload.item(name) for name in payload}
        for key, values, weight in self._terms(group, items):
            if (place := self.slices.get(key)) is None:
                raise PayloadError(
                    f"item {key.item!r}: tensor {key.tensor!r} of shape {key.shape} is not part of "
                    "the secure aggregation"
                )
            try:
                weights = torch.broadcast_to(weight, place.weight_shape)
            except RuntimeError:
                raise PayloadError(
                    f"item {key.item!r}: weight must have shape {place.weight_shape}, "
                    f"got {tuple(weight.shape)}"
                ) from None
            term = values.double() if items[key.item].kind in SUMS else values.double() * weight
            value_slice, weight_slice = place.parts(key)
            vector[value_slice] = (term / unit).reshape(-1).numpy()
            vector[weight_slice] = (weights / unit).reshape(-1).numpy()
        if (loss := loss_from_report(payload.report)) is not None:
            vector[-2:] = (loss, 1)
        return vector

    def read(self, key: TensorKey, vector: np.ndarray, unit: float) -> Weighted:
        """Return the totals of a tensor from a sum of vectors.

        Args:
            key: Identifier of the tensor.
            vector: The sum of the clients' vectors.
            unit: Factor by which the clients divided values and weights.

        Returns:
            The totals Σ w v with the shape of the tensor and Σ w with the shape of the weights,
            both of dtype float64.
        """
        place = self.slices[key]
        values, weights = (torch.from_numpy(vector[part] * unit) for part in place.parts(key))
        return values.reshape(key.shape), weights.reshape(place.weight_shape)

    def tensor_keys(self, group: str, items: Mapping[str, Item]) -> list[TensorKey]:
        """Return the identifiers of the tensors in an upload.

        Args:
            group: Architecture group of the client.
            items: Items of the upload, keyed by name. The values are not used.
        """
        return [key for key, _, _ in self._terms(group, items)]

    @staticmethod
    def mean_loss(vector: np.ndarray) -> float | None:
        """Return the mean training loss from a sum of vectors. None if no client reports a loss."""
        return float(vector[-2] / vector[-1]) if vector[-1] >= 1 else None


class SharedSetup(Interface):
    """Interface of the setup that the server and all clients share."""

    def layout(self, round_idx: int) -> VectorLayout:
        """Return the layout of the vector that clients send in a round."""

    def aggregation_group(self, client: str) -> str:
        """Return the architecture group of a client."""

    def noise(
        self, client: str, round_idx: int, layout: VectorLayout, unit: float, shares: int
    ) -> np.ndarray | None:
        """Return a client's share of the noise that is added to the sum.

        Args:
            client: The client.
            round_idx: Index of the round.
            layout: The layout of the vector.
            unit: Factor by which the client divides values and weights.
            shares: Number of shares that make up the noise of the sum.

        Returns:
            The noise on the vector, shape `[layout.size]`. None if clients do not add noise.
        """

    def num_rows(self, client: str) -> int:
        """Return the number of training rows of a client, which limits the weights of items."""


class SecureAggregation(RoundProtocol):
    """Secure aggregation (Bonawitz et al. 2017) with the mask graph of Bell et al. (2020).

    The four exchanges are "keys", "shares", "train" and "unmask". In the exchange "train", clients
    train and send masked vectors. The sum can be unmasked even if some clients drop out or diverge
    during training.

    Args:
        config: Settings of secure aggregation.
        cohort: Number of clients in a round.
        shared_setup: The setup that the server and all clients share.
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

    @override
    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        layout = self.agreed.layout(round_idx)
        server = SecureAggregationRound(
            cohort,
            self.survivors,
            self.config.neighbours,
            (self._digest(layout), layout.size),
            unit=self._unit(cohort),
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

        return answer(client_id, message, notes, packer)

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
        members = num_neighbours(cohort, self.survivors, self.config.neighbours) + 1
        return message_sizes(members, self.agreed.layout(round_idx).size, broadcast)

    def _digest(self, layout: VectorLayout) -> bytes:
        return layout.digest_with(repr(self.fixed))

    def _unit(self, clients: Sequence[str]) -> int:
        """Return the exponent of the smallest power of two that is not less than any weight."""
        return math.ceil(math.log2(max(1, *map(self.agreed.num_rows, clients))))
