"""Memory of a device: copies of the host's tensors, and estimates of what training needs."""

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
from hetero_fl.core.participant import move_tree
from hetero_fl.engine.dropout import DropoutStreams, use_keyed_dropout
from hetero_fl.utils.caching import BoundedCache
from model_zoo.shapes import make_shape

CPU = torch.device("cpu")
# Of the memory that is free when the first tensor is copied.
CACHE_SHARE = 0.5
# For private state, of the memory that is free when the first is stored.
STATE_SHARE = 0.25
# Examples of the two forward passes that are compared. BatchNorm has no variance of one example.
FEWER, MORE = 2, 4


class DeviceCopy(NamedTuple):
    """A copy, the tensor that it was made of, and how often that had been changed in place."""

    copy: Tensor
    original: weakref.ref[Tensor]
    version: int


class DeviceMemory:
    """A device, and copies of the host's tensors that stay there as long as there is room.

    Rows are read in every round, and copied to the device once. A copy does not keep its original
    alive, and goes when that does.

    Args:
        device: The device. If it is the CPU, nothing is copied.
        keeps_copies: Whether copies stay. A user's method may change a tensor where no version
            tells (`.data`, `.numpy()`): what it computes with is copied each time.
        stores_tensors: Whether the tensors of participants are stored on the device, if it is a
            GPU: models, state, rows, predictions and messages that are handed over.

    Attributes:
        storage_device: Where the tensors of participants are stored, the device or the CPU.
    """

    def __init__(
        self, device: torch.device, keeps_copies: bool = True, stores_tensors: bool = False
    ) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.storage_device = device if stores_tensors and device.type == "cuda" else CPU
        self._keeps_copies = keeps_copies
        self._state_room: int | None = None  # bytes
        self._copies: BoundedCache[DeviceCopy] | None = None
        self._gone: list[int] = []  # keys of tensors that no longer exist

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy on the device, detached, that stays there; or the tensor itself.

        Returns the tensor itself if it is on the device already or does not fit. Callers must
        therefore still move the result to the device, and must not change it in place.

        Args:
            tensor: Any tensor. If it was changed in place, it is copied again; changes that its
                version does not count (`.data`, `.numpy()`, fused optimizers) go unnoticed.
        """
        if tensor.device.type == self.device.type or not self._keeps_copies:
            return tensor
        if tensor.is_inference():  # has no version
            return tensor
        if self._copies is None:
            room = int(CACHE_SHARE * free_bytes(self.device))
            self._copies = BoundedCache(max(1, room), lambda entry: entry.copy.nbytes)
        while self._gone:
            self._copies.pop(self._gone.pop(), None)
        if tensor.nbytes > self._copies.maxsize:
            return tensor
        key = id(tensor)
        known = self._copies.get(key)
        if known is None or known.original() is not tensor or known.version != tensor._version:
            # Removed later: the callback may come while the cache is being changed.
            original = weakref.ref(tensor, lambda _: self._gone.append(key))
            copy = tensor.detach().to(self.device)
            known = self._copies[key] = DeviceCopy(copy, original, tensor._version)
        return known.copy

    def to_storage(self, tree: Any) -> Any:
        """Return a tree of dictionaries, lists and tensors with its tensors on the storage device."""
        return move_tree(tree, self.storage_device)

    def columns_to_storage(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return columns of rows on the storage device, or as they are if they do not fit there."""
        if self.storage_device.type == "cpu":
            return dict(columns)
        return {name: self.keep(column) for name, column in columns.items()}

    def has_room_for_state(self, num_bytes: int) -> bool:
        """Return whether private state of this size, in total, may be on the storage device."""
        if self.storage_device.type == "cpu":
            return True
        if self._state_room is None:
            self._state_room = int(STATE_SHARE * free_bytes(self.device))
        return num_bytes <= self._state_room

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensors stacked on the device; one that occurs several times is copied once."""
        return torch.stack([self.keep(t).detach().to(self.device) for t in tensors])

    @property
    def has_copies(self) -> bool:
        """Whether copies take memory that training could use."""
        return bool(self._copies)

    def give_up(self) -> None:
        """Free the memory, and keep no more copies: training needs all of it."""
        self._keeps_copies = False
        self._copies = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that this process can still use; 0 for other devices."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that the local training of one participant takes, about.

    The workspace of convolutions, the batch and the gradients of single examples, which private
    records need, are not counted.

    Attributes:
        weights: Tensors of its models.
        gradients: One for each parameter.
        optimizer: Momentum, or both moments of Adam.
        activations: What the forward pass of a batch keeps for the gradients.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @classmethod
    def estimate(
        cls, models: Mapping[str, ModelSpec], optimizer: OptimizerConfig, batch_size: int
    ) -> MemoryPlan:
        """Estimate it for a participant that trains all of its models at once.

        Args:
            models: Its models by slot.
            optimizer: Settings of the optimizer.
            batch_size: Examples per step.
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


@cache
def activation_bytes(arch: ModelSpec) -> int:
    """Return the bytes that a model's forward pass in training keeps for each example.

    Measured: the memory that two forward passes keep, of which one has more examples.
    """
    return (_kept_bytes(arch, MORE) - _kept_bytes(arch, FEWER)) // (MORE - FEWER)


def _kept_bytes(arch: ModelSpec, examples: int) -> int:
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no other tensor gets the same memory

    def count(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.random.fork_rng(devices=[]):
        module = arch.build().train()
        dropout = DropoutStreams(CPU)
        use_keyed_dropout(module, dropout)
        dropout.seed([0], examples)
        _, channels, size, _ = arch.size_arguments
        x = make_shape(channels, size, arch.vocabulary).blank(examples)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            module(x)
    return sum(sizes.values())
