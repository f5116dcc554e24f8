"""Select and partition whole groups and patients, and match groups to clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import PARTITION_KINDS
from hetero_fl.data.dataset import Dataset, Examples
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_key, natural_order
from hetero_fl.utils.text import format_list, pluralize

if TYPE_CHECKING:
    from hetero_fl.data.partition import PartitionContext, PartitionFunction

WHERE = "data.partition"


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


def partition_patients(
    partition: PartitionFunction, context: PartitionContext, patient: Tensor
) -> list[Tensor]:
    """Partition patients as if they were rows, then move patients to clients with too few rows.

    The kind `natural` partitions rows by group instead. With the kind `classes`, no patients are
    moved, as they could have classes that are not assigned to the client. With user-defined
    kinds, no patients are moved either.

    Args:
        partition: Partition function of the configured kind.
        context: Inputs of the partition function, with an entry for each row.
        patient: Patient of each row, int64 `[N]`.

    Returns:
        Row indices of each client.

    Raises:
        UserError: If there are fewer patients than clients, a patient is in two groups (kind
            `natural`), or some client gets fewer than `min_size` rows.
    """
    clients = len(context.share)
    if context.config.kind == "natural":
        parts = partition(context)
        if divides_patients(parts, patient):
            raise UserError(
                f"{WHERE}.kind=natural: a patient (data.patient) has rows in two groups; give the "
                "patient a different name in each group"
            )
        return parts
    term = context.columns.patient_term
    patient_index, sizes = patient.unique(return_inverse=True, return_counts=True)[1:]
    if len(sizes) < clients:
        raise UserError(
            f"{term.rule}: expected at least one {term.noun} per client, got {len(sizes)} "
            f"{term.noun}s for {clients} clients"
        )
    # The number of patients that have min_size rows on average.
    min_patients = max(
        1, min(-(-context.config.min_size * len(sizes) // len(patient)), len(sizes) // clients)
    )
    strata = most_common_stratum(context.strata, patient_index)
    first = first_rows(context.strata, strata, patient_index)
    patients_of = partition(
        replace(
            context,
            strata=strata,
            group=None,
            min_rows=min_patients,
            labels=context.labels[first],
            columns=context.columns.select_rows(first),
            unit=term.noun,
        )
    )
    owner = torch.full((len(sizes),), -1)
    for client, patients in enumerate(patients_of):
        owner[patients] = client
    if context.config.kind == "classes":
        # Moving patients would give clients additional classes.
        rows_per_client = torch.bincount(owner[patient_index] + 1, minlength=clients + 1)[1:]
        if int(rows_per_client.min()) < context.config.min_size:
            raise too_few_rows_error(context)
    elif context.config.kind in PARTITION_KINDS:
        order = context.shuffled(torch.arange(len(sizes)), "patients")
        before = owner
        owner = move_patients_to_short_clients(
            owner, sizes, clients, context.config.min_size, order
        )
        if moved := int((owner != before).sum()):
            context.notes.append(
                f"{WHERE}.min_size: moved {pluralize(moved, term.noun)} to clients that had fewer "
                f"than {context.config.min_size} rows"
            )
    return [torch.nonzero(owner[patient_index] == client).squeeze(1) for client in range(clients)]


def too_few_rows_error(context: PartitionContext) -> UserError:
    """Return the error for a partition by classes with fewer than `min_size` rows per client."""
    return UserError(
        f"{WHERE}.min_size: with {context.config.classes} classes per client some clients get "
        f"fewer than {context.config.min_size} rows; choose a smaller number"
    )


def match_groups(groups: list[str], clients: list[str], name: str, advice: str = "") -> list[str]:
    """Check that the groups of a natural partition match the clients.

    Groups match if their names are the client ids. If no name matches, there must be as many groups
    as clients, or a single client, which gets all groups.

    Args:
        groups: Names of the groups.
        clients: Client ids.
        name: Name of the data set, for messages.
        advice: End of the error message.

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
        suggest = some_match and not unmatched_clients
        hint = suggest_or_list(unmatched_groups[0], unmatched_clients) if suggest else ""
        problems.append(f"no client for group {format_list(unmatched_groups, quote=True)}{hint}")
    raise UserError(
        f"{WHERE}.kind=natural: got {len(groups)} groups for {len(clients)} clients in {name}: "
        f"{' and '.join(problem.removesuffix('?') for problem in problems)}{advice}"
    )


