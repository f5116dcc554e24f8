"""Secrets shared so that any t holders can put them together and fewer learn nothing (Shamir 1979).

Secrets are 32 bytes, numbers below the prime 2^256 + 297. A polynomial of 100 shares with t = 67 takes a millisecond, so plain
integers do.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297
LENGTH = 33  # bytes of a share


def split(secret: bytes, threshold: int, holders: Sequence[int]) -> list[bytes]:
    """A share for each holder: a random polynomial of degree t − 1 whose value at 0 is the secret, at the holders' numbers.

    Holders are distinct numbers from 1 on; raises ValueError otherwise.
    """
    if len(set(holders)) < len(holders) or min(holders, default=1) < 1 or not 1 <= threshold <= len(holders):
        raise ValueError("holders are distinct numbers from 1 on, and no fewer than the threshold")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    constant, made = int.from_bytes(secret, "little"), []
    for x in holders:
        y = 0
        for coefficient in coefficients:
            y = (y + coefficient) * x % PRIME
        made.append(((y + constant) % PRIME).to_bytes(LENGTH, "little"))
    return made


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of which these are shares, by holder; None if they are shares of nothing that `split` was given."""
    weights = _at_nought(tuple(shares))
    total = sum(
        weight * int.from_bytes(share, "little") for weight, share in zip(weights, shares.values(), strict=True)
    )
    return None if total % PRIME >= 2**256 else (total % PRIME).to_bytes(32, "little")


@lru_cache(maxsize=64)  # in a complete graph the same holders answer for everybody
def _at_nought(holders: tuple[int, ...]) -> list[int]:
    """Lagrange's weights of values at these numbers for the value at 0."""
    made = []
    for x in holders:
        above, below = 1, 1
        for other in holders:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        made.append(above * pow(below, -1, PRIME) % PRIME)
    return made
