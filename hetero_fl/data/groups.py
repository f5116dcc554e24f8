"""Dealing a set's rows out to clients; where rows say whose group they are of, groups go by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.source import DataConfig
from hetero_fl.data.base import Dataset
from hetero_fl.data.partition import deal
from hetero_fl.data.private import Share
from hetero_fl.errors import UserError, nearest
from hetero_fl.state import in_order


def deal_out(
    dataset: Dataset,
    rows: Tensor,
    names: list[str],
    config: DataConfig,
    clients: Mapping[str, ClientSettings],
    seed: int,
    notes: list[str],
) -> dict[str, Share]:
    """The rows of each of these clients. One alone gets them all, unless groups go by name and others have some.

    A note is added where groups go to clients of other names.
    """
    train = dataset.train
    patient = None if train.patient is None else train.patient[rows]
    group = None if train.group is None else train.group[rows]
    if group is not None and train.group_names:
        found = [train.group_names[g] for g in group.unique().tolist()]
        if config.partition.kind == "natural":
            everywhere = all_groups(dataset)
            notes += match_groups(everywhere, names, dataset.name)
            if len(names) > 1 and (empty := in_order(set(everywhere) - set(found))):
                raise UserError(
                    f"data.partition.kind: natural: no training row of group {_shown(empty)} of {dataset.name} is left: all "
                    "are for validation, test or the proxy set, or beyond data.train_limit"
                )
            one_group_each(dataset)
        if set(found) == set(names):  # groups that bear the clients' names go to them by name
            group = torch.tensor([names.index(n) if n in names else -1 for n in train.group_names])[group]
    if len(names) < 2:
        return {name: Share(train, rows) for name in names}
    assert train.y is not None
    sizes = [clients[name].size for name in names]
    parts = deal(train.y[rows], group, config.partition, sizes, dataset.task, seed, patient)
    return {name: Share(train, rows[part]) for name, part in zip(names, parts, strict=True)}


def match_groups(groups: list[str], clients: list[str], name: str) -> list[str]:
    """Check that a natural partition's groups and the clients are the same by name; lines on who gets what if they have
    no name in common, and go in the order in which people count.

    Raises:
        UserError: only some names are in both, or there are more of one than of the other.
    """
    strangers = [c for c in clients if c not in groups]
    orphans = [g for g in in_order(groups) if g not in clients]
    common = len(strangers) < len(clients)
    if not strangers and (not orphans or not clients):
        return []
    if not common and len(clients) == 1:
        return [f"{name}: client '{clients[0]}' gets the rows of all groups: {_shown(orphans)}"]
    if not common and len(groups) == len(clients):
        pairs = zip(clients, in_order(groups), strict=True)
        return [f"{name}: no client is called as a group is; " + ", ".join(f"'{c}' gets '{g}'" for c, g in pairs)]
    found = []
    if strangers:
        hint = nearest(strangers[0], orphans) if common else ""
        found.append(f"no group for client {_shown(strangers)}{hint}")
    if orphans:
        hint = nearest(orphans[0], strangers) if common and not strangers else ""
        found.append(f"no client for group {_shown(orphans)}{hint}")
    raise UserError(
        f"data.partition.kind: natural found {len(groups)} groups for {len(clients)} clients in {name}: "
        f"{' and '.join(part.removesuffix('?') for part in found)}"
    )


def all_groups(dataset: Dataset) -> list[str]:
    """The names of the groups of all rows, those of the common validation and test sets as well, in the order of people."""
    parts = dataset.splits().values()
    held = [(part.group, part.group_names) for part in parts if part.group is not None and part.group_names]
    return in_order({names[g] for group, names in held for g in group.unique().tolist()})


def one_group_each(dataset: Dataset) -> None:
    """Refuse a patient (UserError) who has rows in two groups, whatever they are used for: a natural partition would tear
    them apart."""
    group_of: dict[str, str] = {}
    for part in dataset.splits().values():
        if part.patient is None or part.group is None:
            continue
        for who, group in torch.stack([part.patient, part.group], 1).unique(dim=0).tolist():
            patient = part.patient_names[who] if part.patient_names else str(who)
            name = part.group_names[group] if part.group_names else str(group)
            if (first := group_of.setdefault(patient, name)) != name:
                raise UserError(
                    f"data.patient: patient '{patient}' has rows in groups '{first}' and '{name}' of {dataset.name}: a natural "
                    "partition cannot keep them together; where sites number their own patients, put the site before the "
                    "number"
                )


def _shown(names: list[str]) -> str:
    return ", ".join(f"'{n}'" for n in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
