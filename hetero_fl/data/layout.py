"""What a raw example is made of: named columns, or named blocks (modalities) of a flat row; and which of them a view takes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hetero_fl.errors import UserError, nearest

Spans = tuple[tuple[int, int], ...]
"""Runs of columns of the last axis, each from its first to before its last."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class Block(NamedTuple):
    """A named run of columns of a flat row `[D]`, and the shape that its values have: `(1, 28, 28)` an image, `(60,)` a row."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Columns."""
        return math.prod(self.shape)

    @property
    def image(self) -> bool:
        """Whether its values are pixels."""
        return len(self.shape) == 3


@dataclass(frozen=True)
class Layout:
    """The names of what lies along an example's last axis: columns, or blocks; neither where nothing has a name."""

    columns: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What a view may choose from."""
        return tuple(b.name for b in self.blocks) or self.columns

    @property
    def ends(self) -> dict[str, tuple[int, int]]:
        """Where each named column or block begins and ends."""
        if not self.blocks:
            return {name: (i, i + 1) for i, name in enumerate(self.columns)}
        return {b.name: span for b, span in zip(self.blocks, spans_of(self.blocks), strict=True)}

    def spans(self, names: Sequence[str], where: str) -> Spans:
        """The runs of columns that bear these names, in the data's own order; neighbours are one run.

        Raises:
            UserError: nothing has a name, or nothing this one.
        """
        for name in names:
            if name not in self.names:
                hint = (
                    nearest(name, self.names) if self.names else "; nothing of these examples has a name, leave it out"
                )
                raise UserError(f"{where}: found '{name}'{hint}")
        return merged(tuple(span for name, span in self.ends.items() if name in names))


def spans_of(blocks: Sequence[Block]) -> Spans:
    """Where each block begins and ends."""
    found, start = [], 0
    for block in blocks:
        found.append((start, start + block.size))
        start += block.size
    return tuple(found)


def merged(spans: Spans) -> Spans:
    """The same columns in as few runs as can be."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def check_blocks(blocks: Sequence[Block], shape: Sequence[int], where: str) -> None:
    """Refuse (UserError) blocks that are no rows of these (shape of an example), or bear names that tensors cannot have."""
    names = [b.name for b in blocks]
    for name in names:
        if not NAME.fullmatch(name) or names.count(name) > 1:
            raise UserError(f"{where}: blocks: found '{name}'; names are letters, digits and _, each once")
    if blocks and (len(shape) != 1 or shape[0] != sum(b.size for b in blocks)):
        sizes = " + ".join(str(b.size) for b in blocks)
        raise UserError(
            f"{where}: blocks: found {sizes} columns for examples of shape {tuple(shape)}; blocks lie in rows"
        )
