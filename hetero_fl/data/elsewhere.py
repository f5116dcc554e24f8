"""Data of a federation whose participants are on machines of their own: each has its rows, and what the others told of theirs."""

from __future__ import annotations

from collections.abc import Mapping

from hetero_fl.data.federated import PRIVATE, FederatedData
from hetero_fl.data.private import Private, Told, fingerprint


def told_by(data: FederatedData, client: str, own_view: bool, labels: bool) -> Told:
    """What a client says of its rows to those who do not have them.

    Args:
        own_view: whether its preprocessing depends on them (`normalize: own`), and so has to be told.
        labels: whether it tells how often each label occurs in its training rows.
    """
    splits = data.private[client]
    counts = tuple(data.label_counts(client).tolist()) if labels else None
    return Told(
        {name: len(splits[name].rows) for name in PRIVATE},
        fingerprint("rows of a client", [(name, splits[name]) for name in PRIVATE]),
        data.preprocess(client) if own_view else None,
        counts,
    )


def held_at(data: FederatedData, client: str | None, told: Mapping[str, Told]) -> FederatedData:
    """The data as one client has it on its own machine, or the server (None): of everybody else only what they told.

    Raises KeyError for a client of whom nothing is told.
    """
    own = {client: data.private[client]} if client is not None else {}
    others = {id: told[id] for id in data.client_ids if id not in own}
    return data.elsewhere(Private(own, told=others))
