"""Vector that clients send for a sum: layout of the tensors of all uploads, and encoding.

All clients of a round use the same layout, so that a sum of vectors contains the sums of items.
Every client sends the whole vector. The length of the vector therefore does not reveal which
tensors the client has. Secure aggregation masks the vectors, and homomorphic encryption encrypts
them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol as Interface, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.communication import (
    HomomorphicConfig,
    SecureAggregationConfig,
    num_fraction_bits,
)
from hetero_fl.core.payload import (
    SUM_KINDS,
    Item,
    ItemSpec,
    Payload,
    PayloadError,
    loss_from_report,
)

Words: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint64]]"
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
                    "the summed vector"
                )
            try:
                weights = torch.broadcast_to(weight, place.weight_shape)
            except RuntimeError:
                raise PayloadError(
                    f"item {key.item!r}: weight must have shape {place.weight_shape}, "
                    f"got {tuple(weight.shape)}"
                ) from None
            term = (
                values.double() if items[key.item].kind in SUM_KINDS else values.double() * weight
            )
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
    """Interface of the setup that the server and all clients share.

    Attributes:
        client_ids: Ids of all clients of the federation, in natural order.
    """

    client_ids: Sequence[str]

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


def weight_unit(num_rows: Iterable[int]) -> int:
    """Return the exponent of the smallest power of two that is not less than any weight.

    Args:
        num_rows: Number of training rows of each client, which limits the weights of items.
    """
    return math.ceil(math.log2(max(1, *num_rows)))


@dataclass(frozen=True)
class FixedPoint:
    """Fixed-point format, in which x is encoded as the integer `round(x * 2**bits)` modulo 2^64.

    Sums of encoded numbers are exact, and masks cancel without rounding errors. The configuration
    guarantees that the sum over a cohort does not overflow: cohort * limit * 2^bits < 2^63.

    Attributes:
        bits: Number of fraction bits.
        limit: Maximum magnitude of a number before encoding.
        section: Configuration section with the limit, for error messages.
    """

    bits: int
    limit: float
    section: str = "channel.secure_sum"

    @classmethod
    def from_config(
        cls, config: SecureAggregationConfig | HomomorphicConfig, cohort: int, section: str
    ) -> FixedPoint:
        """Create the format that a configuration determines for a cohort of a given size."""
        return cls(num_fraction_bits(config, cohort), config.range, section)

    def encode(self, values: np.ndarray) -> Words:
        """Encode float64 values of shape `[L]` as uint64 integers of the same shape.

        Raises:
            PayloadError: If a value is not finite or exceeds the limit.
        """
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= self.limit:
            raise PayloadError(
                f"{self.section}.range: values must be <= {self.limit:g}, got {largest:.6g}"
            )
        return np.rint(values * 2.0**self.bits).astype(np.int64).view(np.uint64)

    def decode(self, total: Words) -> np.ndarray:
        """Decode a sum of encoded vectors of shape `[L]` to float64 values of the same shape."""
        return total.view(np.int64) * 2.0**-self.bits
