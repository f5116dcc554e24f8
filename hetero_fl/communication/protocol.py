"""Messages between server and clients, and the exchanges of a round.

In an exchange, the server sends a request to each of several clients, and the clients reply.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol as Interface, TypeVar

from torch import Tensor
from typing_extensions import override

from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.utils.caching import BoundedCache
from hetero_fl.utils.errors import NoUploadError

T = TypeVar("T")
# Kind of replies that contain an upload which the server may read.
UPLOAD = "upload"

# Encoded content, or the payload itself if the sender and the receiver are in the same process.
Content = bytes | Payload


def encoded(content: Content) -> bytes:
    """Return the content as bytes. A payload is encoded."""
    return content if isinstance(content, bytes) else content.encode()


def content_size(content: Content) -> int:
    """Return the number of bytes of the encoded content."""
    return len(content) if isinstance(content, bytes) else content.encoded_size


@dataclass(frozen=True)
class Message:
    """Request to a client or reply of a client.

    Args:
        kind: Kind of the request or reply, such as "train" or "upload".
        content: The encoded content, or the payload if the receiver is in the same process. Tensors
            of a payload must not be modified in place.
        round_idx: Index of the round. In an asynchronous run, the number of aggregations before the
            request. The client's random draws are seeded with `round_idx` and `attempt`.
        attempt: Number of earlier requests to the client with the same `round_idx`, which is
            greater than 0 only in asynchronous runs.
        checksum: SHA-256 digest of `body` at the sender, which does not count as traffic. If None,
            `is_intact` is always True.
    """

    kind: str
    content: Content
    round_idx: int = 0
    attempt: int = 0
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
        """Return a copy of the message with the SHA-256 digest of `body` as checksum."""
        return replace(self, checksum=hashlib.sha256(self.body).digest())

    @property
    def is_intact(self) -> bool:
        """Whether `body` matches the checksum, or there is no checksum."""
        return self.checksum is None or self.checksum == hashlib.sha256(self.body).digest()


Reply = Message | NoUploadError


def refusal(error: PayloadError) -> Message:
    """Return the reply of a client that refuses a request, with the error as the reason."""
    return Message("refused", str(error).encode())


def check_accepted(reply: Message, kind: str, max_bytes: float = math.inf) -> None:
    """Check the size of a reply, and that the client did not refuse the request.

    Args:
        reply: The reply.
        kind: Kind of the request.
        max_bytes: Maximum size of the reply in bytes.

    Raises:
        PayloadError: If the client refused the request, with its reason, or the reply is too long.
    """
    if reply.kind == "refused":
        reason = reply.body[:200].decode(errors="replace")
        raise PayloadError(f"the client refused {kind!r}: {reason}")
    if reply.size > max_bytes:
        raise PayloadError(
            f"reply to {kind!r}: must have at most {max_bytes:,} bytes, got {reply.size:,}"
        )


@dataclass
class AggregatedUploads:
    """Sum of the uploads of a round, which is the result of secure aggregation.

    Args:
        clients: Ids of the clients whose uploads are in the sum.
        total: Sum of the clients' vectors modulo 2^64, dtype uint64, shape `[L]`.
        unit: Factor by which clients divide their vectors before encoding. The decoded sum must be
            multiplied by `unit`.
        dropouts: Reasons why the uploads of other clients are not in the sum, keyed by client id.
    """

    clients: list[str]
    total: Any
    unit: float
    dropouts: dict[str, str] = field(default_factory=dict)


# Function that returns the broadcast to the client with a given id.
BroadcastTo = Callable[[str], Content]


@dataclass
class Exchange:
    """One request to each of several clients, and their replies.

    Args:
        kind: Kind of the request.
        clients: Ids of the clients that receive the request.
        content: Function that returns the content of the request to the client with a given id.
        accept: Function that processes the reply of the client with a given id. It returns the
            upload in the reply, or None if the reply contains no upload that the server may read.
            It raises PayloadError if the reply belongs to another exchange.
    """

    kind: str
    clients: Sequence[str]
    content: Callable[[str, BroadcastTo], Content]
    accept: Callable[[str, Message], Content | None]

    def request(self, client_id: str, broadcast_to: BroadcastTo) -> Message:
        """Return the request to a client.

        Args:
            client_id: The client.
            broadcast_to: Function that returns the broadcast to the client with a given id.
        """
        return Message(self.kind, self.content(client_id, broadcast_to))


Exchanges = Generator[Exchange, None, AggregatedUploads | None]


@dataclass(frozen=True)
class TrainingRequest:
    """Request to train on a broadcast.

    Attributes:
        broadcast: The broadcast on which the client trains.
        reply: Function that converts the client's upload to the reply.
    """

    broadcast: Content
    reply: Callable[[Any], Message]


class RoundProtocol(Interface):
    """Interface of protocols, which define the exchanges by which uploads reach the server.

    Attributes:
        setup: Kinds of the exchanges before the exchange "train", in which clients train.
        requests: Kinds of all requests, in the order of the exchanges.
        accepts_unencoded: Whether the protocol accepts broadcasts and uploads that are not encoded.
            If True, encoding can be omitted if server and clients are in the same process.
        has_one_time_requests: Whether requests refer to secrets that are valid for one sum only.
    """

    setup: tuple[str, ...] = ()
    requests: tuple[str, ...] = ("train",)
    accepts_unencoded: bool = False
    has_one_time_requests: bool = False

    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        """Yield the exchanges of a round.

        The replies to an exchange must be processed before the next exchange is requested.

        Args:
            cohort: Ids of the clients in the round.
            round_idx: Index of the round.

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
            notes: State of the clients between the exchanges of a round, keyed by client id. The
                mapping is modified in place.

        Returns:
            The reply, or a request to train if the client must compute first.
        """

    def broadcast_in(self, client_id: str, message: Message) -> Content:
        """Return the broadcast in a request, as the client reads it.

        Args:
            client_id: The client.
            message: A request of kind "train", or of kind "read", which requests an evaluation.

        Raises:
            PayloadError: If the request is malformed or cannot be decrypted.
        """
        return message.content

    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        """Return the message sizes of each exchange if no client drops out.

        Args:
            cohort: Number of clients.
            round_idx: Index of the round.
            broadcast: Size of the encoded broadcast in bytes.
            upload: Size of the encoded upload in bytes.

        Returns:
            Bytes sent to and by each client, as pairs (down, up), keyed by the kind of exchange.
        """

    def broadcast_size(self, round_idx: int, broadcast: int) -> int:
        """Return the size of the message with a broadcast in bytes.

        Args:
            round_idx: Index of the round.
            broadcast: Size of the encoded broadcast in bytes.
        """
        return broadcast


class TrainExchange(Exchange):
    """Exchange in which clients receive a broadcast and send an upload.

    Args:
        clients: Ids of the clients.
    """

    def __init__(self, clients: Sequence[str]) -> None:
        super().__init__("train", clients, lambda client, to: to(client), self.upload_in)

    @staticmethod
    def upload_in(_client_id: str, reply: Message) -> Content:
        """Return the upload in the reply of a client.

        Raises:
            PayloadError: If the reply contains no upload.
        """
        check_accepted(reply, "train")
        if reply.kind != UPLOAD:
            raise PayloadError(f"expected a reply to 'train', got {reply.kind[:20]!r}")
        return reply.content


class DirectProtocol(RoundProtocol):
    """Protocol with a single exchange, in which clients receive a broadcast, train and upload."""

    accepts_unencoded = True

    @override
    def exchanges(self, cohort: Sequence[str], round_idx: int) -> Exchanges:
        yield TrainExchange(cohort)
        return None

    @override
    def answer(
        self, client_id: str, message: Message, round_idx: int, notes: MutableMapping[str, bytes]
    ) -> Message | TrainingRequest:
        return TrainingRequest(message.content, lambda upload: Message(UPLOAD, upload))

    @override
    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        return {"train": (broadcast, upload)}


def total_bytes(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the total number of bytes of one or more exchanges, as a pair (down, up)."""
    down, up = zip(*sizes, strict=True)
    return sum(down), sum(up)


