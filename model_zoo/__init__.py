"""Neural networks by name, each split into a backbone and a head.

A model returns logits, as models of timm and torchvision do. The backbone and the head can be
called, trained and shared separately, under the names that they have in timm: `forward_features`,
`forward_head`, `num_features`, `get_classifier` and `reset_classifier`. `python -m model_zoo`
prints a table of the models. The package does not depend on hetero_fl.

Example:
    >>> import torch
    >>> from model_zoo import create_model, describe, list_models
    >>> list_models("cnn_bn_*")
    ['cnn_bn_large', 'cnn_bn_medium', 'cnn_bn_small']
    >>> model = create_model("cnn_bn_small", num_classes=10, in_channels=1, input_size=28)
    >>> x = torch.rand(4, 1, 28, 28)
    >>> model(x).shape, model.forward_features(x).shape
    (torch.Size([4, 10]), torch.Size([4, 32]))
    >>> describe("cnn_bn_small").parameters
    6330
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
    register_model,
)
from model_zoo.split_model import SplitModel, batch_norm_buffers, is_batch_norm
from model_zoo.widths import can_narrow, narrow_options, share_of

__all__ = [
    "ModelDescription",
    "ModelError",
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
    "register_model",
    "share_of",
]
