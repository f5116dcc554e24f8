"""The trust boundary: what crosses between client and server, and nothing else.

A payload is a set of named items, each with values, a weight and a kind. It is encoded without pickle, counted in exact
bytes, and checked on arrival against what the method declared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hetero_fl.core.model_spec import Tensors
from hetero_fl.utils.errors import one_line, suggest_or_list, suggest_similar
from hetero_fl.utils.serialization import CodecError, decode, encode, encoded_size

Kind = Literal["params", "update", "rows", "class_sums", "counts"]
KINDS: tuple[Kind, ...] = ("params", "update", "rows", "class_sums", "counts")
FORM = "hetero_fl payload 1"
MOST_REASON = 240  # characters of a PayloadError
LOGGED = "log "  # before a logged number's name in a report
MOST_REPORTED = 64  # values in a report: a loss, factors by item
LONGEST_REPORTED = 256  # characters of a name or a value in it
LARGEST = 1e18  # magnitude of a value or weight: the square of it is a float32
SPARE_BYTES = 2**16  # of a message, beside its tensors
SPARE_TENSOR_BYTES = 2**10  # of a message for each of its tensors: name, shape, where it lies


class PayloadError(ValueError):
    """A payload that is malformed, or not what was agreed; one short printable line."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message, MOST_REASON))


class MissingItemError(KeyError):
    """An item that was not sent, or a name that no upload can have; one line."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Item:
    """Values with their weight.

    kind: "params" named tensors, "update" their difference from what was received, "rows" a row per proxy example, "counts" a
    vector that is summed; "class_sums" values that are already sums, whose weight `[C, 1]` is what they are divided by. A
    tensor as weight broadcasts against the values (a weight per class on logits `[N, C]`).
    """

    values: Tensor | Tensors
    weight: float | Tensor = 1.0
    kind: Kind = "rows"

    @property
    def tensors(self) -> Tensors:
        """The values by name; a single tensor has the name ""."""
        return self.values if isinstance(self.values, dict) else {"": self.values}

    def with_tensors(self, tensors: Tensors) -> Item:
        """Return the item with other values; `tensors` has the names of its own."""
        return replace(self, values=tensors if isinstance(self.values, dict) else tensors[""])


Share = Literal["parameters", "predictions", "statistics", "features"]
SHARE_OF_KIND: dict[Kind, Share] = {
    "params": "parameters",
    "update": "parameters",
    "rows": "predictions",
    "class_sums": "statistics",
    "counts": "statistics",
}


@dataclass(frozen=True)
class ItemSpec:
    """What a method declares of an item that its clients upload.

    `across`: whether tensors of that name belong to one model, whatever the senders' own architectures.
    `use`: "sum" if the server needs only the weighted sum of all (a secure sum will do), "each" if it needs them one by one.
    `private`: whether it is computed from private rows with no model in between that is released anyway.
    `share`: which of a client's `shares` must be given for it to leave; None: what the kind is (`SHARE_OF_KIND`).
    `ranks`: matrices in it are stacks of terms `[k, …]` whose number k depends on the values (hetero_fl.communication.compression).
    `says`: what the rows are, where each is a word on the classes.
    `rows_of`: whose rows those of kind "rows" are: the proxy set's, or each of the sender's own training rows.
    """

    kind: Kind
    use: Literal["sum", "each"] = "sum"
    private: bool = False
    share: Share | None = None
    ranks: bool = False
    across: bool = False
    rows_of: Literal["proxy", "train"] = "proxy"
    says: Literal["", "logits", "probabilities"] = ""

    @property
    def needed_share(self) -> Share:
        """The entry of a client's `shares` without which the item may not leave."""
        return self.share or SHARE_OF_KIND[self.kind]


