"""What an exported model is given: raw examples, as far as the model sees them, each kind of measurement under a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hetero_fl.data.layout import Block, Categories, indicators
from hetero_fl.data.preprocess import Preprocess
from hetero_fl.saved import SavedModel

Sizes = tuple[int | str, ...]


@dataclass(frozen=True)
class Input:
    """One input: its name, its shape without the batch (a word is a size that is free), what its numbers are.

    `columns` are the names along the last axis, where those are known; `categories` the text columns that some of them
    encode, with their values; `gaps`: NaN is a missing value, and no mistake;
    `tokens`: how many different ones there are.
    """

    name: str
    kind: Literal["image", "row", "series", "tokens"]
    shape: Sizes
    columns: tuple[str, ...] = ()
    gaps: bool = False
    tokens: int = 0
    categories: Categories = ()

    @property
    def dtype(self) -> str:
        """Of the numbers."""
        return "int64" if self.kind == "tokens" else "float32"

    @property
    def meaning(self) -> str:
        """What they are, in words."""
        missing = "; NaN where a value is missing" if self.gaps else ""
        if self.kind == "tokens":
            return f"numbers of words, 0 to {self.tokens - 1}; 0 is no word and fills shorter texts up from the left"
        if self.kind == "image":
            return f"pixels from 0 to 1 (bytes divided by 255), channels first{missing}"
        if self.kind == "series":
            return f"steps × columns, the newest step last, in the units of the data{missing}"
        encoded = "; NAME=VALUE is 1 where column NAME has that value, else 0" if self.categories else ""
        return f"a value a column, in the units of the data{encoded}{missing}"

    def record(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        fields: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "shape": ["batch", *self.shape],
            "dtype": self.dtype,
            "meaning": self.meaning,
        }
        fields |= {"columns": list(self.columns)} if self.columns else {}
        fields |= {"categories": {c: list(v) for c, v in self.categories}} if self.categories else {}
        fields |= {"gaps": True} if self.gaps else {}
        return fields | ({"tokens": self.tokens} if self.tokens else {})


def side_by_side(view: Preprocess) -> bool:
    """Whether the model reads blocks as one row, and not a single block in its own shape."""
    return bool(view.blocks) and (len(view.blocks) > 1 or view.missing is not None)


def inputs_of(model: SavedModel) -> tuple[Input, ...]:
    """What the exported graph takes: tokens, images, rows or series; a block of several each by itself."""
    view, seen = Preprocess(**model.preprocess), model.arch.input_shape
    gaps = view.missing is not None
    if model.arch.vocabulary is not None:
        return (Input("tokens", "tokens", seen, tokens=model.arch.vocabulary),)
    if side_by_side(view):
        return tuple(Input(b.name, _kind(b), b.shape, gaps=gaps) for b in view.blocks)
    if len(seen) == 3:
        name = view.blocks[0].name if view.blocks else "image"
        channels: Sizes = ("channels",) if view.channels is not None else seen[:1]
        return (Input(name, "image", (*channels, *(("height", "width") if view.resize is not None else seen[1:]))),)
    if view.blocks:
        return (Input(view.blocks[0].name, "row", view.blocks[0].shape),)
    names = tuple(view.names(model.columns)) if model.columns else ()
    columns = seen[0] if view.raw is None else view.taken(torch.empty(0, view.raw[-1])).shape[-1]
    kind: Literal["series", "row"] = "series" if len(seen) == 2 else "row"
    categories = tuple(pair for pair in model.categories if set(indicators(*pair)) <= set(names))
    shape = (*seen[:0:-1], columns)  # a series lies in memory with its steps first
    return (Input(kind, kind, shape, names, gaps, categories=categories),)


def as_predicted(model: SavedModel, given: tuple[Tensor, ...]) -> Any:
    """The same examples in the form that `Run.predict` takes: whole rows where it wants those, or blocks by name."""
    view = Preprocess(**model.preprocess)
    if side_by_side(view):
        return {block.name: part for block, part in zip(view.blocks, given, strict=True)}
    (x,) = given
    if view.raw is None or view.spans is None or view.blocks:
        return x
    whole = x.new_full((*x.shape[:-1], view.raw[-1]), torch.nan)
    whole[..., torch.cat([torch.arange(*span) for span in view.spans])] = x
    return whole


def drawn(model: SavedModel, size: int, draws: torch.Generator) -> tuple[Tensor, ...]:
    """Examples to try a graph on, `size` of each input: values of the size that this client's data have, and gaps where the
    model has an answer to them; free sizes of images differ with `size`."""
    view = Preprocess(**model.preprocess)
    parts = tuple(_drawn(one, view, size, draws) for one in inputs_of(model))
    if not side_by_side(view):
        return parts
    gone = torch.rand(size, len(parts), generator=draws) < 0.3
    whole = [gone[:, i].reshape(-1, *[1] * (part.ndim - 1)) for i, part in enumerate(parts)]
    return tuple(p.masked_fill(g, torch.nan) for p, g in zip(parts, whole, strict=True)) if view.missing else parts


def _drawn(one: Input, view: Preprocess, size: int, draws: torch.Generator) -> Tensor:
    if one.kind == "tokens":
        return torch.randint(0, one.tokens, (size, *_settled(one, view, size)), generator=draws)
    if one.kind == "image":
        return torch.rand(size, *_settled(one, view, size), generator=draws)
    x = torch.randn(size, *_settled(one, view, size), generator=draws)
    if view.mean is not None and view.std is not None and not side_by_side(view):
        x = x * torch.tensor(view.std) + torch.tensor(view.mean)
    if one.gaps:
        x = x.masked_fill(torch.rand(x.shape, generator=draws) < 0.2, torch.nan)
    return x


def _settled(one: Input, view: Preprocess, size: int) -> list[int]:
    """A number for each free size: of channels 1 or what the model sees (3, of grey); smaller and larger images by turns."""
    side = view.resize or 0
    colours = (1, 3 if view.channels in (None, 1) else view.channels)
    free = {
        "channels": colours[size % 2],
        "height": side if size == 1 else 2 * side - 1,
        "width": side if size == 1 else side + size,
    }
    return [free[s] if isinstance(s, str) else s for s in one.shape]


def _kind(block: Block) -> Literal["image", "row"]:
    return "image" if block.image else "row"
