"""How training rows are dealt out to clients.

`deal` is the one entry; each kind of partition is a function in the registry. A deal depends on the rows, the sizes in
their order, the configuration and the seed, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.source import PartitionConfig
from hetero_fl.errors import UserError, nearest
from hetero_fl.registry import imported
from hetero_fl.seeding import generator, key
from hetero_fl.task import Task

TRIES = 1000
WHERE = "data.partition"


@dataclass(frozen=True)
class Deal:
    """What a partition has to go by: `strata` int64 `[N]` (see `strata`), `group` int64 `[N]`, `share` float64 `[K]`,
    each client's part of all rows by its size, which sums to one."""

    strata: Tensor
    group: Tensor | None
    config: PartitionConfig
    share: np.ndarray
    seed: int

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
    y: Tensor, group: Tensor | None, config: PartitionConfig, sizes: Sequence[float], task: Task, seed: int
) -> list[Tensor]:
    """Rows of each client: int64, sorted, disjoint, at least `config.min_size` each, and all rows together.
    (Exceptions: `classes` with too few clients to hold every class leaves rows out, and a user's own partition,
    `python:` and a function of the same arguments, may.)

    Args:
        y: targets `[N]` or `[N, L]`.
        group: whose row it is, `[N]`; the natural partition needs it.
        sizes: how much each client gets, relative to the others.

    Raises:
        UserError: too few rows; no groups, or another number of them; a user's partition that is none.
    """
    if config.min_size * len(sizes) > len(y):
        raise UserError(
            f"{WHERE}.min_size: found {config.min_size}, but {len(y)} training rows are left for {len(sizes)} clients; "
            f"at most {len(y) // len(sizes)}"
        )
    if config.kind.startswith("python:"):
        return _checked(_own(y, group, config, sizes, task, seed), config, len(y), len(sizes))
    if config.kind not in _partitions:
        raise UserError(f"{WHERE}.kind: found '{config.kind}'{nearest(config.kind, _partitions)}")
    share = np.asarray(sizes, dtype=np.float64)
    parts = _partitions[config.kind](Deal(strata(y, task), group, config, share / share.sum(), seed))
    return [part.sort().values for part in parts]


def strata(y: Tensor, task: Task) -> Tensor:
    """What counts as a row's label in a partition, int64 `[N]`: its class; the rarest of its labels plus one, 0 if it
    has none (multilabel); the tenth of all rows, by the first target, that it falls into (regression)."""
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
    """Whole numbers that sum to `total`, as near to the shares as can be (largest remainder), none below `at_least`."""
    exact = share / share.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    while (counts < at_least).any():  # ends: each turn fills the shortest from the longest, and the total suffices
        low, high = counts.argmin(), counts.argmax()
        moved = min(at_least - counts[low], counts[high] - at_least)
        counts[low] += moved
        counts[high] -= moved
    return counts


@partition("iid")
def iid(d: Deal) -> list[Tensor]:
    """Rows at random, as many as the sizes say."""
    counts = apportion(d.rows(), d.share, d.config.min_size)
    return list(d.shuffled(torch.arange(d.rows()), "iid").split(counts.tolist()))


@partition("quantity")
def quantity(d: Deal) -> list[Tensor]:
    """Rows at random, numbers of rows skewed: shares ~ Dirichlet(alpha · K · size share)."""
    share = d.draws("quantity").dirichlet(d.config.alpha * len(d.share) * d.share)
    counts = apportion(d.rows(), share, d.config.min_size)
    return list(d.shuffled(torch.arange(d.rows()), "quantity").split(counts.tolist()))


@partition("dirichlet")
def dirichlet(d: Deal) -> list[Tensor]:
    """Labels skewed: each class is dealt in proportions ~ Dirichlet(alpha · K · size share), drawn anew until nobody is
    short; with equal sizes the rule of Hsu et al., arXiv:1909.06335, and Li et al., ICDE 2022. After `TRIES` draws the
    short clients take rows at random from the largest."""
    classes, counts = np.unique(d.strata.numpy(), return_counts=True)
    for attempt in range(TRIES):
        proportions = d.draws("dirichlet", attempt).dirichlet(
            d.config.alpha * len(d.share) * d.share, size=len(classes)
        )
        cuts = np.rint(proportions.cumsum(1) * counts[:, None]).astype(np.int64)
        cuts[:, -1] = counts
        dealt = np.diff(cuts, axis=1, prepend=0)  # [classes, clients]
        if dealt.sum(0).min() >= d.config.min_size:
            break
    parts = _deal_classes(d, classes, dealt)
    return _top_up(d, parts)


