"""The uploads of a round, and the one rule by which they are combined: the weighted mean over the owners of each element.

That rule is FedAvg within an architecture, partial sharing, and the mean of predictions at once. Sums are taken in client-id
order, so that the order of arrival changes no bit; weights that are numbers are normalised before they multiply, and the
first term starts the sum, so that a tensor with one owner passes through untouched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hetero_fl.architecture import Tensors
from hetero_fl.errors import nearest
from hetero_fl.payload import Item, NoSuchItem, Payload
from hetero_fl.state import Card, in_order


@dataclass(frozen=True)
class Upload:
    """What one client sent."""

    card: Card
    payload: Payload

    @property
    def client(self) -> str:
        """The sender's id."""
        return self.card.id

    @property
    def group(self) -> str:
        """The architecture group of the sender's model."""
        return self.card.arch.id


class Uploads:
    """All uploads that arrived, in client-id order.

    `declared`: the items that the method's clients may send; to ask for another one raises NoSuchItem (a KeyError).
    """

    def __init__(self, uploads: Iterable[Upload], declared: Collection[str] | None = None) -> None:
        self.declared = declared
        by_client = {u.client: u for u in uploads}
        self._uploads = [by_client[c] for c in in_order(by_client)]

    def __len__(self) -> int:
        return len(self._uploads)

    @property
    def each(self) -> Iterator[Upload]:
        """The single uploads."""
        return iter(self._uploads)

    def having(self, name: str) -> list[Upload]:
        """Those with the item."""
        if self.declared is not None and name not in self.declared:
            raise NoSuchItem(f"item {name!r} is not declared in `uploads`{nearest(name, self.declared)}")
        return [u for u in self._uploads if name in u.payload]

    def mean(self, name: str) -> Tensor | None:
        """`mean_of` the single-tensor items of that name; None if nobody sent it."""
        items = [u.payload.item(name) for u in self.having(name)]
        return mean_of(items) if items else None

    def total(self, name: str) -> tuple[Tensor, Tensor]:
        """`total_of` the single-tensor items of that name. Raises KeyError if nobody sent it."""
        items = [u.payload.item(name) for u in self.having(name)]
        if not items:
            raise KeyError(name)
        return total_of(items)


def mean_of(items: Sequence[Item]) -> Tensor:
    """Σ w·v / Σ w of single-tensor items in the order given, element by element; nought where nobody has weight."""
    if any(i.kind == "class_sums" or isinstance(i.weight, Tensor) for i in items):
        total, weight = total_of(items)
        return total / torch.where(weight > 0, weight, torch.ones_like(weight))
    weights = normalised([float(i.weight) for i in items])
    return weighted_sum([_tensor(i) for i in items], weights)


def total_of(items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """(Σ values·weight, Σ weight) of single-tensor items; `class_sums` and `counts` are sums already."""
    values = [_tensor(i) for i in items]
    weights = [torch.as_tensor(i.weight, dtype=v.dtype) for i, v in zip(items, values, strict=True)]
    terms = [v if i.kind in ("class_sums", "counts") else v * w for i, v, w in zip(items, values, weights, strict=True)]
    return _sum(terms), _sum(weights)


def _tensor(item: Item) -> Tensor:
    if not isinstance(item.values, Tensor):
        raise TypeError("named tensors are averaged by aggregation.averaging")
    return item.values


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights that sum to one; equal ones if all are nought."""
    total = sum(weights)
    return [w / total for w in weights] if total > 0 else [1 / len(weights)] * len(weights)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w·t in the order given; exact where there is one."""
    return _sum([t * w for t, w in zip(tensors, weights, strict=True)])


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def step(current: Tensors, mean: Tensors, rate: float, parameters: Iterable[str]) -> Tensors:
    """current + rate·(mean − current) for parameters; buffers (BatchNorm statistics) take the mean as it is.

    A rate of one takes the mean to the bit. Extrapolating a running variance could make it negative.
    """
    trainable = set(parameters)
    moved = {n: m if rate == 1 or n not in trainable else current[n] + rate * (m - current[n]) for n, m in mean.items()}
    return {**current, **moved}
