"""Fitted offsets undo a bias of the logits and keep their order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.science.thresholds import balanced_accuracy, with_fitted_offsets

BIAS = torch.tensor([4.0, 0.0, -3.0])


def noisy_logits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return logits `[N, 3]` that are calibrated for equal class frequencies, and labels `[N]`."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=draws)
    noise = torch.randn(n, 3, generator=draws)
    return 2 * torch.eye(3)[y] + noise, y


def test_offsets_undo_a_bias() -> None:
    known, known_y = noisy_logits(4000, seed=0)
    test, y = noisy_logits(4000, seed=1)

    fitted = with_fitted_offsets(3 * known + BIAS, known_y, 3 * test + BIAS)

    assert balanced_accuracy(3 * test + BIAS, y) < balanced_accuracy(test, y) - 0.05
    assert balanced_accuracy(fitted, y) == pytest.approx(balanced_accuracy(test, y), abs=0.01)


def test_offsets_weight_classes_equally() -> None:
    known, known_y = noisy_logits(4000, seed=0)
    test, y = noisy_logits(4000, seed=1)
    kept = (known_y != 2) | (torch.arange(len(known_y)) % 20 == 0)  # class 2 is rare

    fitted = with_fitted_offsets(known[kept], known_y[kept], test)

    assert balanced_accuracy(fitted, y) == pytest.approx(balanced_accuracy(test, y), abs=0.02)


def test_balanced_accuracy_equals_the_one_of_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score

    logits, y = noisy_logits(100, seed=2)

    expected = balanced_accuracy_score(y, logits.argmax(-1))
    assert balanced_accuracy(logits, y) == pytest.approx(expected)
