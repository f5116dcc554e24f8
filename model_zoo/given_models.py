"""Models that a program passes as objects, which are then known as `object:NAME`.

A name is valid as long as the program keeps a reference to the `GivenModel`. Equal models have
equal names, in every process and on every machine.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections import ChainMap
from collections.abc import Callable, Collection
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import nn

from model_zoo.errors import ModelError
from model_zoo.generators import keyed_generators
from model_zoo.heads import split_module
from model_zoo.module_state import (
    MODULE_ATTRIBUTES,
    carry_state,
    check_tensors,
    convert_to_default_type,
    describe_value,
    observe_forward,
)
from model_zoo.shapes import Shape
from model_zoo.split_model import SplitModel

OBJECT_PREFIX = "object:"

ModelFactory = Callable[..., nn.Module]


# The models that the program keeps, keyed by name.
_given: dict[str, WeakSet[GivenModel]] = {}
# Functions that cache properties of models, whose arguments contain names of models.
_caches: list[Any] = []
_Cache = TypeVar("_Cache")


class GivenModel:
    """A model that a program passes as a module, class or function.

    Two modules have the same name if their classes, `repr`, attributes, names and shapes of
    tensors, frozen parameters, and `head` are equal. Attributes without a description, such as
    lambdas, are equal only if they are the same object. Two functions or classes have the same name
    only if they are the same object.

    Args:
        model: A module, or a class or function that returns a module. A module is not modified. A
            class or function is called with the arguments `num_classes`, `in_channels`,
            `input_size`, `feature_dim` and `vocabulary`, as far as the signature contains them.
        head: Path of the head in the module. If None, the head is searched for (see
            `split_module`).
        caches: Names of attributes of the module that do not count. Default: empty.

    Attributes:
        head: Path of the head, or None if the head is searched for.
        name: Name of the model in `create_model`, such as `object:SmallNet-1f0c2a9b`.

    Raises:
        TypeError: If `model` is neither a module nor callable.
        ModelError: If the module has tensors that cannot be read (see `check_tensors`), or that
            have no values (device meta).

    Example:
        >>> from torch import nn
        >>> from model_zoo import create_model
        >>> from model_zoo.given_models import GivenModel
        >>> given = GivenModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2)))
        >>> create_model(given.name, num_classes=2, input_size=8).num_features
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
        self.head = head
        self._caches = caches
        # The model without caches, if it has any, keyed by the shape of an example.
        self._without_caches: dict[Shape, GivenModel | None] = {}
        if isinstance(model, nn.Module):
            check_tensors(model)
            # A name does not tell devices, so this module could be mistaken for an equal one.
            if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
                raise ModelError("the module has no weights (device meta); create it on a device")
            described, self._identity = _describe_module(model, caches)
        else:
            described, self._identity = _source_of(model), (id(model),)
        digest = hashlib.sha256(f"{described}\n{head}".encode()).hexdigest()[:8]
        self.name = self._unique_name(f"{OBJECT_PREFIX}{self.title}-{digest}")
        _given.setdefault(self.name, WeakSet()).add(self)
        # The name may have belonged to another model, and a function may return other modules now.
        for cached in _caches:
            cached.cache_clear()

    def __reduce__(self) -> tuple[Any, ...]:
        # The source text of a function is not available in every process.
        return restore_given, (self._model, self.head, self.name)

    def __repr__(self) -> str:
        return f"GivenModel({self.title}, head={self.head!r})"

    @property
    def title(self) -> str:
        """Name of the class or function."""
        model = self._model
        named = type(model) if isinstance(model, nn.Module) else model
        return str(getattr(named, "__name__", type(named).__name__))

    @property
    def is_instance(self) -> bool:
        """Whether the model is a module, so that training may start from its weights."""
        return isinstance(self._model, nn.Module)

    @property
    def factory(self) -> ModelFactory:
        """The class or function that creates the module, or a function that copies the module."""
        return _Copy(self._model) if isinstance(self._model, nn.Module) else self._model

    def is_known_as(self, name: str) -> bool:
        """Return whether an equal model of another program may have a name, `object:NAME`."""
        return self.name.partition("~")[0] == name.partition("~")[0]

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

    @property
    def signature(self) -> tuple[type[nn.Module], frozenset[tuple[str, tuple[int, ...]]]] | None:
        """Class of the module, and names and shapes of its tensors. None for other models."""
        if not isinstance(self._model, nn.Module):
            return None
        return type(self._model), frozenset(_tensor_shapes(self._model).items())

    def differences(self, other: GivenModel) -> list[str]:
        """Return the attributes that differ from those of another module.

        The list is empty if the signatures differ.

        Args:
            other: The other model.
        """
        first, second = self._model, other._model
        if not isinstance(first, nn.Module) or not isinstance(second, nn.Module):
            return []
        if self.signature != other.signature:
            return []
        own = {**_describe_attributes(first, self._caches), "head": self.head}
        others = {**_describe_attributes(second, other._caches), "head": other.head}
        names = dict.fromkeys([*own, *others])
        return [name for name in names if own.get(name) != others.get(name)]

    def _unique_name(self, name: str) -> str:
        """Return a name of which all models have the same functions and other opaque objects."""
        number = 1
        unique = name
        while any(given._identity != self._identity for given in _given.get(unique, ())):
            number += 1
            unique = f"{name}~{number}"
        return unique

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
    _given.setdefault(name, WeakSet()).add(given)
    return given


