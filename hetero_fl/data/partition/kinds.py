"""The partition kinds of the package: random, by label, by quantity and by group."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hetero_fl.data.partition.apportion import (
    apportion,
    apportion_nonzero,
    assign_classes,
    cut_below,
    cut_proportions,
)
from hetero_fl.data.partition.context import PartitionContext
from hetero_fl.data.partition.groups import WHERE, too_few_rows_error
from hetero_fl.data.partition.registry import register_partition
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import pluralize

MAX_ATTEMPTS = 1000
"""Maximum number of random partitions that are tried until every client has enough rows."""
MAX_PROPORTIONS = 10_000_000
"""Maximum number of proportions, classes times clients, that all attempts sample."""
MAX_CONCENTRATION = 1e300
"""Concentration above which the parameters of the Dirichlet distribution could overflow."""


@register_partition("iid")
def partition_iid(context: PartitionContext) -> list[Tensor]:
    """Assign rows at random, in proportion to the client sizes.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.arange(60) % 3
        >>> config = PartitionConfig(kind="iid", min_size=10)
        >>> parts = partition_rows(y, None, config, [1, 2], Task("multiclass", 3), seed=0)
        >>> [len(part) for part in parts]
        [20, 40]
    """
    counts = apportion(context.num_rows, context.share, context.min_rows)
    return list(context.shuffled(torch.arange(context.num_rows), "iid").split(counts.tolist()))


@register_partition("in_order")
def partition_in_order(context: PartitionContext) -> list[Tensor]:
    """Assign consecutive slices of the rows, in proportion to the client sizes.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.zeros(5, dtype=torch.int64)
        >>> config = PartitionConfig(kind="in_order", min_size=1)
        >>> partition_rows(y, None, config, [2, 3], Task("multiclass", 2), seed=0)
        [tensor([0, 1]), tensor([2, 3, 4])]
    """
    counts = apportion(context.num_rows, context.share, context.min_rows)
    return list(torch.arange(context.num_rows).split(counts.tolist()))


@register_partition("quantity")
def partition_by_quantity(context: PartitionContext) -> list[Tensor]:
    """Assign rows at random, with client shares sampled from a Dirichlet distribution.

    The concentration parameter of a client is `alpha * K * share`, where K is the number of clients
    and `share` is the client's share of the total size. If all sizes are equal, the parameter is
    `alpha`, and this is the quantity skew of Li et al. (ICDE 2022).

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.arange(300) % 3
        >>> config = PartitionConfig(kind="quantity", alpha=0.2, min_size=10)
        >>> parts = partition_rows(y, None, config, [1] * 4, Task("multiclass", 3), seed=0)
        >>> sizes = sorted(len(part) for part in parts)
        >>> sum(sizes), sizes[0] < 75 < sizes[-1]
        (300, True)
    """
    share = context.rng("quantity").dirichlet(_concentration(context))
    counts = apportion(context.num_rows, share, context.min_rows)
    return list(context.shuffled(torch.arange(context.num_rows), "quantity").split(counts.tolist()))


@register_partition("dirichlet")
def partition_dirichlet(context: PartitionContext) -> list[Tensor]:
    """Divide each class among clients in proportions sampled from a Dirichlet distribution.

    The concentration parameter of a client is `alpha * K * share`, where K is the number of clients
    and `share` is the client's share of the total size. If the sizes are equal, this is the
    partition of Yurochkin et al. (ICML 2019, section 4), which Li et al. (ICDE 2022) call
    distribution-based label imbalance.

    Proportions are sampled again until every client has enough rows, at most `MAX_ATTEMPTS` times
    and fewer times for large numbers of classes and clients (`MAX_PROPORTIONS`). After that, random
    rows of the largest clients move to clients with too few rows, and `context.notes` states how
    many.

    If `config.cap` is set, a client that has `cap` times its share of the rows gets no further
    classes. With `cap=1`, the partition matches the code of Li et al.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.arange(400) % 2
        >>> config = PartitionConfig(kind="dirichlet", alpha=0.1, min_size=10)
        >>> parts = partition_rows(y, None, config, [1] * 4, Task("multiclass", 2), seed=0)
        >>> shares = [y[part].double().mean().item() for part in parts]
        >>> min(shares) < 0.1 and max(shares) > 0.9
        True
    """
    classes, counts = np.unique(context.strata.numpy(), return_counts=True)
    concentration = _concentration(context)
    for attempt in range(_max_attempts(len(classes) * len(context.share))):
        proportions = context.rng("dirichlet", attempt).dirichlet(concentration, len(classes))
        if context.config.cap is None:
            class_counts = cut_proportions(proportions, counts)
        else:
            largest_share = np.minimum(context.config.cap * context.share, 1.0)
            class_counts = cut_below(proportions, counts, largest_share * context.num_rows)
        if class_counts.sum(0).min() >= context.min_rows:
            break
    parts = _partition_classes(context, classes, class_counts)
    return _fill_short_clients(context, parts)


@register_partition("classes")
def partition_by_classes(context: PartitionContext) -> list[Tensor]:
    """Assign a few classes to each client.

    Each client gets `config.classes` classes, plus or minus up to `config.classes_spread`. The rows
    of a class are divided among the clients with this class in proportion to the client sizes. This
    is the quantity-based label imbalance of Li et al. (ICDE 2022), except that all classes have
    similar numbers of clients. McMahan et al. (2017, section 3) instead assign equal shards of rows
    sorted by class, so clients have at most a few classes.

    If `config.shots` is set, a client with a class instead gets `config.shots` rows of the class,
    multiplied by the relative client size, and the remaining rows are left out (Tan et al., AAAI
    2022). Classes without a client are left out. The assignment is sampled again until
    every client has enough rows.

    Raises:
        UserError: If there are fewer than `config.classes` classes, or no valid assignment is found
            in `MAX_ATTEMPTS` samples.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.arange(400) % 10
        >>> config = PartitionConfig(kind="classes", classes=2)
        >>> parts = partition_rows(y, None, config, [1] * 5, Task("multiclass", 10), seed=0)
        >>> [len(y[part].unique()) for part in parts]
        [2, 2, 2, 2, 2]
    """
    classes, counts = np.unique(context.strata.numpy(), return_counts=True)
    clients = len(context.share)
    each = context.config.classes
    if each > len(classes):
        raise UserError(
            f"{WHERE}.classes: must be <= {len(classes)}, the number of classes of the training "
            f"rows, got {each}"
        )
    min_classes = max(min(2, each), each - context.config.classes_spread)
    max_classes = min(len(classes), each + context.config.classes_spread)
    shots = (
        None
        if context.config.shots is None
        else np.rint(context.config.shots * context.share * clients).astype(np.int64)
    )
    for attempt in range(MAX_ATTEMPTS):
        rng = context.rng("classes", attempt)
        if min_classes == max_classes:
            classes_per_client = np.full(clients, each)
        else:
            classes_per_client = rng.integers(min_classes, max_classes + 1, clients)
        has_class = assign_classes(rng, classes_per_client, len(classes))
        if shots is None:
            class_counts = np.stack(
                [
                    apportion_nonzero(n, context.share * has_class[:, c])
                    for c, n in enumerate(counts)
                ]
            )
        else:
            class_counts = (has_class * shots[:, None]).T
        enough = class_counts.sum(0).min() >= context.min_rows
        if (class_counts.sum(1) <= counts).all() and enough:
            return _partition_classes(context, classes, class_counts)
    if shots is not None and (excess := class_counts.sum(1) - counts).max() > 0:
        c = excess.argmax()
        raise UserError(
            f"{WHERE}.shots: class {classes[c]} has only {counts[c]} rows for "
            f"{has_class[:, c].sum()} clients, got {context.config.shots}; choose a smaller number"
        )
    raise too_few_rows_error(context)


@register_partition("natural")
def partition_natural(context: PartitionContext) -> list[Tensor]:
    """Assign each group of rows to one client, in the order of the group numbers.

    Raises:
        UserError: If there are no groups, the numbers of groups and clients differ, or a group is
            too small.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import PartitionConfig
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import partition_rows
        >>> y = torch.tensor([0, 1, 0, 1])
        >>> group = torch.tensor([1, 0, 0, 1])
        >>> config = PartitionConfig(kind="natural", min_size=1)
        >>> partition_rows(y, group, config, [1, 1], Task("multiclass", 2), seed=0)
        [tensor([1, 2]), tensor([0, 3])]
    """
    if context.group is None:
        raise UserError(
            f"{WHERE}.kind=natural needs groups; name their column in data.group, or choose "
            "another kind"
        )
    present = context.group.unique()
    if len(present) != len(context.share):
        raise UserError(
            f"{WHERE}.kind=natural: expected one group per client, got {len(present)} groups for "
            f"{len(context.share)} clients"
        )
    parts = [torch.nonzero(context.group == g).squeeze(1) for g in present]
    if (smallest := min(map(len, parts))) < context.config.min_size:
        raise UserError(
            f"{WHERE}.min_size: must be <= {smallest}, the number of rows of the smallest "
            f"group or client, got {context.config.min_size}"
        )
    return parts


def _partition_classes(
    context: PartitionContext, classes: np.ndarray, counts: np.ndarray
) -> list[Tensor]:
    """Sample the rows of each client. `counts` has shape `[classes, clients]`."""
    per_class = [
        context.shuffled(torch.nonzero(context.strata == c).squeeze(1), "rows", int(c))[
            : n.sum()
        ].split(n.tolist())
        for c, n in zip(classes, counts, strict=True)
    ]
    return [torch.cat(parts) for parts in zip(*per_class, strict=True)]


def _concentration(context: PartitionContext) -> np.ndarray:
    """Return the parameters of the Dirichlet distribution over clients, float64 `[K]`."""
    return np.minimum(context.alpha * len(context.share) * context.share, MAX_CONCENTRATION)


def _max_attempts(num_proportions: int) -> int:
    """Return the maximum number of samples of `num_proportions` proportions each."""
    return max(1, min(MAX_ATTEMPTS, MAX_PROPORTIONS // num_proportions))


def _fill_short_clients(context: PartitionContext, parts: list[Tensor]) -> list[Tensor]:
    """Move random rows from the largest client to clients that have too few rows."""
    sizes = np.array([len(part) for part in parts])
    short = int((sizes < context.min_rows).sum())
    if not short:
        return parts
    turn = 0
    total = 0
    # Terminates because every step fills up a client, or leaves the largest one at the minimum.
    while sizes.min() < context.min_rows:
        low = int(sizes.argmin())
        high = int(sizes.argmax())
        moved = int(min(context.min_rows - sizes[low], sizes[high] - context.min_rows))
        rows = context.shuffled(parts[high].sort().values, "top_up", turn)
        parts[low] = torch.cat([parts[low], rows[:moved]])
        parts[high] = rows[moved:]
        sizes[low] += moved
        sizes[high] -= moved
        total += moved
        turn += 1
    context.notes.append(
        f"{WHERE}.min_size: moved {pluralize(total, context.unit)} to {pluralize(short, 'client')} "
        f"that had fewer than {context.min_rows}"
    )
    return parts