class Payload(Mapping[str, Any]):
    """Named items; `payload[name]` gives an item's values. Plain values are wrapped with weight 1."""

    def __init__(
        self,
        items: Mapping[str, Item | Tensor | Tensors] | None = None,
        report: Mapping[str, Any] | None = None,
    ):
        self.items_: dict[str, Item] = {}
        for name, value in (items or {}).items():
            if not isinstance(value, Item):
                value = Item(value, kind="rows" if isinstance(value, Tensor) else "params")
            self.items_[name] = value
        self.report = dict(report or {})
        self.magnitude = 0.0
        """The largest norm of its tensors, where it was read from bytes."""

    @classmethod
    def from_hook(cls, items: Any, specs: Mapping[str, ItemSpec] | None = None) -> Payload:
        """What a method's hook returned; with `specs`, as it declared it. Raises PayloadError naming the item at fault."""
        if not isinstance(items, Mapping):
            raise PayloadError(f"returns {type(items).__name__}, not a dictionary of items")
        payload = cls(items)
        for name, item in payload.items_.items():
            odd = [type(t).__name__ for t in item.tensors.values() if not isinstance(t, Tensor)]
            if odd:
                raise PayloadError(f"item {name!r} holds {odd[0]}, not a tensor or named tensors")
            if specs is None:
                continue
            if name not in specs:
                raise PayloadError(
                    f"item {name!r} is not declared in `uploads`{suggest_or_list(name, specs)}"
                )
            if item.kind != specs[name].kind:
                kind = specs[name].kind
                raise PayloadError(
                    f"item {name!r} is of kind {item.kind!r}, declared is {kind!r}; return Item(values, weight, {kind!r})"
                )
        return payload

    def __getitem__(self, name: str) -> Any:
        return self.item(name).values

    def __contains__(self, name: object) -> bool:
        return name in self.items_

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)

    def item(self, name: str) -> Item:
        """The item with its weight and kind. Raises MissingItemError, a KeyError, that says what was sent."""
        if name not in self.items_:
            sent = ", ".join(map(repr, self.items_)) or "nothing"
            raise MissingItemError(
                f"no item {name!r} was sent, but {sent}{suggest_similar(name, self.items_)}"
            )
        return self.items_[name]

    def to(self, device: torch.device) -> Payload:
        """Return the payload with its tensors on a device; itself if they are there."""
        weights = [i.weight for i in self.items_.values() if isinstance(i.weight, Tensor)]
        tensors = [t for item in self.items_.values() for t in item.tensors.values()]
        if all(t.device == device for t in [*tensors, *weights]):
            return self
        moved = Payload(report=self.report)
        moved.magnitude = self.magnitude
        for name, item in self.items_.items():
            values = item.with_tensors({n: t.to(device) for n, t in item.tensors.items()})
            weight = item.weight
            moved.items_[name] = replace(
                values, weight=weight.to(device) if isinstance(weight, Tensor) else weight
            )
        return moved

    def norm(self) -> float:
        """Return the largest norm of its floating-point tensors."""
        tensors = [t for item in self.items_.values() for t in item.tensors.values()]
        return max(_norms([t for t in tensors if t.is_floating_point()]), default=0.0)

    def encode(self) -> bytes:
        """As it travels; its length is what is counted."""
        return encode(self.tree(), FORM)

    @property
    def encoded_size(self) -> int:
        """The length of `encode()`; tensors that are contiguous are not read."""
        return encoded_size(self.tree(), FORM)

    def tree(self) -> dict[str, Any]:
        """Return the payload as plain values and tensors, as `from_untrusted` reads it.

        Its tensors are detached and contiguous, as decoded ones are; those that are so already are not
        copied.
        """
        items = {
            n: {"values": _plain(i.values), "weight": _plain(i.weight), "kind": i.kind}
            for n, i in self.items_.items()
        }
        return {"items": items, "report": self.report}

    @classmethod
    def decode(cls, data: bytes, like: Mapping[str, Item] | None = None) -> Payload:
        """Decode a received payload.

        Args:
            data: The encoded payload.
            like: Items of the names, shapes and dtypes that are expected, if they are known: a
                header that is longer than theirs can be is not parsed.

        Raises:
            PayloadError: If anything is malformed, or not finite and up to `LARGEST`.
        """
        if like is not None:
            check_header(data, like)
        try:
            return cls.from_untrusted(decode(data, FORM))
        except CodecError as error:
            raise PayloadError(str(error)) from None

    @classmethod
    def from_untrusted(cls, tree: Any) -> Payload:
        """A payload from a tree of plain values and tensors that somebody sent: `items`, each with values, weight and kind,
        and a `report`. Raises PayloadError for anything malformed, or not finite and up to `LARGEST`."""
        if not isinstance(tree, dict) or set(tree) != {"items", "report"}:
            raise PayloadError("holds something else than items and a report")
        items = tree["items"]
        report = tree["report"]
        if not isinstance(items, dict) or not isinstance(report, dict):
            raise PayloadError("holds something else than items and a report")
        _check_report(report)
        payload = cls(report=report)
        for name, raw in items.items():
            payload.items_[name], norm = _item(name, raw)
            payload.magnitude = max(payload.magnitude, norm)
        return payload


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value.detach().contiguous() if isinstance(value, Tensor) else value


def report_with_loss(
    loss: float | None, logged: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Return the report of an upload: the training loss and what the client logged.

    Numbers have all 17 digits, in a fixed width, so that the upload's size is known before its numbers are.
    """
    values = {} if loss is None else {"loss": loss}
    values |= {LOGGED + name: value for name, value in (logged or {}).items()}
    return {name: f"{value:+.16e}" for name, value in values.items()}


def loss_from_report(report: Mapping[str, Any]) -> float | None:
    """Return the loss in a report, None if there is none of a magnitude up to `LARGEST`."""
    return _read_number(report.get("loss"))


def logged_from_report(report: Mapping[str, Any]) -> dict[str, float]:
    """Return what the client logged, as far as it is of a magnitude up to `LARGEST`."""
    logged = {
        n.removeprefix(LOGGED): _read_number(report[n]) for n in report if n.startswith(LOGGED)
    }
    return {name: value for name, value in logged.items() if value is not None}


def _read_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None


def _check_report(report: Mapping[str, Any]) -> None:
    """Raise PayloadError for a report that is more than a few short values."""
    if len(report) > MOST_REPORTED:
        raise PayloadError(f"reports {len(report)} values; at most {MOST_REPORTED} are read")
    for name, value in report.items():
        if not isinstance(value, str | int | float | None) or (
            isinstance(value, int) and value.bit_length() > 64
        ):
            raise PayloadError(f"reports {name!r}: found {type(value).__name__}, no plain value")
        if len(name) > LONGEST_REPORTED or (
            isinstance(value, str) and len(value) > LONGEST_REPORTED
        ):
            raise PayloadError(f"reports {name!r}: more than {LONGEST_REPORTED} characters")


def _item(name: str, raw: Any) -> tuple[Item, float]:
    """Return the item and the largest norm of its tensors. Raises PayloadError."""
    if not isinstance(raw, dict) or set(raw) != {"values", "weight", "kind"}:
        raise PayloadError(f"item {name!r} has no values, weight and kind")
    values = raw["values"]
    weight = raw["weight"]
    kind = raw["kind"]
    if kind not in KINDS:
        raise PayloadError(f"item {name!r} is of unknown kind {one_line(kind, 20)!r}")
    if isinstance(values, dict):
        if not all(isinstance(t, Tensor) for t in values.values()):
            raise PayloadError(f"item {name!r} holds something else than tensors")
    elif not isinstance(values, Tensor):
        raise PayloadError(f"item {name!r} is neither a tensor nor named tensors")
    tensors = [*Item(values).tensors.values(), *([weight] if isinstance(weight, Tensor) else [])]
    floating = [t for t in tensors if t.is_floating_point()]
    norms = _norms(floating)
    largest = max(
        (_check_norm(name, t, n) for t, n in zip(floating, norms, strict=True)), default=0.0
    )
    if isinstance(weight, Tensor):
        if not weight.is_floating_point() or bool((weight < 0).any()):
            raise PayloadError(f"item {name!r} has a weight below nought")
    elif (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight <= LARGEST
    ):
        raise PayloadError(f"item {name!r} has a weight that is no number from 0 to {LARGEST:g}")
    else:
        weight = float(weight)
    return Item(values, weight, kind), largest


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """Return the norm of each tensor, with one wait for their device."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    if all(norm.is_cpu for norm in norms):
        return [float(norm) for norm in norms]
    device = next(norm.device for norm in norms if not norm.is_cpu)
    together = torch.stack([norm.to(device, torch.float64) for norm in norms])
    return [float(norm) for norm in together.tolist()]


def _check_norm(name: str, tensor: Tensor, norm: float) -> float:
    """Return the norm of a floating-point tensor of an item, taken in double precision if need be.

    The norm carries every NaN, infinity and large value, and takes no longer than a sum. Only where it is beyond `LARGEST`
    every element is looked at. Raises PayloadError for one that is not finite or beyond `LARGEST`.
    """
    if norm <= LARGEST:
        return norm
    low, high = map(float, tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise PayloadError(f"item {name!r} is not finite")
    largest = max(-low, high)
    if largest > LARGEST:
        raise PayloadError(
            f"item {name!r} holds a value of magnitude {largest:g}; at most {LARGEST:g} is taken"
        )
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def check_size(size: int, specs: Mapping[str, ItemSpec], like: Mapping[str, Item]) -> None:
    """Raise PayloadError for a message that is too long to be the agreed upload, before it is read.

    The bound is three times the bytes of the agreed tensors, whatever the channel makes of them, and something for names.

    Args:
        size: Bytes of the message.
        specs: What the method declares of its items.
        like: For each item an example of the right names, shapes and dtypes.
    """
    most = SPARE_BYTES
    for name, item in like.items():
        tensors = [*item.tensors.values()]
        tensors += [item.weight] if isinstance(item.weight, Tensor) else []
        ranks = name in specs and specs[name].ranks
        most += sum(SPARE_TENSOR_BYTES + 3 * _max_tensor_bytes(tensor, ranks) for tensor in tensors)
    if size > most:
        raise PayloadError(f"{size:,} bytes; what was agreed takes at most {most:,}")


def check_header(data: bytes, like: Mapping[str, Item]) -> None:
    """Raise PayloadError for a message whose header is too long for the agreed upload, before it is parsed.

    `like`: see `check_size`.
    """
    tensors = sum(len(item.tensors) + 1 for item in like.values())
    size = int.from_bytes(data[:8], "little")
    most = SPARE_BYTES + SPARE_TENSOR_BYTES * tensors
    if len(data) >= 8 and most < size <= len(data):
        raise PayloadError(f"a header of {size:,} bytes; what was agreed takes at most {most:,}")


def _max_tensor_bytes(tensor: Tensor, ranks: bool) -> int:
    """Bytes of a tensor; where it may be a stack of any number of terms `[k, m + n]`, of the most that are of use, mn/(m + n)."""
    if ranks and tensor.ndim == 2:
        return (tensor.shape[1] // 4 + 1) * tensor.shape[1] * tensor.itemsize
    return tensor.nbytes


def check_upload(payload: Payload, specs: Mapping[str, ItemSpec], like: Mapping[str, Item]) -> None:
    """Whether an upload is what the method declared. `like`: for each item an example of the right names, shapes and dtypes.

    Raises PayloadError in one line that names the item.
    """
    for name in payload:
        item = payload.item(name)
        if name not in specs or name not in like:
            raise PayloadError(f"item {name!r} was not asked for")
        if item.kind != specs[name].kind:
            raise PayloadError(
                f"item {name!r} is of kind {item.kind!r} where {specs[name].kind!r} was declared"
            )
        want = like[name]
        if isinstance(want.values, dict) != isinstance(item.values, dict):
            raise PayloadError(f"item {name!r} has another structure than agreed")
        if set(want.tensors) != set(item.tensors):
            raise PayloadError(f"item {name!r} has other tensors than agreed")
        for tensor_name, got in item.tensors.items():
            expected = want.tensors[tensor_name]
            place = f"item {name!r}, {tensor_name or 'values'}"
            free = specs[name].ranks and got.ndim == expected.ndim == 2 and len(got) > 0
            _check_shape(place, got.shape[free:] == expected.shape[free:], got, expected)
            if got.dtype != expected.dtype:
                raise PayloadError(f"{place}: dtype {got.dtype} where {expected.dtype} was agreed")
        # A weight may be a plain number or of another precision.
        agreed = torch.as_tensor(want.weight)
        weight = torch.as_tensor(item.weight)
        _check_shape(f"item {name!r}, weight", weight.shape == agreed.shape, weight, agreed)


def _check_shape(what: str, fits: bool, received: Tensor, expected: Tensor) -> None:
    if not fits:
        raise PayloadError(
            f"{what}: shape {tuple(received.shape)} where {tuple(expected.shape)} was agreed"
        )
