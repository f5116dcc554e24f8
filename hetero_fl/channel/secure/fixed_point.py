"""Numbers as integers modulo 2^64, so that sums are exact and masks cancel to the last bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetero_fl.channel.secure.masks import Words
from hetero_fl.config.secure import SecureSumConfig
from hetero_fl.payload import PayloadError


@dataclass(frozen=True)
class FixedPoint:
    """x stands as round(x · 2^bits) modulo 2^64, for |x| ≤ limit; negative ones in two's complement.

    No sum over `cohort` of them leaves the range where the configuration was checked: cohort · limit · 2^bits < 2^63.
    """

    bits: int
    limit: float

    @classmethod
    def of(cls, config: SecureSumConfig, cohort: int) -> FixedPoint:
        """As configured, for so many clients."""
        return cls(config.bits(cohort), config.range)

    def encode(self, values: np.ndarray) -> Words:
        """Integers `[L]` of float64 values `[L]`. Raises PayloadError for what is not finite or beyond the limit."""
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= self.limit:
            raise PayloadError(f"found {largest:.6g}, but channel.secure_sum.range is {self.limit:g}")
        return np.rint(values * 2.0**self.bits).astype(np.int64).view(np.uint64)

    def decode(self, total: Words) -> np.ndarray:
        """The values `[L]`, float64, of a sum."""
        return total.view(np.int64) * 2.0**-self.bits
