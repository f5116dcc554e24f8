"""Half precision: 11 significant bits of each number, whatever its size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hetero_fl.channel.reader import Reader
from hetero_fl.channel.stages.base import Draw, Format, Layout, count, parts

FAR = 126  # exponents of two that float32 has on either side


@dataclass(frozen=True)
class Half(Format):
    """IEEE half precision, each tensor multiplied by a power of two first that brings its largest number near the upper end:
    otherwise small changes would be rounded to nought, and sums of many rows overflow."""

    def write(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        halves, shifts, at = torch.empty(len(numbers), dtype=torch.float16), [], 0
        for part in parts(numbers, layout):
            most = float(part.abs().amax()) if part.numel() else 0.0
            shift = max(-FAR, min(FAR, 15 - int(np.frexp(most)[1]))) if np.isfinite(most) else 0
            halves[at : (at := at + part.numel())] = part.reshape(-1) * 2.0**shift
            shifts.append(shift)
        return np.array(shifts, np.int8).tobytes() + halves.numpy().tobytes()

    def read(self, source: Reader, layout: Layout, dtype: torch.dtype) -> Tensor:
        shifts = np.frombuffer(source.take(len(layout)), np.int8).tolist()
        numbers = torch.from_numpy(np.frombuffer(bytearray(source.take(2 * count(layout))), "<f2")).to(dtype)
        for part, shift in zip(parts(numbers, layout), shifts, strict=True):
            part.mul_(2.0 ** -max(-FAR, min(FAR, shift)))
        return numbers


@dataclass(frozen=True)
class Whole(Format):
    """All bits of each number: the end of a chain that names no other."""

    def write(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        return numbers.numpy().tobytes()

    def read(self, source: Reader, layout: Layout, dtype: torch.dtype) -> Tensor:
        kind = np.dtype(str(dtype).removeprefix("torch."))
        raw = source.take(count(layout) * kind.itemsize)
        return torch.from_numpy(np.frombuffer(bytearray(raw), kind))
