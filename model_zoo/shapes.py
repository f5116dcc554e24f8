"""The shape of one example, which is an image, a series, a table row, or tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from model_zoo.errors import ModelError
from model_zoo.options import is_integer, is_list

Kind = Literal["table", "series", "image", "tokens"]
# Kinds of numeric examples. The index of a kind is the number of dimensions besides the channels.
KINDS: tuple[Kind, ...] = ("table", "series", "image")


@dataclass(frozen=True)
class Shape:
    """The shape of one example.

    Attributes:
        channels: Channels of an image or series, columns of a table row, 1 for tokens.
        size: `()` for a table row, `(L,)` for a series or tokens, `(H, W)` for an image.
        vocabulary: Number of different tokens. If None, examples are numeric.
    """

    channels: int
    size: tuple[int, ...]
    vocabulary: int | None = None

    @property
    def kind(self) -> Kind:
        """Kind of example: "table", "series", "image" or "tokens"."""
        return KINDS[len(self.size)] if self.vocabulary is None else "tokens"

    @property
    def vocabulary_size(self) -> int:
        """Number of different tokens, which is 0 for numeric examples."""
        return self.vocabulary or 0

    @property
    def num_values(self) -> int:
        """Number of values in an example."""
        return self.channels * math.prod(self.size)

    @property
    def steps(self) -> tuple[int, int]:
        """Number of steps and width of a step, if the example is treated as a sequence.

        The steps are the rows of an image or the points of a series. A table row has no steps.
        """
        return self.size[0], self.channels * math.prod(self.size[1:])

    def zeros(self, batch_size: int) -> torch.Tensor:
        """Return a batch of zeros.

        The shape is `[batch_size, channels, *size]`, or `[batch_size, L]` (int64) for tokens.
        """
        if self.vocabulary is not None:
            return torch.zeros(batch_size, *self.size, dtype=torch.int64)
        return torch.zeros(batch_size, self.channels, *self.size)

    def random(self, batch_size: int, seed: int = 0) -> torch.Tensor:
        """Return a batch of numbers from 0 to 1 or of tokens other than 0, drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        blank = self.zeros(batch_size)
        if self.vocabulary is None:
            return torch.rand(blank.shape, generator=generator)
        return torch.randint(1, self.vocabulary, blank.shape, generator=generator)

    def __str__(self) -> str:
        if self.kind == "tokens":
            return f"a text of {self.size[0]} tokens (vocabulary of {self.vocabulary})"
        if self.kind == "table":
            return f"a table row of {self.channels} columns"
        if self.kind == "series":
            length = self.size[0]
            channels = self.channels
            return (
                f"a series of length {length} ({channels} channels; batches have the shape "
                f"[B, {channels}, {length}])"
            )
        return f"an image of {self.size[0]}x{self.size[1]} pixels ({self.channels} channels)"


def make_shape(
    in_channels: int, input_size: int | Sequence[int], vocabulary: int | None = None
) -> Shape:
    """Check the arguments and return the shape of an example.

    Args:
        in_channels: Channels of an image or series, columns of a table row, 1 for tokens.
        input_size: `S` for images of S x S pixels, `(H, W)` for images, `(L,)` for series or tokens
            of length L, `()` for table rows.
        vocabulary: Number of different tokens. If None, examples are numeric.

    Raises:
        ModelError: If an argument is not valid.
    """
    if vocabulary is not None:
        return _make_token_shape(in_channels, input_size, vocabulary)
    if not is_integer(in_channels):
        raise ModelError(f"in_channels: expected an integer >= 1, got {in_channels!r}")
    size: Any = (input_size, input_size) if is_integer(input_size) else input_size
    if not is_list(size) or len(size) > 2 or not all(map(is_integer, size)):
        raise ModelError(
            "input_size: expected S or (H, W) for an image, (L,) for a series or () for a table "
            f"row, got {input_size!r}"
        )
    return Shape(int(in_channels), tuple(map(int, size)))


def _make_token_shape(in_channels: int, input_size: int | Sequence[int], vocabulary: int) -> Shape:
    if not is_integer(vocabulary, 2):
        raise ModelError(f"vocabulary: expected an integer >= 2, got {vocabulary!r}")
    if not is_list(input_size) or len(input_size) != 1 or not is_integer(input_size[0]):
        raise ModelError(f"input_size: expected (L,) for texts of L tokens, got {input_size!r}")
    if in_channels != 1:
        raise ModelError(f"in_channels: expected 1 for tokens, got {in_channels!r}")
    return Shape(1, (int(input_size[0]),), int(vocabulary))