class _Copy:
    """A function that returns copies of a module, with new weights unless `pretrained` is set."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, pretrained: bool = False) -> nn.Module:
        # Training moves the model to the configured device.
        module = _copy_module(self._module).cpu()
        if not pretrained:
            redraw_weights(module)
        return module


def _copy_module(module: nn.Module) -> nn.Module:
    """Return a copy of a module.

    Raises:
        ModelError: If an attribute cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    # Any attribute may refuse.
    except Exception as error:
        for path, own in _own_attributes(module, ()).items():
            for key, value in own.items():
                if not _can_copy(value):
                    name = f"{path}.{key}".removeprefix(".")
                    raise ModelError(
                        f"its attribute '{name}' cannot be copied, such as a tensor that is "
                        "computed from parameters; pass a function that creates the module, or "
                        "keep tensor.detach()"
                    ) from error
        raise


def _can_copy(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    # Any object may refuse.
    except Exception:
        return False
    return True


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
        >>> from model_zoo.given_models import redraw_weights
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


def forgets_models(cached: _Cache) -> _Cache:
    """Clear a cache whenever a model is given, because a name does not determine all properties.

    Args:
        cached: A function with a cache of `functools`.

    Returns:
        The function.
    """
    _caches.append(cached)
    return cached


def is_given(name: str) -> bool:
    """Return whether this program has the model with a name, `object:NAME`."""
    return bool(_given.get(name))


def find_given(name: str) -> GivenModel:
    """Return the model that is registered under the name `object:NAME`.

    Raises:
        ModelError: If this program has no such model.
    """
    given = next(iter(_given.get(name, ())), None)
    if given is None:
        raise ModelError(
            "the model was an object of a Python program; create the federation from objects "
            "again, or use a name or python:package.module:Class"
        )
    return given


def _describe_module(module: nn.Module, caches: Collection[str]) -> tuple[str, tuple[int, ...]]:
    """Describe everything but the weights and the caches of a module.

    Returns:
        A text, and the ids of the objects that the text does not describe, such as lambdas.
    """
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    opaque: list[int] = []
    known = _known_parts(module)
    described: list[Any] = []
    attributes = {
        path: describe_value(own, opaque, known, described)
        for path, own in _own_attributes(module, caches).items()
    }
    tensors = _tensor_shapes(module)
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return f"{name}\n{module}\n{tensors}\n{frozen}\n{attributes}", tuple(opaque)


def _describe_attributes(module: nn.Module, caches: Collection[str]) -> dict[str, Any]:
    """Describe each attribute of a module and its submodules, keyed by name."""
    described: dict[str, Any] = {
        f"{name}.requires_grad": p.requires_grad for name, p in module.named_parameters()
    }
    known = _known_parts(module)
    described |= {path: type(part) for path, part in module.named_modules() if path}
    for path, own in _own_attributes(module, caches).items():
        for name, value in own.items():
            opaque: list[int] = []
            described[f"{path}.{name}".removeprefix(".")] = (
                describe_value(value, opaque, ChainMap({}, known), []),
                opaque,
            )
    return described


def _own_attributes(module: nn.Module, caches: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return attributes and buffers that are not persistent, keyed by submodule and name."""
    attributes = {}
    for path, part in module.named_modules():
        own = {
            name: value
            for name, value in vars(part).items()
            if name not in MODULE_ATTRIBUTES and f"{path}.{name}".removeprefix(".") not in caches
        }
        buffers = {name: part._buffers[name] for name in part._non_persistent_buffers_set}
        attributes[path] = {**own, **buffers}
    return attributes


def _known_parts(module: nn.Module) -> dict[int, str]:
    """Describe submodules and parameters, whose content does not count, keyed by id."""
    known = {id(part): type(part).__qualname__ for part in module.modules()}
    return known | {id(parameter): name for name, parameter in module.named_parameters()}


def _tensor_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    state = module.state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if isinstance(t, torch.Tensor)}


def _source_of(function: Any) -> str:
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    try:
        return f"{name}\n{inspect.getsource(function)}"
    except (OSError, TypeError):
        return name
