"""Items of all clients in one common vector of numbers, so that a sum of vectors is a sum of items.

Each tensor has a place for Σ w·v and one for Σ w: that of a model by its owner (the architecture group, or everybody), as in
hetero_fl.aggregation.averaging. Every client sends the whole vector, with noughts where it owns nothing, so that neither its
length nor its form tells what the client has. The last two numbers are the sum of training losses and how many told theirs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hetero_fl.payload import Item, ItemSpec, Payload, PayloadError, loss_of

SUMS = ("class_sums", "counts")  # kinds whose values are sums already
Weighted = tuple[Tensor, Tensor]  # Σ w·v, Σ w


@dataclass(frozen=True)
class Place:
    """Which tensor: of an item that is one (`tensor` is ""), or a named one of a model; `group` "": everybody's."""

    item: str
    tensor: str
    group: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """Where a tensor's values stand, and the weights behind them."""

    start: int
    weight_shape: tuple[int, ...]
    dtype: torch.dtype

    def parts(self, place: Place) -> tuple[slice, slice]:
        """Of the vector: values, weights."""
        middle = self.start + math.prod(place.shape)
        return slice(self.start, middle), slice(middle, middle + math.prod(self.weight_shape))


@dataclass
class Layout:
    """The common vector of a round. The same forms give the same layout, in whatever order they come.

    Args:
        specs: what the method declares of its items.
        common: prefixes of tensors that are averaged across architectures.
    """

    specs: Mapping[str, ItemSpec]
    common: Sequence[str] = ()
    slots: dict[Place, Slot] = field(default_factory=dict)
    size: int = 2  # numbers in the vector

    @classmethod
    def of(
        cls, forms: Iterable[tuple[str, Mapping[str, Item]]], specs: Mapping[str, ItemSpec], common: Sequence[str] = ()
    ) -> Layout:
        """The layout for uploads of these forms: (architecture group, items whose numbers mean nothing)."""
        made = cls(specs, tuple(common))
        shapes: dict[Place, tuple[tuple[int, ...], torch.dtype]] = {}
        for group, form in forms:
            for place, values, weight in made._terms(group, form):
                known = shapes.get(place, ((), values.dtype))
                shapes[place] = (tuple(torch.broadcast_shapes(known[0], weight.shape)), known[1])
        at = 0
        for place in sorted(shapes, key=lambda p: (p.item, p.tensor, p.group, p.shape)):
            made.slots[place] = Slot(at, *shapes[place])
            at = made.slots[place].parts(place)[1].stop
        made.size = at + 2
        return made

    @cached_property
    def digest(self) -> bytes:
        """32 bytes by which two parties see that they mean the same layout."""
        return hashlib.sha256(repr((list(self.slots.items()), self.size)).encode()).digest()

    def digest_with(self, terms: str) -> bytes:
        """The digest of the layout and of what else was agreed."""
        return hashlib.sha256(self.digest + terms.encode()).digest()

    def _terms(self, group: str, items: Mapping[str, Item]) -> Iterable[tuple[Place, Tensor, Tensor]]:
        """Each tensor with its place and weight."""
        for name, item in items.items():
            weight = torch.as_tensor(item.weight, dtype=torch.float64)
            if isinstance(item.values, Tensor):
                yield Place(name, "", "", tuple(item.values.shape)), item.values, weight
                continue
            across = self.specs[name].across
            for tensor, values in item.values.items():
                everybodys = across or (bool(self.common) and tensor.startswith(tuple(self.common)))
                yield Place(name, tensor, "" if everybodys else group, tuple(values.shape)), values, weight

    def pack(self, group: str, payload: Payload, unit: float) -> np.ndarray:
        """A client's vector, float64 `[size]`: w·v and w in parts of `unit`, the cohort's largest weight.

        Raises PayloadError for items that have no place.
        """
        vector = np.zeros(self.size)
        items = {name: payload.item(name) for name in payload}
        for place, values, weight in self._terms(group, items):
            if (slot := self.slots.get(place)) is None:
                raise PayloadError(f"item {place.item!r}: {place.tensor or 'values'}: has no place in the secure sum")
            try:
                said = torch.broadcast_to(weight, slot.weight_shape)
            except RuntimeError:
                raise PayloadError(f"item {place.item!r}: a weight of shape {tuple(weight.shape)}") from None
            term = values.double() if items[place.item].kind in SUMS else values.double() * weight
            here, beside = slot.parts(place)
            vector[here], vector[beside] = (term / unit).reshape(-1).numpy(), (said / unit).reshape(-1).numpy()
        if (loss := loss_of(payload.report)) is not None:
            vector[-2:] = loss, 1
        return vector

    def read(self, place: Place, vector: np.ndarray, unit: float) -> Weighted:
        """Σ w·v in the tensor's shape, and Σ w in the weights', both float64."""
        slot = self.slots[place]
        values, weights = (torch.from_numpy(vector[part] * unit) for part in slot.parts(place))
        return values.reshape(place.shape), weights.reshape(slot.weight_shape)

    def places(self, group: str, items: Mapping[str, Item]) -> list[Place]:
        """The places that an upload of this form fills."""
        return [place for place, _, _ in self._terms(group, items)]

    @staticmethod
    def loss(vector: np.ndarray) -> float | None:
        """The mean training loss of those who told theirs."""
        return float(vector[-2] / vector[-1]) if vector[-1] >= 1 else None
