"""Convolutional networks without shortcuts: LeNet, FedAvg's CNN, three blocks, published CNNs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from model_zoo.shapes import Shape
from model_zoo.split_model import Body, scale_outputs

# Convolutional networks without shortcuts: LeNet, FedAvg's CNN, and the three-block CNN in any
# width and norm.

Norm = Literal["batch", "group", "none"]


def norm_2d(norm: Norm, channels: int) -> nn.Module:
    """A normalisation of [B, channels, H, W].

    ``group`` takes groups of at least 4 channels, and at most 32 groups: the largest number of groups that fits
    and divides the channels (Wu & He, "Group Normalization", ECCV 2018).
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        most = min(32, max(1, channels // 4))
        return nn.GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels)
    return nn.Identity()


def lenet(shape: Shape) -> Body:
    """LeNet-5 with ReLU and max pooling; 61,706 parameters for 28x28 grey images and 10 classes.

    After LeCun et al., "Gradient-based learning applied to document recognition" (1998). The first convolution pads
    by 2, so 28x28 is what the paper's 32x32 is.
    """
    return padded_lenet(shape, 2)


def padded_lenet(shape: Shape, padding: int) -> Body:
    """LeNet-5 whose first convolution pads by ``padding``."""
    height, width = ((s + 2 * padding - 4) // 2 - 4 for s in shape.size)
    layers = nn.Sequential(
        nn.Conv2d(shape.channels, 6, 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (height // 2) * (width // 2), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
    )
    return layers, 84


def fedavg_cnn(shape: Shape) -> Body:
    """Two 5x5 convolutions (32 and 64 channels, same padding), each with 2x2 max pooling, and 512 hidden units.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (AISTATS 2017),
    section 3: 1,663,370 parameters for 28x28 grey images and 10 classes.
    """
    height, width = (s // 2 // 2 for s in shape.size)
    layers = nn.Sequential(
        nn.Conv2d(shape.channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * height * width, 512),
        nn.ReLU(),
    )
    return layers, 512


def cnn(
    shape: Shape,
    *,
    width: int = 16,
    norm: Norm = "batch",
    dropout: float = 0.0,
    scaler: float = 0.0,
) -> Body:
    """Three 3x3 convolutions of ``width``, 2·``width`` and 4·``width`` channels, each with a norm and ReLU.

    2x2 max pooling after the first two, the mean over the pixels after the third: features of width 4·``width``,
    whatever the image's size. Dropout, where asked for, acts on the features; ``scaler`` as in
    :func:`model_zoo.split_model.scale_outputs`.
    """

    def block(channels: int, wider: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(channels, wider, 3, padding=1)]
        if norm != "none":
            layers.append(norm_2d(norm, wider))
        return [*layers, nn.ReLU()]

    layers = [
        *block(shape.channels, width),
        nn.MaxPool2d(2),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    if dropout > 0:
        layers.append(nn.Dropout(dropout))
    return scale_outputs(nn.Sequential(*layers), scaler), 4 * width


# The small CNNs with which published comparisons were made, so that their tables can be repeated.


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
