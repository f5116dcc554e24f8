"""The small CNNs with which published comparisons were made, so that their tables can be repeated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cnn import padded_lenet
from .shapes import Shape
from .split import Body


class ChannelDropout(nn.Module):
    """Dropout of whole channels of [B, C, H, W] with probability ``p``; its randomness is ``nn.Dropout``'s."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.dropout(torch.ones_like(x[:, :, :1, :1]))
        return out


def niid_cnn(shape: Shape) -> Body:
    """LeNet-5 without padding: two 5x5 convolutions (6 and 16 channels), each with 2x2 max pooling, 120 and 84 hidden units.

    Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study" (ICDE 2022), section 5: 44,426
    parameters for 28x28 grey images and 10 classes.
    """
    return padded_lenet(shape, 0)


def fedproto_cnn(shape: Shape, *, width: int = 20) -> Body:
    """Two 5x5 convolutions (10 and ``width`` channels, no padding), each with 2x2 max pooling, and 50 hidden units.

    The second convolution's channels, and the features on their way to the head, are dropped with probability 0.5. Tan et al.,
    "FedProto: Federated Prototype Learning across Heterogeneous Clients" (AAAI 2022), whose mixed clients have ``width``
    18, 20 and 22: 21,840 parameters for 28x28 grey images and 10 classes with 20.
    """
    height, across = (((s - 4) // 2 - 4) // 2 for s in shape.size)
    layers = nn.Sequential(
        nn.Conv2d(shape.channels, 10, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, width, 5),
        ChannelDropout(),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * height * across, 50),
        nn.ReLU(),
    )
    return layers, 50, 0.5


def fedgen_cnn(shape: Shape) -> Body:
    """Two 3x3 convolutions of stride 2 (6 and 16 channels), each with BatchNorm and ReLU, and a linear layer to 32 features.

    After Zhu et al., "Data-Free Knowledge Distillation for Heterogeneous Federated Learning" (ICML 2021): 26,434 parameters
    for 28x28 grey images and 10 classes. The features are not rectified.
    """
    height, width = ((s + 3) // 4 for s in shape.size)  # halved twice, rounded up
    layers = nn.Sequential(
        nn.Conv2d(shape.channels, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * height * width, 32),
    )
    return layers, 32
