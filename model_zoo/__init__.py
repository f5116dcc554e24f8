"""Models that come apart into a backbone and a head, by name.

In ten seconds::

    import torch
    from model_zoo import create_model, describe, list_models

    list_models("cnn_*")                                    # ['cnn_bn_large', 'cnn_bn_medium', …]
    model = create_model("cnn_bn_small", num_classes=10)    # for grey images of 28x28 pixels
    logits, features = model(torch.rand(4, 1, 28, 28))      # [4, 10] and [4, 32]
    model.head(model.features(torch.rand(4, 1, 28, 28)))    # the same in two steps
    create_model("timm:resnet10t", num_classes=3, in_channels=3, input_size=32, feature_dim=64)
    print(describe("resnet18"))                             # parameters, features, arithmetic

``python -m model_zoo`` prints a table of the models. Input shapes are in :func:`create_model`, groups of models for
the clients of a federation in :mod:`model_zoo.registry`.
"""

from model_zoo.description import ModelDescription, describe
from model_zoo.errors import ModelError
from model_zoo.registry import (
    check_options,
    create_model,
    group_models,
    list_groups,
    list_models,
    model_options,
)
from model_zoo.split_model import Outputs, SplitModel, batch_norm_buffers, is_batch_norm
from model_zoo.widths import can_narrow, narrow_options, share_of

__all__ = [
    "ModelDescription",
    "ModelError",
    "Outputs",
    "SplitModel",
    "batch_norm_buffers",
    "can_narrow",
    "check_options",
    "create_model",
    "describe",
    "group_models",
    "is_batch_norm",
    "list_groups",
    "list_models",
    "model_options",
    "narrow_options",
    "share_of",
]
