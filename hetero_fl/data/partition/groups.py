"""Match groups to clients, and check that the rows of a patient are together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch

from hetero_fl.config.data import PARTITION_KINDS
from hetero_fl.data.dataset import Dataset
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_key, natural_order
from hetero_fl.utils.text import format_list, pluralize


def largest_groups(totals: Mapping[str, int], count: int | None, key: str, what: str) -> set[str]:
    """Return the names of the groups with the most rows, of equal groups the first by name.

    Args:
        totals: Number of rows of each group.
        count: Number of groups to keep, or None for all groups.
        key: Key of the number in the configuration, for error messages.
        what: Description of the groups, for error messages.

    Raises:
        UserError: If there are fewer than `count` groups.
    """
    if count is None:
        return set(totals)
    if count > len(totals):
        raise UserError(f"{key}: must be <= {len(totals)}, the number of {what}, got {count}")
    ranked = sorted(totals, key=lambda name: (-totals[name], natural_key(name)))
    return set(ranked[:count])


def match_groups(groups: list[str], clients: list[str], name: str) -> list[str]:
    """Check that the groups of a natural partition match the clients.

    Groups match if their names are the client ids. If no name matches, there must be as many groups
    as clients, or a single client, which gets all groups.

    Args:
        groups: Names of the groups.
        clients: Client ids.
        name: Name of the data set, for messages.

    Returns:
        Remarks on which client gets which group. If the names match, the list is empty.

    Raises:
        UserError: If the groups do not match the clients.
    """
    unmatched_clients = [c for c in clients if c not in groups]
    unmatched_groups = [g for g in natural_order(groups) if g not in clients]
    some_match = len(unmatched_clients) < len(clients)
    if not unmatched_clients and (not unmatched_groups or not clients):
        return []
    if not some_match and len(clients) == 1:
        listed = format_list(unmatched_groups, quote=True)
        return [f"{name}: client '{clients[0]}' gets the rows of all groups: {listed}"]
    if not some_match and len(groups) == len(clients):
        pairs = zip(clients, natural_order(groups), strict=True)
        return [
            f"{name}: no client has the name of a group; "
            + ", ".join(f"'{c}' gets '{g}'" for c, g in pairs)
        ]
    problems = []
    if unmatched_clients:
        hint = suggest_or_list(unmatched_clients[0], unmatched_groups) if some_match else ""
        problems.append(f"no group for client {format_list(unmatched_clients, quote=True)}{hint}")
    if unmatched_groups:
        problems.append(f"no client for group {format_list(unmatched_groups, quote=True)}")
    others = format_list([kind for kind in PARTITION_KINDS if kind not in ("natural", "drawn")])
    raise UserError(
        f"data.partition.kind=natural: got {len(groups)} groups for {len(clients)} clients in "
        f"{name}: {' and '.join(problem.removesuffix('?') for problem in problems)}; have one "
        f"client per group, or set data.partition.kind to {others}"
    )


def all_groups(dataset: Dataset) -> list[str]:
    """Return the names of all groups in all splits, in natural order."""
    parts = dataset.splits().values()
    return natural_order(set().union(*(part.names_of("group") for part in parts)))


def check_patients_in_one_set(dataset: Dataset, where: str) -> None:
    """Check that no patient has rows in two of the training, validation and test sets.

    Raises:
        UserError: If a patient has rows in two sets.
    """
    names = {
        split: part.names_of("patient") if part.patient_names else set()
        for split, part in dataset.splits().items()
    }
    for (first, own), (second, other) in combinations(names.items(), 2):
        if shared := natural_order(own & other):
            raise UserError(
                f"{where}: {pluralize(len(shared), 'patient')} with rows in the {first} and the "
                f"{second} set, such as '{shared[0]}'; remove their rows from one of the sets"
            )


def check_patients_in_one_group(dataset: Dataset) -> None:
    """Check that all rows of each patient are in the same group.

    A natural partition would otherwise divide the rows of a patient among clients.

    Raises:
        UserError: If a patient has rows in two groups.
    """
    group_of: dict[str, str] = {}
    for part in dataset.splits().values():
        if part.patient is None or part.group is None:
            continue
        for index, group in torch.stack([part.patient, part.group], 1).unique(dim=0).tolist():
            patient = part.patient_names[index] if part.patient_names else str(index)
            name = part.group_names[group] if part.group_names else str(group)
            if (first := group_of.setdefault(patient, name)) != name:
                raise UserError(
                    f"data.patient: patient '{patient}' has rows in groups '{first}' and '{name}' "
                    f"of {dataset.name}, which a natural partition would divide; if each site "
                    "numbers its patients, prefix the numbers with the site"
                )
