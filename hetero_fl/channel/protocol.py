"""How a cohort's uploads reach the server: a protocol is a pair of coroutines, and the methods do not know which.

`Direct` has one exchange (a broadcast down, an upload up). Protocols with several exchanges a round, a secure sum for
instance, fit the same two methods.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Protocol as Interface


@dataclass(frozen=True)
class Message:
    """One transfer between server and client: what is asked, and encoded bytes."""

    ask: str
    body: bytes


Messages = Mapping[str, Message]  # client id -> message
Exchange = Callable[[Messages], Messages]  # requests -> the replies that came
Work = Callable[[bytes], bytes]  # a client's own part: broadcast in, upload out


class Protocol(Interface):
    """The two sides of a round."""

    def collect(self, broadcasts: Mapping[str, bytes]) -> Generator[Messages, Messages, dict[str, bytes]]:
        """Server: yields requests, is sent the replies that came, returns what arrived by client id."""
        ...

    def answer(self, message: Message, work: Work) -> Message:
        """Client: the reply to one request."""
        ...


class Direct:
    """One request, one answer."""

    def collect(self, broadcasts: Mapping[str, bytes]) -> Generator[Messages, Messages, dict[str, bytes]]:
        replies = yield {c: Message("train", body) for c, body in broadcasts.items()}
        return {c: m.body for c, m in replies.items()}

    def answer(self, message: Message, work: Work) -> Message:
        return Message("upload", work(message.body))


@dataclass
class Traffic:
    """Bytes counted on encoded messages."""

    up: int = 0
    down: int = 0


def hold_round(
    protocol: Protocol, broadcasts: Mapping[str, bytes], exchange: Exchange, traffic: Traffic
) -> dict[str, bytes]:
    """Drive a protocol to its end; the same for the simulator and for real machines. Returns uploads by client id."""
    conversation = protocol.collect(broadcasts)
    try:
        requests = next(conversation)
        while True:
            traffic.down += sum(len(message.body) for message in requests.values())
            replies = exchange(requests)
            traffic.up += sum(len(message.body) for message in replies.values())
            requests = conversation.send(replies)
    except StopIteration as stop:
        return stop.value
