"""A client's whole upload as one bounded vector: clipped before it leaves, and under local privacy noised as well.

The items of an upload are bounded one by one, each to a norm C_i of its own, and noised with z·√m·C_i where m items may be
sent: scaled by 1/C_i and laid end to end they are one vector of norm up to √m with noise z·√m, one Gaussian mechanism of
multiplier z (McMahan et al. 2018, section 3, "per-layer clipping"; Balle and Wang 2018 for its ε).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hetero_fl.architecture import Tensors
from hetero_fl.payload import Item, Payload

VALUES, WEIGHT = "values", "weight"
Draw = Callable[[Tensor, float, str], Tensor]  # (like, standard deviation, what for)


def clipped(item: Item, received: Item | None, bound: float) -> tuple[Item, bool]:
    """The item with weight one, moved from its reference by at most `bound` in L2; and whether it was within it already.

    "params" move from what the client received (nought where it received no such tensor), others from nought. Of
    "class_sums" the weights, which count rows, are part of the vector.
    """
    reference = _reference(item, received)
    parts = {n: t - reference[n] for n, t in _vector(item).items()}
    norm = float(torch.stack([t.double().square().sum() for t in parts.values()]).sum().sqrt()) if parts else 0.0
    if norm <= bound:
        return _item(item, _vector(item)), True
    return _item(item, {n: reference[n] + t * (bound / norm) for n, t in parts.items()}), False


def noised(item: Item, deviation: float, draw: Draw) -> Item:
    """The item with N(0, deviation²) on every number of it; weights of class sums stay at nought or above."""
    return _item(item, {n: t + draw(t, deviation, n) for n, t in _vector(item).items()})


def released(
    payload: Payload,
    received: Payload,
    bounds: Callable[[str], float],
    noise: Callable[[str, Item], Item] | None = None,
) -> tuple[Payload, dict[str, bool]]:
    """The upload with every item clipped (and noised, where `noise(name, item)` is given), and which were within bounds."""
    items, within = {}, {}
    for name in payload:
        before = received.item(name) if name in received else None
        item, within[name] = clipped(payload.item(name), before, bounds(name))
        items[name] = item if noise is None else noise(name, item)
    return Payload(items, payload.report), within


def _vector(item: Item) -> Tensors:
    """All numbers of an item that its receiver reads, named."""
    if isinstance(item.values, Mapping):
        return dict(item.values)
    if item.kind == "class_sums":
        return {VALUES: item.values, WEIGHT: torch.as_tensor(item.weight, dtype=item.values.dtype)}
    return {VALUES: item.values}


def _item(like: Item, vector: Tensors) -> Item:
    if isinstance(like.values, Mapping):
        return Item(vector, 1.0, like.kind)
    weight = vector[WEIGHT].clamp(min=0) if like.kind == "class_sums" else 1.0
    values = vector[VALUES].clamp(min=0) if like.kind == "counts" else vector[VALUES]
    return Item(values, weight, like.kind)


def _reference(item: Item, received: Item | None) -> Tensors:
    """Where an item starts from, tensor by tensor."""
    known = received.values if received is not None and item.kind == "params" else {}
    known = known if isinstance(known, Mapping) else {}
    vector = _vector(item)
    return {n: known[n] if n in known and known[n].shape == t.shape else torch.zeros_like(t) for n, t in vector.items()}
