"""Copies of the host's tensors on a device."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hetero_fl.utils.caching import BoundedCache

SHARE = 0.5  # of the memory that is free when the first tensor is copied


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
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: BoundedCache[DeviceCopy] | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy on the device that is kept, or the tensor itself.

        The latter if it is there already or larger than the room for copies: move what is computed
        with to the device all the same. Copies must not be changed in place.
        """
        if tensor.device.type == self.device.type:
            return tensor
        if self._copies is None:
            free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
            self._copies = BoundedCache(max(1, int(SHARE * free)), lambda entry: entry.copy.nbytes)
        if tensor.nbytes > self._copies.maxsize:
            return tensor
        key = id(tensor)
        known = self._copies.get(key)
        if known is None or known.original() is not tensor or known.version != tensor._version:
            original = weakref.ref(tensor, lambda _: self._forget(key))
            known = DeviceCopy(tensor.to(self.device), original, tensor._version)
            self._copies[key] = known
        return known.copy

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensors stacked on the device; one that occurs several times is copied once."""
        return torch.stack([self.keep(t).detach().to(self.device) for t in tensors])

    def clear(self) -> None:
        """Free the memory."""
        self._copies = None

    def _forget(self, key: int) -> None:
        if self._copies is not None:
            self._copies.pop(key, None)
