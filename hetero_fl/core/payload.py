"""Payloads and their items, the only data that clients and server exchange.

A payload consists of named items, each with values, a weight and a kind. Payloads are encoded
without pickle, measured in bytes and validated on arrival against the declarations of the method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hetero_fl.core.model_spec import Tensors
from hetero_fl.utils.errors import one_line, suggest_or_list, suggest_similar
from hetero_fl.utils.serialization import CodecError, decode, encode, encoded_size

Kind = Literal["params", "update", "rows", "class_sums", "counts"]
KINDS: tuple[Kind, ...] = ("params", "update", "rows", "class_sums", "counts")
# Kinds of items whose values are already sums. The divisor of their mean is the sum of the weights.
SUM_KINDS = ("class_sums", "counts")
# Name in a declaration of items that stands for all names that are not declared.
ANY_NAME = "*"
# Name of the format of encoded payloads.
FORM = "hetero_fl payload 1"
MAX_MESSAGE_CHARACTERS = 240
# Prefix of the names of logged values in a report.
LOGGED_PREFIX = "log "
# Limits of a report: the number of values, and the number of characters of a name or a value.
MAX_REPORT_VALUES = 64
MAX_REPORT_CHARACTERS = 256
# Maximum magnitude of values and weights, so that their squares do not overflow in float32.
MAX_MAGNITUDE = 1e18
# Bytes that a message may contain in addition to the values of tensors: in total, and for the name,
# shape and offset of each tensor.
SPARE_BYTES = 2**16
SPARE_TENSOR_BYTES = 2**10


class PayloadError(ValueError):
    """Raised when a payload is malformed or does not match the declaration of the method.

    Args:
        message: The message, which is shortened to one printable line.

    Example:
        >>> from hetero_fl.core.payload import Payload, PayloadError
        >>> try:
        ...     Payload.decode(b"not a payload")
        ... except PayloadError as error:
        ...     print("rejected")
        rejected
    """

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message, MAX_MESSAGE_CHARACTERS))


class MissingItemError(KeyError):
    """Raised when a payload does not contain an item, or no upload can contain this item."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Item:
    """An entry of a payload: one or several tensors with a weight and a kind.

    Args:
        values: A tensor, or a dictionary of tensors.
        weight: Weight in the mean over clients. A tensor is broadcast against the values, for
            example a weight per class for logits `[N, C]`.
        kind: Meaning of the values. `params` are tensors of a model, and `update` is the difference
            between the tensors of a model and the received tensors. `rows` is a tensor with one row
            per example. `counts` is a vector that is summed. `class_sums` are sums per class, whose
            weight `[C, 1]` is the divisor of the mean.

    Example:
        >>> import torch
        >>> from hetero_fl.core.payload import Item
        >>> Item({"head.bias": torch.zeros(2)}, weight=50.0, kind="params").tensors
        {'head.bias': tensor([0., 0.])}
    """

    values: Tensor | Tensors
    weight: float | Tensor = 1.0
    kind: Kind = "rows"

    @property
    def tensors(self) -> Tensors:
        """The values as a dictionary of tensors. A single tensor has the name ""."""
        return self.values if isinstance(self.values, dict) else {"": self.values}

    def with_tensors(self, tensors: Tensors) -> Item:
        """Return a copy of the item with other values.

        Args:
            tensors: The new values, keyed by the names of the present values.
        """
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
    """The declaration of an item that clients upload or the server broadcasts.

    Args:
        kind: Kind of the item, see `Item`.
        use: `sum` if the server only needs the weighted sum over clients, which secure aggregation
            can provide. `each` if the server needs the items of individual clients.
        private: Whether the item is computed directly from private rows, so that it needs separate
            noise under differential privacy.
        share: The entry of a client's setting `shares` that permits the upload. If None, the
            default of the kind is used (`SHARE_OF_KIND`).
        ranks: Whether matrices are sent as rank-one terms, shape `[k, …]`, whose number k depends
            on the values (see `hetero_fl.communication.compression`).
        across_architectures: Whether the tensors belong to one model that clients of all
            architectures share.
        rows_of: Data set of the rows of an item of kind `rows`: the proxy set or the sender's
            training set.
        prediction_type: `logits` or `probabilities` if the rows are predictions, otherwise "".
        max_weight: Largest weight of the item. If None, the number of the sender's training rows.
        description: Content of the item with its shape, for tables. If empty, tables describe the
            kind of the item.

    Example:
        >>> from hetero_fl.core.payload import ItemSpec
        >>> uploads = {"model": ItemSpec("params"), "logits": ItemSpec("rows", use="each")}
        >>> uploads["logits"].needed_share
        'predictions'
    """

    kind: Kind
    use: Literal["sum", "each"] = "sum"
    private: bool = False
    share: Share | None = None
    ranks: bool = False
    across_architectures: bool = False
    rows_of: Literal["proxy", "train"] = "proxy"
    prediction_type: Literal["", "logits", "probabilities"] = ""
    max_weight: float | None = None
    description: str = field(default="", compare=False)

    @property
    def needed_share(self) -> Share:
        """The entry of a client's setting `shares` that permits the upload."""
        return self.share or SHARE_OF_KIND[self.kind]


