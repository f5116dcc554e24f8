"""Random streams with reproducible seeds, regardless of the order or place of computations.

A stream is seeded with a hash of a key. A key is a sequence of strings and integers, for example
the run's seed, the round, the participant and the label of a step. The same configuration therefore
results in the same random numbers, regardless of the order of clients, the number of workers and
restarts after a crash. The global random number generators are not used, except by the code of
users (see `model_zoo.generators`).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

# One part of a key.
Key = str | int


def stream_key(*parts: Key) -> int:
    """Return a 63-bit hash of the parts of a key, which is the same on all machines.

    Example:
        >>> from hetero_fl.utils.seeding import stream_key
        >>> stream_key(0, "partition") == stream_key(0, "partition")
        True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def sample_numbers(total: int, count: int, *parts: Key) -> list[int]:
    """Sample integers from 0 to `total - 1` without replacement and return them in ascending order.

    With Floyd's algorithm (CACM 30(9), 1987), the time is proportional to `count` and does not
    depend on `total`.

    Args:
        total: Number of candidates.
        count: Number of draws.
        *parts: Parts of the key.
    """
    chosen: set[int] = set()
    for last in range(total - count, total):
        drawn = stream_key(*parts, last) % (last + 1)
        chosen.add(last if drawn in chosen else drawn)
    return sorted(chosen)


def keyed_generator(*parts: Key) -> torch.Generator:
    """Create a generator on the CPU that is seeded with the hash of a key."""
    return torch.Generator().manual_seed(stream_key(*parts))


def keyed_numpy_generator(*parts: Key) -> np.random.Generator:
    """Create a NumPy generator that is seeded with the hash of a key."""
    return np.random.default_rng(stream_key(*parts))
