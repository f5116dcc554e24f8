"""Partition training rows among clients: Dirichlet, classes, quantity, natural groups, custom.

Whole patients stay with one client where the data names patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, PartitionConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, RowSelection
from hetero_fl.utils.code_permission import OWN
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.registry import call_reference
from hetero_fl.utils.seeding import keyed_generator, keyed_numpy_generator
from hetero_fl.utils.text import format_list

# What partitions count with: the stratum of a row, whole numbers by shares, classes by holders.


def row_strata(y: Tensor, task: Task) -> Tensor:
    """Return what counts as each row's label in a partition, int64 `[N]`.

    Multiclass: its class. Multilabel: the rarest of its labels plus one, 0 if it has none.
    Regression: the tenth of all rows, by the first target, that it falls into.
    """
    if task.kind == "multiclass":
        return y
    if task.kind == "multilabel":
        order = y.sum(0).argsort(stable=True)  # rarest first: argmax finds the first positive one
        first = (y[:, order] > 0).to(torch.uint8).argmax(1)
        return torch.where((y > 0).any(1), order[first] + 1, 0)
    inner = torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1]
    target = y[:, 0].double().contiguous()
    edges = torch.from_numpy(np.quantile(target.numpy(), inner.numpy()))
    return torch.searchsorted(edges, target, right=True)


def apportion(total: int, share: np.ndarray, at_least: int = 0) -> np.ndarray:
    """Return whole numbers that sum to `total` and are nearest to the shares (largest remainder).

    Args:
        total: Their sum.
        share: Shares, float `[K]`; they need not sum to one.
        at_least: Smallest number.
    """
    exact = share / share.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    # Each turn fills the smallest from the largest, and the total suffices: this ends.
    while (counts < at_least).any():
        low = counts.argmin()
        high = counts.argmax()
        moved = min(at_least - counts[low], counts[high] - at_least)
        counts[low] += moved
        counts[high] -= moved
    return counts


def apportion_nonzero(rows: int, share: np.ndarray) -> np.ndarray:
    """Apportion rows among those with a share above 0; the others get none."""
    counts = np.zeros(len(share), dtype=np.int64)
    if (share > 0).any():
        counts[share > 0] = apportion(rows, share[share > 0])
    return counts


def cut_proportions(proportions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return each client's rows of each class, int64 `[classes, clients]`.

    Args:
        proportions: Each client's proportion of a class, float `[classes, clients]`.
        counts: Rows of each class, int64 `[classes]`.
    """
    cuts = np.rint(proportions.cumsum(1) * counts[:, None]).astype(np.int64)
    cuts[:, -1] = counts
    return np.diff(cuts, axis=1, prepend=0)


