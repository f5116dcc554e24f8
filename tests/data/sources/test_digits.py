"""The digits equal those of scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import load_source


def test_digits_equal_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    train, bunch = load_source(SourceConfig(name="digits"), Path()).train, load_digits()
    assert train.y is not None
    assert train.x.shape == (1797, 1, 8, 8) and train.x.dtype == torch.uint8
    assert torch.equal(train.y, torch.from_numpy(bunch.target).long())
    assert torch.equal(train.x[:, 0].double(), torch.from_numpy(bunch.images * (255 / 16)).round())
