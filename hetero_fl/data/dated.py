"""Dated sets: what is cut by date, and which rows of the cut a client has.

A model that forecasts is trained on what was and judged on what came after: rows are never drawn from all over the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_fl.data.base import Examples
from hetero_fl.errors import UserError


def cut_by_date(time: Tensor, share: float, span: int = 0) -> tuple[Tensor, Tensor]:
    """Masks `[N]` of the rows in the last `share` of the time that all of them cover, and of those before.

    Args:
        time: int64 `[N]`, when a row's (last) target is.
        span: how long before it the row's first target may be. Later rows whose first target would lie before the cut are
            in neither: no target is in both.
    """
    first, last = int(time.min()), int(time.max())
    cut = last - round(share * (last - first))
    return time > cut + span, time <= cut


def cut_rows(rows: Tensor, time: Tensor, shares: tuple[float, float], span: int, where: str) -> dict[str, Tensor]:
    """Rows as train, validation and test, in this order in time.

    Args:
        rows: int64 `[M]`, sorted.
        time: int64, of every row of the set.
        shares: of validation and test, of the time that the rows cover; 0: none.

    Raises:
        UserError: a part whose share is above 0 gets no row.
    """
    parts, rest = {"validation": rows[:0], "test": rows[:0]}, rows
    whole = 1.0
    for name, share in (("test", shares[1]), ("validation", shares[0])):
        if not share:
            continue
        later, before = cut_by_date(time[rest], share / whole, span)
        parts[name], rest, whole = rest[later], rest[before], whole - share
        if not len(parts[name]) or not len(rest):
            raise UserError(f"{where} has {len(rows)} rows, too few to cut {name} off by date")
    return {"train": rest, **parts}


def rows_of_groups(examples: Examples, like: Examples, rows: Tensor) -> Tensor:
    """The rows of a set whose groups, by name, are those of some rows of another, int64, sorted."""
    assert examples.group is not None and like.group is not None
    names = {_name(like, int(place)) for place in like.group[rows].unique()}
    mine = torch.tensor([place for place in examples.group.unique().tolist() if _name(examples, place) in names])
    return torch.nonzero(torch.isin(examples.group, mine)).squeeze(1)


def _name(examples: Examples, place: int) -> str:
    return examples.group_names[place] if examples.group_names else str(place)
