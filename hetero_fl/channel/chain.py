"""A chain of stages over one vector of numbers: reduced stage by stage, then written; read, then restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hetero_fl.channel.reader import Reader
from hetero_fl.channel.stages.base import Draw, Format, Layout, Sort, Stage
from hetero_fl.channel.stages.half import Whole
from hetero_fl.channel.stages.quantize import Quantize


class Chain:
    """Those of the stages that are made for one sort of numbers. `biased`: the sender has to keep what was not sent."""

    def __init__(self, stages: Sequence[Stage | Format], sort: Sort) -> None:
        self.reducing = [s for s in stages if isinstance(s, Stage) and sort in s.sorts]
        self.biased = any(s.biased for s in self.reducing)
        formats = [s for s in stages if isinstance(s, Format) and sort in s.sorts]
        self.format: Format = formats[0] if formats else Whole()
        if self.biased and isinstance(self.format, Quantize):
            self.format = replace(self.format, nearest=True)

    def changes(self, layout: Layout) -> bool:
        """Whether a vector of this layout travels otherwise than as it is; the same at both ends."""
        return not isinstance(self.format, Whole) or any(s.reduces(layout) for s in self.reducing)

    def write(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        """The vector `[n]`, as it travels."""
        told = []
        for stage in self.reducing:
            if stage.reduces(layout):
                numbers, layout, besides = stage.reduce(numbers, layout, draw)
                told.append(besides)
        return b"".join([*told, self.format.write(numbers, layout, draw)])

    def read(self, source: Reader, layout: Layout, dtype: torch.dtype, draw: Draw) -> Tensor:
        """The reverse of `write`, with what was left out restored. Raises PayloadError for what is not of that layout."""
        done = []
        for stage in self.reducing:
            if stage.reduces(layout):
                left, told = stage.read(source, layout, draw)
                done.append((stage, layout, told))
                layout = left
        numbers = self.format.read(source, layout, dtype)
        for stage, before, told in reversed(done):
            numbers = stage.restore(numbers, before, told)
        return numbers
