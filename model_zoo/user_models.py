"""A user's own model: ``python:package.module:Class``, a subclass of ``torch.nn.Module``."""

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

from model_zoo.errors import ModelError, nearest, one_line
from model_zoo.shapes import Shape
from model_zoo.split_model import SplitModel, feature_width

STANDARD = ("num_classes", "in_channels", "input_size", "feature_dim", "vocabulary")
"""What :func:`build` passes by name, as far as the signature takes it; ``input_size`` is always a tuple, ``vocabulary`` is
None but for tokens."""


def load(path: str) -> type[nn.Module]:
    """Import the class that ``package.module:Class`` names. Raises :class:`ModelError` if it is no ``nn.Module``."""
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute):
        raise ModelError(f"found {path!r}, the form is python:package.module:Class")
    if os.getcwd() not in sys.path:  # the working folder may hold it
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ModelError(
            f"{module_name} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    target = getattr(module, attribute, None)
    if target is None:
        known = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise ModelError(f"{module_name} has no class {attribute}{nearest(attribute, known)}")
    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise ModelError(f"{attribute} of {module_name} is not a subclass of torch.nn.Module")
    return target


def options(target: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """The keyword options it takes beside the standard arguments and ``pretrained``, with their defaults (None where
    there is none), and whether it takes any others (``**kwargs``)."""
    parameters = inspect.signature(target).parameters.values()
    named = {
        p.name: None if p.default is p.empty else p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in (*STANDARD, "pretrained")
    }
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def build(
    path: str,
    shape: Shape,
    num_classes: int,
    feature_dim: int | None,
    pretrained: bool,
    model_options: Mapping[str, Any],
) -> SplitModel:
    """Make a model of the user's class, and check it with a dry run on two blank examples.

    It may be a :class:`SplitModel`, or any module with ``.backbone`` and ``.head``, which is wrapped into one.
    Raises :class:`ModelError`.
    """
    target = load(path)
    parameters = inspect.signature(target).parameters
    takes_any = options(target)[1]
    values = (num_classes, shape.channels, shape.size, feature_dim, shape.vocabulary)
    wanted = {
        k
        for k in STANDARD
        if k in parameters or (takes_any and (k != "vocabulary" or shape.vocabulary))
    }
    arguments = {k: v for k, v in zip(STANDARD, values, strict=True) if k in wanted} | dict(
        model_options
    )
    if "pretrained" in parameters:
        arguments["pretrained"] = pretrained
    elif pretrained:
        raise ModelError("pretrained: it has no such argument")
    try:
        made = target(**arguments)
    except Exception as error:  # a user's constructor may raise anything
        raise ModelError(f"could not be made: {type(error).__name__}: {one_line(error)}") from error
    model = _wrap(made, shape)
    if feature_dim not in (None, model.feature_dim):
        raise ModelError(
            f"feature_dim={feature_dim} was asked for, its features have width {model.feature_dim}"
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
            f"found {type(model).__name__}; it must be a model_zoo.SplitModel, or a module with .backbone and .head"
        )
    width = feature_width(backbone, shape)
    if not isinstance(model, SplitModel):
        return SplitModel(backbone, head, width)
    if model.feature_dim != width:
        raise ModelError(
            f"its feature_dim says {model.feature_dim}, its features have width {width}"
        )
    return model


def _check_head(model: SplitModel, num_classes: int) -> None:
    """Raises :class:`ModelError` unless the head maps [2, feature_dim] to [2, num_classes]."""
    head = copy.deepcopy(model.head).eval()
    try:
        with torch.no_grad():
            logits = head(torch.zeros(2, model.feature_dim))
    except Exception as error:  # whatever a user's head raises
        raise ModelError(
            f"its head cannot take features of width {model.feature_dim}: {one_line(error)}"
        ) from error
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (2, num_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"its head must give logits of shape (2, {num_classes}) for two examples, it gave {found}"
        )
