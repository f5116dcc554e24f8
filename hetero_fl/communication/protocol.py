"""Messages between server and clients, and the exchanges that make up a round."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol as Interface, TypeVar

from torch import Tensor
from typing_extensions import override

from hetero_fl.core.payload import Payload
from hetero_fl.utils.errors import NoUploadError

T = TypeVar("T")

# Encoded content, or the payload itself if sender and receiver are in the same process.
Content = bytes | Payload


def encoded(content: Content) -> bytes:
    """Return the content as bytes, encoded if necessary."""
    return content if isinstance(content, bytes) else content.encode()


def content_size(content: Content) -> int:
    """Return the number of bytes of the encoded content."""
    return len(content) if isinstance(content, bytes) else content.encoded_size


@dataclass(frozen=True)
class Message:
    """One transfer between server and client.

    Args:
        kind: Kind of the request or reply, such as "train" or "upload".
        content: The encoded content, or the payload if the receiver is in this process. The tensors
            of a payload must not be modified in place.
        round_idx: Index of the round; in an asynchronous run, the server's version. Together with
            `attempt`, it is part of the key of the client's random streams.
        attempt: In asynchronous runs, the number of earlier requests to the client in that round.
        step_share: Share of the local steps that the client computes.
        checksum: SHA-256 digest of `body` at the sender, if the message leaves the machine or a
            simulated fault may change it. It is not counted as traffic.
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
        """The number of bytes of the encoded content."""
        return content_size(self.content)

    def with_checksum(self) -> Message:
        """Return a copy with the checksum of the body."""
        return replace(self, checksum=hashlib.sha256(self.body).digest())

    @property
    def is_intact(self) -> bool:
        """Whether the body matches the checksum; true without a checksum."""
        return self.checksum is None or self.checksum == hashlib.sha256(self.body).digest()


Reply = Message | NoUploadError


@dataclass
class AggregatedUploads:
    """The result of secure aggregation: the sum of the uploads.

    Args:
        clients: The clients in the sum.
        total: Sum of the clients' vectors, integers modulo 2^64, uint64, shape `[L]`.
        unit: Factor by which the decoded sum is multiplied, as clients divide their vectors by it.
        dropouts: The reasons why other clients are not in the sum, by client id.
    """

    clients: list[str]
    total: Any
    unit: float
    dropouts: dict[str, str] = field(default_factory=dict)


class Exchange(Interface):
    """Interface for an exchange: one request to each of several clients, and their replies.

    Attributes:
        kind: Kind of the request.
        clients: The clients that receive it.
    """

    kind: str
    clients: Sequence[str]

    def request(self, client_id: str, broadcast_to: Callable[[str], Content]) -> Message:
        """Return the request to a client; `broadcast_to` returns the broadcast for a client id."""

    def accept(self, client_id: str, reply: Message) -> Content | None:
        """Process a reply; return its upload, or None if the server may not see the upload."""


Exchanges = Generator[Exchange, None, AggregatedUploads | None]


@dataclass(frozen=True)
class TrainingRequest:
    """A request to train.

    Attributes:
        broadcast: The broadcast on which the client trains.
        reply: Function that converts an upload to the reply.
    """

    broadcast: Content
    reply: Callable[[Any], Message]


class RoundProtocol(Interface):
    """Interface for the protocol by which the uploads of a round reach the server.

    Attributes:
        setup: Kinds of the exchanges that precede the exchange "train", in which clients train.
        takes_payload: Whether broadcasts and uploads need not be encoded within a process, because
            the protocol does not read their bytes.
    """

    setup: tuple[str, ...]
    takes_payload: bool

    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        """Yield the exchanges of a round, each after the replies to the previous one.

        Returns:
            The sum of the uploads if the protocol reveals only the sum, otherwise None.

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
            round_idx: Index of the round.
            notes: State of clients between the exchanges of a round, by client id.

        Returns:
            The reply, or a request to train.
        """

    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        """Return the message sizes of each exchange if no client drops out.

        Args:
            cohort: Number of clients.
            round_idx: Index of the round.
            broadcast: Bytes of the broadcast alone.
            upload: Bytes of the upload alone.

        Returns:
            The bytes per client, as pairs (down, up) by kind of exchange.
        """


@dataclass
class TrainExchange(Exchange):
    """The exchange in which clients receive a broadcast and send an upload."""

    clients: Sequence[str]
    kind: str = "train"

    @override
    def request(self, client_id: str, broadcast_to: Callable[[str], Content]) -> Message:
        return Message(self.kind, broadcast_to(client_id))

    @override
    def accept(self, client_id: str, reply: Message) -> Content:
        return reply.content


class DirectProtocol(RoundProtocol):
    """The protocol with a single exchange: clients receive a broadcast, train, and upload."""

    setup: tuple[str, ...] = ()
    takes_payload = True

    @override
    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        yield TrainExchange(cohort)
        return None

    @override
    def answer(
        self, client_id: str, message: Message, round_idx: int, notes: MutableMapping[str, bytes]
    ) -> TrainingRequest:
        return TrainingRequest(message.content, _upload)

    @override
    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        return {"train": (broadcast, upload)}


def _upload(content: Content) -> Message:
    return Message("upload", content)


def total_bytes(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the total number of bytes of several exchanges, as a pair (down, up)."""
    down, up = zip(*sizes, strict=True)
    return sum(down), sum(up)


@dataclass
class Traffic:
    """The number of bytes of encoded messages, by direction.

    Attributes:
        up: Bytes from clients to the server.
        down: Bytes from the server to clients.
    """

    up: int = 0
    down: int = 0


class EncodeCache(Generic[T]):
    """A cache that encodes equal payloads only once.

    Clients of one group receive the same tensors, so the encoding of the first payload is reused.
    Payloads are equal if their reports are equal and their tensors share the same memory.

    Args:
        encode: Function that encodes a payload.
        max_entries: Number of encodings to keep.
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
            for name, item in payload.items_by_name.items()
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
    # The address also identifies views that are created for each client.
    if isinstance(value, Tensor) and value.numel():
        # The version counts changes in place.
        version = 0 if value.is_inference() else value._version
        return value.data_ptr(), version, tuple(value.shape), value.stride(), value.dtype
    return id(value) if isinstance(value, Tensor) else value
