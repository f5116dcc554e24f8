"""Keyed randomness: random streams that depend on their purpose, not on time or place.

A key is the SHA-256 hash of the run's seed, the round, the participant, the label of the step and
so on. The same configuration therefore draws the same numbers for any order of clients, number of
workers or crash. The global random number generator is not used.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

Key = str | int


def stream_key(*parts: Key) -> int:
    """Return a 63-bit integer that depends on the parts only, equal on all machines.

    Example:
        >>> from hetero_fl.utils.seeding import stream_key
        >>> stream_key(0, "partition") == stream_key(0, "partition")
        True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def sample_numbers(total: int, count: int, *parts: Key) -> list[int]:
    """Draw sorted numbers below `total` without replacement (Floyd's algorithm, CACM 30(9), 1987).

    The time is proportional to `count` and does not depend on `total`.

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
    """Return a new CPU generator seeded with the key of the parts."""
    return torch.Generator().manual_seed(stream_key(*parts))


def keyed_numpy_generator(*parts: Key) -> np.random.Generator:
    """Return a new NumPy generator seeded with the key of the parts."""
    return np.random.default_rng(stream_key(*parts))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed PyTorch's global generators of the CPU and of a device.

    `torch.manual_seed` would also record a stack trace for each type of device that is not
    initialized, which takes more than a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
