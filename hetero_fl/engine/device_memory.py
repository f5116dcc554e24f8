"""Device memory: cached copies of CPU tensors, and estimates of the memory for training.

Private states are the values that participants keep between rounds (`Participant.state`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import Columns, move_tree
from hetero_fl.core.stored_rows import Column
from hetero_fl.engine.dropout import DropoutStreams, use_keyed_dropout
from hetero_fl.utils.caching import BoundedCache
from model_zoo.generators import keyed_generators
from model_zoo.given_models import forgets_models
from model_zoo.shapes import make_shape

CPU = torch.device("cpu")
# Maximum size of the cache, as a fraction of the memory that is free when the first tensor is
# copied.
CACHE_SHARE = 0.5
# Maximum size of private states on the device, as a fraction of the memory that is free when the
# first state is stored.
STATE_SHARE = 0.25
# Batch sizes of the two forward passes in `activation_bytes`. BatchNorm needs two examples or more.
SMALL_BATCH = 2
LARGE_BATCH = 4


class DeviceCopy(NamedTuple):
    """A copy of a tensor on the device.

    Attributes:
        copy: The copy.
        original: Weak reference to the original tensor.
        version: Version of the original tensor that was copied.
    """

    copy: Tensor
    original: weakref.ref[Tensor]
    version: int


class DeviceMemory:
    """A device with a cache for copies of CPU tensors.

    For example, the rows of a data set are used in every round but copied to the device only once.
    A copy does not keep the original tensor alive and is removed together with the original.

    Args:
        device: The device. If it is the CPU, nothing is copied.
        keeps_copies: Whether copies are cached. Must be False if tensors may be modified without a
            new version number (by `.data` or `.numpy()`), as in user-defined methods. If False,
            tensors are copied each time.
        stores_tensors: Whether the tensors of participants (models, state, rows, predictions and
            messages within the process) are stored on the device if it is a GPU.

    Attributes:
        device: The device.
        storage_device: Device on which the tensors of participants are stored: `device` or the CPU.
    """

    def __init__(
        self, device: torch.device, keeps_copies: bool = True, stores_tensors: bool = False
    ) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.storage_device = device if stores_tensors and device.type == "cuda" else CPU
        self._keeps_copies = keeps_copies
        # Maximum number of bytes of private states; None before the first call of
        # `has_room_for_state`.
        self._max_state_bytes: int | None = None
        self._copies: BoundedCache[DeviceCopy] | None = None
        # Cache keys of tensors that no longer exist.
        self._dead_keys: list[int] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a cached, detached copy of a tensor on the device.

        The tensor itself is returned if it is already on the device, does not fit into the cache or
        cannot be cached. Callers must therefore move the result to the device and must not modify
        the result in place.

        Args:
            tensor: Any tensor. A tensor that was modified in place is copied again. Modifications
                that do not increment the version of the tensor (by `.data`, `.numpy()` or fused
                optimizers) are not detected.
        """
        if tensor.device.type == self.device.type or not self._keeps_copies:
            return tensor
        # Inference tensors have no version.
        if tensor.is_inference():
            return tensor
        if self._copies is None:
            room = int(CACHE_SHARE * free_bytes(self.device))
            self._copies = BoundedCache(max(1, room), lambda entry: entry.copy.nbytes)
        while self._dead_keys:
            self._copies.pop(self._dead_keys.pop(), None)
        if tensor.nbytes > self._copies.maxsize:
            return tensor
        key = id(tensor)
        known = self._copies.get(key)
        if known is None or known.original() is not tensor or known.version != tensor._version:
            # The entry is removed later, because the callback may run while the cache is modified.
            original = weakref.ref(tensor, lambda _: self._dead_keys.append(key))
            copy = tensor.detach().to(self.device)
            known = self._copies[key] = DeviceCopy(copy, original, tensor._version)
        return known.copy

    def to_storage(self, tree: Any) -> Any:
        """Move all tensors of a tree of dictionaries and lists to the storage device."""
        return move_tree(tree, self.storage_device)

    def keep_column(self, column: Column) -> Column:
        """Return a column on the device, cached as by `keep`, or unchanged if it is in files."""
        return self.keep(column).to(self.device) if isinstance(column, Tensor) else column

    def columns_to_storage(self, columns: Columns) -> Columns:
        """Return the columns of a data set on the storage device.

        Columns that do not fit into the cache and rows in files are returned unchanged.

        Args:
            columns: Columns, keyed by name.
        """
        if self.storage_device.type == "cpu":
            return dict(columns)
        return {
            name: self.keep(column) if isinstance(column, Tensor) else column
            for name, column in columns.items()
        }

    def has_room_for_state(self, num_bytes: int) -> bool:
        """Return whether private states of `num_bytes` in total fit on the storage device.

        The result is always True if the storage device is the CPU.
        """
        if self.storage_device.type == "cpu":
            return True
        if self._max_state_bytes is None:
            self._max_state_bytes = int(STATE_SHARE * free_bytes(self.device))
        return num_bytes <= self._max_state_bytes

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stack tensors on the device.

        A tensor that occurs repeatedly is copied only once if copies are cached.
        """
        return torch.stack([self.keep(t).detach().to(self.device) for t in tensors])

    @property
    def has_copies(self) -> bool:
        """Whether cached copies take memory that training could use."""
        return bool(self._copies)

    def disable_cache(self) -> None:
        """Free all cached copies and stop caching, so that training can use the memory."""
        self._keeps_copies = False
        self._copies = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that this process can still allocate, or 0 for other devices."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated memory for the local training of one participant, in bytes.

    The estimate does not include the workspace of convolutions, the batch, or the gradients of
    single examples in differentially private training.

    Attributes:
        weights: Bytes of the parameters and buffers of the models.
        gradients: Bytes of the gradients of all parameters.
        optimizer: Bytes of the optimizer state: the momentum, or both moments of Adam.
        activations: Bytes of the tensors that the forward pass of a batch saves for the backward
            pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Total number of bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @classmethod
    def estimate(
        cls, models: Mapping[str, ModelSpec], optimizer: OptimizerConfig, batch_size: int
    ) -> MemoryPlan:
        """Estimate the memory for training all models of a participant at once.

        Args:
            models: The models, keyed by slot.
            optimizer: Settings of the optimizer.
            batch_size: Number of examples per step.
        """
        size = torch.finfo(torch.get_default_dtype()).bits // 8
        archs = models.values()
        values = sum(math.prod(shape) for arch in archs for shape in arch.shapes.values())
        parameters = sum(
            math.prod(arch.shapes[name]) for arch in archs for name in arch.parameter_names
        )
        states = {"sgd": 1 if optimizer.momentum else 0, "adam": 2, "adamw": 2}[optimizer.name]
        return cls(
            weights=values * size,
            gradients=parameters * size,
            optimizer=states * parameters * size,
            activations=sum(map(activation_bytes, archs)) * batch_size,
        )


def activation_bytes(arch: ModelSpec) -> int:
    """Return the bytes per example that a forward pass saves for the backward pass.

    The number is measured in two forward passes in training mode with different batch sizes, in the
    default dtype.
    """
    return _measure_activation_bytes(arch, torch.get_default_dtype())


@forgets_models
@cache
def _measure_activation_bytes(arch: ModelSpec, _dtype: torch.dtype) -> int:
    # The dtype is an argument because it is part of the cache key.
    difference = _saved_bytes(arch, LARGE_BATCH) - _saved_bytes(arch, SMALL_BATCH)
    return difference // (LARGE_BATCH - SMALL_BATCH)


def _saved_bytes(arch: ModelSpec, examples: int) -> int:
    sizes: dict[int, int] = {}
    # The list keeps the tensors alive, so that no two of them have the same address.
    saved: list[Tensor] = []

    def count(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        saved.append(tensor)
        return tensor

    with keyed_generators(0):
        module = arch.build().train()
        dropout = DropoutStreams(CPU)
        use_keyed_dropout(module, dropout)
        dropout.seed([0], examples)
        _, channels, size, _ = arch.size_arguments
        x = make_shape(channels, size, arch.vocabulary).zeros(examples)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            module(x)
    return sum(sizes.values())
