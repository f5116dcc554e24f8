"""How training rows are dealt out to clients.

`deal` is the one entry; each kind of partition is a function in the registry. A deal depends on the rows, the sizes in
their order, the configuration and the seed, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.source import PartitionConfig
from hetero_fl.data.own_partition import own_partition
from hetero_fl.data.patients import commonest, fill_up, torn
from hetero_fl.data.shares import among, apportion, cut, cut_below, holders, strata
from hetero_fl.errors import UserError, nearest
from hetero_fl.own_code import OWN
from hetero_fl.seeding import generator, key
from hetero_fl.task import Task

TRIES = 1000
WHERE = "data.partition"


@dataclass(frozen=True)
class Deal:
    """What a partition has to go by: `strata` int64 `[N]` (see `strata`), `group` int64 `[N]`, `share` float64 `[K]`,
    each client's part of all rows by its size, which sums to one; nobody gets less than `fewest`. Where patients stay whole,
    a patient stands for a row here: with its commonest stratum."""

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

    def draws(self, *use: str | int) -> np.random.Generator:
        """Keyed draws of what torch has no public sampler for (Dirichlet)."""
        return np.random.default_rng(key("data", self.seed, "partition", *use))

    def shuffled(self, rows: Tensor, *use: str | int) -> Tensor:
        """The rows in a keyed order."""
        return rows[torch.randperm(len(rows), generator=generator("data", self.seed, "partition", *use))]


PartitionFunction = Callable[[Deal], list[Tensor]]
_partitions: dict[str, PartitionFunction] = {}


def partition(name: str) -> Callable[[PartitionFunction], PartitionFunction]:
    """Register a function from a `Deal` to the rows of each client as the partition of that name."""

    def register(function: PartitionFunction) -> PartitionFunction:
        _partitions[name] = function
        return function

    return register


def deal(
    y: Tensor,
    group: Tensor | None,
    config: PartitionConfig,
    sizes: Sequence[float],
    task: Task,
    seed: int,
    patient: Tensor | None = None,
) -> list[Tensor]:
    """Rows of each client: int64, sorted, disjoint, at least `config.min_size` each, and all rows together.
    (Exceptions: `classes` leaves rows out where too few clients hold every class, or with `shots`, and a user's own partition,
    `python:` and a function of the same arguments, may.)

    Args:
        y: targets `[N]` or `[N, L]`.
        group: whose row it is, `[N]`; the natural partition needs it.
        sizes: how much each client gets, relative to the others.
        patient: of whom each row is, `[N]`; a patient's rows all go to one client.

    Raises:
        UserError: too few rows or patients; no groups, or another number of them; a patient in two groups; a user's
            partition that is none, or deals a patient to two clients.
    """
    if config.min_size * len(sizes) > len(y):
        raise UserError(
            f"{WHERE}.min_size: found {config.min_size}, but {len(y)} training rows are left for {len(sizes)} clients; "
            f"at most {len(y) // len(sizes)}, unless they share rows ({WHERE}.kind: drawn)"
        )
    if config.kind.startswith(OWN):
        return own_partition(config, (y, group, config, sizes, task, seed), len(y), len(sizes), patient)
    if config.kind not in _partitions:
        raise UserError(f"{WHERE}.kind: found '{config.kind}'{nearest(config.kind, _partitions)}")
    share = np.asarray(sizes, dtype=np.float64)
    d = Deal(strata(y, task), group, config, share / share.sum(), seed, config.min_size)
    parts = _partitions[config.kind](d) if patient is None else _deal_patients(d, patient)
    return [part.sort().values for part in parts]


@partition("iid")
def iid(d: Deal) -> list[Tensor]:
    """Rows at random, as many as the sizes say."""
    counts = apportion(d.rows(), d.share, d.fewest)
    return list(d.shuffled(torch.arange(d.rows()), "iid").split(counts.tolist()))


@partition("in_order")
def in_order(d: Deal) -> list[Tensor]:
    """Consecutive slices of the rows as they lie in the set, as long as the sizes say: the first client has the first."""
    return list(torch.arange(d.rows()).split(apportion(d.rows(), d.share, d.fewest).tolist()))


@partition("quantity")
def quantity(d: Deal) -> list[Tensor]:
    """Rows at random, numbers of rows skewed: shares ~ Dirichlet(alpha · K · size share)."""
    share = d.draws("quantity").dirichlet(d.alpha * len(d.share) * d.share)
    counts = apportion(d.rows(), share, d.fewest)
    return list(d.shuffled(torch.arange(d.rows()), "quantity").split(counts.tolist()))


@partition("dirichlet")
def dirichlet(d: Deal) -> list[Tensor]:
    """Labels skewed: each class is dealt in proportions ~ Dirichlet(alpha · K · size share), drawn anew until nobody is
    short; with equal sizes the rule of Hsu et al., arXiv:1909.06335, and Li et al., ICDE 2022. After `TRIES` draws the
    short clients take rows at random from the largest. `config.cap`: who has reached so many times its part of the rows gets
    none of the further classes, which the others share by their proportions; 1 is the rule of the latter's code."""
    classes, counts = np.unique(d.strata.numpy(), return_counts=True)
    for attempt in range(TRIES):
        proportions = d.draws("dirichlet", attempt).dirichlet(d.alpha * len(d.share) * d.share, size=len(classes))
        if d.config.cap is None:
            dealt = cut(proportions, counts)  # [classes, clients]
        else:
            dealt = cut_below(proportions, counts, d.config.cap * d.share * d.rows())
        if dealt.sum(0).min() >= d.fewest:
            break
    parts = _deal_classes(d, classes, dealt)
    return _top_up(d, parts)


