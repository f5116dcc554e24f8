"""Missing values: who would see them without having said what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hetero_fl.config.population import Kind, Population
from hetero_fl.data.client_rows import Private
from hetero_fl.data.dataset import Examples, Layout, Share
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.utils.errors import UserError

CHUNK = 8192  # rows looked at together


def check_gaps(kinds: Iterable[Kind], clients: Population, private: Private, public: Mapping[str, Share], layout: Layout,
               gap: str = "") -> list[str]:  # fmt: skip
    """Refuse (UserError) a missing value in what a client sees and has no `missing: indicate` for.

    A client who sees nothing at all of the proxy set has none; a line says so. `gap` is the source's own line on where the
    first missing value lies.
    """
    known: dict[int, bool] = {}
    shares = [*public.values(), *(share for _, share in private.places())]
    if not any(_gappy(share.examples, known) for share in shares):
        return []
    notes = []
    for kind in kinds:
        config, where = kind.settings.preprocess, f"clients: '{kind.first}': preprocess"
        view = Preprocess.plain(
            config, layout, tuple(public["common_test"].examples.x.shape[1:]), where
        )
        if "proxy" in public and sees_nothing(public["proxy"], view):
            more = f" (and {kind.count - 1:,} more)" if kind.count > 1 else ""
            notes.append(
                f"client '{kind.first}'{more} sees nothing of the proxy set: it has no part in what is done with it"
            )
        if view.missing is not None:
            continue
        places = {
            name: share
            for name, share in public.items()
            if name != "proxy" or not sees_nothing(share, view)
        }
        if private.drawing is not None:
            places["train"] = private.drawing.pool
        check_view(places, view, layout, where, known, gap)
    for (name, split), share in private.places():
        if (
            name
            and _gappy(share.examples, known)
            and (settings := clients[name]).preprocess.missing is None
        ):
            where, raw = f"clients: '{name}': preprocess", tuple(share.examples.x.shape[1:])
            check_view(
                {split: share},
                Preprocess.plain(settings.preprocess, layout, raw, where),
                layout,
                where,
                known,
                gap,
            )
    return notes


def check_view(
    places: Mapping[str, Share],
    view: Preprocess,
    layout: Layout,
    where: str,
    known: dict[int, bool],
    gap: str = "",
) -> None:
    """Refuse (UserError) a missing value that this view would see in one of these sets."""
    for name, share in places.items():
        if not _gappy(share.examples, known):
            continue
        for rows in share.rows.split(CHUNK):
            gone = view.taken(share.examples.x[rows]).isnan()
            if not bool(gone.any()):
                continue
            place = gone.nonzero()[0]
            names = [n for n, (a, b) in layout.ends.items() for _ in range(a, b)]
            named = view.taken(torch.arange(len(names))[None])[0] if names else None
            what = "" if named is None else f" '{names[int(named[place[-1]])]}'"
            first = f" ({gap})" if gap else ""
            raise UserError(
                f"{where}.missing: row {int(rows[place[0]])} of {name} has no value of{what or ' one column'}{first}; set it "
                "to indicate, or leave what is missing out of preprocess.columns"
            )


def sees_nothing(share: Share, view: Preprocess) -> bool:
    """Whether everything that the view takes of these rows is missing."""
    x = share.examples.x
    return x.is_floating_point() and all(
        bool(view.taken(x[rows]).isnan().all()) for rows in share.rows.split(CHUNK)
    )  # as a rule the first chunk decides


def usable(x_raw: Tensor, view: Preprocess) -> Tensor:
    """bool `[N]`: rows that can be learned from through this view: something of them is there, and all unless the view says
    what becomes of missing values."""
    if not x_raw.is_floating_point():
        return torch.ones(len(x_raw), dtype=torch.bool)
    gone = view.taken(x_raw).isnan().flatten(1)
    return ~(gone.any(1) if view.missing is None else gone.all(1))


def _gappy(examples: Examples, known: dict[int, bool]) -> bool:
    """Whether any value is missing; looked at once for each set of examples."""
    x = examples.x
    if id(examples) not in known:
        known[id(examples)] = x.is_floating_point() and any(
            bool(c.isnan().any()) for c in x.split(CHUNK)
        )
    return known[id(examples)]
