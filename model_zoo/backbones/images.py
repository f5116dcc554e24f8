"""Convolutional networks for images: LeNet, CNNs of papers, a three-block CNN, and ResNets."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from model_zoo.errors import ModelError
from model_zoo.options import Count, Counts, Rate
from model_zoo.shapes import Shape
from model_zoo.split_model import Body, scale_outputs

Norm = Literal["batch", "group", "none"]
ResNetNorm = Literal["batch", "group"]


def norm_2d(norm: Norm, channels: int) -> nn.Module:
    """Return a normalization layer for images `[B, channels, H, W]`.

    `batch` is BatchNorm, `group` is GroupNorm (Wu & He, "Group Normalization", ECCV 2018), and
    `none` is the identity. The number of groups is the largest divisor of the number of channels
    that is at most 32 and leaves at least 4 channels per group, or 1 for fewer than 4 channels.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        max_groups = min(32, max(1, channels // 4))
        groups = next(g for g in range(max_groups, 0, -1) if channels % g == 0)
        return nn.GroupNorm(groups, channels)
    return nn.Identity()


def lenet(shape: Shape, *, padding: int) -> Body:
    """Build LeNet-5 with ReLU and max pooling.

    With a padding of 2, the model has 61,706 parameters for 28x28 gray images and 10 classes, and
    28x28 images correspond to the 32x32 images of the paper (LeCun et al., "Gradient-based learning
    applied to document recognition", 1998). Without padding, it is the CNN of NIID-Bench with
    44,426 parameters (Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study",
    ICDE 2022, section 5).

    Args:
        shape: Shape of an image.
        padding: Padding of the first convolution.

    Returns:
        The backbone and the width of the features.
    """
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
    """Build the CNN of the FedAvg paper.

    The backbone consists of two 5x5 convolutions (32 and 64 channels, same padding), each followed
    by 2x2 max pooling, and a layer of 512 hidden units. The model has 1,663,370 parameters for
    28x28 gray images and 10 classes (McMahan et al., "Communication-Efficient Learning of Deep
    Networks from Decentralized Data", AISTATS 2017, section 3).
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
    width: Count = 16,
    norm: Norm = "batch",
    dropout: Rate = 0.0,
    scaler: Rate = 0.0,
) -> Body:
    """Build a CNN with three 3x3 convolutions, each followed by normalization and ReLU.

    The first two blocks end with 2x2 max pooling, the third with global average pooling. The width
    of the features is `4 * width` for images of any size.

    Args:
        shape: Shape of an image.
        width: Channels of the first convolution. The second convolution has twice as many channels,
            the third four times as many.
        norm: Normalization layer, which is `batch`, `group` or `none` (see `norm_2d`).
        dropout: Dropout rate of the features.
        scaler: Divisor of the outputs of all layers in a narrow copy (see
            `model_zoo.split_model.scale_outputs`). If 0, outputs are not divided.

    Returns:
        The backbone and the width of the features.
    """

    def block(in_channels: int, out_channels: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 3, padding=1)]
        if norm != "none":
            layers.append(norm_2d(norm, out_channels))
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


class ChannelDropout(nn.Module):
    """Dropout of whole channels of images `[B, C, H, W]`.

    The module is equivalent to `nn.Dropout2d`, but draws random numbers with `nn.Dropout`.

    Args:
        p: Probability of dropping a channel in training.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x * self.dropout(torch.ones_like(x[:, :, :1, :1]))


def fedproto_cnn(shape: Shape, *, width: Count = 20) -> Body:
    """Build the CNN of FedProto.

    The backbone consists of two 5x5 convolutions (10 and `width` channels, no padding), each
    followed by 2x2 max pooling, and a layer of 50 hidden units. The channels of the second
    convolution and the input of the head are dropped with probability 0.5. With `width=20`, the
    model has 21,840 parameters for 28x28 gray images and 10 classes. Heterogeneous clients in the
    paper have widths of 18, 20 and 22 (Tan et al., "FedProto: Federated Prototype Learning across
    Heterogeneous Clients", AAAI 2022).
    """
    map_height, map_width = (((s - 4) // 2 - 4) // 2 for s in shape.size)
    layers = nn.Sequential(
        nn.Conv2d(shape.channels, 10, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, width, 5),
        ChannelDropout(),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * map_height * map_width, 50),
        nn.ReLU(),
    )
    return layers, 50, 0.5


def fedgen_cnn(shape: Shape) -> Body:
    """Build the CNN of FedGen.

    The backbone consists of two 3x3 convolutions of stride 2 (6 and 16 channels), each followed by
    BatchNorm and ReLU, and a linear layer to 32 features without activation. The model has 26,434
    parameters for 28x28 gray images and 10 classes (Zhu et al., "Data-Free Knowledge Distillation
    for Heterogeneous Federated Learning", ICML 2021).
    """
    # Each stride of 2 halves the size and rounds up.
    height, width = ((s + 3) // 4 for s in shape.size)
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


class BasicBlock(nn.Module):
    """A residual block of two 3x3 convolutions (He et al., 2016, figure 2).

    The output is `ReLU(norm(conv(ReLU(norm(conv(x))))) + shortcut(x))`. The shortcut is the
    identity, or a normalized 1x1 convolution if the shape changes (the paper's option B).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
        norm: ResNetNormalization layer, which is `batch` or `group`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: ResNetNorm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm_2d(norm, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = norm_2d(norm, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                norm_2d(norm, out_channels),
            )

    @override
    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(self.conv1(x)).relu()
        out: Tensor = self.norm2(self.conv2(inner)) + self.shortcut(x)
        return out.relu()


def resnet(
    shape: Shape,
    *,
    widths: Counts = (16, 32, 64),
    blocks: Counts = (1, 1, 1),
    stem: Literal["small", "imagenet"] = "small",
    norm: ResNetNorm = "batch",
    scaler: Rate = 0.0,
) -> Body:
    """Build a residual network.

    The features are the mean over the pixels of the last stage, shape `[B, widths[-1]]`.
    Convolutions have He initialization (He et al., "Deep Residual Learning for Image Recognition",
    CVPR 2016).

    Args:
        shape: Shape of an image.
        widths: Channels of each stage. Every stage except the first halves the height and width.
        blocks: Number of blocks of each stage.
        stem: `small` is a 3x3 convolution that preserves the size of the image, as in the paper's
            networks for CIFAR. `imagenet` is a 7x7 convolution with max pooling, which reduces
            height and width to a quarter.
        norm: ResNetNormalization layer, which is `batch` or `group`.
        scaler: Divisor of the outputs of all layers in a narrow copy (see
            `model_zoo.split_model.scale_outputs`). If 0, outputs are not divided.

    Returns:
        The backbone and the width of the features.

    Raises:
        ModelError: If `widths` and `blocks` differ in length.
    """
    if len(blocks) != len(widths):
        raise ModelError(
            f"option blocks: expected {len(widths)} stages as in widths, got {len(blocks)}"
        )
    first = widths[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "small":
        layers["conv"] = nn.Conv2d(shape.channels, first, 3, padding=1, bias=False)
    else:
        layers["conv"] = nn.Conv2d(shape.channels, first, 7, stride=2, padding=3, bias=False)
    layers["norm"] = norm_2d(norm, first)
    layers["relu"] = nn.ReLU()
    if stem == "imagenet":
        layers["shrink"] = nn.MaxPool2d(3, stride=2, padding=1)
    channels = first
    for number, (width, depth) in enumerate(zip(widths, blocks, strict=True), start=1):
        strides = [1 if number == 1 else 2] + [1] * (depth - 1)
        stage = []
        for stride in strides:
            stage.append(BasicBlock(channels, width, stride, norm))
            channels = width
        layers[f"stage{number}"] = nn.Sequential(*stage)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    backbone = nn.Sequential(layers)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return scale_outputs(backbone, scaler), channels
