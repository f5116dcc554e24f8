"""The state of a module: its parameters and buffers, and what its forward pass writes.

A federation keeps the state of each client's model as named tensors and loads them into one module
in turn. This module finds out which tensors these are for a module of unknown origin.
"""

from __future__ import annotations

import copy
import enum
import functools
import hashlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from model_zoo.errors import ModelError
from model_zoo.generators import keyed_generators
from model_zoo.shapes import Shape

# Attributes of every module, such as the mode and the dictionaries of parameters and hooks, and the
# module from which a `SplitModel` was made.
MODULE_ATTRIBUTES = vars(nn.Module()).keys() | {"_source"}
# Types whose `repr` describes a value completely.
PLAIN_TYPES = (
    *(type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.Size, enum.Enum),
)

# Random number generators, whose state only their own methods can read.
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a module, keyed by name.

    The order is that of `state_dict`. A tensor with several names (tied weights) is listed once,
    under its first name. The tensors are those of the module, not copies.

    Example:
        >>> from torch import nn
        >>> from model_zoo.module_state import state_tensors
        >>> module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        >>> module[1].weight = module[0].weight
        >>> list(state_tensors(module))
        ['0.weight', '0.bias']
    """
    first: dict[int, tuple[str, Tensor]] = {}
    for found in named_state(module):
        first.setdefault(id(found.tensor), (found.name, found.tensor))
    return dict(first.values())


class NamedTensor(NamedTuple):
    """A parameter or persistent buffer, and the submodule that it belongs to.

    Attributes:
        name: Name in `state_dict`.
        tensor: The tensor.
        part: The submodule.
        key: Name in the submodule.
    """

    name: str
    tensor: Tensor
    part: nn.Module
    key: str


def named_state(module: nn.Module) -> Iterator[NamedTensor]:
    """Yield the parameters and persistent buffers of a module under all of their names.

    A submodule that is used twice has only the names of its first use.
    """
    for path, part in module.named_modules():
        own: dict[str, Tensor | None] = {**part._parameters, **part._buffers}
        for key, tensor in own.items():
            if tensor is not None and key not in part._non_persistent_buffers_set:
                yield NamedTensor(f"{path}.{key}" if path else key, tensor, part, key)


@torch.no_grad()
def load_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module.

    Args:
        module: The module.
        tensors: New values, keyed by the names of `state_tensors`. Integers, which are not
            transmitted, may be missing and keep their values.

    Raises:
        ValueError: If tensors are missing, or the module has no tensors of these names or shapes.
    """
    own = state_tensors(module)
    needed = {name for name, tensor in own.items() if tensor.is_floating_point()}
    if wrong := sorted((tensors.keys() - own.keys()) | (needed - tensors.keys())):
        raise ValueError(f"'{wrong[0]}' belongs to either the module or the tensors only")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            expected, found = tuple(own[name].shape), tuple(tensor.shape)
            raise ValueError(f"'{name}' has the shape {found}, expected {expected}")
        own[name].copy_(tensor)


