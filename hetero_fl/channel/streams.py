"""An item of floating numbers as one stream of bits: which of its tensors go through which stages, and there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from hetero_fl.architecture import Tensors
from hetero_fl.channel.chain import Chain
from hetero_fl.channel.reader import Reader
from hetero_fl.channel.stages.base import Format, Layout, Sort, Stage, parts
from hetero_fl.payload import KINDS, Item, ItemSpec, Kind, PayloadError
from hetero_fl.seeding import Key, generator

DTYPES = {"float32": torch.float32, "float64": torch.float64}
ALONE = ""  # the name of an item's values that are a single tensor


@dataclass(frozen=True)
class Form:
    """All that is known of an item before its numbers are: `shapes` by tensor, in the item's order; which are `plain`."""

    kind: Kind
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    plain: frozenset[str] = frozenset()

    @classmethod
    def of(cls, item: Item, plain: frozenset[str]) -> Form | None:
        """None for an item that is not made of floating numbers of one type alone: it passes as it is."""
        tensors = named(item.values)
        dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
        if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
            return None
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        return cls(item.kind, dtypes.pop(), shapes, plain & shapes.keys())

    def told(self) -> list[Any]:
        """As JSON; `read` is the reverse."""
        return [self.kind, self.dtype, self.shapes, sorted(self.plain)]

    @classmethod
    def read(cls, told: Any) -> Form:
        """Raises PayloadError for anything else."""
        match told:
            case [str(named), str(dtype), dict(shapes), list(plain)] if dtype in DTYPES and shapes:
                kind = next((kind for kind in KINDS if kind == named), None)
                sizes = [size for shape in shapes.values() for size in (shape if isinstance(shape, list) else [None])]
                if (
                    kind
                    and all(type(s) is int and 0 <= s < 2**40 for s in sizes)
                    and all(isinstance(n, str) for n in plain)
                ):
                    known = {n: tuple(shape) for n, shape in shapes.items()}
                    return cls(kind, dtype, known, frozenset(plain) & known.keys())
        raise PayloadError("the layout is malformed")


@dataclass(frozen=True)
class Group:
    """Tensors that are one vector to a chain."""

    chain: Chain
    names: tuple[str, ...]
    layout: Layout
    change: bool  # against the reference, where the item has one


class Streams:
    """Items there and back, under the stages of one direction. `outputs`: predictions are rows of so many numbers."""

    def __init__(self, stages: Sequence[Stage | Format], outputs: int) -> None:
        sorts: tuple[Sort, ...] = ("change", "whole", "predictions", "rows")
        self._chains: dict[Sort, Chain] = {sort: Chain(stages, sort) for sort in sorts}
        self._outputs, self._plain = outputs, Chain((), "whole")

    def groups(self, form: Form, spec: ItemSpec, base: Tensors) -> list[Group]:
        """How an item is cut up; empty if all of it passes as it is. The same at both ends."""
        if spec.ranks:
            return []
        members: dict[Sort | None, list[str]] = {}
        for name, shape in sorted(form.shapes.items()):
            at = base.get(name)
            known = at is not None and tuple(at.shape) == shape and at.dtype == DTYPES[form.dtype]
            sort = None if name in form.plain or not prod(shape) else self._sort(form.kind, spec, shape, known)
            members.setdefault(sort, []).append(name)
        made, plain = [], members.pop(None, [])
        for sort, names in members.items():
            assert sort is not None
            layout = tuple(form.shapes[n] for n in names)
            if self._chains[sort].changes(layout):
                made.append(Group(self._chains[sort], tuple(names), layout, sort == "change"))
            else:
                plain += names
        if made and plain:
            made.append(Group(self._plain, tuple(plain), tuple(form.shapes[n] for n in plain), False))
        return made

    def _sort(self, kind: Kind, spec: ItemSpec, shape: tuple[int, ...], known: bool) -> Sort | None:
        if kind == "params":
            return "change" if known else "whole"
        if kind == "update":
            return "change"
        if kind == "counts" or len(shape) < 2:
            return None
        said = kind == "rows" and spec.share == "predictions" and shape[1:] == (self._outputs,)
        return "predictions" if said else "rows"

    def write(
        self, groups: Sequence[Group], item: Item, base: Tensors, key: tuple[Key, ...], unsent: Mapping[str, Tensor]
    ) -> tuple[bytes, Tensors]:
        """The stream, and what a biased chain leaves for later, by tensor: to the last bit update + unsent − decoded."""
        tensors, bodies = named(item.values), []
        left: Tensors = {}
        for place, group in enumerate(groups):
            numbers = torch.cat([self._moved(tensors[n], n, group, base).reshape(-1) for n in group.names])
            if group.chain.biased and any(n in unsent for n in group.names):
                for part, n in zip(parts(numbers, group.layout), group.names, strict=True):
                    if n in unsent and unsent[n].shape == part.shape:
                        part.add_(unsent[n])

            def draw(label: str, place: int = place) -> torch.Generator:
                return generator(*key, place, label)

            bodies.append(group.chain.write(numbers, group.layout, draw))
            if group.chain.biased:
                sent = group.chain.read(Reader(bodies[-1]), group.layout, numbers.dtype, draw)
                left |= dict(zip(group.names, parts(numbers - sent, group.layout), strict=True))
        return b"".join(bodies), left

    def read(
        self, groups: Sequence[Group], form: Form, base: Tensors, key: tuple[Key, ...], source: Reader
    ) -> Tensor | Tensors:
        """An item's values from its stream. Raises PayloadError."""
        found: Tensors = {}
        for place, group in enumerate(groups):

            def draw(label: str, place: int = place) -> torch.Generator:
                return generator(*key, place, label)

            numbers = group.chain.read(source, group.layout, DTYPES[form.dtype], draw)
            for part, n in zip(parts(numbers, group.layout), group.names, strict=True):
                found[n] = part + base[n] if group.change and n in base else part
        return found[ALONE] if set(form.shapes) == {ALONE} else {n: found[n] for n in form.shapes}

    @staticmethod
    def _moved(tensor: Tensor, name: str, group: Group, base: Tensors) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor - base[name] if group.change and name in base else tensor


def named(values: Tensor | Tensors) -> Tensors:
    """An item's tensors by name."""
    return values if isinstance(values, dict) else {ALONE: values}


def sorts_of(spec: ItemSpec) -> set[Sort]:
    """What the numbers of an item that is declared like this may be."""
    if spec.ranks or spec.kind == "counts":
        return set()
    if spec.kind in ("params", "update"):
        return {"change", "whole"}
    return {"rows", "predictions"} if spec.kind == "rows" and spec.share == "predictions" else {"rows"}