@partition("classes")
def by_classes(d: Deal) -> list[Tensor]:
    """`config.classes` classes a client, as in McMahan et al., 2017; the rows of a class are dealt among its holders by
    size. Every class has a holder if clients times classes suffice for that; else the rows of the others stay out.
    Drawn anew until nobody is short."""
    classes, counts = np.unique(d.strata.numpy(), return_counts=True)
    clients, each = len(d.share), d.config.classes
    if each > len(classes):
        raise UserError(f"{WHERE}.classes: found {each}, but the training rows have {len(classes)} classes")
    for attempt in range(TRIES):
        holds = _holders(d.draws("classes", attempt), clients, len(classes), each)
        dealt = np.stack([_among(n, d.share * holds[:, c]) for c, n in enumerate(counts)])  # [classes, clients]
        if dealt.sum(0).min() >= d.config.min_size:
            return _deal_classes(d, classes, dealt)
    raise UserError(
        f"{WHERE}.min_size: found {d.config.min_size}; with {each} classes a client some get fewer; lower it"
    )


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


def _among(rows: int, share: np.ndarray) -> np.ndarray:
    """`apportion` among those with a share, the others getting none."""
    counts = np.zeros(len(share), dtype=np.int64)
    if (share > 0).any():
        counts[share > 0] = apportion(rows, share[share > 0])
    return counts


def _holders(draws: np.random.Generator, clients: int, classes: int, each: int) -> np.ndarray:
    """bool `[clients, classes]`, `each` classes a client and as even over the classes as can be: always those that
    fewest hold, at random among equals."""
    holds = np.zeros((clients, classes), dtype=bool)
    held = np.zeros(classes)
    for client in draws.permutation(clients):
        chosen = np.lexsort((draws.random(classes), held))[:each]
        holds[client, chosen] = True
        held[chosen] += 1
    return holds


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
    while min(map(len, parts)) < d.config.min_size:
        low = min(range(len(parts)), key=lambda k: len(parts[k]))
        high = max(range(len(parts)), key=lambda k: len(parts[k]))
        moved = min(d.config.min_size - len(parts[low]), len(parts[high]) - d.config.min_size)
        rows = d.shuffled(parts[high].sort().values, "top_up", turn)
        parts[low], parts[high] = torch.cat([parts[low], rows[:moved]]), rows[moved:]
        turn += 1
    return parts


def _own(
    y: Tensor, group: Tensor | None, config: PartitionConfig, sizes: Sequence[float], task: Task, seed: int
) -> object:
    """What a user's own partition returns."""
    where = f"{WHERE}.kind"
    function = imported(config.kind, where)
    if not callable(function):
        raise UserError(f"{where}: {config.kind} is not a function of (y, group, config, sizes, task, seed)")
    try:
        return function(y, group, config, sizes, task, seed)
    except UserError as error:
        raise UserError(f"{where}: {config.kind}: {error}") from error
    except Exception as error:  # a user's function may fail in any way; the reason goes into the one line
        raise UserError(f"{where}: {config.kind} raised {type(error).__name__}: {error}") from error


def _checked(parts: object, config: PartitionConfig, rows: int, clients: int) -> list[Tensor]:
    """The rows that a user's own partition dealt, if they can be that."""
    where = f"{WHERE}.kind: {config.kind}"
    if not isinstance(parts, list | tuple) or len(parts) != clients:
        raise UserError(f"{where}: has to return a list of the rows of {clients} clients")
    try:
        dealt = [torch.as_tensor(part, dtype=torch.int64).reshape(-1).sort().values for part in parts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: rows have to be whole numbers: {error}") from error
    every = torch.cat(dealt)
    if len(every) and (every.min() < 0 or every.max() >= rows):
        raise UserError(f"{where}: rows from {every.min()} to {every.max()}; there are {rows}")
    if len(every.unique()) < len(every):
        raise UserError(f"{where}: deals a row to two clients")
    if (short := min(map(len, dealt))) < config.min_size:
        raise UserError(f"{where}: deals {short} rows to a client; data.partition.min_size is {config.min_size}")
    return dealt
