"""Scores of membership inference compared with short reference implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hetero_fl.core.task import Task
from hetero_fl.experiment.auditing.membership import (
    auroc_error,
    confidence,
    likelihood_ratio,
    score_attack,
)

MULTICLASS = Task("multiclass", 3)
MULTILABEL = Task("multilabel", 2)
REGRESSION = Task("regression", 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_confidence_is_the_log_odds_of_the_label() -> None:
    z, y = normal(5, 3), torch.tensor([0, 1, 2, 1, 0])
    p = z.softmax(1)[range(5), y]

    assert torch.allclose(confidence(MULTICLASS, z, y), (p / (1 - p)).log())
    for task, outputs, target, expected in (
        # p rounds to exactly 1
        (MULTICLASS, [500.0, 0.0, 0.0], 0, 500 - math.log(2)),
        (MULTILABEL, [2.0, -3.0], [1.0, 0.0], 2.5),
        (REGRESSION, [1.0, 2.0], [1.0, 4.0], -math.log(2)),
    ):
        found = confidence(task, torch.tensor([outputs]).double(), torch.tensor([target]))
        assert float(found) == pytest.approx(expected)


def test_likelihood_ratio_matches_two_normals() -> None:
    shadows, target = 3 * normal(4, 7), normal(7, seed=1)
    inside = torch.tensor(
        [[1, 0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 1]]
    ).bool()
    found = likelihood_ratio(target, shadows, inside)
    s, t, b = shadows.numpy(), target.numpy(), inside.numpy()
    mean_in, mean_out = ([s[side[:, i], i].mean() for i in range(7)] for side in (b, ~b))
    residual = [
        s[j, i] - (mean_in[i] if b[j, i] else mean_out[i]) for j in range(4) for i in range(7)
    ]
    # four values and two means per example
    variance = np.square(residual).sum() / (7 * 2)
    level, gap = (np.array(mean_in) + mean_out) / 2, 0.8
    ratio = [
        ((x - m + gap / 2) ** 2 - (x - m - gap / 2) ** 2) / (2 * variance)
        for x, m in zip(t, level, strict=True)
    ]
    assert np.allclose(found.numpy() * gap / math.sqrt(variance), ratio)


def test_auroc_and_hits_count_pairs_and_rows() -> None:
    scores, member = normal(300), torch.arange(300) < 120
    scores[member] += 0.5
    # create ties
    scores = (scores * 4).round()
    ins, outs = scores[member].numpy(), scores[~member].numpy()
    found = score_attack(scores, member)
    pairs = (ins[:, None] > outs).mean() + (ins[:, None] == outs).mean() / 2
    assert found["auroc"] == pytest.approx(pairs)
    assert found["auroc_se"] == auroc_error(found["auroc"], 120, 180)
    # at a rate of 1%, one of 180 non-members may score higher
    threshold = np.sort(outs)[-2]
    assert found["hits"] == pytest.approx((ins > threshold).mean())


def test_auroc_error_is_the_spread_over_samples() -> None:
    draws = np.random.default_rng(0)
    # exponential scores, on which the equation is based, with an area of 0.5 or 0.8
    for ratio in (1, 4):
        positives = draws.exponential(ratio, (2000, 20, 1))
        negatives = draws.exponential(1, (2000, 1, 80))
        spread = (positives > negatives).mean((1, 2)).std()

        assert auroc_error(ratio / (1 + ratio), 20, 80) == pytest.approx(spread, rel=0.05)


def test_chance_verdict_has_the_expected_frequency() -> None:
    member = torch.arange(80) < 40
    verdicts = [score_attack(normal(80, seed=seed), member)["at_chance"] for seed in range(40)]
    # 95% of 40 are 38
    assert sum(verdicts) >= 34
    separated = normal(80) + member.double()
    assert not score_attack(separated, member)["at_chance"]
