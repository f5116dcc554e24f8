"""Named groups of models, to be dealt out to clients in turn.

HtFLlib's groups (github.com/TsingZ0/HtFLlib, ``system/main.py``: HtFE2 … HtFE9 and HtM10, there also called
HtFE-img-2 …; Zhang et al., FedTGP, AAAI 2024) are given with this package's models. Three differences: ``fedavg_cnn``
pads its convolutions (McMahan et al., 2017), HtFLlib's does not; ``mobilenet_v2`` is torchvision's; and a common
feature width is a projection here (``feature_dim=512``) where HtFLlib pools the features to it. HtM10's vision
transformers need images whose sides are multiples of 32, as in HtFLlib.
"""

from __future__ import annotations

from .errors import ModelError, nearest

_DEEP = [f"torchvision:resnet{depth}" for depth in (18, 34, 50, 101, 152)]
_HTFE8 = ["fedavg_cnn", "torchvision:googlenet", "torchvision:mobilenet_v2", *_DEEP]

GROUPS: dict[str, list[str]] = {
    "cnn_pair": ["cnn_bn_small", "cnn_bn_medium"],
    "cnn_trio": ["cnn_bn_small", "cnn_bn_medium", "cnn_bn_large"],
    "resnet_family": ["resnet8", "resnet20", "resnet18_small"],
    "small_mixed": ["cnn_bn_small", "resnet8", "mlp"],
    "HtFE2": ["fedavg_cnn", "torchvision:resnet18"],
    "HtFE3": ["resnet10_imagenet", "torchvision:resnet18", "torchvision:resnet34"],
    "HtFE4": ["fedavg_cnn", "torchvision:googlenet", "torchvision:mobilenet_v2", "torchvision:resnet18"],
    "HtFE5": ["torchvision:googlenet", "torchvision:mobilenet_v2", *_DEEP[:3]],
    "HtFE8": _HTFE8,
    "HtFE9": [f"resnet{depth}_imagenet" for depth in (4, 6, 8, 10)] + _DEEP,
    "HtM10": [*_HTFE8, "torchvision:vit_b_16", "torchvision:vit_b_32"],
}


def list_groups() -> list[str]:
    """Names of all groups."""
    return list(GROUPS)


def group_models(name: str) -> list[str]:
    """The models of a group, in order. Raises :class:`ModelError` with the nearest name where there is none."""
    if name not in GROUPS:
        raise ModelError(f"group {name}: no such group{nearest(str(name), GROUPS)}")
    return list(GROUPS[name])
