"""What one example looks like: an image, a series, a row of a table, or tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch

from model_zoo.errors import ModelError

Kind = Literal["table", "series", "image", "tokens"]
# of numbers, by the number of dimensions beside the channels
KINDS: tuple[Kind, ...] = ("table", "series", "image")


@dataclass(frozen=True)
class Shape:
    """An example's shape ``(channels, *size)``: size ``()`` a table row, ``(L,)`` a series, ``(H, W)`` an image.

    With a ``vocabulary`` it is ``(L,)`` tokens, whole numbers from 0 to below the vocabulary's size.
    """

    channels: int
    size: tuple[int, ...]
    vocabulary: int | None = None

    @property
    def kind(self) -> Kind:
        return KINDS[len(self.size)] if self.vocabulary is None else "tokens"

    @property
    def words(self) -> int:
        """Size of the vocabulary; 0 where there is none."""
        return self.vocabulary or 0

    @property
    def numbers(self) -> int:
        """How many numbers an example has."""
        return self.channels * math.prod(self.size)

    @property
    def steps(self) -> tuple[int, int]:
        """(number of steps, width of a step) when read as a sequence: an image row by row, a series point by point."""
        return self.size[0], self.channels * math.prod(self.size[1:])

    def blank(self, n: int) -> torch.Tensor:
        """A batch of ``n`` examples of nothing but noughts: [n, channels, *size]; tokens [n, L], int64."""
        if self.vocabulary is not None:
            return torch.zeros(n, *self.size, dtype=torch.int64)
        return torch.zeros(n, self.channels, *self.size)

    def __str__(self) -> str:
        if self.kind == "tokens":
            return f"a text of {self.size[0]} tokens (of a vocabulary of {self.vocabulary})"
        if self.kind == "table":
            return f"a table row of {self.channels} columns"
        if self.kind == "series":
            return f"a series of length {self.size[0]} ({self.channels} channels)"
        return f"an image of {self.size[0]}x{self.size[1]} pixels ({self.channels} channels)"


def is_integer(value: Any, least: int = 1) -> bool:
    """Is ``value`` a whole number of at least ``least``? (True and False are not numbers here.)"""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def make_shape(
    in_channels: int, input_size: int | Sequence[int], vocabulary: int | None = None
) -> Shape:
    """Checks all and gives the :class:`Shape`. Raises :class:`ModelError`."""
    if vocabulary is not None:
        return _tokens(in_channels, input_size, vocabulary)
    if not is_integer(in_channels):
        raise ModelError(
            f"in_channels: found {in_channels!r}, a whole number of at least 1 is needed"
        )
    if is_integer(input_size):
        return Shape(int(in_channels), (int(input_size),) * 2)  # type: ignore[arg-type]
    listed = isinstance(input_size, Sequence) and not isinstance(input_size, str)
    if not listed or len(input_size) > 2 or not all(is_integer(s) for s in input_size):  # type: ignore[arg-type, union-attr]
        raise ModelError(
            f"input_size: found {input_size!r}; give S or (H, W) for an image, (L,) for a series, () for a table row"
        )
    return Shape(int(in_channels), tuple(int(s) for s in input_size))  # type: ignore[union-attr]


def _tokens(in_channels: int, input_size: int | Sequence[int], vocabulary: int) -> Shape:
    if not is_integer(vocabulary, 2):
        raise ModelError(
            f"vocabulary: found {vocabulary!r}, a whole number of at least 2 is needed"
        )
    if (
        not isinstance(input_size, Sequence)
        or len(input_size) != 1
        or not is_integer(input_size[0])
    ):
        raise ModelError(f"input_size: found {input_size!r}; give (L,) for texts of L tokens")
    if in_channels != 1:
        raise ModelError(f"in_channels: found {in_channels!r}; tokens have 1")
    return Shape(1, (int(input_size[0]),), int(vocabulary))
