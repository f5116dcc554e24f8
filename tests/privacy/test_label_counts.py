"""Noisy label counts: the scale of noise for each kind of task."""

from __future__ import annotations

import math

import pytest
import torch

from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.privacy.mechanisms import KeyedNoiseSource, noisy_label_counts

PRIVACY = PrivacyConfig(noise_multiplier=2.0, statistics_noise=3.0, delta=1e-4)
COUNTS = torch.full((400,), 1e6)


@pytest.mark.parametrize(("kind", "norm_of_a_row"), [("multiclass", 1.0), ("multilabel", 20.0)])
def test_noised_counts_scale_with_sensitivity(kind: str, norm_of_a_row: float) -> None:
    noise = noisy_label_counts(COUNTS, kind, PRIVACY, KeyedNoiseSource(0), "site_1") - COUNTS

    deviation = norm_of_a_row * 2.0 * 3.0
    assert float(noise.std()) == pytest.approx(deviation, rel=4 / math.sqrt(2 * len(COUNTS)))


def test_noised_counts_are_non_negative() -> None:
    empty = torch.zeros(400)

    assert (
        noisy_label_counts(empty, "multiclass", PRIVACY, KeyedNoiseSource(0), "site_1") >= 0
    ).all()
    assert noisy_label_counts(empty, "regression", PRIVACY, KeyedNoiseSource(0), "site_1") is empty
