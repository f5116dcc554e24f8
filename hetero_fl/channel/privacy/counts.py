"""Label counts as they may be known where records are private."""

from __future__ import annotations

import math

from torch import Tensor

from hetero_fl.channel.privacy.accounting import Charge
from hetero_fl.channel.privacy.noise import Noise
from hetero_fl.config.privacy import PrivacyConfig

COUNTS = "label counts"


def counts_charge(kind: str, privacy: PrivacyConfig) -> list[Charge]:
    """What reading a client's label counts costs, once; nothing where they are only the number of rows."""
    return [] if kind == "regression" else [Charge(1.0, scale=privacy.statistics_noise, once=COUNTS)]


def noised_counts(counts: Tensor, kind: str, privacy: PrivacyConfig, noise: Noise, client: str) -> Tensor:
    """Label counts as they may be known, `[outputs]`, nought or more: the same draw whenever it is asked for, one release.

    A row is counted once, under several labels up to `outputs` times. Rows themselves are no secret: of regression, where
    every count is their number, nothing is noised.
    """
    if kind == "regression":
        return counts
    once = math.sqrt(len(counts)) if kind == "multilabel" else 1.0
    deviation = once * privacy.statistics_noise * privacy.z
    return (counts + noise.normal(counts, deviation, client, COUNTS)).clamp(min=0)
