"""Models that a program passes as modules, classes or functions, named `object:NAME`.

A name is valid as long as the program keeps a reference to the `GivenModel`. Equal models have
equal names, in every process and on every machine.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from hetero_fl.core.forward_writes import carry_state, observe_forward
from hetero_fl.utils.objects import OBJECT_PREFIX, get_object, restore_object
from model_zoo import ModelError, SplitModel
from model_zoo.generators import keyed_generators
from model_zoo.heads import split_module
from model_zoo.module_state import (
    MODULE_ATTRIBUTES,
    check_tensors,
    convert_to_default_type,
    describe_content,
)
from model_zoo.shapes import Shape
from model_zoo.user_models import ModelFactory, UserModel

# Addresses of objects, which differ between processes.
ADDRESS = re.compile(r" at 0x[0-9a-f]+")

# Functions that cache properties of models, whose arguments contain names of models.
_caches: list[Any] = []
_Cache = TypeVar("_Cache", bound=Callable[..., Any])


class GivenModel(UserModel):
    """A model that a program passes as a module, class or function.

    Two modules have the same name if their classes, attributes, names and shapes of tensors, frozen
    parameters, and `head` are equal. Attributes without a description, such as lambdas, are equal
    only if they are the same object. Two functions or classes have the same name only if they are
    the same object.

    Args:
        model: A module, or a class or function that returns a module. A module is not modified. A
            class or function is called with the arguments `num_classes`, `in_channels`,
            `input_size`, `feature_dim` and `vocabulary`, as far as the signature contains them.
        head: Path of the head in the module. If None, the head is searched for (see
            `model_zoo.heads.split_module`).
        caches: Names of attributes of the module that do not count. Default: empty.

    Attributes:
        name: Name of the model, such as `object:SmallNet-1f0c2a9b`.
        title: Name of the class or function.

    Raises:
        TypeError: If `model` is neither a module nor callable.
        ModelError: If the module has tensors that cannot be read (see `check_tensors`), that have
            no values (device meta), or that have hooks.

    Example:
        >>> from torch import nn
        >>> from hetero_fl.core.given_models import GivenModel
        >>> from model_zoo import create_model
        >>> given = GivenModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2)))
        >>> create_model(given, num_classes=2, input_size=8).num_features
        8
    """

    def __init__(
        self,
        model: nn.Module | ModelFactory,
        head: str | None = None,
        caches: Collection[str] = (),
    ) -> None:
        if not isinstance(model, nn.Module) and not callable(model):
            raise TypeError(
                "model: expected a torch.nn.Module, or a class or function that creates one, got "
                f"{type(model).__name__}"
            )
        self._model = model
        # The model without caches, if it has any, keyed by the shape of an example.
        self._without_caches: dict[Shape, GivenModel | None] = {}
        named = type(model) if isinstance(model, nn.Module) else model
        self.title = str(getattr(named, "__name__", type(named).__name__))
        self._described: dict[str, str] = {}
        if isinstance(model, nn.Module):
            check_tensors(model)
            # A name does not tell devices, so this module could be mistaken for an equal one.
            if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
                raise ModelError("the module has no weights (device meta); create it on a device")
            if hooked := [name for name, p in model.named_parameters() if _has_hooks(p)]:
                raise ModelError(
                    f"the parameter '{hooked[0]}' has a hook, which copies of the module lose; "
                    "pass a function that creates the module"
                )
            self._described = {**_describe_module(model, caches), "head": str(head)}
            text = ADDRESS.sub("", str(self._described))
            self._identity = str(self._described)
        else:
            text = _source_of(model)
            self._identity = str(id(model))
        digest = hashlib.sha256(f"{text}\n{head}".encode()).hexdigest()[:8]
        self.name = self._unique_name(f"{OBJECT_PREFIX}{self.title}-{digest}")
        factory = partial(_copy_module, model) if isinstance(model, nn.Module) else model
        super().__init__(factory, self.name.removeprefix(OBJECT_PREFIX), head)
        restore_object(self.name, self)
        # The name may have belonged to another model, and a function may return other modules now.
        for cached in _caches:
            cached.cache_clear()

    def __reduce__(self) -> tuple[Any, ...]:
        # The source text of a function is not available in every process.
        return restore_given, (self._model, self.head, self.name)

    def __repr__(self) -> str:
        return f"GivenModel({self.title}, head={self.head!r})"

    def _unique_name(self, name: str) -> str:
        """Return a name of which all models have the same functions and other opaque objects."""
        number = 1
        unique = name
        while (other := get_object(unique)) and other._identity != self._identity:
            number += 1
            unique = f"{name}~{number}"
        return unique

    @property
    def is_instance(self) -> bool:
        """Whether the model is a module, so that training may start from its weights."""
        return isinstance(self._model, nn.Module)

    @property
    def signature(self) -> tuple[type[nn.Module], str] | None:
        """Class of the module, and names and shapes of its tensors. None for other models."""
        return (type(self._model), self._described["tensors"]) if self.is_instance else None  # type: ignore[return-value]

    def is_known_as(self, name: str) -> bool:
        """Return whether an equal model of another program may have a name, `object:NAME`."""
        return self.name.partition("~")[0] == name.partition("~")[0]

    def differences(self, other: GivenModel) -> list[str]:
        """Return the attributes that differ from those of a module with the same signature."""
        own, others = self._described, other._described
        return [name for name in {**own, **others} if own.get(name) != others.get(name)]

    def without_caches(self, shape: Shape) -> GivenModel:
        """Return the model under the name that it has without the attributes that no pass reads.

        Modules then have the same name whether or not they have been called. A class or function,
        and a module that does not accept the examples, keep their names.

        Args:
            shape: Shape of an example.
        """
        if shape not in self._without_caches and self.is_instance:
            try:
                with keyed_generators(0):
                    module = self.build(shape).source_module()
                carry_state(module, ())
                caches = observe_forward(module, shape).caches
            # Errors of modules are reported where models are created.
            except Exception:
                caches = frozenset()
            self._without_caches[shape] = (
                GivenModel(self._model, self.head, caches) if caches else None
            )
        return self._without_caches.get(shape) or self

    def build(self, shape: Shape) -> SplitModel:
        """Return a copy of the module, including the weights, split into a backbone and a head.

        The model must be a module (see `is_instance`).

        Args:
            shape: Shape of an example.

        Raises:
            ModelError: If the module has no head, or does not accept the examples.
        """
        module = self.factory(pretrained=True)
        convert_to_default_type(module)
        return split_module(module, shape, self.head)


def restore_given(model: nn.Module | ModelFactory, head: str | None, name: str) -> GivenModel:
    """Return a model under the name that the model has in another program.

    Args:
        model: The module, class or function.
        head: Path of the head in the module. If None, the head is searched for.
        name: The name, `object:NAME`.
    """
    given = GivenModel(model, head)
    given.name = name
    restore_object(name, given)
    return given


def forgets_models(cached: _Cache) -> _Cache:
    """Clear a cache whenever a model is given, because a name does not determine all properties.

    Args:
        cached: A function with a cache of `functools`.

    Returns:
        The function.
    """
    _caches.append(cached)
    return cached


def redraw_weights(module: nn.Module) -> list[str]:
    """Draw new weights from PyTorch's global random number generator.

    Args:
        module: The module, modified in place. The method `reset_parameters` of each submodule is
            called, except for submodules whose parameters are all frozen. Frozen parameters keep
            their values.

    Returns:
        Names of the trainable parameters that keep their values, because their submodules have no
        such method.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hetero_fl.core.given_models import redraw_weights
        >>> scale = nn.ParameterList([nn.Parameter(torch.ones(1))])
        >>> redraw_weights(nn.Sequential(nn.Linear(2, 3), scale))
        ['1.0']
    """
    kept = []
    for path, part in module.named_modules():
        own = dict(part.named_parameters(prefix=path, recurse=False))
        trainable = [name for name, parameter in own.items() if parameter.requires_grad]
        if own and not trainable:
            continue
        if callable(reset := getattr(part, "reset_parameters", None)):
            frozen = {name: p.detach().clone() for name, p in own.items() if name not in trainable}
            reset()
            for name, values in frozen.items():
                own[name].data.copy_(values)
        else:
            kept += trainable
    return kept


def _copy_module(module: nn.Module, pretrained: bool = False) -> nn.Module:
    """Return a copy of a module, with new weights unless `pretrained` is set.

    Raises:
        ModelError: If an attribute cannot be copied.
    """
    try:
        copied = copy.deepcopy(module)
    # Any attribute may refuse.
    except Exception as error:
        found = [name for name, value in _own_attributes(module) if not _can_copy(value)]
        if not found:
            raise
        raise ModelError(
            f"its attribute '{found[0]}' cannot be copied, such as a tensor that is computed from "
            "parameters; pass a function that creates the module, or keep tensor.detach()"
        ) from error
    # Training moves the model to the configured device.
    copied.cpu()
    if not pretrained:
        redraw_weights(copied)
    return copied


def _can_copy(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    # Any object may refuse.
    except Exception:
        return False
    return True


def _own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield names and values of attributes, and of buffers that are not persistent."""
    for path, part in module.named_modules():
        own = {name: value for name, value in vars(part).items() if name not in MODULE_ATTRIBUTES}
        own |= {name: part._buffers[name] for name in part._non_persistent_buffers_set}
        for name, value in own.items():
            yield f"{path}.{name}".removeprefix("."), value


def _has_hooks(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _describe_module(module: nn.Module, caches: Collection[str]) -> dict[str, str]:
    """Describe everything but the weights and the caches of a module, keyed by name."""
    parameters = dict(module.named_parameters())
    known: dict[int, tuple[Any, str]] = {
        id(part): (part, type(part).__qualname__) for part in module.modules()
    }
    known |= {id(parameter): (parameter, name) for name, parameter in parameters.items()}
    state = module.state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items() if isinstance(t, torch.Tensor)}
    return {
        "tensors": str(shapes),
        **{f"{name}.requires_grad": str(p.requires_grad) for name, p in parameters.items()},
        **{
            path: f"{type(part).__module__}.{type(part).__qualname__}"
            for path, part in module.named_modules()
        },
        **{
            name: describe_content(value, known)
            for name, value in _own_attributes(module)
            if name not in caches
        },
    }


def _source_of(function: Any) -> str:
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    try:
        return f"{name}\n{inspect.getsource(function)}"
    except (OSError, TypeError):
        return name
