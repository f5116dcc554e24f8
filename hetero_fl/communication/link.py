"""Encoding of payloads as compressed messages in one direction, and decoding of the messages.

A message consists of `"hfl1" | report | layout | number of streams | streams | other items`. Each
compressed item is one stream, `item index, length, weight, bits`. The layout describes the
compressed items (see `ItemForm`). Model parameters are compressed as the difference from a
reference that both the sender and the receiver have.
"""

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

DTYPES = {"float32": torch.float32, "float64": torch.float64}
MARK = b"hfl1"
WEIGHT = "weight 1"
# Maximum bytes of the JSON layout.
MAX_LAYOUT_BYTES = 1 << 22
# Maximum number of values that a layout may describe, because a short layout can describe many.
MAX_NUMBERS = 1 << 30
# Name of the entry in the sender's private state with the values that have not been sent yet.
UNSENT = "unsent"


class StageChain:
    """Chain of the configured stages that apply to numbers of one meaning.

    Args:
        stages: The configured stages.
        sort: Meaning of the numbers (see `compression.Sort`).

    Attributes:
        reducing: The stages that reduce the vector, in order of application.
        format: The number format that encodes the remaining numbers.
        biased: Whether the sender must store the values that are not sent.
    """

    def __init__(self, stages: Sequence[Stage | NumberFormat], sort: Sort) -> None:
        self.reducing = [s for s in stages if isinstance(s, Stage) and sort in s.sorts]
        self.biased = any(s.biased for s in self.reducing)
        formats = [s for s in stages if isinstance(s, NumberFormat) and sort in s.sorts]
        self.format: NumberFormat = formats[0] if formats else FullPrecision()
        if self.biased and isinstance(self.format, Quantize):
            self.format = replace(self.format, nearest=True)

    def transforms(self, layout: Layout) -> bool:
        """Return whether the chain changes a vector with the given layout.

        The result depends only on the layout. The sender and the receiver therefore obtain the same
        result.
        """
        return not isinstance(self.format, FullPrecision) or any(
            s.compresses(layout) for s in self.reducing
        )

    def encode(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        """Apply the stages to a vector and encode the result.

        Args:
            numbers: The vector, shape `[n]`.
            layout: Shapes of the tensors that are concatenated in the vector.
            draw: Function that returns a random generator for a label.
        """
        parts = []
        for stage in self.reducing:
            if stage.compresses(layout):
                numbers, layout, side_information = stage.compress(numbers, layout, draw)
                parts.append(side_information)
        return b"".join([*parts, self.format.encode(numbers, layout, draw)])

    def decode(self, source: ByteReader, layout: Layout, dtype: torch.dtype, draw: Draw) -> Tensor:
        """Decode a vector that was encoded by `encode`.

        Args:
            source: Reader at the start of the encoded vector.
            layout: Layout of the vector.
            dtype: Data type of the numbers.
            draw: Function that returns a random generator for a label.

        Raises:
            PayloadError: If the bytes are malformed.
        """
        done = []
        for stage in self.reducing:
            if stage.compresses(layout):
                reduced, side_information = stage.decode_side_information(source, layout, draw)
                done.append((stage, layout, side_information))
                layout = reduced
        numbers = self.format.decode(source, layout, dtype)
        for stage, before, side_information in reversed(done):
            numbers = stage.decompress(numbers, before, side_information)
        return numbers


@dataclass(frozen=True)
class ItemForm:
    """Description of an item without the values.

    Attributes:
        kind: Kind of the item (see `Item`).
        dtype: Data type of all tensors, "float32" or "float64".
        shapes: Shapes, keyed by tensor name, in the order of the tensors in the item.
        plain: Names of tensors that are not compressed.
    """

    kind: Kind
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    plain: frozenset[str] = frozenset()

    @classmethod
    def from_item(cls, item: Item, plain: frozenset[str]) -> ItemForm | None:
        """Create the description of an item.

        Args:
            item: The item.
            plain: Names of tensors that are not compressed. Names that the item does not contain
                are ignored.

        Returns:
            The description, or None if there are no tensors, or their data types differ or are
            neither float32 nor float64. Such items are not compressed.
        """
        tensors = item.tensors
        dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
        if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
            return None
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        return cls(item.kind, dtypes.pop(), shapes, plain & shapes.keys())

    def to_json(self) -> list[Any]:
        """Return the attributes as a list that can be serialized to JSON."""
        return [self.kind, self.dtype, self.shapes, sorted(self.plain)]

    @classmethod
    def from_json(cls, content: Any) -> ItemForm:
        """Create a description from the return value of `to_json`, which may be untrusted.

        Raises:
            PayloadError: If the content is malformed.
        """
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
        raise PayloadError("layout: malformed")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of an item that a chain of stages encodes as one vector.

    Attributes:
        chain: The chain.
        names: Names of the tensors, in the order of concatenation.
        layout: Shapes of the tensors.
        change: Whether to encode the difference from the reference tensors. Tensors without a
            reference are encoded unchanged.
    """

    chain: StageChain
    names: tuple[str, ...]
    layout: Layout
    change: bool


class ItemCodec:
    """Encoder and decoder of items in one direction.

    Args:
        stages: The configured stages.
        outputs: Number of outputs of the task, which is the number of columns of predictions.
    """

    def __init__(self, stages: Sequence[Stage | NumberFormat], outputs: int) -> None:
        sorts: tuple[Sort, ...] = ("change", "whole", "predictions", "rows")
        self._chains: dict[Sort, StageChain] = {sort: StageChain(stages, sort) for sort in sorts}
        self._outputs = outputs
        self._plain = StageChain((), "whole")

    def groups(self, form: ItemForm, spec: ItemSpec, base: Tensors) -> list[TensorGroup]:
        """Divide the tensors of an item into groups, each of which is encoded as one vector.

        The result does not depend on values. The sender and the receiver therefore obtain the same
        result.

        Args:
            form: Description of the item.
            spec: Declaration of the item.
            base: The reference tensors, keyed by name. Empty if there is no reference.

        Returns:
            The groups, or an empty list if the item is not compressed.
        """
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
        groups = []
        plain = members.pop(None, [])
        for sort, names in members.items():
            assert sort is not None
            layout = tuple(form.shapes[n] for n in names)
            chain = self._chains[sort]
            if chain.transforms(layout):
                groups.append(TensorGroup(chain, tuple(names), layout, sort == "change"))
            else:
                plain += names
        if groups and plain:
            layout = tuple(form.shapes[n] for n in plain)
            groups.append(TensorGroup(self._plain, tuple(plain), layout, False))
        return groups

    def _sort(self, kind: Kind, spec: ItemSpec, shape: tuple[int, ...], known: bool) -> Sort | None:
        if kind == "params":
            return "change" if known else "whole"
        if kind == "update":
            return "change"
        if kind == "counts" or len(shape) < 2:
            return None
        is_prediction = (
            kind == "rows" and spec.share == "predictions" and shape[1:] == (self._outputs,)
        )
        return "predictions" if is_prediction else "rows"

    def encode(
        self,
        groups: Sequence[TensorGroup],
        item: Item,
        base: Tensors,
        key: tuple[Key, ...],
        unsent: Mapping[str, Tensor] | None,
    ) -> tuple[bytes, Tensors]:
        """Encode the values of an item.

        Args:
            groups: The return value of the method `groups`.
            item: The item.
            base: The reference tensors, keyed by name.
            key: Values that seed the random generators.
            unsent: Values that earlier messages omitted, keyed by tensor name. If None, the sender
                does not store omitted values.

        Returns:
            The encoded values, and the values that biased chains omit, keyed by tensor name. The
            omitted values are exactly `update + unsent - decoded`. Empty if `unsent` is None or no
            chain is biased.
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
        """Decode the values of an item.

        Args:
            groups: The return value of the method `groups`.
            form: Description of the item.
            base: The reference tensors, keyed by name.
            key: Values that seed the random generators, as in `encode`.
            source: Reader at the start of the encoded values.

        Returns:
            A tensor if the item is a single-tensor item, otherwise tensors, keyed by name.

        Raises:
            PayloadError: If the encoded values are malformed.
        """
        tensors: Tensors = {}
        for place, group in enumerate(groups):
            draw = partial(keyed_generator, *key, place)
            numbers = group.chain.decode(source, group.layout, DTYPES[form.dtype], draw)
            for part, n in zip(split_vector(numbers, group.layout), group.names, strict=True):
                tensors[n] = part + base[n] if group.change and n in base else part
        return tensors[""] if set(form.shapes) == {""} else {n: tensors[n] for n in form.shapes}

    @staticmethod
    def _reference_change(tensor: Tensor, name: str, group: TensorGroup, base: Tensors) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor - base[name] if group.change and name in base else tensor


def value_kinds(spec: ItemSpec) -> set[Sort]:
    """Return the possible meanings of the numbers of an item (see `compression.Sort`).

    The result is empty if the item is never compressed.
    """
    if spec.ranks or spec.kind == "counts":
        return set()
    if spec.kind in ("params", "update"):
        return {"change", "whole"}
    return (
        {"rows", "predictions"} if spec.kind == "rows" and spec.share == "predictions" else {"rows"}
    )


class Link:
    """Encoder and decoder of the payloads in one direction, either broadcasts or uploads.

    Args:
        stages: The configured stages.
        specs: Declarations of items, keyed by name. Broadcasts may contain items without a
            declaration.
        outputs: Number of outputs of the task, which is the number of columns of predictions.
    """

    def __init__(
        self,
        stages: Sequence[Stage | NumberFormat],
        specs: Mapping[str, ItemSpec],
        outputs: int,
    ) -> None:
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
        """Encode a payload.

        Args:
            payload: The payload.
            key: Values that seed the random generators. The receiver must use the same values.
            plain: Names of tensors that are not compressed, such as BatchNorm statistics.
            reference: A payload that the sender and the receiver have. Models are encoded as the
                difference from the models in the reference. If None, whole models are encoded, and
                the message contains a layout.
            memory: Private state of the sender. The values that biased chains omit are stored under
                the key `UNSENT` and added to the next message. If None, these values are lost.
        """
        forms: dict[str, ItemForm] = {}
        bodies = {}
        uncompressed = {}
        kept: dict[str, Tensors] = {} if memory is None else memory.get(UNSENT, {})
        for name, item in payload.items_by_name.items():
            form = ItemForm.from_item(item, plain)
            base = _reference_item(reference, name, item.kind)
            groups = self.streams.groups(form, self._spec(name, item.kind), base) if form else []
            if form is None or not groups:
                uncompressed[name] = item
                continue
            earlier = None if memory is None else kept.get(name, {})
            body, unsent = self.streams.encode(groups, item, base, (*key, name), earlier)
            if unsent and memory is not None:
                memory[UNSENT] = kept = {**kept, name: {**kept.get(name, {}), **unsent}}
            forms[name] = form
            bodies[name] = _encode_weight(item.weight) + body
        names = self.names
        layout = b""
        if reference is None:
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
        rest = Payload(uncompressed).encode() if uncompressed else b""
        return b"".join([*head, struct.pack("<B", len(streams)), *streams, rest])

    def receive(
        self,
        data: bytes,
        key: tuple[Key, ...],
        plain: frozenset[str] = frozenset(),
        reference: Payload | None = None,
        like: Mapping[str, Item] | None = None,
    ) -> Payload:
        """Decode a payload that was encoded by `send`.

        The message may be untrusted. A layout of more than `MAX_NUMBERS` numbers is rejected, which
        bounds the memory for decoding.

        Args:
            data: The message.
            key: The values that were passed to `send` as `key`.
            plain: The names that were passed to `send` as `plain`.
            reference: The payload that was passed to `send` as `reference`.
            like: Items with the expected names, shapes and dtypes, keyed by name. Required if the
                message contains no layout. Must be None if the message contains a layout, which is
                then used.

        Returns:
            The decoded payload.

        Raises:
            PayloadError: If the message is malformed, contains unexpected items, or contains a
                value that is too large, infinite or NaN.
        """
        source = ByteReader(data)
        if source.take(min(len(MARK), len(data))) != MARK:
            raise PayloadError("expected a compressed message, as configured in channel.compress")
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
                raise PayloadError(f"item {name[:60]!r}: unexpected")
            items[name] = self._receive_item(name, form, stream, key, reference)
        rest = bytes(source.read_rest())
        for name, item in (Payload.decode(rest, like).items_by_name if rest else {}).items():
            if name in items:
                raise PayloadError(f"item {name[:60]!r}: received twice")
            items[name] = {"values": item.values, "weight": item.weight, "kind": item.kind}
        return Payload.from_untrusted({"items": items, "report": report})

    def _receive_item(
        self,
        name: str,
        form: ItemForm,
        stream: ByteReader,
        key: tuple[Key, ...],
        reference: Payload | None,
    ) -> dict[str, Any]:
        base = _reference_item(reference, name, form.kind)
        groups = self.streams.groups(form, self._spec(name, form.kind), base)
        try:
            weight = _read_weight(stream)
            values = self.streams.decode(groups, form, base, (*key, name), stream)
            stream.expect_end()
        except PayloadError as error:
            raise PayloadError(f"item {name[:60]!r}: {error}") from None
        return {"values": values, "weight": weight, "kind": form.kind}

    def _spec(self, name: str, kind: Any) -> ItemSpec:
        return self.specs.get(name, ItemSpec(kind))


def _reference_item(reference: Payload | None, name: str, kind: str) -> Tensors:
    """Return the reference tensors of an item, or an empty dictionary without a reference."""
    if reference is None or kind != "params" or name not in reference:
        return {}
    return reference.item(name).tensors


def _encode_weight(weight: float | Tensor) -> bytes:
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
        content = read_json(raw)
    except CodecError as error:
        raise PayloadError(f"report or layout: {error}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise PayloadError("report or layout: malformed")
    return content


def _item_forms(layout: bytes) -> dict[str, ItemForm | None]:
    """Decode the layout in a message, and return the description of each item."""
    try:
        raw = zlib.decompressobj().decompress(layout, MAX_LAYOUT_BYTES)
    except zlib.error:
        raise PayloadError("layout: malformed") from None
    forms = {name: ItemForm.from_json(form) for name, form in _json(raw).items()}
    numbers = sum(prod(shape) for form in forms.values() for shape in form.shapes.values())
    if numbers > MAX_NUMBERS:
        raise PayloadError(f"layout: {numbers:,} numbers exceed the limit of {MAX_NUMBERS:,}")
    return dict(forms)
