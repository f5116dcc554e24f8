"""Messages between server and clients, and the exchanges that make up a round."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from typing import Protocol as Interface

from torch import Tensor

from hetero_fl.core.payload import Payload
from hetero_fl.utils.errors import NoUploadError

T = TypeVar("T")

Content = bytes | Payload  # encoded, or as it is where sender and receiver are in one process


def encoded(content: Content) -> bytes:
    """Return the content as it travels."""
    return content if isinstance(content, bytes) else content.encode()


def content_size(content: Content) -> int:
    """Return the bytes of the encoded content."""
    return len(content) if isinstance(content, bytes) else content.encoded_size


@dataclass(frozen=True)
class Message:
    """One transfer between server and client.

    Args:
        kind: What is asked or answered, such as "train" or "upload".
        content: What is sent: encoded, or as it is if the receiver is in this process. Its tensors
            must not be modified in place.
        round_idx: The round of the task; the server's version in an asynchronous run. Keys the
            client's random draws, together with `attempt`.
        attempt: In asynchronous runs, how often the client was asked in that round before.
        step_share: The share of its local steps that the client does.
        checksum: SHA-256 of `body` as the sender had it, where the message leaves its machine or
            a simulated fault may change it. Not counted as traffic.
    """

    kind: str
    content: Content
    round_idx: int = 0
    attempt: int = 0
    step_share: float = 1.0
    checksum: bytes | None = None

    @property
    def body(self) -> bytes:
        """The encoded content."""
        return encoded(self.content)

    @property
    def size(self) -> int:
        """The bytes of the encoded content."""
        return content_size(self.content)

    def with_checksum(self) -> Message:
        """Return a copy that carries the checksum of its body."""
        return replace(self, checksum=hashlib.sha256(self.body).digest())

    @property
    def is_intact(self) -> bool:
        """Whether the body matches the checksum; true without one."""
        return self.checksum is None or self.checksum == hashlib.sha256(self.body).digest()


Reply = Message | NoUploadError


@dataclass
class AggregatedUploads:
    """The outcome of a secure sum: the total of the uploads, and no single one.

    Args:
        clients: The clients in the sum.
        total: Integers modulo 2^64, uint64 `[L]`.
        unit: The unit in which the weights in `total` are expressed.
        dropouts: Why other clients are not in the sum.
    """

    clients: list[str]
    total: Any
    unit: float
    dropouts: dict[str, str] = field(default_factory=dict)


class Exchange(Interface):
    """One request to each of some clients, and what the server does with the replies."""

    kind: str
    clients: Sequence[str]

    def request(self, client_id: str, broadcast_to: Callable[[str], Content]) -> Message:
        """Return the request to a client; `broadcast_to` gives its broadcast if it is needed."""

    def accept(self, client_id: str, reply: Message) -> Content | None:
        """Take a client's reply. Return the upload in it if the server may see it."""


Exchanges = Generator[Exchange, None, AggregatedUploads | None]


@dataclass(frozen=True)
class TrainingRequest:
    """A request that asks a client to train.

    Attributes:
        broadcast: The broadcast.
        reply: Returns the reply with an upload.
    """

    broadcast: Content
    reply: Callable[[Any], Message]


class RoundProtocol(Interface):
    """How the uploads of a round reach the server.

    Attributes:
        setup: The exchanges before the one in which clients train ("train").
        takes_payload: Whether it passes broadcasts and uploads on without reading their bytes, so
            that they need not be encoded within a process.
    """

    setup: tuple[str, ...]
    takes_payload: bool

    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        """Yield the exchanges of a round, each after the replies to the one before.

        Returns:
            The sum of the uploads if the protocol reveals nothing else, otherwise None.

        Raises:
            RoundAbandonedError: If too few clients are left.
        """

    def answer(
        self, client_id: str, message: Message, round_idx: int, notes: MutableMapping[str, bytes]
    ) -> Message | TrainingRequest:
        """Answer a request on the client.

        Args:
            client_id: The client.
            message: The request.
            round_idx: The round.
            notes: What clients remember between the exchanges of a round, by client id.
        """

    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        """Return the bytes (down, up) per client of each exchange if nobody leaves.

        Args:
            cohort: Number of clients.
            round_idx: The round.
            broadcast: Bytes of the broadcast alone.
            upload: Bytes of the upload alone.
        """


@dataclass
class TrainExchange:
    """Broadcast down, upload up."""

    clients: Sequence[str]
    kind: str = "train"

    def request(self, client_id: str, broadcast_to: Callable[[str], Content]) -> Message:
        return Message(self.kind, broadcast_to(client_id))

    def accept(self, client_id: str, reply: Message) -> Content:
        return reply.content


class DirectProtocol:
    """One exchange: every client trains on its broadcast and sends its upload."""

    setup: tuple[str, ...] = ()
    takes_payload = True

    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        yield TrainExchange(cohort)
        return None

    def answer(
        self, client_id: str, message: Message, round_idx: int, notes: MutableMapping[str, bytes]
    ) -> TrainingRequest:
        return TrainingRequest(message.content, _upload)

    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        return {"train": (broadcast, upload)}


def _upload(content: Content) -> Message:
    return Message("upload", content)


def total_bytes(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the bytes down and up of several exchanges together."""
    down, up = zip(*sizes, strict=True)
    return sum(down), sum(up)


@dataclass
class Traffic:
    """Bytes of encoded messages."""

    up: int = 0
    down: int = 0


class EncodeCache(Generic[T]):
    """Encode equal payloads once.

    Clients of one group receive the same tensors, so the payload of the first is encoded and the
    result reused. Payloads are equal if their reports are, and their tensors are the same memory.

    Args:
        encode: What to do with a payload.
        max_entries: Number of results to keep.
    """

    def __init__(self, encode: Callable[[Payload], T], max_entries: int = 8) -> None:
        self._encode = encode
        self._max_entries = max_entries
        # An entry keeps its payload alive, so that no other tensor gets the same memory.
        self._entries: dict[Any, tuple[Payload, T]] = {}

    def __call__(self, payload: Payload) -> T:
        """Return the encoding of `payload`."""
        items = [
            (name, item.kind, _identity(item.values), _identity(item.weight))
            for name, item in payload.items_.items()
        ]
        key = repr(payload.report), *items
        if key not in self._entries:
            if len(self._entries) >= self._max_entries:
                self._entries.pop(next(iter(self._entries)))
            self._entries[key] = (payload, self._encode(payload))
        return self._entries[key][1]


def _identity(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _identity(tensor)) for name, tensor in value.items())
    # Views that are made anew for each client are the same memory, too.
    if isinstance(value, Tensor) and value.numel():
        version = 0 if value.is_inference() else value._version  # changes in place
        return value.data_ptr(), version, tuple(value.shape), value.stride(), value.dtype
    return id(value) if isinstance(value, Tensor) else value
