"""User-defined models: `python:package.module:Class` for a class, `object:NAME` for an object."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from model_zoo.errors import InputError, ModelError, one_line, suggest_names
from model_zoo.given_models import OBJECT_PREFIX, find_given
from model_zoo.heads import split_module
from model_zoo.module_state import check_tensors, convert_to_default_type, state_tensors
from model_zoo.shapes import Shape
from model_zoo.split_model import SplitModel, probe

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
    # A user's module may raise any exception, or call sys.exit.
    except (Exception, SystemExit) as error:
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
    """Return the options of a constructor, and whether the constructor accepts `**kwargs`.

    The options are all arguments except `STANDARD_ARGUMENTS` and `pretrained`, with their defaults.
    The default of a required argument is None.
    """
    parameters = inspect.signature(target).parameters.values()
    named = {
        p.name: None if p.default is p.empty else p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in (*STANDARD_ARGUMENTS, "pretrained")
    }
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def find_factory(name: str) -> tuple[Callable[..., nn.Module], str | None]:
    """Return the class or function that creates a model, and the path of the model's head.

    If the head is not specified, as for all `python:` models, the path is None.

    Args:
        name: `python:package.module:Class` or `object:NAME`.

    Raises:
        ModelError: If there is no such model.
    """
    if name.startswith(OBJECT_PREFIX):
        given = find_given(name)
        return given.factory, given.head
    return load(name.removeprefix("python:")), None


def build(
    target: Callable[..., nn.Module],
    head: str | None,
    shape: Shape,
    num_classes: int,
    feature_dim: int | None,
    *,
    pretrained: bool,
    options: Mapping[str, Any],
) -> SplitModel:
    """Create a user-defined model and check it on two examples.

    Args:
        target: Class or function that creates the model, which is a `SplitModel`, or any
            classifier, which is then split (see `split_module`).
        head: Path of the model's head. If None, the head is searched for.
        shape: Shape of an example.
        num_classes: Number of outputs.
        feature_dim: Required width of the features. If None, any width is accepted.
        pretrained: Whether to start from pretrained weights, or from the weights of a module that
            the user passed.
        options: Further keyword arguments of the class or function.

    Raises:
        ModelError: If the model cannot be created or does not match the arguments.
    """
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
    except ModelError:
        raise
    # A user's constructor may raise any exception, or call sys.exit.
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"cannot create the model: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(created, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(created).__name__}")
    check_tensors(created)
    converted = convert_to_default_type(created)
    for name, tensor in state_tensors(created).items():
        if tensor.is_complex() or tensor.dtype is torch.bfloat16:
            raise ModelError(
                f"'{name}' has the unsupported type {tensor.dtype}; use torch.float32, such as the "
                "real and imaginary part (torch.view_as_complex)"
            )
    model = split_module(created, shape, head)
    model.converted_type = converted
    if feature_dim not in (None, model.num_features):
        raise ModelError(
            f"feature_dim: expected features of width {feature_dim}, got {model.num_features}"
        )
    _check_head(model, num_classes)
    return model


def _check_head(model: SplitModel, num_classes: int) -> None:
    width = model.num_features
    try:
        logits = probe(model.head, torch.zeros(2, width), f"features of width {width}")
    except InputError as error:
        raise ModelError(f"head: {error}") from error
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (2, num_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"head: expected logits of shape (2, {num_classes}) for a batch of 2 examples, "
            f"got {found}"
        )
