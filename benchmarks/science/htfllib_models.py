"""Models with the architectures of HtFLlib's model families.

HtFLlib pools the features of every model to one width by averaging neighbors (`AdaptiveAvgPool1d`)
and adds a linear head. A family is a list of models, which the clients use in turn.
"""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from model_zoo import SplitModel

FEATURE_DIM = 512


class PooledModel(SplitModel):
    """A backbone whose features are pooled to a given width, and a linear head.

    Args:
        backbone: Module that maps images to features `[B, F]`.
        num_classes: Number of classes.
        feature_dim: Width of the pooled features. If None, the width is 512.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, feature_dim: int | None) -> None:
        feature_dim = feature_dim or FEATURE_DIM
        pooled = nn.Sequential(backbone, nn.AdaptiveAvgPool1d(feature_dim))
        super().__init__(pooled, nn.Linear(feature_dim, num_classes))


class ValidCNN(PooledModel):
    """Convolutions of 5x5 without padding, each followed by 2x2 max pooling, and 512 units.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of an image.
        input_size: Height and width of an image, which are equal.
        feature_dim: Width of the features. If None, the width is 512.
        convolutions: Number of convolutions, with 32, 64, … channels.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        input_size: tuple[int, int],
        feature_dim: int | None = None,
        convolutions: int = 2,
    ) -> None:
        layers: list[nn.Module] = []
        side = input_size[0]
        channels = in_channels
        for i in range(convolutions):
            width = 32 * 2**i
            layers += [nn.Conv2d(channels, width, 5), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
            side = (side - 4) // 2
        layers += [nn.Flatten(), nn.Linear(channels * side**2, FEATURE_DIM), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), num_classes, feature_dim)


class ShallowResNet(PooledModel):
    """A ResNet with the first layers of ResNet-18 and one basic block per width.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of an image.
        feature_dim: Width of the features. If None, the width is 512.
        blocks: Number of blocks, with 64, 128, … channels.
    """

    def __init__(
        self, num_classes: int, in_channels: int, feature_dim: int | None = None, blocks: int = 1
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            BasicBlock(64, 64),
        ]
        for i in range(1, blocks):
            before = 64 * 2 ** (i - 1)
            shortcut = nn.Sequential(
                nn.Conv2d(before, 2 * before, 1, stride=2, bias=False), nn.BatchNorm2d(2 * before)
            )
            layers.append(BasicBlock(before, 2 * before, stride=2, downsample=shortcut))
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        backbone = nn.Sequential(*layers)
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(backbone, num_classes, feature_dim)


class TorchvisionModel(PooledModel):
    """A model of torchvision without weights of other data.

    Args:
        num_classes: Number of classes.
        feature_dim: Width of the features. If None, the width is 512.
        architecture: Name of the model in torchvision, with a head `fc` or `classifier`.
    """

    def __init__(
        self, num_classes: int, feature_dim: int | None = None, architecture: str = "resnet18"
    ) -> None:
        options = {"aux_logits": False, "init_weights": True} if architecture == "googlenet" else {}
        backbone = torchvision.models.get_model(architecture, weights=None, **options)
        setattr(backbone, "fc" if hasattr(backbone, "fc") else "classifier", nn.Identity())
        super().__init__(backbone, num_classes, feature_dim)


def _model(kind: type[PooledModel], **options: Any) -> dict[str, Any]:
    """Return the configuration of a model."""
    return {"name": f"python:{__name__}:{kind.__name__}", **options}


def _torchvision(*names: str) -> list[dict[str, Any]]:
    return [_model(TorchvisionModel, architecture=name) for name in names]


_CNN = _model(ValidCNN, convolutions=2)
_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

FAMILIES: dict[str, list[dict[str, Any]]] = {
    "digits": [
        _CNN,
        _model(ValidCNN, convolutions=1),
        _model(ShallowResNet, blocks=1),
        _model(ShallowResNet, blocks=2),
    ],
    "HtFE-img-2": [_CNN, *_torchvision("resnet18")],
    "HtFE-img-3": [_model(ShallowResNet, blocks=4), *_torchvision("resnet18", "resnet34")],
    "HtFE-img-4": [_CNN, *_torchvision("googlenet", "mobilenet_v2", "resnet18")],
    "HtFE-img-5": _torchvision("googlenet", "mobilenet_v2", "resnet18", "resnet34", "resnet50"),
    "HtFE-img-8": [_CNN, *_torchvision("googlenet", "mobilenet_v2", *_RESNETS)],
    "HtFE-img-9": [
        *(_model(ShallowResNet, blocks=blocks) for blocks in (1, 2, 3, 4)),
        *_torchvision(*_RESNETS),
    ],
}
"""Configurations of the models, keyed by family. `digits` is for images of 3x16x16."""

DIGITS_IN_HTFLLIB = (
    "FedAvgCNN(in_features=3, num_classes=args.num_classes, dim=64)",
    "CNN(in_features=3, num_classes=args.num_classes, height=16, num_cov=1, hidden_dims=[])",
    "resnet4(num_classes=args.num_classes)",
    "resnet6(num_classes=args.num_classes)",
)
"""The family `digits` in the notation of HtFLlib's `main.py`."""
