"""The likeliest classes of each prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetero_fl.channel.bits import pack, unpack
from hetero_fl.channel.reader import Reader
from hetero_fl.channel.stages.base import Draw, Layout, Stage
from hetero_fl.payload import PayloadError


@dataclass(frozen=True)
class TopClasses(Stage):
    """Of each row `[C]` the k largest numbers with their classes, and the mean of all others in place of those: the sum of a row
    stays what it was. `[N, C]` becomes `[N, k + 1]`."""

    k: int

    sorts = frozenset({"predictions"})
    biased = False  # predictions are said anew each round: there is nothing to make up for

    def reduces(self, layout: Layout) -> bool:
        return len(layout) == 1 and len(layout[0]) == 2 and self.k + 1 < layout[0][1]

    @staticmethod
    def _bits(classes: int) -> int:
        return (classes - 1).bit_length()

    def reduce(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        ((n, classes),) = layout
        rows = numbers.view(n, classes)
        which = rows.topk(self.k).indices.sort(-1).values
        top = rows.gather(1, which)
        rest = rows.scatter(1, which, 0).sum(1, keepdim=True) / (classes - self.k)
        told = pack(which.reshape(-1).numpy(), self._bits(classes))
        return torch.cat([top, rest], 1).reshape(-1), ((n, self.k + 1),), told

    def read(self, source: Reader, layout: Layout, draw: Draw) -> tuple[Layout, Any]:
        ((n, classes),) = layout
        which = torch.from_numpy(unpack(source, n * self.k, self._bits(classes))).long().view(n, self.k)
        if bool((which >= classes).any()) or bool((which.diff(dim=1) < 1).any()):
            raise PayloadError(f"classes of a row that are not ascending below {classes}")
        return ((n, self.k + 1),), which

    def restore(self, numbers: Tensor, layout: Layout, told: Any) -> Tensor:
        ((n, classes),) = layout
        said = numbers.view(n, self.k + 1)
        return said[:, -1:].expand(n, classes).scatter(1, told, said[:, :-1]).reshape(-1)
