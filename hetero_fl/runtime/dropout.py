"""Keyed dropout: masks that depend on the step and the position, not on a global generator, a device or a batch neighbour."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


def mix(h: Tensor) -> Tensor:
    """A 32-bit integer hash (xorshift-multiply, in the manner of Prospecting for Hash Functions' lowbias32), in int64."""
    h = h & MASK
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & MASK
    return h ^ (h >> 16)


class KeyedDropout(TorchFunctionMode):
    """While active, `F.dropout` draws its mask from a hash of (key, number of the call, position).

    Inside `vmap` the key is a tensor (int64, one for each participant), and the masks are those of single runs. Rows that
    pad a short batch come after the others, so they move no position.
    """

    def __init__(self, key: int | Tensor) -> None:
        super().__init__()
        self.key = torch.as_tensor(key & MASK)
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.dropout, torch.dropout):
            return self.drop(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def drop(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Dropout of `input`, scaled by 1 / (1 − p)."""
        if not training or p == 0:
            return input
        self.calls += 1
        position = torch.arange(input.numel(), device=input.device).view(input.shape)
        bits = mix(mix(position + GOLDEN * self.calls) ^ mix(self.key.to(input.device)))
        return input * (bits >= int(p * 2**32)) / (1 - p)
