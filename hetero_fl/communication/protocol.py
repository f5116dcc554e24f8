"""Exchange payloads with a cohort and count the traffic; equal payloads are encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from typing import Protocol as Interface

from torch import Tensor

from hetero_fl.core.payload import Payload
from hetero_fl.utils.caching import LazyMapping

# How a cohort's uploads reach the server: a protocol is a pair of coroutines, and the methods do
# not know which.
#
# `DirectProtocol` has one exchange (a broadcast down, an upload up). Protocols with several exchanges a
# round, a secure sum for instance, fit the same two methods. Messages are made when they are sent
# and uploads used as they come, so that a round holds one of each, not a cohort's worth.


@dataclass(frozen=True)
class Message:
    """One transfer between server and client: what is asked, and encoded bytes.

    A request names the task's `round_idx` (the server's version, where a run is asynchronous), and how often the client was asked
    in that round before: by both its random draws are keyed.
    `step_share`: the share of its steps that a client is asked to do. `checksum`: SHA-256 of the bytes as the sender had them, where they
    leave its machine or may be changed on the way, 32 bytes beside those that are counted (a millisecond for two megabytes).
    """

    kind: str
    body: bytes
    round_idx: int = 0
    attempt: int = 0
    step_share: float = 1.0
    checksum: bytes | None = None

    def with_checksum(self) -> Message:
        """With the checksum of its bytes."""
        return replace(self, checksum=hashlib.sha256(self.body).digest())

    @property
    def is_intact(self) -> bool:
        """Whether its bytes are those that were sealed; of one that nobody sealed nothing is known."""
        return self.checksum is None or self.checksum == hashlib.sha256(self.body).digest()


Messages = Mapping[str, Message]  # client id -> message
# in client-id order, as they come; who does not answer is left out
Replies = Iterator[tuple[str, Message]]
Exchange = Callable[[Messages], Replies]
Arrivals = Iterable[tuple[str, bytes]]  # (client id, upload), in client-id order
# yields a broadcast, is sent the upload made of it, returns the reply
ClientPlan = Generator[bytes, bytes, Message]


@dataclass
class AggregatedUploads:
    """What a secure sum tells of a round: of the uploads only their sum, and who did not come to be in it and why.

    `total`: integers modulo 2^64, uint64 `[L]`; `unit`: in parts of which weights stand in it.
    """

    clients: list[str]
    total: Any
    unit: float
    dropouts: dict[str, str] = field(default_factory=dict)


class Protocol(Interface):
    """The two sides of a round. The request that a client trains on is called "train"; `setup`: the requests before it, for
    which it has to be there, too."""

    setup: tuple[str, ...]

    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        """Bytes down to a client and up from it by request, in a round of so many that nobody leaves; `broadcast`, `upload`: of
        these alone."""
        ...

    def collect(
        self, broadcasts: Mapping[str, bytes], round_idx: int
    ) -> Generator[Messages, Replies, Arrivals | AggregatedUploads]:
        """Server: yields requests, is sent the replies, returns what arrived. Raises RoundAbandonedError where that can be nothing."""
        ...

    def answer(
        self, client: str, message: Message, round_idx: int, notes: MutableMapping[str, bytes]
    ) -> ClientPlan:
        """Client: the reply to one request, with its own computation in between where the protocol has it.

        `notes`: what clients remember from one exchange of a round to the next, by id.
        """
        ...


class DirectProtocol:
    """One request, one answer."""

    setup: tuple[str, ...] = ()

    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        return {"train": (broadcast, upload)}

    def collect(
        self, broadcasts: Mapping[str, bytes], round_idx: int
    ) -> Generator[Messages, Replies, Arrivals]:
        replies = yield LazyMapping(
            list(broadcasts), lambda client: Message("train", broadcasts[client])
        )
        return map(lambda reply: (reply[0], reply[1].body), replies)  # noqa: C417  (a generator would hold the last one)

    def answer(
        self, client: str, message: Message, round_idx: int, notes: MutableMapping[str, bytes]
    ) -> ClientPlan:
        upload = yield message.body
        return Message("upload", upload)


def total_bytes(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Bytes down and bytes up of several exchanges together."""
    down, up = zip(*sizes, strict=True)
    return sum(down), sum(up)


@dataclass
class Traffic:
    """Bytes counted on encoded messages."""

    up: int = 0
    down: int = 0


def run_protocol(
    protocol: Protocol,
    broadcasts: Mapping[str, bytes],
    exchange: Exchange,
    traffic: Traffic,
    round_idx: int,
) -> Arrivals | AggregatedUploads:
    """Drive a protocol to its end; the same for the simulator and for real machines. Single uploads come in client-id order,
    each when it is asked for."""
    conversation = protocol.collect(broadcasts, round_idx)
    try:
        requests = next(conversation)
        while True:
            requests = conversation.send(_count_traffic(requests, exchange, traffic))
    except StopIteration as stop:
        arrived: Arrivals | AggregatedUploads = stop.value
        return arrived


def _count_traffic(requests: Messages, exchange: Exchange, traffic: Traffic) -> Replies:
    sent: set[str] = set()

    def message(client: str) -> Message:
        made = requests[client]
        if client not in sent:  # a worker that died is told again; the client is not
            sent.add(client)
            traffic.down += len(made.body)
        return made

    def arrived(reply: tuple[str, Message]) -> tuple[str, Message]:
        traffic.up += len(reply[1].body)
        return reply

    return map(arrived, exchange(LazyMapping(requests.keys(), message)))


# Payloads that are the same in memory are dealt with once.

T = TypeVar("T")


class EncodeCache(Generic[T]):
    """Does something with payloads, encodes them say; with equal ones, made of the very same memory, once. Keeps the last few.

    A model that a whole group receives is then encoded for the first of its members alone.
    """

    def __init__(self, encode: Callable[[Payload], T], max_entries: int = 8) -> None:
        self.make = encode
        self.most = max_entries
        # A payload keeps its tensors alive, so that nobody else gets their memory.
        self._known: dict[Any, tuple[Payload, T]] = {}

    def __call__(self, payload: Payload) -> T:
        """What was made of the payload."""
        mark = tuple(
            (n, i.kind, _identity(i.values), _identity(i.weight)) for n, i in payload.items_.items()
        )
        if mark not in self._known:
            if len(self._known) >= self.most:
                self._known.pop(next(iter(self._known)))
            self._known[mark] = (payload, self.make(payload))
        return self._known[mark][1]


def _identity(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((n, _identity(t)) for n, t in value.items())
    # where it lies: views of one tensor, made anew for each client, are the same
    if isinstance(value, Tensor):
        return (
            (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            if value.numel()
            else id(value)
        )
    return value
