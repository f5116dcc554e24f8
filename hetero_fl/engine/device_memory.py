"""Device memory: cached copies of CPU tensors on the device that trains.

Private states are the values that participants keep between rounds (`Participant.state`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hetero_fl.core.mapped_tensors import mapped_file
from hetero_fl.core.participant import Columns, move_tree

CPU = torch.device("cpu")
# Maximum size of the cache, as a fraction of the memory that is free when the first tensor is
# copied.
CACHE_SHARE = 0.5
# Maximum size of private states on the device, as a fraction of the memory that is free when the
# first state is stored.
STATE_SHARE = 0.25


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
        # Maximum number of bytes of the cache; None before the first copy.
        self._max_copied_bytes: int | None = None
        # Copies and the versions of the originals, keyed by the original.
        self._copies = WeakTensorKeyDictionary()
        # Number of bytes copied since the cache was empty.
        self._copied_bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process caches its own copies.
        return type(self), (self.device, self._keeps_copies, self.storage_device != CPU)

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a cached, detached copy of a tensor on the device.

        The tensor itself is returned if it is already on the device, does not fit into the cache or
        cannot be cached. Callers must therefore move the result to the device and must not modify
        the result in place.

        Args:
            tensor: A tensor. If it was modified in place, it is copied again. Modifications that do
                not increment the version
                of the tensor (by `.data`, `.numpy()` or fused optimizers) are not detected.
        """
        if not self._keeps_copies or tensor.device.type == self.device.type:
            return tensor
        if self._max_copied_bytes is None:
            self._max_copied_bytes = int(CACHE_SHARE * free_bytes(self.device))
        # Inference tensors have no version.
        if tensor.is_inference() or tensor.nbytes > self._max_copied_bytes:
            return tensor
        copy, version = self._copies.get(tensor, (tensor, None))
        if version != tensor._version:
            if self._copied_bytes + tensor.nbytes > self._max_copied_bytes:
                self._copies.clear()
                self._copied_bytes = 0
            self._copied_bytes += tensor.nbytes
            copy = tensor.detach().to(self.device)
            self._copies[tensor] = copy, tensor._version
        return copy

    def to_storage(self, tree: Any) -> Any:
        """Move all tensors of a tree of dictionaries and lists to the storage device."""
        return move_tree(tree, self.storage_device)

    def keep_column(self, column: Tensor) -> Tensor:
        """Return a column on the device, cached as by `keep`.

        A mapped column that does not fit into the cache is returned unchanged.
        """
        if self.device.type == "cpu":
            return column
        kept = self.keep(column)
        return kept.to(self.device) if mapped_file(kept) is None else kept

    def columns_to_storage(self, columns: Columns) -> Columns:
        """Return the columns of a data set on the storage device.

        Columns that do not fit into the cache are returned unchanged.

        Args:
            columns: Columns, keyed by name.
        """
        if self.storage_device.type == "cpu":
            return dict(columns)
        return {name: self.keep(column) for name, column in columns.items()}

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
        self._copies.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that this process can still allocate, or 0 for other devices."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
