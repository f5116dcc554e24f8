"""The state of a module: its parameters and buffers, and what its forward pass writes.

A federation keeps the state of each client's model as named tensors and loads them into one module
in turn. This module finds out which tensors these are for a module of unknown origin.
"""

from __future__ import annotations

import copy
import enum
import hashlib
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from model_zoo.errors import ModelError

# Attributes of every module, such as the mode and the dictionaries of parameters and hooks, and the
# module from which a `SplitModel` was made.
MODULE_ATTRIBUTES = vars(nn.Module()).keys() | {"_source"}
# Types whose `repr` describes a value completely.
PLAIN_TYPES = (
    *(type(None), bool, int, float, complex, str),
    *(torch.dtype, torch.device, torch.Size, enum.Enum),
)
# Maximum length of the description of an object. Longer descriptions are hashed.
MAX_DESCRIPTION = 1000


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


def first_names(module: nn.Module) -> dict[str, str]:
    """Return the name in `state_tensors` of each name of a parameter or persistent buffer."""
    first: dict[int, str] = {}
    return {
        found.name: first.setdefault(id(found.tensor), found.name) for found in named_state(module)
    }


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
def load_state(
    module: nn.Module, tensors: Mapping[str, Tensor], optional: Collection[str] = ()
) -> None:
    """Copy tensors into a module.

    Args:
        module: The module.
        tensors: New values, keyed by the names of `state_tensors`, or by any name in `state_dict`,
            as in files of older versions. Of several values for one tensor, the last in the order
            of `state_dict` is used, as in those versions. Integers, which are not transmitted, may
            be missing and keep their values.
        optional: Names of other tensors that may be missing. Default: empty.

    Raises:
        ValueError: If tensors are missing, or the module has no tensors of these names or shapes.
    """
    own = state_tensors(module)
    first = {id(tensor): name for name, tensor in own.items()}
    # A module may rename its tensors in `state_dict`.
    named = [*own.items(), *module.state_dict(keep_vars=True).items()]
    names = {name: first[id(tensor)] for name, tensor in named if id(tensor) in first}
    given = {names[name]: tensors[name] for name in names if name in tensors}
    if unknown := sorted(tensors.keys() - names.keys()):
        raise ValueError(f"'{unknown[0]}' is not a tensor of the module")
    needed = {name for name, tensor in own.items() if tensor.is_floating_point()}
    if missing := sorted(needed - given.keys() - set(optional)):
        raise ValueError(f"'{missing[0]}' is missing")
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            expected, found = tuple(own[name].shape), tuple(tensor.shape)
            raise ValueError(f"'{name}' has the shape {found}, expected {expected}")
        own[name].copy_(tensor)


