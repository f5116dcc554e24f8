"""What partitions count with: the stratum of a row, whole numbers by shares, classes by holders."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hetero_fl.task import Task


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


def among(rows: int, share: np.ndarray) -> np.ndarray:
    """`apportion` among those with a share, the others getting none."""
    counts = np.zeros(len(share), dtype=np.int64)
    if (share > 0).any():
        counts[share > 0] = apportion(rows, share[share > 0])
    return counts


def cut(proportions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whole numbers `[classes, clients]`, of `counts` `[classes]` rows each client's proportion, float `[classes, clients]`."""
    cuts = np.rint(proportions.cumsum(1) * counts[:, None]).astype(np.int64)
    cuts[:, -1] = counts
    return np.diff(cuts, axis=1, prepend=0)


def cut_below(proportions: np.ndarray, counts: np.ndarray, most: np.ndarray) -> np.ndarray:
    """As `cut`, class by class: who has `most` `[clients]` rows or more gets none of the next class, which the others share by
    their proportions. (The last class that somebody gets may carry it above.) `most` sums to all rows at least."""
    dealt = np.zeros(proportions.shape, dtype=np.int64)
    for c in range(len(counts)):
        below = dealt.sum(0) < most
        share = np.where(below, proportions[c], 0.0)
        share = share if share.sum() > 0 else below.astype(float)
        dealt[c] = cut(share[None] / share.sum(), counts[c : c + 1])[0]
    return dealt


def holders(draws: np.random.Generator, each: np.ndarray, classes: int) -> np.ndarray:
    """bool `[clients, classes]`, `each` (int `[clients]`) classes a client and as even over the classes as can be: always those
    that fewest hold, at random among equals."""
    holds = np.zeros((len(each), classes), dtype=bool)
    held = np.zeros(classes)
    for client in draws.permutation(len(each)):
        chosen = np.lexsort((draws.random(classes), held))[: each[client]]
        holds[client, chosen] = True
        held[chosen] += 1
    return holds
