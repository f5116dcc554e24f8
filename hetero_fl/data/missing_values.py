"""Missing values: who would see them without having said what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hetero_fl.config.population import Population, SettingsProfile
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.dataset import ColumnLayout, Examples, RowSelection
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.utils.errors import UserError

CHUNK = 8192  # rows looked at together


def check_missing_values(kinds: Iterable[SettingsProfile], clients: Population, private: ClientRows, public: Mapping[str, RowSelection], layout: ColumnLayout,
               first_missing: str = "") -> list[str]:  # fmt: skip
    """Refuse (UserError) a missing value in what a client sees and has no `missing: indicate` for.

    A client who sees nothing at all of the proxy set has none; a line says so. `first_missing` is the source's own line on where the
    first missing value lies.
    """
    known: dict[int, bool] = {}
    shares = [*public.values(), *(share for _, share in private.rows_by_location())]
    if not any(_has_missing_values(share.examples, known) for share in shares):
        return []
    notes = []
    for kind in kinds:
        config = kind.settings.preprocess
        where = f"clients: '{kind.first}': preprocess"
        view = Preprocess.without_normalization(
            config, layout, tuple(public["common_test"].examples.x.shape[1:]), where
        )
        if "proxy" in public and is_all_missing(public["proxy"], view):
            more = f" (and {kind.count - 1:,} more)" if kind.count > 1 else ""
            notes.append(
                f"client '{kind.first}'{more} sees nothing of the proxy set: it has no part in what is done with it"
            )
        if view.missing is not None:
            continue
        places = {
            name: share
            for name, share in public.items()
            if name != "proxy" or not is_all_missing(share, view)
        }
        if private.lazy_partition is not None:
            places["train"] = private.lazy_partition.pool
        check_view(places, view, layout, where, known, first_missing)
    for (name, split), share in private.rows_by_location():
        if (
            name
            and _has_missing_values(share.examples, known)
            and (settings := clients[name]).preprocess.missing is None
        ):
            where = f"clients: '{name}': preprocess"
            raw = tuple(share.examples.x.shape[1:])
            check_view(
                {split: share},
                Preprocess.without_normalization(settings.preprocess, layout, raw, where),
                layout,
                where,
                known,
                first_missing,
            )
    return notes


def check_view(
    places: Mapping[str, RowSelection],
    view: Preprocess,
    layout: ColumnLayout,
    where: str,
    known: dict[int, bool],
    first_missing: str = "",
) -> None:
    """Refuse (UserError) a missing value that this view would see in one of these sets."""
    for name, share in places.items():
        if not _has_missing_values(share.examples, known):
            continue
        for rows in share.rows.split(CHUNK):
            gone = view.select_columns(share.examples.x[rows]).isnan()
            if not bool(gone.any()):
                continue
            place = gone.nonzero()[0]
            names = [n for n, (a, b) in layout.boundaries.items() for _ in range(a, b)]
            named = view.select_columns(torch.arange(len(names))[None])[0] if names else None
            what = "" if named is None else f" '{names[int(named[place[-1]])]}'"
            first = f" ({first_missing})" if first_missing else ""
            raise UserError(
                f"{where}.missing: row {int(rows[place[0]])} of {name} has no value of{what or ' one column'}{first}; set it "
                "to indicate, or leave what is missing out of preprocess.columns"
            )


def is_all_missing(share: RowSelection, view: Preprocess) -> bool:
    """Whether everything that the view takes of these rows is missing."""
    x = share.examples.x
    return x.is_floating_point() and all(
        bool(view.select_columns(x[rows]).isnan().all()) for rows in share.rows.split(CHUNK)
    )  # as a rule the first chunk decides


def usable_rows(x_raw: Tensor, view: Preprocess) -> Tensor:
    """bool `[N]`: rows that can be learned from through this view: something of them is there, and all unless the view says
    what becomes of missing values."""
    if not x_raw.is_floating_point():
        return torch.ones(len(x_raw), dtype=torch.bool)
    gone = view.select_columns(x_raw).isnan().flatten(1)
    return ~(gone.any(1) if view.missing is None else gone.all(1))


def _has_missing_values(examples: Examples, known: dict[int, bool]) -> bool:
    """Whether any value is missing; looked at once for each set of examples."""
    x = examples.x
    if id(examples) not in known:
        known[id(examples)] = x.is_floating_point() and any(
            bool(c.isnan().any()) for c in x.split(CHUNK)
        )
    return known[id(examples)]
