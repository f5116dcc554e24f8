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


def holders(draws: np.random.Generator, clients: int, classes: int, each: int) -> np.ndarray:
    """bool `[clients, classes]`, `each` classes a client and as even over the classes as can be: always those that
    fewest hold, at random among equals."""
    holds = np.zeros((clients, classes), dtype=bool)
    held = np.zeros(classes)
    for client in draws.permutation(clients):
        chosen = np.lexsort((draws.random(classes), held))[:each]
        holds[client, chosen] = True
        held[chosen] += 1
    return holds
