"""Models with fixed weights, and batches of examples."""

from __future__ import annotations

import torch
from torch import Tensor

from model_zoo import SplitModel, create_model

Size = tuple[int, ...]


def make(
    name: str, classes: int = 10, channels: int = 1, size: int | Size = 28, **options: object
) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, classes, channels, size, **options)


def batch(channels: int, *size: int, n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(seed))
