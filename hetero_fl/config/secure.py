"""What a secure sum is configured by, and what follows from it for a cohort."""

from __future__ import annotations

import math

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from hetero_fl.config.base import Section


class SecureSumConfig(Section):
    """The server learns the sum of a round's uploads and no single one (Bonawitz et al. 2017)."""

    threshold: float = Field(
        2 / 3,
        description="clients that have to stay until a round's end, or it is given up: a share of the cohort above one half, "
        "or a number from 2 on",
    )
    range: PositiveFloat = Field(
        65536.0,
        description="largest number that a client may send, weighted: |value| × weight / largest weight; what is larger "
        "leaves the client out of the round",
    )
    fraction_bits: PositiveInt | None = Field(
        None, description="binary digits after the point; none: as many as fit, cohort × range × 2^bits < 2^63"
    )
    neighbours: PositiveInt | None = Field(
        None,
        description="clients with whom each shares masks (SecAgg+), an even number; none: everybody in a small cohort, in "
        "a large one as many as are safe if a fifth of all tell the server what they know",
    )

    @field_validator("threshold")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if not (0.5 < value <= 1 or (value >= 2 and value == int(value))):
            raise ValueError(f"found {value:g}; give a share above 0.5 and at most 1, or a number of clients from 2 on")
        return value

    @field_validator("neighbours")
    @classmethod
    def _even(cls, value: int | None) -> int | None:
        if value is not None and value % 2:
            raise ValueError(f"found {value}; half of them stand on either side, choose {value - 1} or {value + 1}")
        return value

    def survivors(self, cohort: int) -> int:
        """How many of a cohort have to stay: the fewest uploads that a sum is ever told of."""
        if self.threshold > 1:
            return int(self.threshold)
        return max(2, cohort // 2 + 1, math.ceil(self.threshold * cohort - 1e-9))

    def bits(self, cohort: int) -> int:
        """Binary digits after the point; the most that fit unless they are given. Below 1: not even one does."""
        return self.fraction_bits if self.fraction_bits is not None else self.most_bits(cohort)

    def most_bits(self, cohort: int) -> int:
        """The most binary digits with which no sum over a cohort leaves 64-bit integers: cohort · range · 2^bits < 2^63."""
        return math.ceil(63 - math.log2(cohort * self.range)) - 1