def cut_below(proportions: np.ndarray, counts: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Cut class by class; a client that has its maximum gets none of the next class.

    The others share that class by their proportions. The last class that a client gets may carry
    it above its maximum.

    Args:
        proportions: Each client's proportion of a class, float `[classes, clients]`.
        counts: Rows of each class, int64 `[classes]`.
        most: Maximum of each client, float `[clients]`; they sum to at least all rows.
    """
    dealt = np.zeros(proportions.shape, dtype=np.int64)
    for c in range(len(counts)):
        below = dealt.sum(0) < most
        share = np.where(below, proportions[c], 0.0)
        share = share if share.sum() > 0 else below.astype(float)
        dealt[c] = cut_proportions(share[None] / share.sum(), counts[c : c + 1])[0]
    return dealt


def assign_classes(
    draws: np.random.Generator, classes_per_client: np.ndarray, classes: int
) -> np.ndarray:
    """Return which classes each client holds, bool `[clients, classes]`.

    Each client gets the classes that fewest others hold, at random among equals.

    Args:
        draws: Random generator.
        classes_per_client: Number of classes of each client, int64 `[clients]`.
        classes: Number of classes.
    """
    holds = np.zeros((len(classes_per_client), classes), dtype=bool)
    held = np.zeros(classes)
    for client in draws.permutation(len(classes_per_client)):
        chosen = np.lexsort((draws.random(classes), held))[: classes_per_client[client]]
        holds[client, chosen] = True
        held[chosen] += 1
    return holds


# Partitions that users write: their results are checked.

OWN_WHERE = "data.partition.kind"
ARGUMENTS = "y, group, config, sizes, task, seed"


def user_partition(
    config: PartitionConfig,
    arguments: tuple[Any, ...],
    rows: int,
    clients: int,
    patient: Tensor | None,
) -> list[Tensor]:
    """Return the rows of each client as the user's function assigns them.

    Args:
        config: Its `kind` names the function.
        arguments: The arguments of the function; patients are not among them.
        rows: Number of rows.
        clients: Number of clients.
        patient: Patient of each row, `[N]`; a result that splits one is refused.

    Raises:
        UserError: If the function raises anything or returns no partition.
    """
    parts = _check_parts(
        call_reference(config.kind, OWN_WHERE, ARGUMENTS, arguments), config, rows, clients
    )
    if patient is not None and (pair := split_patient_rows(parts, patient)) is not None:
        raise UserError(
            f"{OWN_WHERE}: {config.kind}: deals rows {pair[0]} and {pair[1]}, which are of one "
            "patient (data.patient), to two clients"
        )
    return parts


def _check_parts(parts: object, config: PartitionConfig, rows: int, clients: int) -> list[Tensor]:
    """Return the rows of each client, sorted, after checking what a user's function returned."""
    where = f"{OWN_WHERE}: {config.kind}"
    if not isinstance(parts, list | tuple) or len(parts) != clients:
        raise UserError(f"{where}: has to return a list of the rows of {clients} clients")
    try:
        dealt = [
            torch.as_tensor(part, dtype=torch.int64).reshape(-1).sort().values for part in parts
        ]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: rows have to be whole numbers: {error}") from error
    every = torch.cat(dealt)
    if len(every) and (every.min() < 0 or every.max() >= rows):
        raise UserError(f"{where}: rows from {every.min()} to {every.max()}; there are {rows}")
    if len(every.unique()) < len(every):
        raise UserError(f"{where}: deals a row to two clients")
    if (short := min(map(len, dealt))) < config.min_size:
        raise UserError(
            f"{where}: deals {short} rows to a client; data.partition.min_size is {config.min_size}"
        )
    return dealt


# How training rows are dealt out to clients.
#
# `partition_rows` is the one entry; each kind of partition is a function in the registry. A deal depends on
# the rows, the sizes in their order, the configuration and the seed, and on nothing else.

TRIES = 1000
WHERE = "data.partition"


@dataclass(frozen=True)
class PartitionContext:
    """What a partition depends on.

    Where patients stay whole, a patient with its most common stratum stands for a row.

    Attributes:
        strata: Label of each row, int64 `[N]` (see `row_strata`).
        group: Group of each row, int64 `[N]`.
        config: Settings of the partition.
        share: Each client's share of the rows by its size, float64 `[K]`; they sum to one.
        seed: The run's seed.
        fewest: Smallest number of rows of a client.
    """

    strata: Tensor
    group: Tensor | None
    config: PartitionConfig
    share: np.ndarray
    seed: int
    fewest: int

    @property
    def alpha(self) -> float:
        """The concentration."""
        assert self.config.alpha is not None  # the schema has filled it in
        return self.config.alpha

    def rows(self) -> int:
        """Number of rows to deal."""
        return len(self.strata)

    def rng(self, *use: str | int) -> np.random.Generator:
        """Return a keyed generator of what torch has no public sampler for (Dirichlet)."""
        return keyed_numpy_generator("data", self.seed, "partition", *use)

    def shuffled(self, rows: Tensor, *use: str | int) -> Tensor:
        """Return the rows in a keyed order."""
        generator = keyed_generator("data", self.seed, "partition", *use)
        return rows[torch.randperm(len(rows), generator=generator)]


PartitionFunction = Callable[[PartitionContext], list[Tensor]]
_partitions: dict[str, PartitionFunction] = {}


def register_partition(name: str) -> Callable[[PartitionFunction], PartitionFunction]:
    """Register a function from a `PartitionContext` to the rows of each client as the partition of that name."""

    def register(function: PartitionFunction) -> PartitionFunction:
        _partitions[name] = function
        return function

    return register


def partition_rows(
    y: Tensor,
    group: Tensor | None,
    config: PartitionConfig,
    sizes: Sequence[float],
    task: Task,
    seed: int,
    patient: Tensor | None = None,
) -> list[Tensor]:
    """Partition rows among clients.

    The kind `classes` leaves rows out with `shots`, and where too few clients hold every class. A
    user's own partition (`python:` and a function of the same arguments) may leave rows out, too.

    Args:
        y: Targets, `[N]` or `[N, L]`.
        group: Group of each row, `[N]`; the natural partition needs it.
        config: Settings of the partition.
        sizes: How much each client gets, relative to the others.
        task: What is learned.
        seed: The run's seed.
        patient: Patient of each row, `[N]`; a patient's rows all go to one client.

    Returns:
        The rows of each client: int64, sorted, disjoint, at least `config.min_size` each.

    Raises:
        UserError: Too few rows or patients; no groups, or another number of them; a patient in two
            groups; a user's partition that is none, or splits a patient.
    """
    if config.min_size * len(sizes) > len(y):
        raise UserError(
            f"{WHERE}.min_size: found {config.min_size}, but {len(y)} training rows are left for {len(sizes)} clients; "
            f"at most {len(y) // len(sizes)}, unless they share rows ({WHERE}.kind: drawn)"
        )
    if config.kind.startswith(OWN):
        return user_partition(
            config, (y, group, config, sizes, task, seed), len(y), len(sizes), patient
        )
    if config.kind not in _partitions:
        raise UserError(
            f"{WHERE}.kind: found '{config.kind}'{suggest_or_list(config.kind, _partitions)}"
        )
    share = np.asarray(sizes, dtype=np.float64)
    context = PartitionContext(
        row_strata(y, task), group, config, share / share.sum(), seed, config.min_size
    )
    if patient is None:
        parts = _partitions[config.kind](context)
    else:
        parts = _partition_patients(context, patient)
    return [part.sort().values for part in parts]


@register_partition("iid")
def partition_iid(context: PartitionContext) -> list[Tensor]:
    """Assign rows at random, in numbers by the clients' sizes."""
    counts = apportion(context.rows(), context.share, context.fewest)
    return list(context.shuffled(torch.arange(context.rows()), "iid").split(counts.tolist()))


@register_partition("in_order")
def partition_in_order(context: PartitionContext) -> list[Tensor]:
    """Assign consecutive slices of the rows, in the order of the clients and by their sizes."""
    counts = apportion(context.rows(), context.share, context.fewest)
    return list(torch.arange(context.rows()).split(counts.tolist()))


@register_partition("quantity")
def partition_by_quantity(context: PartitionContext) -> list[Tensor]:
    """Assign rows at random, in skewed numbers: shares ~ Dirichlet(alpha · K · size share)."""
    share = context.rng("quantity").dirichlet(context.alpha * len(context.share) * context.share)
    counts = apportion(context.rows(), share, context.fewest)
    return list(context.shuffled(torch.arange(context.rows()), "quantity").split(counts.tolist()))


@register_partition("dirichlet")
def partition_dirichlet(context: PartitionContext) -> list[Tensor]:
    """Skew the labels: each class is divided in proportions ~ Dirichlet(alpha · K · size share).

    They are drawn again until no client is short; with equal sizes this is the rule of Hsu et al.,
    arXiv:1909.06335, and Li et al., ICDE 2022. After `TRIES` draws the short clients take rows at
    random from the largest. With `config.cap`, a client that has so many times its share of the
    rows gets none of the further classes; 1 is the rule of the code of Li et al.
    """
    classes, counts = np.unique(context.strata.numpy(), return_counts=True)
    for attempt in range(TRIES):
        proportions = context.rng("dirichlet", attempt).dirichlet(
            context.alpha * len(context.share) * context.share, size=len(classes)
        )
        if context.config.cap is None:
            dealt = cut_proportions(proportions, counts)  # [classes, clients]
        else:
            dealt = cut_below(
                proportions, counts, context.config.cap * context.share * context.rows()
            )
        if dealt.sum(0).min() >= context.fewest:
            break
    parts = _partition_classes(context, classes, dealt)
    return _fill_short_clients(context, parts)


@register_partition("classes")
def partition_by_classes(context: PartitionContext) -> list[Tensor]:
    """Give each client a few classes, drawn again until no client is short.

    A client has `config.classes` classes (McMahan et al., 2017), or as many more or fewer as
    `config.classes_spread` allows. The rows of a class are divided among its holders by size; or
    each holder gets `config.shots` of them and the rest stays out (Tan et al., 2022). Classes
    without a holder stay out where there are more of them than clients times classes.
    """
    classes, counts = np.unique(context.strata.numpy(), return_counts=True)
    clients = len(context.share)
    each = context.config.classes
    if each > len(classes):
        raise UserError(
            f"{WHERE}.classes: found {each}, but the training rows have {len(classes)} classes"
        )
    few = max(min(2, each), each - context.config.classes_spread)
    many = min(len(classes), each + context.config.classes_spread)
    shots = (
        None
        if context.config.shots is None
        else np.rint(context.config.shots * context.share * clients).astype(np.int64)
    )
    for attempt in range(TRIES):
        draws = context.rng("classes", attempt)
        numbers = np.full(clients, each) if few == many else draws.integers(few, many + 1, clients)
        holds = assign_classes(draws, numbers, len(classes))
        if shots is None:
            # [classes, clients]
            dealt = np.stack(
                [apportion_nonzero(n, context.share * holds[:, c]) for c, n in enumerate(counts)]
            )
        else:
            dealt = (holds * shots[:, None]).T
        if (dealt.sum(1) <= counts).all() and dealt.sum(0).min() >= context.fewest:
            return _partition_classes(context, classes, dealt)
    if shots is not None and (wanted := dealt.sum(1) - counts).max() > 0:
        c = wanted.argmax()
        raise UserError(
            f"{WHERE}.shots: found {context.config.shots}; class {classes[c]} has {counts[c]} rows, and {holds[:, c].sum()} clients "
            "are to hold it; lower it"
        )
    raise _too_few_classes(context)


@register_partition("natural")
def partition_natural(context: PartitionContext) -> list[Tensor]:
    """Assign each group of rows to a client, in the order of the groups' numbers."""
    if context.group is None:
        raise UserError(
            f"{WHERE}.kind: natural needs groups; name their column in data.group, or choose another kind"
        )
    present = context.group.unique()
    if len(present) != len(context.share):
        raise UserError(
            f"{WHERE}.kind: natural found {len(present)} groups for {len(context.share)} clients; make them equal"
        )
    parts = [torch.nonzero(context.group == g).squeeze(1) for g in present]
    if (short := min(map(len, parts))) < context.config.min_size:
        raise UserError(
            f"{WHERE}.min_size: found {context.config.min_size}, but the smallest group has {short} rows"
        )
    return parts


def _too_few_classes(context: PartitionContext) -> UserError:
    few = f"found {context.config.min_size}; with {context.config.classes} classes a client some get fewer; lower it"
    return UserError(f"{WHERE}.min_size: {few}")


def _partition_patients(context: PartitionContext, patient: Tensor) -> list[Tensor]:
    """Partition patients as if they were rows, then move patients to clients that are short."""
    function = _partitions[context.config.kind]
    clients = len(context.share)
    if context.config.kind == "natural":
        parts = function(context)
        if split_patient_rows(parts, patient) is not None:
            raise UserError(
                f"{WHERE}.kind: natural finds a patient in two groups; give it one group, or other names"
            )
        return parts
    unit, size = patient.unique(return_inverse=True, return_counts=True)[1:]
    if len(size) < clients:
        raise UserError(
            f"data.patient: {len(size)} patients are left for {clients} clients; each needs at least one"
        )
    # As many patients as have min_size rows on average: draws are repeated as often as for rows.
    fewest = max(
        1, min(-(-context.config.min_size * len(size) // len(patient)), len(size) // clients)
    )
    dealt = function(
        replace(
            context, strata=most_common_stratum(context.strata, unit), group=None, fewest=fewest
        )
    )
    owner = torch.full((len(size),), -1)
    for client, mine in enumerate(dealt):
        owner[mine] = client
    if context.config.kind == "classes":  # filling up would hand a client further classes
        if (
            int(torch.bincount(owner[unit] + 1, minlength=clients + 1)[1:].min())
            < context.config.min_size
        ):
            raise _too_few_classes(context)
    else:
        order = context.shuffled(torch.arange(len(size)), "patients")
        owner = move_patients_to_short_clients(owner, size, clients, context.config.min_size, order)
    return [torch.nonzero(owner[unit] == client).squeeze(1) for client in range(clients)]


def _partition_classes(
    context: PartitionContext, classes: np.ndarray, counts: np.ndarray
) -> list[Tensor]:
    """Draw the rows of each client: `counts` `[classes, clients]` of each class."""
    per_class = [
        context.shuffled(torch.nonzero(context.strata == c).squeeze(1), "rows", int(c))[
            : n.sum()
        ].split(n.tolist())
        for c, n in zip(classes, counts, strict=True)
    ]
    return [torch.cat(parts) for parts in zip(*per_class, strict=True)]


def _fill_short_clients(context: PartitionContext, parts: list[Tensor]) -> list[Tensor]:
    """Move rows drawn at random from the largest client to short ones; all rows suffice."""
    turn = 0
    while min(map(len, parts)) < context.fewest:
        low = min(range(len(parts)), key=lambda k: len(parts[k]))
        high = max(range(len(parts)), key=lambda k: len(parts[k]))
        moved = min(context.fewest - len(parts[low]), len(parts[high]) - context.fewest)
        rows = context.shuffled(parts[high].sort().values, "top_up", turn)
        parts[low], parts[high] = torch.cat([parts[low], rows[:moved]]), rows[moved:]
        turn += 1
    return parts


# Dealing a set's rows out to clients; where rows say whose group they are of, groups go by name.


def assign_rows(
    dataset: Dataset,
    rows: Tensor,
    names: list[str],
    config: DataConfig,
    clients: Mapping[str, ClientSettings],
    seed: int,
    notes: list[str],
) -> dict[str, RowSelection]:
    """Assign training rows to clients; groups go to the clients of their names.

    A single client gets all rows, unless groups go by name and other clients have some.

    Args:
        dataset: The data set.
        rows: The training rows to assign, int64 `[M]`.
        names: The clients, in order.
        config: The data's configuration.
        clients: Settings by client.
        seed: The run's seed.
        notes: Gets a line where groups go to clients of other names.
    """
    train = dataset.train
    patient = None if train.patient is None else train.patient[rows]
    group = None if train.group is None else train.group[rows]
    if group is not None and train.group_names:
        found = [train.group_names[g] for g in group.unique().tolist()]
        if config.partition.kind == "natural":
            everywhere = all_groups(dataset)
            notes += match_groups(everywhere, names, dataset.name)
            if len(names) > 1 and (empty := natural_order(set(everywhere) - set(found))):
                raise UserError(
                    f"data.partition.kind: natural: no training row of group {format_list(empty, quote=True)} of {dataset.name} is left: all "
                    "are for validation, test or the proxy set, or beyond data.train_limit"
                )
            check_patients_in_one_group(dataset)
        if set(found) == set(names):  # groups that bear the clients' names go to them by name
            group = torch.tensor([names.index(n) if n in names else -1 for n in train.group_names])[
                group
            ]
    if len(names) < 2:
        return {name: RowSelection(train, rows) for name in names}
    sizes = [clients[name].size for name in names]
    parts = partition_rows(
        train.labels[rows], group, config.partition, sizes, dataset.task, seed, patient
    )
    return {name: RowSelection(train, rows[part]) for name, part in zip(names, parts, strict=True)}


def match_groups(groups: list[str], clients: list[str], name: str) -> list[str]:
    """Check that the groups of a natural partition and the clients have the same names.

    Args:
        groups: The names of the groups.
        clients: The clients.
        name: The name of the data set.

    Returns:
        Lines on which client gets which group, where no name is the same and groups are assigned in
        natural order.

    Raises:
        UserError: If only some names are in both, or there are more of one than of the other.
    """
    strangers = [c for c in clients if c not in groups]
    orphans = [g for g in natural_order(groups) if g not in clients]
    common = len(strangers) < len(clients)
    if not strangers and (not orphans or not clients):
        return []
    if not common and len(clients) == 1:
        return [
            f"{name}: client '{clients[0]}' gets the rows of all groups: {format_list(orphans, quote=True)}"
        ]
    if not common and len(groups) == len(clients):
        pairs = zip(clients, natural_order(groups), strict=True)
        return [
            f"{name}: no client is called as a group is; "
            + ", ".join(f"'{c}' gets '{g}'" for c, g in pairs)
        ]
    found = []
    if strangers:
        hint = suggest_or_list(strangers[0], orphans) if common else ""
        found.append(f"no group for client {format_list(strangers, quote=True)}{hint}")
    if orphans:
        hint = suggest_or_list(orphans[0], strangers) if common and not strangers else ""
        found.append(f"no client for group {format_list(orphans, quote=True)}{hint}")
    raise UserError(
        f"data.partition.kind: natural found {len(groups)} groups for {len(clients)} clients in {name}: "
        f"{' and '.join(part.removesuffix('?') for part in found)}"
    )


def all_groups(dataset: Dataset) -> list[str]:
    """Return the names of all groups in natural order, those of the common sets included."""
    parts = dataset.splits().values()
    held = [
        (part.group, part.group_names)
        for part in parts
        if part.group is not None and part.group_names
    ]
    return natural_order({names[g] for group, names in held for g in group.unique().tolist()})


def check_patients_in_one_group(dataset: Dataset) -> None:
    """Refuse a patient with rows in two groups: a natural partition would split it."""
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


def most_common_stratum(strata: Tensor, unit: Tensor) -> Tensor:
    """Return the most common stratum of each patient's rows, int64 `[P]`; of equals the lowest.

    Args:
        strata: Stratum of each row, int64 `[N]`, from 0.
        unit: Patient of each row, int64 `[N]`: numbers 0 to P - 1, each of which occurs.
    """
    kinds = int(strata.max()) + 1
    pairs, rows = (unit * kinds + strata).unique(return_counts=True)
    patient = pairs // kinds
    order = np.lexsort((pairs % kinds, -rows, patient))
    first = np.unique(patient[order], return_index=True)[1]
    return pairs[order[first]] % kinds


def move_patients_to_short_clients(
    owner: Tensor, size: Tensor, clients: int, fewest: int, order: Tensor
) -> Tensor:
    """Move whole patients from the largest clients to short ones.

    Args:
        owner: The client of each patient, int64 `[P]`, -1 for none.
        size: Rows of each patient, int64 `[P]`.
        clients: Number of clients.
        fewest: Smallest number of rows of a client.
        order: All patients in the order in which they move, int64 `[P]`.

    Returns:
        The new client of each patient, int64 `[P]`.

    Raises:
        UserError: If no client can give a patient away without being short itself.
    """
    owner = owner.clone()
    dealt = owner >= 0
    held = torch.zeros(clients, dtype=torch.int64).index_add(0, owner[dealt], size[dealt])
    # The smallest client grows and none becomes short: this ends.
    while int(held.min()) < fewest:
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


def split_patient_rows(parts: Sequence[Tensor], patient: Tensor) -> tuple[int, int] | None:
    """Return two rows of one patient that are in different parts, or None."""
    rows = torch.cat(list(parts))
    place = torch.cat([torch.full((len(part),), k) for k, part in enumerate(parts)])
    order = patient[rows].argsort(stable=True)
    rows = rows[order]
    place = place[order]
    bad = (patient[rows[1:]] == patient[rows[:-1]]) & (place[1:] != place[:-1])
    first = torch.nonzero(bad)
    return (int(rows[first[0]]), int(rows[first[0] + 1])) if len(first) else None
