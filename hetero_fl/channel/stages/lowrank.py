"""Matrices of a change as few rank-one terms (Wu et al. 2022, FedKD's energy rule)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetero_fl.channel import lowrank
from hetero_fl.channel.reader import Reader
from hetero_fl.channel.stages.base import Draw, Layout, Stage, parts
from hetero_fl.payload import PayloadError

WHOLE = 2.0  # an energy that no truncation keeps: the most that it can be


@dataclass(frozen=True)
class LowRank(Stage):
    """The fewest terms with that share of the energy, for each matrix by itself; vectors are sent as they are."""

    energy: float

    sorts = frozenset({"change"})
    biased = True

    def dearest(self) -> LowRank:
        return LowRank(WHOLE)

    def reduces(self, layout: Layout) -> bool:
        return any(len(shape) > 1 for shape in layout)

    def reduce(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        energy = self.energy if bool(torch.isfinite(numbers).all()) else WHOLE  # no factorisation: told from its values
        packed = lowrank.compress({str(i): part for i, part in enumerate(parts(numbers, layout))}, energy)
        left = tuple(tuple(t.shape) for t in packed.values())
        rows = b"".join(shape[0].to_bytes(4, "little") for shape, was in zip(left, layout, strict=True) if len(was) > 1)
        return torch.cat([t.reshape(-1) for t in packed.values()]), left, rows

    def read(self, source: Reader, layout: Layout, draw: Draw) -> tuple[Layout, Any]:
        left: list[tuple[int, ...]] = []
        for shape in layout:
            if len(shape) > 1:
                most, width = lowrank.widest(shape)
                rows = source.number(4)
                if not 1 <= rows <= most:
                    raise PayloadError(f"{rows} terms of a matrix that {most} hold whole")
                left.append((rows, width))
            else:
                left.append(shape)
        return tuple(left), tuple(left)

    def restore(self, numbers: Tensor, layout: Layout, told: Any) -> Tensor:
        packed = {str(i): part for i, part in enumerate(parts(numbers, told))}
        like = {str(i): numbers.new_empty(shape) for i, shape in enumerate(layout)}
        return torch.cat([t.reshape(-1) for t in lowrank.restore(packed, like).values()])