class Payload(Mapping[str, Any]):
    """A mapping of names to items, in which `payload[name]` returns the values of an item.

    Args:
        items: Items, keyed by name. A tensor or a dictionary of tensors is converted to an item
            with weight 1.
        report: Short values that are sent with the items, such as the training loss.

    Attributes:
        items_by_name: The items, with weight and kind, keyed by name.
        report: The report.
        magnitude: Largest norm of a tensor if the payload was decoded with `decode` or
            `from_untrusted`, otherwise 0.

    Example:
        >>> import torch
        >>> from hetero_fl.core.payload import Item, Payload
        >>> counts = Item(torch.ones(2), 1.0, "counts")
        >>> payload = Payload({"logits": torch.zeros(4, 2), "counts": counts})
        >>> received = Payload.decode(payload.encode())
        >>> received["logits"].shape
        torch.Size([4, 2])
        >>> received.item("counts").kind
        'counts'
    """

    def __init__(
        self,
        items: Mapping[str, Item | Tensor | Tensors] | None = None,
        report: Mapping[str, Any] | None = None,
    ):
        self.items_by_name: dict[str, Item] = {
            name: value
            if isinstance(value, Item)
            else Item(value, kind="rows" if isinstance(value, Tensor) else "params")
            for name, value in (items or {}).items()
        }
        self.report = dict(report or {})
        self.magnitude = 0.0

    @classmethod
    def from_hook(
        cls, items: Any, specs: Mapping[str, ItemSpec], attribute: str = "uploads"
    ) -> Payload:
        """Create a payload from the return value of a method's hook.

        Args:
            items: The return value.
            specs: Declarations of the items, keyed by name. The name `*` stands for all others.
            attribute: Name of the attribute with the declarations, for error messages.

        Raises:
            PayloadError: If the return value is not a dictionary of items, or an item does not
                match its declaration.
        """
        if not isinstance(items, Mapping):
            raise PayloadError(
                f"expected a dictionary of items as return value, got {type(items).__name__}"
            )
        payload = cls(items)
        for name, item in payload.items_by_name.items():
            invalid = [type(t).__name__ for t in item.tensors.values() if not isinstance(t, Tensor)]
            if invalid:
                raise PayloadError(
                    f"item {name!r}: expected a tensor or tensors by name, got {invalid[0]}"
                )
            spec = specs.get(name) or specs.get(ANY_NAME)
            if spec is None:
                hint = suggest_or_list(name, specs)
                raise PayloadError(f"item {name!r} is not declared in `{attribute}`{hint}")
            kind = spec.kind
            if item.kind != kind:
                raise PayloadError(
                    f"item {name!r}: expected kind {kind!r} as declared, got {item.kind!r}; "
                    f"return Item(values, weight, {kind!r})"
                )
        return payload

    def __getitem__(self, name: str) -> Any:
        return self.item(name).values

    def __contains__(self, name: object) -> bool:
        return name in self.items_by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_by_name)

    def __len__(self) -> int:
        return len(self.items_by_name)

    def item(self, name: str) -> Item:
        """Return an item with its weight and kind.

        Raises:
            MissingItemError: If the payload does not contain the item.
        """
        if name not in self.items_by_name:
            received = ", ".join(map(repr, self.items_by_name)) or "no items"
            hint = suggest_similar(name, self.items_by_name)
            raise MissingItemError(f"item {name!r} was not sent; received {received}{hint}")
        return self.items_by_name[name]

    def to(self, device: torch.device) -> Payload:
        """Move all tensors to a device and return the payload.

        If all tensors are already on the device, this payload is returned, otherwise a new payload.
        """
        weights = [i.weight for i in self.items_by_name.values() if isinstance(i.weight, Tensor)]
        tensors = [t for item in self.items_by_name.values() for t in item.tensors.values()]
        if all(t.device == device for t in [*tensors, *weights]):
            return self
        moved = Payload(report=self.report)
        moved.magnitude = self.magnitude
        for name, item in self.items_by_name.items():
            values = item.with_tensors({n: t.to(device) for n, t in item.tensors.items()})
            weight = item.weight
            moved.items_by_name[name] = replace(
                values, weight=weight.to(device) if isinstance(weight, Tensor) else weight
            )
        return moved

    def norm(self) -> float:
        """Return the largest norm among the floating-point tensors, or 0 without such tensors."""
        tensors = [t for item in self.items_by_name.values() for t in item.tensors.values()]
        return max(_norms([t for t in tensors if t.is_floating_point()]), default=0.0)

    def encode(self) -> bytes:
        """Encode the payload for transmission.

        The number of bytes is the communication cost of the payload.
        """
        return encode(self.tree(), FORM)

    @property
    def encoded_size(self) -> int:
        """Number of bytes that `encode` would return, computed without encoding the tensors."""
        return encoded_size(self.tree(), FORM)

    def tree(self) -> dict[str, Any]:
        """Return the payload as nested dictionaries, the input of `from_untrusted`.

        All tensors are detached and contiguous. Tensors that are already contiguous are not copied.
        """
        items = {
            n: {"values": _plain(i.values), "weight": _plain(i.weight), "kind": i.kind}
            for n, i in self.items_by_name.items()
        }
        return {"items": items, "report": self.report}

    @classmethod
    def decode(cls, data: bytes, like: Mapping[str, Item] | None = None) -> Payload:
        """Decode a received payload.

        Args:
            data: The encoded payload.
            like: Items with the expected names, shapes and dtypes. If given, a header that is too
                long for such items is rejected before it is parsed.

        Raises:
            PayloadError: If the payload is malformed, or a value is not finite or exceeds
                `MAX_MAGNITUDE`.
        """
        if like is not None:
            check_header(data, like)
        try:
            return cls.from_untrusted(decode(data, FORM))
        except CodecError as error:
            raise PayloadError(str(error)) from None

    @classmethod
    def from_untrusted(cls, tree: Any) -> Payload:
        """Validate received nested dictionaries and convert them to a payload.

        Args:
            tree: A dictionary with the entries `items`, a dictionary of items with values, weight
                and kind, and `report`.

        Raises:
            PayloadError: If the tree is malformed, or a value is not finite or exceeds
                `MAX_MAGNITUDE`.
        """
        if not isinstance(tree, dict) or set(tree) != {"items", "report"}:
            raise PayloadError("expected a dictionary of items and a report")
        items = tree["items"]
        report = tree["report"]
        if not isinstance(items, dict) or not isinstance(report, dict):
            raise PayloadError("expected a dictionary of items and a report")
        _check_report(report)
        payload = cls(report=report)
        for name, raw in items.items():
            payload.items_by_name[name], norm = _item(name, raw)
            payload.magnitude = max(payload.magnitude, norm)
        return payload


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(nested) for name, nested in value.items()}
    return value.detach().contiguous() if isinstance(value, Tensor) else value


