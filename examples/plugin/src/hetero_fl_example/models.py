"""The model `sine_mlp`."""

from __future__ import annotations

import math

import torch
from torch import nn


class SineMLP(nn.Module):
    """A multi-layer perceptron with sine activations.

    Args:
        num_classes: Number of outputs.
        in_channels: Columns of a table row, or channels of an image.
        input_size: `(H, W)` for images, `()` for table rows.
        width: Width of the hidden layers, an option in the configuration.
    """

    def __init__(
        self, num_classes: int, in_channels: int, input_size: tuple[int, ...], width: int = 32
    ) -> None:
        super().__init__()
        self.first = nn.Linear(in_channels * math.prod(input_size), width)
        self.second = nn.Linear(width, width)
        # hetero_fl recognizes the head by this name.
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits `[B, num_classes]`."""
        features = self.first(x.flatten(1)).sin()
        return self.head(self.second(features).sin())