def check_tensors(module: nn.Module) -> None:
    """Check that the tensors of a module can be read, and do not share memory.

    A weight that is used twice is the same `nn.Parameter` in both layers. Two tensors on the same
    memory would be trained, written and averaged as if they were independent.

    Raises:
        ModelError: If a part of the module was compiled to TorchScript, a layer has no shape yet,
            or a parameter or buffer shares memory with another tensor. Only buffers are compared
            with attributes.
    """
    registered = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if any(map(is_lazy, registered.values())):
        raise ModelError("lazy layers have no shapes yet; call the module once on an example first")
    attributes: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError("compiled to TorchScript; pass the module before its compilation")
        own = {key: value for key, value in vars(part).items() if isinstance(value, Tensor)}
        attributes |= {f"{path}.{key}" if path else key: value for key, value in own.items()}
    owners: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in [*registered.items(), *attributes.items()]:
        if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
            continue
        others = owners.setdefault(tensor.untyped_storage().data_ptr(), [])
        for first, other in others:
            # Layers may keep a view of a weight that each forward pass replaces.
            is_compared = name in registered or not isinstance(other, nn.Parameter)
            if is_compared and other is not tensor and _overlap(tensor, other):
                kind = "parameter" if isinstance(other, nn.Parameter) else "buffer"
                raise ModelError(
                    f"'{name}' shares memory with the {kind} '{first}', but is another tensor; to "
                    f"use one tensor twice, assign the same {kind} to both names"
                )
        if name in registered:
            others.append((name, tensor))


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one storage have common elements."""
    places = []
    for tensor in (a, b):
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        span = torch.arange(tensor.storage_offset(), tensor.storage_offset() + last + 1)
        places.append(span.as_strided(tensor.shape, tensor.stride()).reshape(-1))
    first, second = places
    is_apart = first.amax() < second.amin() or second.amax() < first.amin()
    return not is_apart and bool(torch.isin(first, second).any())


class ModuleSnapshot:
    """The buffers and attributes of a module at one moment, to which it can be restored.

    Parameters are not included, because a forward pass does not change them.

    Args:
        module: The module.
        buffers: Whether to include buffers. Default: True.
    """

    def __init__(self, module: nn.Module, buffers: bool = True) -> None:
        self._module = module
        self._has_buffers = buffers
        self._records = {
            name: (owner, key, _copy(owner[key]), _content(owner[key]))
            for name, owner, key in self._places()
        }

    def _places(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yield name, dictionary and key of each buffer, submodule and attribute."""
        for path, part in self._module.named_modules():
            prefix = f"{path}." if path else ""
            owners: list[Any] = [part.__dict__, part._modules]
            for owner in [*owners, part._buffers] if self._has_buffers else owners:
                for key in owner:
                    if owner is not part.__dict__ or key not in MODULE_ATTRIBUTES:
                        yield prefix + key, owner, key

    def changes(self) -> set[str]:
        """Return the names of what has another content now, and of what is new or missing."""
        now = {name: owner[key] for name, owner, key in self._places()}
        return {
            name
            for name in now.keys() | self._records.keys()
            if name not in now
            or name not in self._records
            or not _is_equal(_content(now[name]), self._records[name][3])
        }

    def tensor_kind(self, name: str) -> Any:
        """Return shape and dtype of a tensor, or None if there is no tensor of this name."""
        content = self._records[name][3] if name in self._records else None
        return (content.shape, content.dtype) if isinstance(content, Tensor) else None

    @torch.no_grad()
    def restore(self, names: Collection[str]) -> None:
        """Restore some of the buffers, submodules and attributes. What is new is removed."""
        new = [place for place in self._places() if place[0] not in self._records]
        for name, owner, key in new:
            if name in names:
                del owner[key]
        for name in names & self._records.keys():
            owner, key, value, content = self._records[name]
            if isinstance(value, Tensor):
                owner[key] = value.detach().copy_(content) if value.is_leaf else content
            else:
                owner[key] = _copy(value)


def _copy(value: Any) -> Any:
    """Copy a container or another object, but not a tensor or module."""
    if isinstance(value, (Tensor, nn.Module, *PLAIN_TYPES)):
        return value
    try:
        return copy.deepcopy(value)
    # Any object may refuse.
    except Exception:
        return value


def _content(value: Any) -> Any:
    """Return a copy of a tensor, and a description of any other value."""
    try:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if not isinstance(value, nn.Module):
            opaque: list[int] = []
            return f"{type(value)} {describe_value(value, opaque, set())} {opaque}"
    # Any object may refuse, such as a tensor that escaped from `vmap`. Without its content, only
    # another object is noticed.
    except Exception:
        pass
    return id(value)


def describe_value(  # noqa: PLR0911
    value: Any, opaque: list[int], parents: set[int]
) -> str:
    """Describe an attribute of a module, including the content of tensors and containers.

    Args:
        value: The attribute.
        opaque: List to which the ids of objects are appended that cannot be described.
        parents: Ids of the objects that contain the value.
    """
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    is_importable = "<" not in name and not name.startswith("__main__")
    if isinstance(value, PLAIN_TYPES):
        return repr(value)
    if isinstance(value, GENERATORS):
        return _describe_generator(value)
    if isinstance(value, torch.Tensor):
        shape = f"{value.dtype} {tuple(value.shape)}"
        if value.is_meta:
            return shape
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"{shape} {hashlib.sha256(raw.numpy().tobytes()).hexdigest()}"
    if hasattr(value, "__qualname__") and is_importable:
        return name
    # Submodules are described by their own attributes.
    if not isinstance(value, nn.Module) and id(value) not in parents:
        content = _parts_of(value)
        if content is None:
            opaque.append(id(value))
        else:
            inner = {*parents, id(value)}
            parts = (describe_value(each, opaque, inner) for each in content)
            return f"{type(value).__qualname__}({', '.join(parts)})"
    return type(value).__qualname__


