"""Divide numbers of rows and classes among clients."""

from __future__ import annotations

import numpy as np


def apportion(total: int, share: np.ndarray, at_least: int = 0) -> np.ndarray:
    """Divide a total into integers in proportion to shares (largest remainder method).

    Args:
        total: Sum of the integers.
        share: Shares, float `[K]`, which need not sum to one.
        at_least: Minimum of each integer. `K * at_least` must not exceed `total`.

    Returns:
        Integers, int64 `[K]`.

    Example:
        >>> import numpy as np
        >>> from hetero_fl.data.partition import apportion
        >>> apportion(10, np.array([0.32, 0.25, 0.43])).tolist()
        [3, 3, 4]
    """
    exact = share / share.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    # Terminates because the total suffices and each step moves a part of the largest integer to the
    # smallest one.
    while (counts < at_least).any():
        low = counts.argmin()
        high = counts.argmax()
        moved = min(at_least - counts[low], counts[high] - at_least)
        counts[low] += moved
        counts[high] -= moved
    return counts


def apportion_nonzero(rows: int, share: np.ndarray) -> np.ndarray:
    """Divide rows in proportion to shares, so that clients with a share of zero get no rows.

    If all shares are zero, no client gets any rows.
    """
    counts = np.zeros(len(share), dtype=np.int64)
    if (share > 0).any():
        counts[share > 0] = apportion(rows, share[share > 0])
    return counts


def cut_proportions(proportions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Divide the rows of each class among clients in given proportions.

    Args:
        proportions: Proportion of each class per client, float `[classes, clients]`.
        counts: Number of rows of each class, int64 `[classes]`.

    Returns:
        Number of rows of each class per client, int64 `[classes, clients]`.
    """
    cuts = np.rint(proportions.cumsum(1) * counts[:, None]).astype(np.int64)
    cuts[:, -1] = counts
    return np.diff(cuts, axis=1, prepend=0)


def cut_below(proportions: np.ndarray, counts: np.ndarray, max_rows: np.ndarray) -> np.ndarray:
    """Divide the rows of each class in given proportions among the clients that are not full.

    Classes are divided one after the other. A client that has reached its maximum number of rows
    gets no rows of the following classes, which are divided among the other clients. A client may
    exceed its maximum by the rows of the last class that it gets.

    Args:
        proportions: Proportion of each class per client, float `[classes, clients]`.
        counts: Number of rows of each class, int64 `[classes]`.
        max_rows: Maximum number of rows per client, float `[clients]`. The sum must be at least the
            number of rows.

    Returns:
        Number of rows of each class per client, int64 `[classes, clients]`.
    """
    assigned = np.zeros(proportions.shape, dtype=np.int64)
    for c in range(len(counts)):
        below = assigned.sum(0) < max_rows
        share = np.where(below, proportions[c], 0.0)
        share = share if share.sum() > 0 else below.astype(float)
        assigned[c] = cut_proportions(share[None] / share.sum(), counts[c : c + 1])[0]
    return assigned


def assign_classes(
    rng: np.random.Generator, classes_per_client: np.ndarray, num_classes: int
) -> np.ndarray:
    """Assign classes to clients such that all classes have similar numbers of clients.

    Each client, in random order, gets the classes that the fewest clients have so far. Ties are
    broken at random.

    Args:
        rng: Random generator.
        classes_per_client: Number of classes of each client, int64 `[clients]`.
        num_classes: Number of classes.

    Returns:
        Mask of the classes of each client, bool `[clients, classes]`.
    """
    has_class = np.zeros((len(classes_per_client), num_classes), dtype=bool)
    clients_per_class = np.zeros(num_classes)
    for client in rng.permutation(len(classes_per_client)):
        order = np.lexsort((rng.random(num_classes), clients_per_class))
        chosen = order[: classes_per_client[client]]
        has_class[client, chosen] = True
        clients_per_class[chosen] += 1
    return has_class
