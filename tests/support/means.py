"""The mean of items, as a server computes it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from hetero_fl.aggregation.uploads import RunningMean
from hetero_fl.core.payload import SUM_KINDS, Item


def mean_of_items(items: Iterable[Item]) -> Tensor:
    """Return the mean of one or more single-tensor items, added in this order."""
    running = RunningMean()
    for item in items:
        running.add(item.tensors[""], item.weight, item.kind in SUM_KINDS)
    return running.result().value
