"""What is changed in another library's model to make a backbone of it: its ends, and its random draws."""

from __future__ import annotations

import torch
from torch import nn


def replace_first_convolution(model: nn.Module, channels: int, pretrained: bool) -> None:
    """Lets a model for RGB take ``channels`` input channels, in place.

    Pretrained weights are kept as timm does it: summed over the colours for one channel, else repeated and scaled by
    3/channels, so that grey images excite the layer as before. New weights are drawn with the old ones' deviation.
    """
    path, old = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if old.in_channels == channels:
        return
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    with torch.no_grad():
        if not pretrained:
            new.weight.normal_(std=float(old.weight.std()))
        elif channels == 1:
            new.weight.copy_(old.weight.sum(1, keepdim=True))
        else:
            repeats = -(-channels // old.in_channels)
            new.weight.copy_(old.weight.repeat(1, repeats, 1, 1)[:, :channels] * (old.in_channels / channels))
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    _replace(model, path, new)


def remove_classifier(model: nn.Module) -> bool:
    """Puts Identity for the classifier's last Linear (SqueezeNet's last layer is a 1x1 convolution).

    The classifier is looked for under ``fc``, ``classifier``, ``head`` and ``heads``; False if there is none.
    """
    for part in ("fc", "classifier", "head", "heads"):
        if not isinstance(getattr(model, part, None), nn.Module):
            continue
        inside = list(model.get_submodule(part).named_modules(prefix=part))
        for kind in (nn.Linear, nn.Conv2d):
            if paths := [path for path, module in inside if isinstance(module, kind)]:
                _replace(model, paths[-1], nn.Identity())
                return True
    return False


def leave_only_dropout(model: nn.Module) -> None:
    """Turns stochastic depth off and dropout out of place, so that ``F.dropout`` is all that draws in training."""
    for module in model.modules():
        kind = type(module).__name__
        if kind == "StochasticDepth":  # torchvision's
            module.p = 0.0  # type: ignore[assignment]
        elif kind == "DropPath":  # timm's
            module.drop_prob = 0.0  # type: ignore[assignment]
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            module.inplace = False


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
