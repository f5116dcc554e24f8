"""A model in two parts that can be taken apart: a backbone (input to features) and a head (features to logits)."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model_zoo.errors import InputError, ModelError, one_line
from model_zoo.shapes import Shape

Body = tuple[nn.Module, int] | tuple[nn.Module, int, float]
"""A backbone, the width of its features, and the dropout of features on their way to the head, if there is any."""


class Outputs(NamedTuple):
    """What a model returns: ``logits`` [B, num_classes] and the ``features`` [B, feature_dim] they were read from."""

    logits: Tensor
    features: Tensor


class SplitModel(nn.Module):
    """A backbone under a head; every parameter's name begins with ``backbone.`` or ``head.``.

    Args:
        backbone: maps [B, channels, *size] to features [B, feature_dim].
        head: maps features to logits [B, num_classes].
        feature_dim: the width of the features.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature_dim = feature_dim

    def features(self, x: Tensor) -> Tensor:
        """[B, feature_dim]."""
        features: Tensor = self.backbone(x)
        return features

    def forward(self, x: Tensor) -> Outputs:
        features = self.backbone(x)
        return Outputs(self.head(features), features)


class DroppedLinear(nn.Linear):
    """A linear head on features of which a share ``p`` is dropped in training, while the model gives them whole."""

    def __init__(self, width: int, num_classes: int, p: float) -> None:
        super().__init__(width, num_classes)
        self.dropout = nn.Dropout(p)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.dropout(input))


def assemble(body: Body, num_classes: int, feature_dim: int | None) -> SplitModel:
    """Puts a linear head on a backbone.

    The rule for ``feature_dim``: where the backbone's width is another, a projection (Linear, then ReLU) to
    ``feature_dim`` becomes the end of the backbone; where it is that width already, nothing is added.
    """
    backbone = body[0]
    width = body[1]
    if feature_dim is not None and feature_dim != width:
        projection = nn.Sequential(nn.Linear(width, feature_dim), nn.ReLU())
        backbone = nn.Sequential(OrderedDict(body=backbone, projection=projection))
        width = feature_dim
    head = (
        DroppedLinear(width, num_classes, body[2])
        if len(body) == 3
        else nn.Linear(width, num_classes)
    )
    return SplitModel(backbone, head, width)


def scale_outputs(backbone: nn.Module, share: float) -> nn.Module:
    """The backbone, what each of its convolutions and linear layers gives divided by ``share``; 0 leaves it as it is.

    A narrow copy of a wide model sums over fewer channels: dividing by its share of them keeps the sums' size.
    """

    def divide(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out / share

    if share:
        for module in backbone.modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                module.register_forward_hook(divide)
    return backbone


def feature_width(backbone: nn.Module, shape: Shape) -> int:
    """The width of a foreign backbone's features, found by a dry run on two blank examples.

    The run is in evaluation mode, so it draws no random number and moves no BatchNorm statistic.
    Raises :class:`InputError` where the backbone does not take such examples, :class:`ModelError` where it does not
    give features [B, D].
    """
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(shape.blank(2))
    except Exception as error:  # whatever a foreign model raises: it cannot take this input
        raise InputError(f"cannot take {shape}: {one_line(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[0] != 2:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ModelError(
            f"the backbone must give features of shape [batch, D]; for 2 examples it gave {found}"
        )
    return features.shape[1]


def is_batch_norm(module: nn.Module) -> bool:
    """Is this a BatchNorm of any dimension or library? Decided by type, as names differ between libraries."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def batch_norm_buffers(model: nn.Module) -> set[str]:
    """Names of the floating-point BatchNorm statistics (running means and variances), found by type.

    These are averaged together with the weights; the integer ``num_batches_tracked`` is left out.
    """
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if is_batch_norm(module)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }
