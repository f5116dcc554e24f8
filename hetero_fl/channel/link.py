"""One direction of the channel: payloads in, bytes out, and back; compressed on the way as the configuration says.

Without stages a payload travels as `Payload.encode` has it. With stages each item of floating numbers is one stream of bits over
all its tensors, in a message that names nothing that the receiver knows:

    "hfl1" | report | layout | number of streams | (item, length, weight, stream) … | what passes, as a payload of its own

The layout is empty on the way up, where the server knows names, shapes and types from a dry run of the client's plan; downwards
it is deflated JSON. Model parameters are compressed as their change against a reference that both ends hold.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from hetero_fl.architecture import Tensors
from hetero_fl.channel.reader import Reader
from hetero_fl.channel.stages.base import Format, Stage
from hetero_fl.channel.streams import Form, Streams, named
from hetero_fl.codec import CodecError, decode, encode, read_json
from hetero_fl.payload import Item, ItemSpec, Payload, PayloadError, check_header
from hetero_fl.seeding import Key

MARK = b"hfl1"
WEIGHT = "weight 1"
LARGEST_LAYOUT = 1 << 22  # bytes of JSON
MOST_NUMBERS = 1 << 30  # in a message that tells its own layout: of few that are sent, all are made
UNSENT = "unsent"  # where a sender keeps, in its private state, what it has not sent yet


class Link:
    """One direction.

    Args:
        stages: the chain; none: payloads pass as they are.
        specs: what the method declares of items, by name; on the way down, what there is to say of some.
        outputs: of the task: predictions are rows of so many numbers.
    """

    def __init__(self, stages: Sequence[Stage | Format], specs: Mapping[str, ItemSpec], outputs: int) -> None:
        self.specs, self.names = specs, sorted(specs)
        self.streams = Streams(stages, outputs) if stages else None

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
        if self.streams is None:
            return payload.encode()
        forms: dict[str, Form] = {}
        bodies, passing = {}, {}
        kept: dict[str, Tensors] = {} if memory is None else memory.get(UNSENT, {})
        for name, item in payload.items_.items():
            form, base = Form.of(item, plain), _base(reference, name, item.kind)
            groups = self.streams.groups(form, self._spec(name, item.kind), base) if form else []
            if form is None or not groups:
                passing[name] = item
                continue
            body, unsent = self.streams.write(groups, item, base, (*key, name), kept.get(name, {}))
            if unsent and memory is not None:
                memory[UNSENT] = kept = {**kept, name: {**kept.get(name, {}), **unsent}}
            forms[name], bodies[name] = form, _weight(item.weight) + body
        names, layout = self.names, b""
        if reference is None:
            names, layout = list(forms), zlib.compress(json.dumps({n: f.told() for n, f in forms.items()}).encode())
        report = json.dumps(payload.report, separators=(",", ":"), allow_nan=False).encode()
        head = [MARK, struct.pack("<H", len(report)), report, struct.pack("<I", len(layout)), layout]
        streams = [struct.pack("<BI", names.index(name), len(body)) + body for name, body in bodies.items()]
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
        if self.streams is None:
            if like is not None:
                check_header(data, like)
            return Payload.decode(data)
        source = Reader(data)
        if source.take(min(len(MARK), len(data))) != MARK:
            raise PayloadError("no compressed message, as `channel` has it")
        report, layout = _json(bytes(source.take(source.number(2)))), bytes(source.take(source.number(4)))
        forms = _told(layout) if like is None else {n: Form.of(item, plain) for n, item in like.items()}
        names = list(forms) if like is None else self.names
        items: dict[str, Any] = {}
        for _ in range(source.number(1)):
            place, stream = source.number(1), Reader(source.take(source.number(4)))
            name = names[place] if place < len(names) else str(place)
            form = forms.get(name)
            if form is None or name in items:
                raise PayloadError(f"item {name[:60]!r} was not asked for")
            base = _base(reference, name, form.kind)
            groups = self.streams.groups(form, self._spec(name, form.kind), base)
            try:
                weight = _weight_of(stream)
                values = self.streams.read(groups, form, base, (*key, name), stream)
                stream.end()
            except PayloadError as error:
                raise PayloadError(f"item {name[:60]!r}: {error}") from None
            items[name] = {"values": values, "weight": weight, "kind": form.kind}
        rest = bytes(source.rest())
        if like is not None:
            check_header(rest, like)
        for name, item in (Payload.decode(rest).items_ if rest else {}).items():
            if name in items:
                raise PayloadError(f"item {name[:60]!r} was sent twice")
            items[name] = {"values": item.values, "weight": item.weight, "kind": item.kind}
        return Payload.checked({"items": items, "report": report})

    def _spec(self, name: str, kind: Any) -> ItemSpec:
        return self.specs.get(name, ItemSpec(kind))


def _base(reference: Payload | None, name: str, kind: str) -> Tensors:
    """What the tensors of an item are a change of: its namesakes in what the sender received; nothing for other kinds."""
    if reference is None or kind != "params" or name not in reference:
        return {}
    return named(reference[name])


def _weight(weight: float | Tensor) -> bytes:
    if isinstance(weight, Tensor):
        coded = encode(weight, WEIGHT)
        return struct.pack("<BI", 1, len(coded)) + coded
    return struct.pack("<Bd", 0, weight)


def _weight_of(source: Reader) -> Any:
    if source.number(1) == 0:
        return struct.unpack("<d", source.take(8))[0]
    try:
        return decode(bytes(source.take(source.number(4))), WEIGHT)
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


def _told(layout: bytes) -> dict[str, Form | None]:
    """The forms of a message that tells them."""
    try:
        raw = zlib.decompressobj().decompress(layout, LARGEST_LAYOUT)
    except zlib.error:
        raise PayloadError("the layout is malformed") from None
    forms = {name: Form.read(form) for name, form in _json(raw).items()}
    numbers = sum(prod(shape) for form in forms.values() for shape in form.shapes.values())
    if numbers > MOST_NUMBERS:
        raise PayloadError(f"a layout of {numbers:,} numbers; at most {MOST_NUMBERS:,} are read")
    return dict(forms)
