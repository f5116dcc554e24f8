"""What a stage of the channel is: numbers in, fewer numbers and some bytes out; or, at the end of a chain, bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hetero_fl.channel.reader import Reader

# What the numbers of an item are: a model's change, a model as it is, a prediction a row, other rows or sums by class.
Sort = Literal["change", "whole", "predictions", "rows"]
Layout = tuple[tuple[int, ...], ...]  # the shapes of tensors that lie end to end in one vector
Draw = Callable[[str], torch.Generator]  # by label; both ends draw the same


def count(layout: Layout) -> int:
    """Numbers in a vector of that layout."""
    return sum(map(prod, layout))


def parts(numbers: Tensor, layout: Layout) -> Iterator[Tensor]:
    """The vector's tensors, as views in their shapes."""
    for flat, shape in zip(numbers.split([prod(shape) for shape in layout]), layout, strict=True):
        yield flat.view(shape)


class Stage(ABC):
    """Leaves numbers out. `numbers` is always one vector `[n]` of a floating type, in the order of `layout`."""

    sorts: ClassVar[frozenset[Sort]]
    biased: ClassVar[bool]  # whether what it leaves out is missing in the mean, too: the sender then keeps it for later

    def dearest(self) -> Stage:
        """The stage as a bound on its bytes takes it: itself, where what it sends is as long whatever the numbers."""
        return self

    @abstractmethod
    def reduces(self, layout: Layout) -> bool:
        """Whether it leaves anything out of such a vector; asked at both ends."""

    @abstractmethod
    def reduce(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        """What is left, its layout, and what the receiver has to be told besides."""

    @abstractmethod
    def read(self, source: Reader, layout: Layout, draw: Draw) -> tuple[Layout, Any]:
        """At the receiver: the layout of what was left, and what `restore` needs. Raises PayloadError."""

    @abstractmethod
    def restore(self, numbers: Tensor, layout: Layout, told: Any) -> Tensor:
        """A vector of `layout` from what was left of it."""


class Format(ABC):
    """Writes numbers; the end of a chain."""

    sorts: ClassVar[frozenset[Sort]] = frozenset({"change", "whole", "predictions", "rows"})

    @abstractmethod
    def write(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        """The numbers as bytes. What is not finite is written as something that is not finite when it is read."""

    @abstractmethod
    def read(self, source: Reader, layout: Layout, dtype: torch.dtype) -> Tensor:
        """The reverse of `write`. Raises PayloadError."""
