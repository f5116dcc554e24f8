"""The model of the CIFAR-10 benchmark of pfl-research, for the case `pfl_research`."""

from __future__ import annotations

import torch
from torch import nn


class ChannelsLast(nn.Module):
    """Layer that converts images to the channels-last memory format, as in pfl-research."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the images in channels-last format, `[batch, channels, height, width]`."""
        return x.contiguous(memory_format=torch.channels_last)


class SimpleCNN(nn.Module):
    """The model `simple_cnn` of pfl-research.

    The model consists of two convolutions, a hidden layer and two dropout layers. For images of
    32x32x3 and 10 classes, it has 1,626,442 parameters.

    Args:
        num_classes: Number of classes.
        in_channels: Number of image channels.
        input_size: Height and width of the images.
    """

    def __init__(self, num_classes: int, in_channels: int, input_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = ((side - 4) // 2 for side in input_size)
        self.backbone = nn.Sequential(
            ChannelsLast(),
            nn.Conv2d(in_channels, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * height * width, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
        )
        self.head = nn.Linear(128, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
