"""Residual networks of two-convolution blocks, with a stem for small images or the ImageNet stem."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from model_zoo.backbones.cnn import norm_2d
from model_zoo.errors import ModelError
from model_zoo.shapes import Shape
from model_zoo.split_model import Body, scale_outputs

Norm = Literal["batch", "group"]


class BasicBlock(nn.Module):
    """ReLU(norm(conv(ReLU(norm(conv(x))))) + shortcut(x)), two 3x3 convolutions (He et al., 2016, figure 2).

    The shortcut is the identity; where the shape changes, a 1x1 convolution with a norm (the paper's option B).
    """

    def __init__(self, channels: int, wider: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wider, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm_2d(norm, wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norm2 = norm_2d(norm, wider)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != wider:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, wider, 1, stride=stride, bias=False), norm_2d(norm, wider)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(self.conv1(x)).relu()
        out: Tensor = self.norm2(self.conv2(inner)) + self.shortcut(x)
        return out.relu()


def resnet(
    shape: Shape,
    *,
    widths: Sequence[int] = (16, 32, 64),
    blocks: Sequence[int] = (1, 1, 1),
    stem: Literal["small", "imagenet"] = "small",
    norm: Norm = "batch",
    scaler: float = 0.0,
) -> Body:
    """A residual network (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016).

    Args:
        widths: channels of each stage; every stage but the first halves the image.
        blocks: blocks of each stage, as many numbers as there are widths.
        stem: ``small``, a 3x3 convolution that keeps the size (the paper's CIFAR form); ``imagenet``, a 7x7
            convolution and a max pooling that quarter it.
        norm: ``batch`` or ``group``.
        scaler: as in :func:`model_zoo.split_model.scale_outputs`.

    The features are the mean over the last stage's pixels: [B, widths[-1]]. With He's initial weights.
    """
    if len(blocks) != len(widths):
        raise ModelError(
            f"blocks and widths: found {len(blocks)} and {len(widths)} stages, they must be as many"
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
    for number, (wider, depth) in enumerate(zip(widths, blocks, strict=True), start=1):
        strides = [1 if number == 1 else 2] + [1] * (depth - 1)
        stage = []
        for stride in strides:
            stage.append(BasicBlock(channels, wider, stride, norm))
            channels = wider
        layers[f"stage{number}"] = nn.Sequential(*stage)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    backbone = nn.Sequential(layers)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return scale_outputs(backbone, scaler), channels
