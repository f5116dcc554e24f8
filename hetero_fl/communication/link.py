"""One direction of the channel: encode payloads to bytes and decode them, compressed as configured."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from hetero_fl.communication.bit_packing import ByteReader
from hetero_fl.communication.compression import (
    Draw,
    FullPrecision,
    Layout,
    NumberFormat,
    Quantize,
    Sort,
    Stage,
    split_vector,
)
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.payload import KINDS, Item, ItemSpec, Kind, Payload, PayloadError
from hetero_fl.utils.seeding import Key, keyed_generator
from hetero_fl.utils.serialization import CodecError, decode, encode, read_json

# A chain of stages over one vector of numbers: reduced stage by stage, then written; read, then
# restored.


class StageChain:
    """Those of the stages that are made for one sort of numbers. `biased`: the sender has to keep what was not sent."""

    def __init__(self, stages: Sequence[Stage | NumberFormat], sort: Sort) -> None:
        self.reducing = [s for s in stages if isinstance(s, Stage) and sort in s.sorts]
        self.biased = any(s.biased for s in self.reducing)
        formats = [s for s in stages if isinstance(s, NumberFormat) and sort in s.sorts]
        self.format: NumberFormat = formats[0] if formats else FullPrecision()
        if self.biased and isinstance(self.format, Quantize):
            self.format = replace(self.format, nearest=True)

    def transforms(self, layout: Layout) -> bool:
        """Whether a vector of this layout travels otherwise than as it is; the same at both ends."""
        return not isinstance(self.format, FullPrecision) or any(
            s.compresses(layout) for s in self.reducing
        )

    def encode(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        """The vector `[n]`, as it travels."""
        told = []
        for stage in self.reducing:
            if stage.compresses(layout):
                numbers, layout, besides = stage.compress(numbers, layout, draw)
                told.append(besides)
        return b"".join([*told, self.format.encode(numbers, layout, draw)])

    def decode(self, source: ByteReader, layout: Layout, dtype: torch.dtype, draw: Draw) -> Tensor:
        """The reverse of `encode`, with what was left out restored. Raises PayloadError for what is not of that layout."""
        done = []
        for stage in self.reducing:
            if stage.compresses(layout):
                left, told = stage.decode_side_information(source, layout, draw)
                done.append((stage, layout, told))
                layout = left
        numbers = self.format.decode(source, layout, dtype)
        for stage, before, told in reversed(done):
            numbers = stage.decompress(numbers, before, told)
        return numbers


# An item of floating numbers as one stream of bits: which of its tensors go through which stages,
# and there and back.

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class ItemForm:
    """All that is known of an item before its numbers are: `shapes` by tensor, in the item's order; which are `plain`."""

    kind: Kind
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    plain: frozenset[str] = frozenset()

    @classmethod
    def from_item(cls, item: Item, plain: frozenset[str]) -> ItemForm | None:
        """None for an item that is not made of floating numbers of one type alone: it passes as it is."""
        tensors = item.tensors
        dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
        if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
            return None
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        return cls(item.kind, dtypes.pop(), shapes, plain & shapes.keys())

    def to_json(self) -> list[Any]:
        """As JSON; `from_json` is the reverse."""
        return [self.kind, self.dtype, self.shapes, sorted(self.plain)]

    @classmethod
    def from_json(cls, content: Any) -> ItemForm:
        """Raises PayloadError for anything else."""
        match content:
            case [str(named), str(dtype), dict(shapes), list(plain)] if dtype in DTYPES and shapes:
                kind = next((kind for kind in KINDS if kind == named), None)
                sizes = [
                    size
                    for shape in shapes.values()
                    for size in (shape if isinstance(shape, list) else [None])
                ]
                if (
                    kind
                    and all(type(s) is int and 0 <= s < 2**40 for s in sizes)
                    and all(isinstance(n, str) for n in plain)
                ):
                    known = {n: tuple(shape) for n, shape in shapes.items()}
                    return cls(kind, dtype, known, frozenset(plain) & known.keys())
        raise PayloadError("the layout is malformed")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are one vector to a chain."""

    chain: StageChain
    names: tuple[str, ...]
    layout: Layout
    change: bool  # against the reference, where the item has one


class ItemCodec:
    """Items there and back, under the stages of one direction. `outputs`: predictions are rows of so many numbers."""

    def __init__(self, stages: Sequence[Stage | NumberFormat], outputs: int) -> None:
        sorts: tuple[Sort, ...] = ("change", "whole", "predictions", "rows")
        self._chains: dict[Sort, StageChain] = {sort: StageChain(stages, sort) for sort in sorts}
        self._outputs = outputs
        self._plain = StageChain((), "whole")

    def groups(self, form: ItemForm, spec: ItemSpec, base: Tensors) -> list[TensorGroup]:
        """How an item is cut up; empty if all of it passes as it is. The same at both ends."""
        if spec.ranks:
            return []
        members: dict[Sort | None, list[str]] = {}
        for name, shape in sorted(form.shapes.items()):
            at = base.get(name)
            known = at is not None and tuple(at.shape) == shape and at.dtype == DTYPES[form.dtype]
            sort = (
                None
                if name in form.plain or not prod(shape)
                else self._sort(form.kind, spec, shape, known)
            )
            members.setdefault(sort, []).append(name)
        made = []
        plain = members.pop(None, [])
        for sort, names in members.items():
            assert sort is not None
            layout = tuple(form.shapes[n] for n in names)
            if self._chains[sort].transforms(layout):
                made.append(TensorGroup(self._chains[sort], tuple(names), layout, sort == "change"))
            else:
                plain += names
        if made and plain:
            made.append(
                TensorGroup(self._plain, tuple(plain), tuple(form.shapes[n] for n in plain), False)
            )
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

    def encode(
        self,
        groups: Sequence[TensorGroup],
        item: Item,
        base: Tensors,
        key: tuple[Key, ...],
        unsent: Mapping[str, Tensor] | None,
    ) -> tuple[bytes, Tensors]:
        """Return the stream, and what a biased chain leaves out of each tensor: update + unsent - decoded, exactly.

        `unsent` is what was left out before; None if the sender keeps nothing.
        """
        tensors = item.tensors
        bodies = []
        left: Tensors = {}
        for place, group in enumerate(groups):
            numbers = torch.cat(
                [
                    self._reference_change(tensors[n], n, group, base).reshape(-1)
                    for n in group.names
                ]
            )
            if unsent and group.chain.biased and any(n in unsent for n in group.names):
                for part, n in zip(split_vector(numbers, group.layout), group.names, strict=True):
                    if n in unsent and unsent[n].shape == part.shape:
                        part.add_(unsent[n])
            draw = partial(keyed_generator, *key, place)
            bodies.append(group.chain.encode(numbers, group.layout, draw))
            if group.chain.biased and unsent is not None:
                sent = group.chain.decode(ByteReader(bodies[-1]), group.layout, numbers.dtype, draw)
                left |= dict(
                    zip(group.names, split_vector(numbers - sent, group.layout), strict=True)
                )
        return b"".join(bodies), left

    def decode(
        self,
        groups: Sequence[TensorGroup],
        form: ItemForm,
        base: Tensors,
        key: tuple[Key, ...],
        source: ByteReader,
    ) -> Tensor | Tensors:
        """An item's values from its stream. Raises PayloadError."""
        found: Tensors = {}
        for place, group in enumerate(groups):
            draw = partial(keyed_generator, *key, place)
            numbers = group.chain.decode(source, group.layout, DTYPES[form.dtype], draw)
            for part, n in zip(split_vector(numbers, group.layout), group.names, strict=True):
                found[n] = part + base[n] if group.change and n in base else part
        return found[""] if set(form.shapes) == {""} else {n: found[n] for n in form.shapes}

    @staticmethod
    def _reference_change(tensor: Tensor, name: str, group: TensorGroup, base: Tensors) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor - base[name] if group.change and name in base else tensor