def _parts_of(value: Any) -> Sequence[Any] | None:
    """Return the objects that an object consists of, or None for objects such as lambdas."""
    if isinstance(value, Mapping):
        return [each for pair in value.items() for each in pair]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if not callable(value) and hasattr(value, "__dict__"):
        return _parts_of(vars(value))
    return None


def _describe_generator(generator: Any) -> str:
    """Describe the state of a random number generator."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes().hex()
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    is_numpy = isinstance(generator, np.random.RandomState)
    return repr(generator.get_state(legacy=False) if is_numpy else generator.getstate())


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_kind = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return same_kind and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    return type(a) is type(b) and bool(a == b)


@dataclass(frozen=True)
class ForwardWrites:
    """Names of the state and the caches that a forward pass writes in training mode.

    Args:
        tensors: Names of the buffers and attributes that are state of the module.
        carried: Those of `tensors` that `state_dict` does not contain: attributes, and buffers that
            are not persistent.
        caches: Names of the attributes and of the buffers that are not persistent that no later
            pass depends on, such as the features of the last batch.
    """

    tensors: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()
    caches: frozenset[str] = frozenset()


def observe_forward(module: nn.Module, shape: Shape) -> ForwardWrites:
    """Find out what the forward pass of a module writes in training mode.

    A copy of the module computes random examples. What a pass writes outside of `state_dict` is
    state if the next pass depends on it, and a cache otherwise.

    Args:
        module: The module.
        shape: Shape of an example.

    Returns:
        The names of what is written. Nothing is found if the module cannot be copied or does not
        accept the examples, which training will report.

    Raises:
        ModelError: If state is not a tensor of constant shape and type.
    """
    try:
        module = copy.deepcopy(module).train()
        return _observe_copy(module, shape.random(2), shape.random(2, seed=1))
    except ModelError:
        raise
    # A module of unknown origin may raise any exception.
    except Exception:
        return ForwardWrites()


def _observe_copy(module: nn.Module, first: Tensor, second: Tensor) -> ForwardWrites:
    start = ModuleSnapshot(module)
    _outputs(module, first)
    after = ModuleSnapshot(module)
    written = start.changes()
    persistent = written & state_tensors(module).keys()
    others = written - persistent
    start.restore(written)
    outputs = _outputs(module, second)
    fresh = ModuleSnapshot(module)

    def is_read(name: str) -> bool:
        """Return whether a pass depends on what an earlier pass wrote under a name."""
        start.restore(start.changes())
        after.restore({name})
        try:
            same = all(map(_is_equal, outputs, _outputs(module, second)))
        # Other names that belong to this one were not written.
        except Exception:
            return True
        return not same or bool(fresh.changes())

    carried = {name for name in others if is_read(name)}
    for name in sorted(persistent | carried):
        kind = start.tensor_kind(name)
        if kind is None or kind != after.tensor_kind(name):
            raise ModelError(_describe_lost_state(module, name))
    return ForwardWrites(
        frozenset(persistent | carried), frozenset(carried), frozenset(others - carried)
    )


def _outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    with keyed_generators(0):
        outputs = module(x)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _describe_lost_state(module: nn.Module, name: str) -> str:
    path, _, attribute = name.rpartition(".")
    part = module.get_submodule(path)
    cure = (
        f"write self.register_buffer('{attribute}', tensor) in {type(part).__name__}.__init__ and "
        "keep its shape and type"
    )
    if isinstance(getattr(part, attribute, None), GENERATORS):
        cure = "draw from the global generator of torch, which is seeded for each client"
    return (
        f"its forward pass changes '{name}' and depends on it, but only buffers of constant shape "
        f"are kept for each client; {cure}"
    )


def carry_state(module: nn.Module, names: Collection[str]) -> None:
    """Make attributes and buffers of a module persistent buffers.

    Args:
        module: The module.
        names: Names of attributes that are tensors, and of buffers.
    """
    for name in names:
        path, _, key = name.rpartition(".")
        part = module.get_submodule(path)
        if key in part._buffers:
            part._non_persistent_buffers_set.discard(key)
        else:
            part.register_buffer(key, part.__dict__.pop(key))