def all_groups(dataset: Dataset) -> list[str]:
    """Return the names of all groups in all splits, in natural order."""
    names = {
        part.group_names[g]
        for part in dataset.splits().values()
        if part.group is not None and part.group_names
        for g in part.group.unique().tolist()
    }
    return natural_order(names)


def patient_names(examples: Examples, rows: Tensor | None = None) -> set[str]:
    """Return the names of the patients of all or some rows, or no names if they have none."""
    if examples.patient is None or not examples.patient_names:
        return set()
    patient = examples.patient if rows is None else examples.patient[rows]
    return {examples.patient_names[index] for index in patient.unique().tolist()}


def check_patients_in_one_set(dataset: Dataset, where: str) -> None:
    """Check that no patient has rows in two of the training, validation and test sets.

    Raises:
        UserError: If a patient has rows in two sets.
    """
    names = {split: patient_names(part) for split, part in dataset.splits().items()}
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


def most_common_stratum(strata: Tensor, patient: Tensor) -> Tensor:
    """Return the most common stratum of the rows of each patient.

    Ties are resolved in favor of the lowest stratum.

    Args:
        strata: Stratum of each row, int64 `[N]`, starting at 0.
        patient: Patient of each row, int64 `[N]`, with all values from 0 to P - 1.

    Returns:
        Strata, int64 `[P]`.
    """
    num_strata = int(strata.max()) + 1
    pairs, rows = (patient * num_strata + strata).unique(return_counts=True)
    patient_of_pair = pairs // num_strata
    order = np.lexsort((pairs % num_strata, -rows, patient_of_pair))
    first = np.unique(patient_of_pair[order], return_index=True)[1]
    return pairs[order[first]] % num_strata


def first_rows(strata: Tensor, patient_strata: Tensor, patient: Tensor) -> Tensor:
    """Return the first row of each patient that has the stratum of the patient.

    Args:
        strata: Stratum of each row, int64 `[N]`.
        patient_strata: Stratum of each patient, int64 `[P]`.
        patient: Patient of each row, int64 `[N]`, with all values from 0 to P - 1.

    Returns:
        Row indices, int64 `[P]`.
    """
    rows = torch.nonzero(strata == patient_strata[patient]).squeeze(1)
    first = np.unique(patient[rows].numpy(), return_index=True)[1]
    return rows[torch.from_numpy(first)]


def move_patients_to_short_clients(
    owner: Tensor, size: Tensor, clients: int, min_rows: int, order: Tensor
) -> Tensor:
    """Move whole patients from the largest clients to clients with too few rows.

    Args:
        owner: Client of each patient, or -1 for patients without a client, int64 `[P]`.
        size: Number of rows of each patient, int64 `[P]`.
        clients: Number of clients.
        min_rows: Minimum number of rows per client.
        order: Permutation of the patients, int64 `[P]`. Patients that come first are moved first.

    Returns:
        New client of each patient, int64 `[P]`.

    Raises:
        UserError: If no client can spare a patient.
    """
    owner = owner.clone()
    assigned = owner >= 0
    rows = torch.zeros(clients, dtype=torch.int64).index_add(0, owner[assigned], size[assigned])
    # Terminates because the smallest client grows and no donor falls below the minimum.
    while int(rows.min()) < min_rows:
        low = int(rows.argmin())
        movable = order[(owner[order] >= 0) & (size[order] <= (rows - min_rows)[owner[order]])]
        if len(movable) == 0:
            raise UserError(
                f"{WHERE}.min_size: if no patient is divided, a client gets only "
                f"{int(rows[low])} rows, got {min_rows}; choose a smaller number"
            )
        donor = owner[movable][rows[owner[movable]].argmax()]
        moved = movable[owner[movable] == donor][0]
        rows[donor] -= size[moved]
        rows[low] += size[moved]
        owner[moved] = low
    return owner


def divides_patients(parts: Sequence[Tensor], patient: Tensor) -> bool:
    """Return whether rows of a patient are in different parts."""
    owner = torch.cat([torch.full((len(part),), k) for k, part in enumerate(parts)])
    patients = patient[torch.cat(list(parts))]
    pairs = torch.stack([patients, owner]).unique(dim=1)
    return pairs.shape[1] > len(patients.unique())