def convert_to_default_type(module: nn.Module) -> torch.dtype | None:
    """Convert a module whose floating-point tensors have one type to torch's default type.

    A module of several types uses them on purpose, and keeps them.

    Returns:
        The type that was converted, or None if the module has not changed.
    """
    tensors = [*module.parameters(), *module.buffers()]
    types = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    default = torch.get_default_dtype()
    if len(types) != 1 or default in types or any(t.is_complex() for t in tensors):
        return None
    module.to(default)
    return types.pop()


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
    """The state and the attributes of a module at one moment, to which it can be restored.

    Args:
        module: The module.
        tensors: Whether to include parameters and buffers. Default: True.
    """

    def __init__(self, module: nn.Module, tensors: bool = True) -> None:
        self._module = module
        self._has_tensors = tensors
        self._registered: dict[int, Any] = {id(part): part for part in module.modules()}
        for _, tensor in [*module.named_parameters(), *module.named_buffers()]:
            self._registered[id(tensor)] = tensor
        self._known = {key: (part, str(key)) for key, part in self._registered.items()}
        self._records = {
            name: (owner, key, self._copy(owner[key]), self._content(owner[key]))
            for name, owner, key in self._places()
        }

    def _places(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yield name, dictionary and key of each parameter, buffer, submodule and attribute."""
        for path, part in self._module.named_modules():
            prefix = f"{path}." if path else ""
            owners: list[Any] = [part.__dict__, part._modules]
            for owner in [*owners, part._parameters, part._buffers][
                : 4 if self._has_tensors else 2
            ]:
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
            or not have_equal_content(self._content(now[name]), self._records[name][3])
        }

    def tensor_kind(self, name: str) -> tuple[torch.Size, torch.dtype] | None:
        """Return shape and dtype of a tensor, or None if there is no tensor of this name."""
        content = self._records[name][3] if name in self._records else None
        return (content.shape, content.dtype) if isinstance(content, Tensor) else None

    @torch.no_grad()
    def restore(self, names: Collection[str]) -> None:
        """Restore some of the tensors, submodules and attributes. What is new is removed."""
        new = [place for place in self._places() if place[0] not in self._records]
        for name, owner, key in new:
            if name in names:
                del owner[key]
        for name in names & self._records.keys():
            owner, key, value, content = self._records[name]
            if isinstance(value, Tensor) and value.is_leaf:
                value.data.copy_(content)
                owner[key] = value
            else:
                owner[key] = content.clone() if isinstance(value, Tensor) else self._copy(value)

    def remove(self, names: Collection[str]) -> None:
        """Remove some of the tensors, submodules and attributes from the module."""
        for name in names & self._records.keys():
            owner, key, _, _ = self._records[name]
            owner.pop(key, None)

    def _copy(self, value: Any) -> Any:
        """Copy a container or another object, but no tensor or module of the module in it."""
        if isinstance(value, (Tensor, nn.Module, *PLAIN_TYPES)):
            return value
        try:
            return copy.deepcopy(value, dict(self._registered))
        # Any object may refuse.
        except Exception:
            return value

    def _content(self, value: Any) -> Any:
        """Return a copy of a tensor, and a description of any other value."""
        if isinstance(value, nn.Module):
            return id(value)
        try:
            if isinstance(value, Tensor):
                return value.detach().clone()
        # A tensor that escaped from `vmap` may refuse.
        except Exception:
            return id(value)
        return describe_content(value, self._known)


def describe_content(value: Any, known: Mapping[int, tuple[Any, str]] | None = None) -> str:
    """Describe a value such that another content has another description.

    An object whose content is not accessible, such as a lambda, is described by its address, so
    that only another object is noticed.

    Args:
        value: The value.
        known: Objects whose content does not count, and their descriptions, keyed by id.
    """
    try:
        return f"{type(value)} {_describe(value, dict(known or {}))}"
    # Any object may refuse.
    except Exception:
        return f"{type(value)} at {id(value):#x}"


def _describe(value: Any, known: dict[int, tuple[Any, str]]) -> str:  # noqa: PLR0911
    """Describe a value, and add the objects that it contains to `known`."""
    if isinstance(value, PLAIN_TYPES):
        return repr(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if id(value) in known:
        return known[id(value)][1]
    kind = type(value).__qualname__
    if isinstance(value, Tensor):
        shape = f"{value.dtype} {tuple(value.shape)}"
        if value.is_meta:
            return shape
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"{shape} {_describe(raw.numpy().tobytes(), known)}"
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    if hasattr(value, "__qualname__") and "<" not in name and not name.startswith("__main__"):
        return name
    parts = _parts_of(value)
    if parts is None:
        return f"{kind} at {id(value):#x}"
    # An object that contains itself is not described again. It is kept, so that it keeps its id.
    known[id(value)] = (value, kind)
    text = f"{kind}({', '.join([_describe(part, known) for part in parts])})"
    if len(text) > MAX_DESCRIPTION and " at 0x" not in text:
        # The text of an object that contains others repeatedly would grow exponentially.
        text = hashlib.sha256(text.encode()).hexdigest()
    known[id(value)] = (value, text)
    return text


def _parts_of(value: Any) -> Sequence[Any] | None:
    """Return the objects that an object consists of, or None for objects such as lambdas."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    # Recurrent layers keep weak references to their weights.
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, list | tuple):
        return value
    try:
        # From protocol 5 on, arrays return buffers in place of their content.
        reduced = value.__reduce_ex__(4)
    # Any object may refuse to be pickled.
    except Exception:
        return None
    if isinstance(reduced, str):
        return [reduced]
    return [list(part) if isinstance(part, Iterator) else part for part in reduced[1:]]


def have_equal_content(a: Any, b: Any) -> bool:
    """Return whether two values are equal, with NaN equal to NaN in tensors."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_kind = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return same_kind and (a.is_meta or bool(((a == b) | (a.isnan() & b.isnan())).all()))
    return type(a) is type(b) and bool(a == b)


def advise_on_error(error: BaseException, module: nn.Module | None = None) -> str:
    """Return advice on an exception of a forward pass, or "".

    Args:
        error: The exception.
        module: The module, whose tensors of other types than the inputs are named.
    """
    owner = getattr(error, "obj", None)
    if isinstance(error, AttributeError) and isinstance(owner, nn.Module):
        # Libraries do not read attributes that only a pass writes.
        if type(owner).__module__.startswith("torch."):
            return ""
        return (
            f"; if a forward pass writes it, write self.register_buffer('{error.name}', tensor) in "
            f"{type(owner).__name__}.__init__"
        )
    if not isinstance(error, RuntimeError) or "type" not in str(error) or module is None:
        return ""
    default = torch.get_default_dtype()
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != default:
            return (
                f"; '{name}' is {parameter.dtype}, but examples and the inputs of the head are "
                f"{default}: convert the module with .to({default}), or the inputs of the layer in "
                "forward"
            )
    return ""
