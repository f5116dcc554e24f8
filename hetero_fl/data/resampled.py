"""A federation's data in which some clients train on other rows: for asking what a run would have been without an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hetero_fl.data.base import Examples
from hetero_fl.data.cache import ColumnCache
from hetero_fl.data.federated import FederatedData
from hetero_fl.data.private import Private, Share
from hetero_fl.lazy import Recent


class Resampled(FederatedData):
    """The same data, but for the training rows of some clients.

    Args:
        data: the federation's.
        train: those clients' training examples, as `as_made` gives them: their scanners do not touch them again.
    """

    def __init__(self, data: FederatedData, train: Mapping[str, Examples]) -> None:
        self.__dict__.update(data.__dict__)  # public columns are the same, and kept in one place
        self._views, self._private_columns = Recent(), ColumnCache(data._private_columns.limit)
        given = {client: {**data._private[client], "train": Share.whole(rows)} for client, rows in train.items()}
        self._private = Private({**data._private.dealt, **given}, data._private.drawing)
        self._given = frozenset(train)

    def _raw(self, client: str, split: str) -> Examples:
        if split == "train" and client in self._given:
            return self._private[client][split].take()
        return super()._raw(client, split)


def as_made(data: FederatedData, client: str, splits: Sequence[str]) -> Examples:
    """A client's rows of these splits, one after the other, as its own device made them: before any preprocessing."""
    shares = [data._private[client][split] for split in splits]
    return joined([replace(s.take(), x=data._raw(client, n).x) for n, s in zip(splits, shares, strict=True)])


def joined(parts: Sequence[Examples]) -> Examples:
    """Rows of one data set, one part after the other; what only some parts have is left out."""
    found: dict[str, Tensor | None] = {}
    for name in ("y", "group", "patient", "time", "unit"):
        columns = [column for part in parts if (column := getattr(part, name)) is not None]
        found[name] = torch.cat(columns) if len(columns) == len(parts) else None
    return replace(parts[0], x=torch.cat([part.x for part in parts]), baselines={}, **found)  # type: ignore[arg-type]