def report_with_loss(
    loss: float | None, logged: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Create the report of an upload: the training loss and the values that the client logged.

    Numbers are formatted with 17 significant digits, so that the size of an upload does not depend
    on the values. If the loss is None, the report contains no loss.
    """
    values = {} if loss is None else {"loss": loss}
    values |= {LOGGED_PREFIX + name: value for name, value in (logged or {}).items()}
    return {name: f"{value:+.16e}" for name, value in values.items()}


def loss_from_report(report: Mapping[str, Any]) -> float | None:
    """Return the loss in a report, or None if the loss is missing, not a number or too large."""
    return _read_number(report.get("loss"))


def logged_from_report(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the logged values in a report, keyed by name.

    Values whose magnitude exceeds `MAX_MAGNITUDE` are left out, as are values that are not numbers.
    """
    logged = {
        name.removeprefix(LOGGED_PREFIX): _read_number(value)
        for name, value in report.items()
        if name.startswith(LOGGED_PREFIX)
    }
    return {name: value for name, value in logged.items() if value is not None}


def _read_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= MAX_MAGNITUDE else None


def _check_report(report: Mapping[str, Any]) -> None:
    if len(report) > MAX_REPORT_VALUES:
        raise PayloadError(
            f"report: expected at most {MAX_REPORT_VALUES} values, got {len(report)}"
        )
    for name, value in report.items():
        if not isinstance(value, str | int | float | None) or (
            isinstance(value, int) and value.bit_length() > 64
        ):
            raise PayloadError(
                f"report, {name!r}: expected a string or a number, got {type(value).__name__}"
            )
        if len(name) > MAX_REPORT_CHARACTERS or (
            isinstance(value, str) and len(value) > MAX_REPORT_CHARACTERS
        ):
            raise PayloadError(
                f"report, {name!r}: expected at most {MAX_REPORT_CHARACTERS} characters"
            )


def _item(name: str, raw: Any) -> tuple[Item, float]:
    """Convert an entry of an untrusted tree to an item, and return the largest norm of a tensor."""
    if not isinstance(raw, dict) or set(raw) != {"values", "weight", "kind"}:
        raise PayloadError(f"item {name!r}: expected values, weight and kind")
    values = raw["values"]
    weight = raw["weight"]
    kind = raw["kind"]
    if kind not in KINDS:
        raise PayloadError(f"item {name!r}: unknown kind {one_line(kind, 20)!r}")
    if isinstance(values, dict):
        if not all(isinstance(t, Tensor) for t in values.values()):
            raise PayloadError(f"item {name!r}: expected tensors by name")
    elif not isinstance(values, Tensor):
        raise PayloadError(f"item {name!r}: expected a tensor or tensors by name")
    tensors = [*Item(values).tensors.values(), *([weight] if isinstance(weight, Tensor) else [])]
    floating = [t for t in tensors if t.is_floating_point()]
    norms = _norms(floating)
    largest = max(
        (_check_norm(name, t, n) for t, n in zip(floating, norms, strict=True)), default=0.0
    )
    if isinstance(weight, Tensor):
        if not weight.is_floating_point() or bool((weight < 0).any()):
            raise PayloadError(f"item {name!r}: expected a floating-point weight >= 0")
    elif (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight <= MAX_MAGNITUDE
    ):
        raise PayloadError(
            f"item {name!r}: expected a weight from 0 to {MAX_MAGNITUDE:g}, got {weight!r}"
        )
    else:
        weight = float(weight)
    return Item(values, weight, kind), largest


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """Return the norm of each tensor with a single device synchronization."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    if all(norm.is_cpu for norm in norms):
        return [float(norm) for norm in norms]
    device = next(norm.device for norm in norms if not norm.is_cpu)
    together = torch.stack([norm.to(device, torch.float64) for norm in norms])
    return [float(norm) for norm in together.tolist()]


def _check_norm(name: str, tensor: Tensor, norm: float) -> float:
    """Return the norm of a tensor in an item, in double precision if the norm is large.

    If any value is NaN, infinite or too large, the norm is NaN or exceeds `MAX_MAGNITUDE`. Elements
    are therefore checked only in this case.

    Raises:
        PayloadError: If a value is not finite or exceeds `MAX_MAGNITUDE`.
    """
    if norm <= MAX_MAGNITUDE:
        return norm
    low, high = map(float, tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise PayloadError(f"item {name!r} is not finite")
    largest = max(-low, high)
    if largest > MAX_MAGNITUDE:
        raise PayloadError(
            f"item {name!r}: expected magnitudes of at most {MAX_MAGNITUDE:g}, got {largest:g}"
        )
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def check_size(size: int, specs: Mapping[str, ItemSpec], like: Mapping[str, Item]) -> None:
    """Check the size of an uploaded message before the message is read.

    The maximum is three times the bytes of the expected tensors plus constants for names and
    shapes.

    Args:
        size: Bytes of the message.
        specs: Declarations of the items.
        like: Items with the expected names, shapes and dtypes.

    Raises:
        PayloadError: If the message is too long to be the expected upload.
    """
    max_size = SPARE_BYTES
    for name, item in like.items():
        tensors = [*item.tensors.values()]
        tensors += [item.weight] if isinstance(item.weight, Tensor) else []
        ranks = name in specs and specs[name].ranks
        max_size += sum(
            SPARE_TENSOR_BYTES + 3 * _max_tensor_bytes(tensor, ranks) for tensor in tensors
        )
    if size > max_size:
        raise PayloadError(f"expected at most {max_size:,} bytes, got {size:,}")


def check_header(data: bytes, like: Mapping[str, Item]) -> None:
    """Check the size of a message's header before the header is parsed.

    Args:
        data: The message.
        like: Items with the expected names, shapes and dtypes.

    Raises:
        PayloadError: If the header is too long for the expected upload.
    """
    tensors = sum(len(item.tensors) + 1 for item in like.values())
    size = int.from_bytes(data[:8], "little")
    max_size = SPARE_BYTES + SPARE_TENSOR_BYTES * tensors
    if len(data) >= 8 and max_size < size <= len(data):
        raise PayloadError(f"header: expected at most {max_size:,} bytes, got {size:,}")


def _max_tensor_bytes(tensor: Tensor, ranks: bool) -> int:
    # k rank-one terms [k, m + n] represent an m x n matrix. They save bytes if k < mn / (m + n),
    # which is at most (m + n) / 4.
    if ranks and tensor.ndim == 2:
        return (tensor.shape[1] // 4 + 1) * tensor.shape[1] * tensor.itemsize
    return tensor.nbytes


def check_upload(
    payload: Payload,
    specs: Mapping[str, ItemSpec],
    like: Mapping[str, Item],
    num_rows: float = math.inf,
) -> None:
    """Validate an upload against the declarations of the method.

    Args:
        payload: The upload.
        specs: Declarations of the items.
        like: Items with the expected names, shapes and dtypes.
        num_rows: Number of training rows of the sender, which bounds the weights of items. Default:
            no bound.

    Raises:
        PayloadError: If an item is missing or does not match its declaration or the expected item.

    Example:
        >>> import torch
        >>> from hetero_fl.core.payload import Item, ItemSpec, Payload, PayloadError
        >>> from hetero_fl.core.payload import check_upload
        >>> specs = {"logits": ItemSpec("rows")}
        >>> like = {"logits": Item(torch.zeros(4, 2))}
        >>> check_upload(Payload({"logits": torch.rand(4, 2)}), specs, like)
        >>> try:
        ...     check_upload(Payload({"logits": torch.rand(4, 3)}), specs, like)
        ... except PayloadError as error:
        ...     print(error)
        item 'logits', values: expected shape (4, 2), got (4, 3)
    """
    for name in payload:
        item = payload.item(name)
        if name not in specs or name not in like:
            raise PayloadError(f"item {name!r}: not expected")
        if item.kind != specs[name].kind:
            raise PayloadError(
                f"item {name!r}: expected kind {specs[name].kind!r}, got {item.kind!r}"
            )
        expected_item = like[name]
        if isinstance(expected_item.values, dict) != isinstance(item.values, dict):
            expected_form = (
                "tensors by name" if isinstance(expected_item.values, dict) else "a tensor"
            )
            raise PayloadError(f"item {name!r}: expected {expected_form}")
        if set(expected_item.tensors) != set(item.tensors):
            raise PayloadError(f"item {name!r}: unexpected tensor names")
        for tensor_name, received in item.tensors.items():
            expected = expected_item.tensors[tensor_name]
            place = f"item {name!r}, {tensor_name or 'values'}"
            # The number of rank-one terms may differ.
            free = specs[name].ranks and received.ndim == expected.ndim == 2 and len(received) > 0
            if received.shape[free:] != expected.shape[free:]:
                raise _shape_error(place, received, expected)
            if received.dtype != expected.dtype:
                raise PayloadError(
                    f"{place}: expected dtype {expected.dtype}, got {received.dtype}"
                )
        _check_weight(f"item {name!r}", item.weight, expected_item.weight, specs[name], num_rows)
    if missing := like.keys() - set(payload):
        raise PayloadError(f"item {min(missing)!r}: missing")


def _check_weight(
    place: str,
    received: float | Tensor,
    expected: float | Tensor,
    spec: ItemSpec,
    num_rows: float,
) -> None:
    """Check the shape and the bound of the weight of an item.

    Args:
        place: The item, for error messages.
        received: The weight.
        expected: A weight of the expected shape.
        spec: Declaration of the item.
        num_rows: Number of training rows of the sender.
    """
    # A weight may be a Python number or a tensor of another precision.
    weight = torch.as_tensor(received)
    if weight.shape != torch.as_tensor(expected).shape:
        raise _shape_error(f"{place}, weight", weight, torch.as_tensor(expected))
    bound = max(1, num_rows) if spec.max_weight is None else spec.max_weight
    # Weights of float32 may be rounded up.
    if weight.numel() and float(weight.max()) > bound * (1 + 1e-6):
        raise PayloadError(
            f"{place}: weight must be <= {bound:,g} (ItemSpec.max_weight), got "
            f"{float(weight.max()):g}"
        )


def _shape_error(place: str, received: Tensor, expected: Tensor) -> PayloadError:
    return PayloadError(
        f"{place}: expected shape {tuple(expected.shape)}, got {tuple(received.shape)}"
    )
