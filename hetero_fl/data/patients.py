"""Rows of one patient stay together: drawing and dealing whole patients.

Two images of one patient are alike; with one in training and one in the test set, a model is scored on what it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hetero_fl.errors import UserError


def draw_patients(patient: Tensor, count: int, draws: torch.Generator, leave: int = 1) -> Tensor:
    """Rows of patients drawn at random, as a mask `[N]`: at most `count` rows, or the smallest patient's if all have more.

    Args:
        patient: of whom each row is, `[N]`.
        leave: so many patients at least are not drawn.

    Raises:
        UserError: so few patients that none can be drawn.
    """
    unit, size = patient.unique(return_inverse=True, return_counts=True)[1:]
    chosen = torch.zeros(len(size), dtype=torch.bool)
    order = torch.randperm(len(size), generator=draws)
    if count < 1:
        return chosen[unit]
    if len(size) <= leave:
        raise UserError(f"data.patient: found {len(size)} patients; too few to set some apart and leave others")
    while True:  # ends: each turn takes a patient at least
        left = count - int(size[chosen].sum())
        fitting = order[~chosen[order] & (size[order] <= left)][: len(size) - leave - int(chosen.sum())]
        taken = fitting[size[fitting].cumsum(0) <= left]
        if len(taken) == 0:
            break
        chosen[taken] = True
    if not bool(chosen.any()):
        chosen[order[size[order].argsort(stable=True)[0]]] = True
    return chosen[unit]


def commonest(strata: Tensor, unit: Tensor) -> Tensor:
    """The commonest stratum of each patient's rows, int64 `[P]`; of equals the lowest.

    Args:
        strata: int64 `[N]`, from 0.
        unit: int64 `[N]`, places 0 to P - 1, each of which occurs.
    """
    kinds, patients = int(strata.max()) + 1, int(unit.max()) + 1
    pairs, rows = (unit * kinds + strata).unique(return_counts=True)
    # sorted by patient, then fewest rows first, then highest stratum first: the last of each patient is wanted
    order = (pairs % kinds).argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    order = order[(pairs[order] // kinds).argsort(stable=True)]
    last = torch.bincount(pairs // kinds, minlength=patients).cumsum(0) - 1
    return pairs[order[last]] % kinds


def fill_up(owner: Tensor, size: Tensor, clients: int, fewest: int, order: Tensor) -> Tensor:
    """Whole patients moved from the largest clients to short ones, until each has `fewest` rows.

    Args:
        owner: the client of each patient, int64 `[P]`, -1 for none.
        size: rows of each patient, int64 `[P]`.
        order: int64 `[P]`, all patients in the order in which they are asked to move.

    Raises:
        UserError: no client can give a patient away without being short itself.
    """
    owner = owner.clone()
    dealt = owner >= 0
    held = torch.zeros(clients, dtype=torch.int64).index_add(0, owner[dealt], size[dealt])
    while int(held.min()) < fewest:  # ends: the shortest grows, and nobody becomes short
        low = int(held.argmin())
        movable = order[(owner[order] >= 0) & (size[order] <= (held - fewest)[owner[order]])]
        if len(movable) == 0:
            raise UserError(
                f"data.partition.min_size: found {fewest}, but with whole patients a client gets {int(held[low])} rows; "
                "lower it"
            )
        donor = owner[movable][held[owner[movable]].argmax()]
        moved = movable[owner[movable] == donor][0]
        held[donor] -= size[moved]
        held[low] += size[moved]
        owner[moved] = low
    return owner


def torn(parts: Sequence[Tensor], patient: Tensor) -> tuple[int, int] | None:
    """Two rows of one patient that lie in different parts, or None."""
    rows = torch.cat(list(parts))
    place = torch.cat([torch.full((len(part),), k) for k, part in enumerate(parts)])
    order = patient[rows].argsort(stable=True)
    rows, place = rows[order], place[order]
    bad = (patient[rows[1:]] == patient[rows[:-1]]) & (place[1:] != place[:-1])
    first = torch.nonzero(bad)
    return (int(rows[first[0]]), int(rows[first[0] + 1])) if len(first) else None
