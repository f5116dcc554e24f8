"""State and caches that the forward pass of a module writes."""

from __future__ import annotations

import random
from collections.abc import Collection, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from model_zoo import ModelError
from model_zoo.generators import keyed_generators
from model_zoo.module_state import ModuleSnapshot, first_names, have_equal_content
from model_zoo.shapes import Shape

# Random number generators of a module's own.
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@dataclass(frozen=True)
class ForwardWrites:
    """Names of the state and the caches that a forward pass writes.

    Args:
        tensors: Names of the parameters, buffers and attributes that are state of the module.
        attributes: Those of `tensors` that are attributes.
        caches: Names of the attributes that no later pass depends on, such as the features of the
            last batch.
        overwritten: Those of `caches` that are tensors which each pass writes before it reads them.
    """

    tensors: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    caches: frozenset[str] = frozenset()
    overwritten: frozenset[str] = frozenset()


def observe_forward(module: nn.Module, shape: Shape) -> ForwardWrites:
    """Find out what the forward pass of a module writes, by calls with random examples.

    Written attributes are caches if no later pass reads them, and state if they are tensors of
    constant shape and type.

    Args:
        module: The module, which is changed.
        shape: Shape of an example.

    Returns:
        The names of what is written. Nothing is found if the module does not accept the examples,
        which training will report.

    Raises:
        ModelError: If other state is written.
    """
    try:
        return _observe(module, shape.random(2), shape.random(2, seed=1), shape.random(3))
    except ModelError:
        raise
    # A module of unknown origin may raise any exception.
    except Exception:
        return ForwardWrites()


def _observe(module: nn.Module, first: Tensor, second: Tensor, larger: Tensor) -> ForwardWrites:
    names = first_names(module)
    with torch.no_grad():
        for parameter in module.parameters():
            # Attributes that are computed from parameters are then written, too.
            parameter.mul_(1.01)
    start = ModuleSnapshot(module)
    _outputs(module.train(), first)
    after = ModuleSnapshot(module)
    written = start.changes()
    _outputs(module, larger)
    last = ModuleSnapshot(module)

    kinds = {name: {each.tensor_kind(name) for each in (start, after, last)} for name in written}
    tensors = {name for name in written if len(kinds[name]) == 1 and None not in kinds[name]}
    attributes = tensors - names.keys()
    others = written - tensors

    def outputs_without(dropped: Set[str]) -> list[Tensor]:
        """Return the outputs of two further passes, without what was written under some names."""
        after.restore(after.changes())
        start.restore(dropped)
        # Even a read that would not change these outputs is an error then.
        start.remove(dropped & attributes)
        return [*_outputs(module.eval(), second), *_outputs(module.train(), second)]

    outputs = outputs_without(frozenset())
    later = ModuleSnapshot(module)

    def is_read(dropped: Set[str]) -> bool:
        """Return whether a pass depends on what an earlier pass wrote under some names."""
        try:
            same = all(map(have_equal_content, outputs, outputs_without(dropped)))
        # A name is missing, or other names that belong to these were not dropped.
        except Exception:
            return True
        return not same or bool(later.changes())

    caches = {name for name in attributes if not is_read({name})}
    # A pass may read one of them if another is missing.
    if caches and is_read(caches):
        caches = set()
    lost = sorted(others & names.keys()) or (sorted(others) if others and is_read(others) else [])
    if lost:
        raise ModelError(
            _describe_lost_state(module, next((n for n in lost if is_read({n})), lost[0]))
        )
    return ForwardWrites(
        frozenset(names.get(name, name) for name in tensors - caches),
        frozenset(attributes - caches),
        frozenset(others | caches),
        frozenset(caches),
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


def carry_state(module: nn.Module, attributes: Collection[str]) -> None:
    """Make all buffers of a module persistent, and attributes that are tensors buffers.

    Args:
        module: The module.
        attributes: Names of the attributes.
    """
    for part in module.modules():
        part._non_persistent_buffers_set.clear()
    for name in attributes:
        path, _, key = name.rpartition(".")
        part = module.get_submodule(path)
        part.register_buffer(key, part.__dict__.pop(key))


def release_state(
    module: nn.Module, non_persistent: Collection[str], attributes: Collection[str]
) -> None:
    """Undo `carry_state`, so that the module has the buffers and attributes of its class.

    Args:
        module: The module.
        non_persistent: Names of the buffers that the class does not register as persistent.
        attributes: Names of the attributes.
    """
    for name in [*non_persistent, *attributes]:
        path, _, key = name.rpartition(".")
        part = module.get_submodule(path)
        if name in attributes:
            part.__dict__[key] = part._buffers.pop(key)
        else:
            part._non_persistent_buffers_set.add(key)


def non_persistent_names(module: nn.Module) -> frozenset[str]:
    """Return the names of the buffers that are not persistent."""
    return frozenset(
        f"{path}.{key}" if path else key
        for path, part in module.named_modules()
        for key in part._non_persistent_buffers_set
        if part._buffers[key] is not None
    )
