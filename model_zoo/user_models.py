"""User-defined models: `python:package.module:Class`, a subclass of `torch.nn.Module`."""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from model_zoo.errors import ModelError, one_line, suggest_names
from model_zoo.shapes import Shape
from model_zoo.split_model import SplitModel, measure_feature_width

# Arguments that `build` passes by name if the signature contains them. `input_size` is always a
# tuple; `vocabulary` is None except for tokens.
STANDARD_ARGUMENTS = ("num_classes", "in_channels", "input_size", "feature_dim", "vocabulary")


def load(path: str) -> type[nn.Module]:
    """Import the class that `package.module:Class` names.

    Raises:
        ModelError: If the class cannot be imported or is not a subclass of `torch.nn.Module`.
    """
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute):
        raise ModelError(f"expected python:package.module:Class, got 'python:{path}'")
    # The module may be located in the working directory.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    # A user's module may raise any exception.
    except Exception as error:
        raise ModelError(
            f"cannot import {module_name}: {type(error).__name__}: {one_line(error)}"
        ) from error
    target = getattr(module, attribute, None)
    if target is None:
        known = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise ModelError(f"{module_name} has no class {attribute}{suggest_names(attribute, known)}")
    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise ModelError(f"{attribute} in {module_name} is not a subclass of torch.nn.Module")
    return target


def inspect_options(target: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Return the options of a constructor and whether it accepts other keywords (`**kwargs`).

    The options are the arguments other than `STANDARD_ARGUMENTS` and `pretrained`, with their
    defaults; None if there is no default.
    """
    parameters = inspect.signature(target).parameters.values()
    named = {
        p.name: None if p.default is p.empty else p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in (*STANDARD_ARGUMENTS, "pretrained")
    }
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def build(
    path: str,
    shape: Shape,
    num_classes: int,
    feature_dim: int | None,
    *,
    pretrained: bool,
    options: Mapping[str, Any],
) -> SplitModel:
    """Create a model of a user's class and check it on two blank examples.

    Args:
        path: `package.module:Class`. The class is a `SplitModel` or any module with the attributes
            `backbone` and `head`, which is wrapped in a `SplitModel`.
        shape: Shape of an example.
        num_classes: Number of outputs.
        feature_dim: Required width of the features; None accepts any width.
        pretrained: Whether to load pretrained weights.
        options: Further keyword arguments.

    Raises:
        ModelError: If the model cannot be created or does not fit the arguments.
    """
    target = load(path)
    parameters = inspect.signature(target).parameters
    accepts_any = inspect_options(target)[1]
    values = (num_classes, shape.channels, shape.size, feature_dim, shape.vocabulary)
    accepted = {
        name
        for name in STANDARD_ARGUMENTS
        if name in parameters or (accepts_any and (name != "vocabulary" or shape.vocabulary))
    }
    arguments = {
        name: value
        for name, value in zip(STANDARD_ARGUMENTS, values, strict=True)
        if name in accepted
    } | dict(options)
    if "pretrained" in parameters:
        arguments["pretrained"] = pretrained
    elif pretrained:
        raise ModelError("pretrained: the class has no such argument")
    try:
        created = target(**arguments)
    # A user's constructor may raise any exception.
    except Exception as error:
        raise ModelError(
            f"cannot create the model: {type(error).__name__}: {one_line(error)}"
        ) from error
    model = _wrap(created, shape)
    if feature_dim not in (None, model.feature_dim):
        raise ModelError(
            f"feature_dim: expected features of width {feature_dim}, got {model.feature_dim}"
        )
    _check_head(model, num_classes)
    return model


def _wrap(model: Any, shape: Shape) -> SplitModel:
    backbone = getattr(model, "backbone", None)
    head = getattr(model, "head", None)
    if not (
        isinstance(model, nn.Module)
        and isinstance(backbone, nn.Module)
        and isinstance(head, nn.Module)
    ):
        raise ModelError(
            "expected a model_zoo.SplitModel or a module with .backbone and .head, "
            f"got {type(model).__name__}"
        )
    width = measure_feature_width(backbone, shape)
    if not isinstance(model, SplitModel):
        return SplitModel(backbone, head, width)
    if model.feature_dim != width:
        raise ModelError(
            f"feature_dim is {model.feature_dim}, but the backbone returns {width} features"
        )
    return model


def _check_head(model: SplitModel, num_classes: int) -> None:
    head = copy.deepcopy(model.head).eval()
    try:
        with torch.no_grad():
            logits = head(torch.zeros(2, model.feature_dim))
    # A user's head may raise any exception.
    except Exception as error:
        raise ModelError(
            f"head: cannot process features of width {model.feature_dim}: {one_line(error)}"
        ) from error
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (2, num_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"head: expected logits of shape (2, {num_classes}) for a batch of 2 examples, "
            f"got {found}"
        )
