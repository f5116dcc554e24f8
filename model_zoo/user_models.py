"""User-defined models: classes and functions that return a module."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import nn

from model_zoo.errors import ModelError, one_line, suggest_names
from model_zoo.heads import split_module
from model_zoo.module_state import check_tensors, convert_to_default_type, state_tensors
from model_zoo.shapes import Shape
from model_zoo.split_model import SplitModel, check_outputs, probe

ModelFactory = Callable[..., nn.Module]
# Arguments that are passed by name if the signature contains them. `input_size` is always a tuple;
# `vocabulary` is None except for tokens.
STANDARD_ARGUMENTS = ("num_classes", "in_channels", "input_size", "feature_dim", "vocabulary")


class UserModel:
    """A model that is created by a class or function of a user or of an installed package.

    Args:
        factory: Class or function that returns a `SplitModel`, or any classifier, which is then
            split (see `split_module`).
        summary: One-line description of the model.
        head: Path of the model's head. If None, the head is searched for.

    Attributes:
        factory: The class or function.
        summary: One-line description of the model.
        head: Path of the model's head, or None.
    """

    def __init__(self, factory: ModelFactory, summary: str, head: str | None = None) -> None:
        self.factory = factory
        self.summary = summary
        self.head = head

    def __str__(self) -> str:
        return self.summary

    @property
    def options(self) -> dict[str, Any]:
        """All arguments except the standard ones and `pretrained`, with their defaults.

        The default of a required argument is None.
        """
        return {
            p.name: None if p.default is p.empty else p.default
            for p in inspect.signature(self.factory).parameters.values()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.name not in (*STANDARD_ARGUMENTS, "pretrained")
        }

    @property
    def accepts_any(self) -> bool:
        """Whether the class or function accepts `**kwargs`."""
        parameters = inspect.signature(self.factory).parameters.values()
        return any(p.kind is p.VAR_KEYWORD for p in parameters)

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options. The class or function checks their values."""
        return dict(options)

    def create(
        self,
        shape: Shape,
        num_classes: int,
        feature_dim: int | None,
        pretrained: bool,
        options: Mapping[str, Any],
    ) -> SplitModel:
        """Create the model and check it on two examples.

        Args:
            shape: Shape of an example.
            num_classes: Number of outputs.
            feature_dim: Required width of the features. If None, any width is accepted.
            pretrained: Whether to start from pretrained weights, or from the weights of a module
                that the user passed.
            options: Further keyword arguments of the class or function.

        Raises:
            ModelError: If the model cannot be created or does not match the arguments.
        """
        module = self._call(shape, num_classes, feature_dim, pretrained, options)
        check_tensors(module)
        converted = convert_to_default_type(module)
        for name, tensor in state_tensors(module).items():
            if tensor.is_complex() or tensor.dtype is torch.bfloat16:
                raise ModelError(
                    f"'{name}' has the unsupported type {tensor.dtype}; use torch.float32, such as "
                    "the real and imaginary part (torch.view_as_complex)"
                )
        model = split_module(module, shape, self.head)
        model.converted_type = converted
        if feature_dim not in (None, model.num_features):
            raise ModelError(
                f"feature_dim: expected features of width {feature_dim}, got {model.num_features}"
            )
        check_outputs(probe(model, shape.zeros(2), shape), num_classes)
        return model

    def _call(
        self,
        shape: Shape,
        num_classes: int,
        feature_dim: int | None,
        pretrained: bool,
        options: Mapping[str, Any],
    ) -> nn.Module:
        parameters = inspect.signature(self.factory).parameters
        values = (num_classes, shape.channels, shape.size, feature_dim, shape.vocabulary)
        arguments = {
            name: value
            for name, value in zip(STANDARD_ARGUMENTS, values, strict=True)
            if name in parameters
            or (self.accepts_any and (name != "vocabulary" or value is not None))
        } | dict(options)
        if "pretrained" in parameters:
            arguments["pretrained"] = pretrained
        elif pretrained:
            raise ModelError("pretrained: the class or function has no such argument")
        try:
            created = self.factory(**arguments)
        except ModelError:
            raise
        # A user's code may raise any exception, or call sys.exit.
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"cannot create the model: {type(error).__name__}: {one_line(error)}"
            ) from error
        if not isinstance(created, nn.Module):
            raise ModelError(f"expected a torch.nn.Module, got {type(created).__name__}")
        return created


def check_factory(found: object) -> str:
    """Return why an object does not create models, or an empty string."""
    if isinstance(found, type) and not issubclass(found, nn.Module):
        return "expected a subclass of torch.nn.Module, or a function that returns a module"
    return "" if callable(found) else "expected a class or a function"


def load_factory(path: str) -> ModelFactory:
    """Import the class or function that `package.module:Name` names.

    Raises:
        ModelError: If the object cannot be imported or does not create models.
    """
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        raise ModelError(f"expected python:package.module:Name, got 'python:{path}'")
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
    if not hasattr(module, name):
        raise ModelError(f"{module_name} has no '{name}'{suggest_names(name, vars(module))}")
    factory: ModelFactory = getattr(module, name)
    is_class = isinstance(factory, type) and issubclass(factory, nn.Module)
    # A configuration must not call functions of other modules, such as os.system.
    is_function = isinstance(factory, FunctionType) and factory.__module__ == module_name
    if not is_class and not is_function:
        raise ModelError(
            f"{name} in {module_name} is not a subclass of torch.nn.Module, or a function that the "
            "module defines"
        )
    return factory
