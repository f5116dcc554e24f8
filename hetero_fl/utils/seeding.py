"""Keyed randomness: every draw is named by what it is for, never by when or where it happens.

A key is hashed from (run seed, round or task, participant, label of the step, n-th use of the label, epoch …) with SHA-256.
The same configuration therefore draws the same numbers whatever the order of clients, the number of workers, or a crash in
between. Nothing here touches the global generator.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

Key = str | int


def stream_key(*parts: Key) -> int:
    """A 63-bit integer from the parts; equal parts give equal keys on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def sample_numbers(total: int, count: int, *parts: Key) -> list[int]:
    """`count` of the numbers below `total`, sorted, drawn by the parts without replacement (Floyd's algorithm: CACM 30(9),
    1987). Costs `count`, whatever the total."""
    chosen: set[int] = set()
    for last in range(total - count, total):
        drawn = stream_key(*parts, last) % (last + 1)
        chosen.add(last if drawn in chosen else drawn)
    return sorted(chosen)


def keyed_generator(*parts: Key) -> torch.Generator:
    """A fresh CPU generator for the draws that the parts name."""
    return torch.Generator().manual_seed(stream_key(*parts))


def keyed_numpy_generator(*parts: Key) -> np.random.Generator:
    """Return a fresh numpy generator for the draws that the parts name."""
    return np.random.default_rng(stream_key(*parts))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's own generators, that of the CPU and that of the device.

    `torch.manual_seed` also leaves a note, with a formatted stack trace, for every kind of device that is not in use: more
    than a millisecond a call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
