"""DS-FL: sharpening of the mean prediction."""

from __future__ import annotations

import torch

from hetero_fl.algorithms import DSFL
from hetero_fl.core.task import Task


def test_entropy_reduction_sharpens_each_label() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    era = DSFL(era_temperature=0.1).sharpened_logits(Task("multiclass", 3), p).softmax(1)
    assert torch.allclose(era, (p / 0.1).exp() / (p / 0.1).exp().sum(1, keepdim=True), atol=1e-6)
    labels = Task("multilabel", 3)
    yes = DSFL(era_temperature=0.1).sharpened_logits(labels, p).sigmoid()
    assert torch.allclose(yes, torch.stack([p, 1 - p], -1).div(0.1).softmax(-1)[..., 0], atol=1e-6)
    power = DSFL(sharpen="power", beta=2.0).sharpened_logits(labels, p).sigmoid()
    assert torch.allclose(power, p**2 / (p**2 + (1 - p) ** 2), atol=1e-6)
    assert torch.allclose(DSFL(sharpen="none").sharpened_logits(labels, p).sigmoid(), p, atol=1e-6)
    # All clients are certain.
    sure = torch.tensor([[0.0, 1.0, 0.0]])
    for task in (labels, Task("multiclass", 3)):
        assert all(
            DSFL(sharpen=how).sharpened_logits(task, sure).isfinite().all()
            for how in ("era", "power", "none")
        )
