"""Seeding of the global random number generators around code that may draw from them.

The code of users (models, losses, transforms, metrics, data sources) may draw from the generators
of PyTorch, NumPy and Python. Inside `keyed_generators`, such draws depend on a key only, and the
caller's own random numbers do not change.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

CPU = torch.device("cpu")
# Whether the code runs inside a block whose end restores all generators.
_is_inside: ContextVar[bool] = ContextVar("inside_keyed_generators", default=False)


def seed_generators(seed: int, device: torch.device = CPU) -> None:
    """Seed the global generators of PyTorch (CPU and a device), NumPy and Python.

    This function is faster than `torch.manual_seed`, which also records a stack trace for each type
    of device that is not initialized.

    Args:
        seed: A non-negative integer.
        device: Device whose generator is seeded, too.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generator_hash() -> int:
    """Return a hash of the states of NumPy's and Python's generators, which every draw changes."""
    state = np.random.get_state(legacy=False)
    words: Any = state["state"]
    # A draw from a normal distribution may use the second number of an earlier draw.
    gauss = (state["has_gauss"], state["gauss"])
    return hash((words["key"].tobytes(), words["pos"], gauss, random.getstate()))


def read_states() -> tuple[Any, ...]:
    """Return the states of the global generators of PyTorch (CPU), NumPy and Python."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def write_states(states: tuple[Any, ...]) -> None:
    """Restore the states that `read_states` returned."""
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@contextmanager
def own_generators(seed: int = 0, device: torch.device = CPU) -> Iterator[None]:
    """Seed all global generators inside the `with` block, and restore those of the CPU afterwards.

    A block around a run makes the `brief` blocks inside it fast (see `keyed_generators`).

    Args:
        seed: A non-negative integer.
        device: Device whose generator is seeded, too.
    """
    states = read_states()
    token = _is_inside.set(True)
    try:
        seed_generators(seed, device)
        yield
    finally:
        _is_inside.reset(token)
        write_states(states)


@contextmanager
def keyed_generators(
    seed: int, device: torch.device = CPU, *, brief: bool = False
) -> Iterator[None]:
    """Seed all global generators inside the `with` block, and restore them afterwards.

    The generators belong to the process, so only one thread may be inside a block.

    Args:
        seed: A non-negative integer, such as a hash of a key.
        device: Device whose generator is seeded and restored, too.
        brief: Whether to leave the generators of NumPy and Python as they are after the block if
            another block surrounds it. Restoring these generators takes 0.1 ms, which is too long
            for a step of a small model. The code after the block must seed them again.

    Example:
        >>> import random
        >>> from model_zoo.generators import keyed_generators
        >>> state = random.getstate()
        >>> with keyed_generators(7):
        ...     first = random.random()
        >>> with keyed_generators(7):
        ...     second = random.random()
        >>> first == second, random.getstate() == state
        (True, True)
    """
    cpu = torch.get_rng_state()
    accelerator = _accelerator_state(device)
    is_nested = brief and _is_inside.get()
    try:
        if is_nested:
            seed_generators(seed, device)
        with nullcontext() if is_nested else own_generators(seed, device):
            yield
    finally:
        torch.set_rng_state(cpu)
        if accelerator is not None and device.type == "cuda":
            torch.cuda.set_rng_state(accelerator, device)
        elif accelerator is not None:
            torch.mps.set_rng_state(accelerator)


def _accelerator_state(device: torch.device) -> torch.Tensor | None:
    """Return the state of a device's generator, or None for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None
