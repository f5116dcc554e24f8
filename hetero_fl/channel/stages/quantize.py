"""Numbers in few bits: levels at equal distances between −m and m, m being the largest size of those that share a scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from hetero_fl.channel.bits import pack, unpack
from hetero_fl.channel.reader import Reader
from hetero_fl.channel.stages.base import Draw, Format, Layout, count


@dataclass(frozen=True)
class Quantize(Format):
    """b bits: 2^b − 1 levels, nought among them; one bit: the sign (Alistarh et al. 2017, QSGD, with the largest size as norm).

    Rounded up or down at random, so that the mean over draws is the number itself. `nearest`, in a chain whose sender keeps what
    was not sent: to the nearest level, which from two bits on leaves a remainder that is exact in floating point (Sterbenz's
    lemma); one bit is then the sign times the mean size, as the largest would overshoot most numbers by far.
    """

    bits: int
    bucket: int | None = None
    nearest: bool = False

    def write(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        codes = torch.empty(len(numbers), dtype=torch.uint8 if self.bits <= 8 else torch.int32)
        chance = None if self.nearest else torch.rand(len(numbers), generator=draw("quantize"), dtype=numbers.dtype)
        scales, at = [], 0
        for block in self._blocks(numbers, layout):
            size = block.abs()
            scales.append(size.mean(1) if self.nearest and self.bits == 1 else size.amax(1))
            scale = torch.where(scales[-1] > 0, scales[-1], torch.ones_like(scales[-1]))
            share = block.div(scale[:, None]).view(-1)  # in [−1, 1]
            here = slice(at, at := at + len(share))
            codes[here] = self._code(share, None if chance is None else chance[here])
        return torch.cat(scales).numpy().tobytes() + pack(codes.numpy(), self.bits)

    def _code(self, share: Tensor, chance: Tensor | None) -> Tensor:
        """The levels next to numbers in [−1, 1], counted from the lowest."""
        if self.bits == 1:
            level = share.add_(1).div_(2)
            level = (level >= 0.5).to(share.dtype) if chance is None else level.add_(chance).floor_()
            return level.nan_to_num_(0).clamp_(0, 1)
        level = share.mul_(self._most)
        level = level.round_() if chance is None else level.add_(chance).floor_()
        return level.nan_to_num_(0).clamp_(-self._most, self._most).add_(self._most)

    def read(self, source: Reader, layout: Layout, dtype: torch.dtype) -> Tensor:
        rows = sum(r for r, _ in self._shapes(layout))
        kind = np.dtype(str(dtype).removeprefix("torch."))
        scales = torch.from_numpy(np.frombuffer(bytearray(source.take(rows * kind.itemsize)), kind))
        codes = torch.from_numpy(unpack(source, count(layout), self.bits))
        numbers = codes.to(dtype)
        numbers = numbers.mul_(2).sub_(1) if self.bits == 1 else numbers.sub_(self._most).div_(self._most)
        at = 0
        for block in self._blocks(numbers, layout):
            block.mul_(scales[at : (at := at + len(block)), None])
        return numbers

    @property
    def _most(self) -> int:
        """The highest level; the lowest is its opposite."""
        return max(1, 2 ** (self.bits - 1) - 1)

    def _shapes(self, layout: Layout) -> Iterator[tuple[int, int]]:
        """How the vector is cut: rows, of so many numbers, that have a scale each."""
        for size in map(prod, layout):
            width = min(size, self.bucket or size)
            if size:
                yield size // width, width
            if size and size % width:
                yield 1, size % width

    def _blocks(self, numbers: Tensor, layout: Layout) -> Iterator[Tensor]:
        shapes = list(self._shapes(layout))
        for flat, shape in zip(numbers.split([r * w for r, w in shapes]), shapes, strict=True):
            yield flat.view(shape)
