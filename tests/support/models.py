"""Models with fixed weights, and batches of examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


DRIFTING = f"python:{__name__}:Drifting"


class Drifting(nn.Module):
    """A classifier of digits with tied weights, and state that its forward pass writes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.register_buffer("center", torch.zeros(64))
        self.peak = torch.zeros(64)
        self.steps = torch.tensor(0)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.training:
            self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
            self.peak = torch.maximum(self.peak, x.detach().amax(0))
            self.steps += 1
        x = (x - self.center) / (1 + self.peak) * (1 + self.steps / 100)
        return self.head(self.second(self.first(x).tanh()).tanh())  # type: ignore[no-any-return]