@partition("classes")
def by_classes(d: Deal) -> list[Tensor]:
    """`config.classes` classes a client, as in McMahan et al., 2017, or as many as `config.classes_spread` allows. The rows of a
    class are dealt among its holders by size; or, as in Tan et al., 2022, each holder gets `config.shots` of them and the rest
    stays out. Every class has a holder if clients times classes suffice for that; else the rows of the others stay out.
    Drawn anew until nobody is short."""
    classes, counts = np.unique(d.strata.numpy(), return_counts=True)
    clients, each = len(d.share), d.config.classes
    if each > len(classes):
        raise UserError(f"{WHERE}.classes: found {each}, but the training rows have {len(classes)} classes")
    few = max(min(2, each), each - d.config.classes_spread)
    many = min(len(classes), each + d.config.classes_spread)
    shots = None if d.config.shots is None else np.rint(d.config.shots * d.share * clients).astype(np.int64)
    for attempt in range(TRIES):
        draws = d.draws("classes", attempt)
        numbers = np.full(clients, each) if few == many else draws.integers(few, many + 1, clients)
        holds = holders(draws, numbers, len(classes))
        if shots is None:
            dealt = np.stack([among(n, d.share * holds[:, c]) for c, n in enumerate(counts)])  # [classes, clients]
        else:
            dealt = (holds * shots[:, None]).T
        if (dealt.sum(1) <= counts).all() and dealt.sum(0).min() >= d.fewest:
            return _deal_classes(d, classes, dealt)
    if shots is not None and (wanted := dealt.sum(1) - counts).max() > 0:
        c = wanted.argmax()
        raise UserError(
            f"{WHERE}.shots: found {d.config.shots}; class {classes[c]} has {counts[c]} rows, and {holds[:, c].sum()} clients "
            "are to hold it; lower it"
        )
    raise _short_of_classes(d)


@partition("natural")
def natural(d: Deal) -> list[Tensor]:
    """Each group of rows is a client's, in the order of the groups' numbers."""
    if d.group is None:
        raise UserError(f"{WHERE}.kind: natural needs groups; name their column in data.group, or choose another kind")
    present = d.group.unique()
    if len(present) != len(d.share):
        raise UserError(
            f"{WHERE}.kind: natural found {len(present)} groups for {len(d.share)} clients; make them equal"
        )
    parts = [torch.nonzero(d.group == g).squeeze(1) for g in present]
    if (short := min(map(len, parts))) < d.config.min_size:
        raise UserError(f"{WHERE}.min_size: found {d.config.min_size}, but the smallest group has {short} rows")
    return parts


def _short_of_classes(d: Deal) -> UserError:
    few = f"found {d.config.min_size}; with {d.config.classes} classes a client some get fewer; lower it"
    return UserError(f"{WHERE}.min_size: {few}")


def _deal_patients(d: Deal, patient: Tensor) -> list[Tensor]:
    """Rows of each client, each patient's together: patients are dealt as rows are, and short clients then filled."""
    function, clients = _partitions[d.config.kind], len(d.share)
    if d.config.kind == "natural":
        parts = function(d)
        if torn(parts, patient) is not None:
            raise UserError(f"{WHERE}.kind: natural finds a patient in two groups; give it one group, or other names")
        return parts
    unit, size = patient.unique(return_inverse=True, return_counts=True)[1:]
    if len(size) < clients:
        raise UserError(f"data.patient: {len(size)} patients are left for {clients} clients; each needs at least one")
    # as many patients as make up min_size rows on average, so that draws are repeated about as often as for rows
    fewest = max(1, min(-(-d.config.min_size * len(size) // len(patient)), len(size) // clients))
    dealt = function(replace(d, strata=commonest(d.strata, unit), group=None, fewest=fewest))
    owner = torch.full((len(size),), -1)
    for client, mine in enumerate(dealt):
        owner[mine] = client
    if d.config.kind == "classes":  # filling up would hand a client further classes
        if int(torch.bincount(owner[unit] + 1, minlength=clients + 1)[1:].min()) < d.config.min_size:
            raise _short_of_classes(d)
    else:
        order = d.shuffled(torch.arange(len(size)), "patients")
        owner = fill_up(owner, size, clients, d.config.min_size, order)
    return [torch.nonzero(owner[unit] == client).squeeze(1) for client in range(clients)]


def _deal_classes(d: Deal, classes: np.ndarray, dealt: np.ndarray) -> list[Tensor]:
    """Rows of each client, `dealt` int `[classes, clients]` saying how many of each class."""
    per_class = [
        d.shuffled(torch.nonzero(d.strata == c).squeeze(1), "rows", int(c))[: n.sum()].split(n.tolist())
        for c, n in zip(classes, dealt, strict=True)
    ]
    return [torch.cat(parts) for parts in zip(*per_class, strict=True)]


def _top_up(d: Deal, parts: list[Tensor]) -> list[Tensor]:
    """Fill short clients from the largest, with rows drawn at random. Ends, as `deal` checked that all rows suffice."""
    turn = 0
    while min(map(len, parts)) < d.fewest:
        low = min(range(len(parts)), key=lambda k: len(parts[k]))
        high = max(range(len(parts)), key=lambda k: len(parts[k]))
        moved = min(d.fewest - len(parts[low]), len(parts[high]) - d.fewest)
        rows = d.shuffled(parts[high].sort().values, "top_up", turn)
        parts[low], parts[high] = torch.cat([parts[low], rows[:moved]]), rows[moved:]
        turn += 1
    return parts
