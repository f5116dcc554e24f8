"""Residual networks of blocks with two convolutions, with a stem for small images or ImageNet."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn
from typing_extensions import override

from model_zoo.backbones.cnn import norm_2d
from model_zoo.errors import ModelError
from model_zoo.options import Counts, Rate
from model_zoo.shapes import Shape
from model_zoo.split_model import Body, scale_outputs

Norm = Literal["batch", "group"]


class BasicBlock(nn.Module):
    """A residual block of two 3x3 convolutions (He et al., 2016, figure 2).

    The output is `ReLU(norm(conv(ReLU(norm(conv(x))))) + shortcut(x))`. The shortcut is the
    identity, or a normalized 1x1 convolution if the shape changes (the paper's option B).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
        norm: Normalization layer, which is `batch` or `group`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
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
    norm: Norm = "batch",
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
        norm: Normalization layer, which is `batch` or `group`.
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
