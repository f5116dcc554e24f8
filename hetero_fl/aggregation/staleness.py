"""Uploads that were made from an older version of the server count for less."""

from __future__ import annotations

from dataclasses import replace

from hetero_fl.payload import Item, Payload

SUMS = ("class_sums", "counts")  # their values are sums already: the weight is what they are divided by


def discounted(payload: Payload, factor: float) -> Payload:
    """The upload with the weight of every item multiplied by the factor, and the values with it where they are sums."""
    if factor == 1:
        return payload
    return Payload({name: _discounted(payload.item(name), factor) for name in payload}, payload.report)


def _discounted(item: Item, factor: float) -> Item:
    if item.kind not in SUMS:
        return replace(item, weight=item.weight * factor)
    values = item.values
    scaled = {n: t * factor for n, t in values.items()} if isinstance(values, dict) else values * factor
    return Item(scaled, item.weight * factor, item.kind)