@dataclass
class Traffic:
    """Number of bytes of encoded messages in each direction.

    Attributes:
        up: Bytes from clients to the server.
        down: Bytes from the server to clients.
    """

    up: int = 0
    down: int = 0


class EncodeCache(Generic[T]):
    """Cache of encoded payloads, so that equal payloads are encoded only once.

    Clients with the same architecture usually receive the same tensors. Two payloads are equal if
    their reports are equal and their items share the same tensor memory.

    Args:
        encode: Function that encodes a payload.
        max_entries: Maximum number of entries. If the cache is full, the entry that was not used
            for the longest time is removed.
    """

    def __init__(self, encode: Callable[[Payload], T], max_entries: int = 8) -> None:
        self._encode = encode
        # An entry keeps a reference to the payload, so that no new tensor uses the same memory.
        self._entries: BoundedCache[tuple[Payload, T]] = BoundedCache(max_entries)

    def __call__(self, payload: Payload) -> T:
        """Return the encoded payload, from the cache if it contains an equal payload."""
        items = [
            (name, item.kind, _identity(item.values), _identity(item.weight))
            for name, item in payload.items_by_name.items()
        ]
        key = (repr(payload.report), *items)
        if key not in self._entries:
            self._entries[key] = (payload, self._encode(payload))
        return self._entries[key][1]

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()


def _identity(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _identity(tensor)) for name, tensor in value.items())
    # The memory address is compared, because each payload may contain new views of the same tensor.
    if isinstance(value, Tensor) and value.numel():
        # The version counts changes in place.
        version = 0 if value.is_inference() else value._version
        return value.data_ptr(), version, tuple(value.shape), value.stride(), value.dtype
    return id(value) if isinstance(value, Tensor) else value