def value_kinds(spec: ItemSpec) -> set[Sort]:
    """What the numbers of an item that is declared like this may be."""
    if spec.ranks or spec.kind == "counts":
        return set()
    if spec.kind in ("params", "update"):
        return {"change", "whole"}
    return (
        {"rows", "predictions"} if spec.kind == "rows" and spec.share == "predictions" else {"rows"}
    )


# One direction of the channel: payloads in, bytes out, and back; compressed on the way as the
# configuration says.
#
# Each item of floating numbers is one stream of bits over all its tensors, in a message that names
# nothing that the receiver knows:
#
#     "hfl1" | report | layout | number of streams | (item, length, weight, stream) … | what passes, as a payload of its own
#
# The layout is empty on the way up, where the server knows names, shapes and types from a dry run
# of the client's plan; downwards it is deflated JSON. Model parameters are compressed as their
# change against a reference that both ends hold.

MARK = b"hfl1"
WEIGHT = "weight 1"
LARGEST_LAYOUT = 1 << 22  # bytes of JSON
MOST_NUMBERS = 1 << 30  # in a message that tells its own layout: of few that are sent, all are made
UNSENT = "unsent"  # where a sender keeps, in its private state, what it has not sent yet


class Link:
    """One direction.

    Args:
        stages: the chain; without a stage no link is needed.
        specs: what the method declares of items, by name; on the way down, what there is to say of some.
        outputs: of the task: predictions are rows of so many numbers.
        includes_layout: Messages contain their layout, also where both ends hold a reference.
    """

    def __init__(
        self,
        stages: Sequence[Stage | NumberFormat],
        specs: Mapping[str, ItemSpec],
        outputs: int,
        includes_layout: bool = False,
    ) -> None:
        self.includes_layout = includes_layout
        self.specs = specs
        self.names = sorted(specs)
        self.streams = ItemCodec(stages, outputs)

    def send(
        self,
        payload: Payload,
        key: tuple[Key, ...],
        plain: frozenset[str] = frozenset(),
        reference: Payload | None = None,
        memory: dict[str, Any] | None = None,
    ) -> bytes:
        """The message.

        Args:
            key: names the random draws; the receiver has the same.
            plain: names of tensors that travel as they are (BatchNorm's statistics).
            reference: what both ends hold; none: the message tells its own layout.
            memory: the sender's private state. What a biased chain does not send is kept there, and sent with the next.
        """
        forms: dict[str, ItemForm] = {}
        bodies = {}
        passing = {}
        kept: dict[str, Tensors] = {} if memory is None else memory.get(UNSENT, {})
        for name, item in payload.items_.items():
            form = ItemForm.from_item(item, plain)
            base = _reference_item(reference, name, item.kind)
            groups = self.streams.groups(form, self._spec(name, item.kind), base) if form else []
            if form is None or not groups:
                passing[name] = item
                continue
            earlier = None if memory is None else kept.get(name, {})
            body, unsent = self.streams.encode(groups, item, base, (*key, name), earlier)
            if unsent and memory is not None:
                memory[UNSENT] = kept = {**kept, name: {**kept.get(name, {}), **unsent}}
            forms[name], bodies[name] = form, _weight(item.weight) + body
        names = self.names
        layout = b""
        if reference is None or self.includes_layout:
            names = list(forms)
            layout = zlib.compress(json.dumps({n: f.to_json() for n, f in forms.items()}).encode())
        report = json.dumps(payload.report, separators=(",", ":"), allow_nan=False).encode()
        head = [
            MARK,
            struct.pack("<H", len(report)),
            report,
            struct.pack("<I", len(layout)),
            layout,
        ]
        streams = [
            struct.pack("<BI", names.index(name), len(body)) + body for name, body in bodies.items()
        ]
        rest = Payload(passing).encode() if passing else b""
        return b"".join([*head, struct.pack("<B", len(streams)), *streams, rest])

    def receive(
        self,
        data: bytes,
        key: tuple[Key, ...],
        plain: frozenset[str] = frozenset(),
        reference: Payload | None = None,
        like: Mapping[str, Item] | None = None,
    ) -> Payload:
        """The reverse of `send`. `like`: an upload of the right names, shapes and dtypes, where the message does not tell them.

        Raises PayloadError for what is malformed, not of that form, or not finite; allocates no more than is expected.
        """
        source = ByteReader(data)
        if source.take(min(len(MARK), len(data))) != MARK:
            raise PayloadError("no compressed message, as `channel` has it")
        report = _json(bytes(source.take(source.read_integer(2))))
        layout = bytes(source.take(source.read_integer(4)))
        forms = (
            _item_forms(layout)
            if like is None
            else {n: ItemForm.from_item(item, plain) for n, item in like.items()}
        )
        names = list(forms) if like is None else self.names
        items: dict[str, Any] = {}
        for _ in range(source.read_integer(1)):
            place = source.read_integer(1)
            stream = ByteReader(source.take(source.read_integer(4)))
            name = names[place] if place < len(names) else str(place)
            form = forms.get(name)
            if form is None or name in items:
                raise PayloadError(f"item {name[:60]!r} was not asked for")
            base = _reference_item(reference, name, form.kind)
            groups = self.streams.groups(form, self._spec(name, form.kind), base)
            try:
                weight = _read_weight(stream)
                values = self.streams.decode(groups, form, base, (*key, name), stream)
                stream.expect_end()
            except PayloadError as error:
                raise PayloadError(f"item {name[:60]!r}: {error}") from None
            items[name] = {"values": values, "weight": weight, "kind": form.kind}
        rest = bytes(source.read_rest())
        for name, item in (Payload.decode(rest, like).items_ if rest else {}).items():
            if name in items:
                raise PayloadError(f"item {name[:60]!r} was sent twice")
            items[name] = {"values": item.values, "weight": item.weight, "kind": item.kind}
        return Payload.from_untrusted({"items": items, "report": report})

    def _spec(self, name: str, kind: Any) -> ItemSpec:
        return self.specs.get(name, ItemSpec(kind))


