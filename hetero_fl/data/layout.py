"""What a raw example is made of: named columns, or named blocks (modalities) of a flat row; and which of them a view takes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hetero_fl.errors import UserError, nearest, printable

Spans = tuple[tuple[int, int], ...]
"""Runs of columns of the last axis, each from its first to before its last."""
Categories = tuple[tuple[str, tuple[str, ...]], ...]
"""Text columns of a table that are encoded as indicators, each with its values in their order."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def indicators(column: str, values: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns that say 1 where a text column has a value, else 0."""
    return tuple(f"{column}={value}" for value in values)


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
    """The names of what lies along an example's last axis: columns, or blocks; neither where nothing has a name.

    The indicators of a text column (`categories`) lie next to each other and go by that column's name.
    """

    columns: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    categories: Categories = ()

    @property
    def encoded(self) -> dict[str, str]:
        """The text column that each indicator stands for."""
        return {name: column for column, values in self.categories for name in indicators(column, values)}

    @property
    def names(self) -> tuple[str, ...]:
        """What a view may choose from."""
        encoded = self.encoded
        columns = dict.fromkeys(encoded.get(name, name) for name in self.columns)
        return tuple(b.name for b in self.blocks) or tuple(columns)

    @property
    def ends(self) -> dict[str, tuple[int, int]]:
        """Where each named column or block begins and ends."""
        if not self.blocks:
            found: dict[str, tuple[int, int]] = {}
            encoded = self.encoded
            for i, indicator in enumerate(self.columns):
                name = encoded.get(indicator, indicator)
                found[name] = (found.get(name, (i, i))[0], i + 1)
            return found
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
                raise UserError(f"{where}: found '{printable(name)}'{hint}")
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