def _reference_item(reference: Payload | None, name: str, kind: str) -> Tensors:
    """What the tensors of an item are a change of: its namesakes in what the sender received; nothing for other kinds."""
    if reference is None or kind != "params" or name not in reference:
        return {}
    return reference.item(name).tensors


def _weight(weight: float | Tensor) -> bytes:
    if isinstance(weight, Tensor):
        coded = encode(weight, WEIGHT)
        return struct.pack("<BI", 1, len(coded)) + coded
    return struct.pack("<Bd", 0, weight)


def _read_weight(source: ByteReader) -> Any:
    if source.read_integer(1) == 0:
        return struct.unpack("<d", source.take(8))[0]
    try:
        return decode(bytes(source.take(source.read_integer(4))), WEIGHT)
    except CodecError as error:
        raise PayloadError(f"weight: {error}") from None


def _json(raw: bytes) -> dict[str, Any]:
    try:
        found = read_json(raw)
    except CodecError as error:
        raise PayloadError(f"report or layout: {error}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise PayloadError("report or layout is malformed")
    return found


def _item_forms(layout: bytes) -> dict[str, ItemForm | None]:
    """The forms of a message that tells them."""
    try:
        raw = zlib.decompressobj().decompress(layout, LARGEST_LAYOUT)
    except zlib.error:
        raise PayloadError("the layout is malformed") from None
    forms = {name: ItemForm.from_json(form) for name, form in _json(raw).items()}
    numbers = sum(prod(shape) for form in forms.values() for shape in form.shapes.values())
    if numbers > MOST_NUMBERS:
        raise PayloadError(f"a layout of {numbers:,} numbers; at most {MOST_NUMBERS:,} are read")
    return dict(forms)
