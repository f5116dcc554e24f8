"""Encoding of the server's broadcasts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from typing_extensions import override

from hetero_fl.communication.protocol import Content, EncodeCache
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.payload import Payload
from hetero_fl.federation.channel import FederationLinks


class Broadcasts(ABC):
    """Base class for encoders of the server's broadcasts."""

    @abstractmethod
    def begin(self, round_idx: int, archs: Iterable[ModelSpec]) -> None:
        """Begin a round, and drop the messages of earlier rounds.

        Args:
            round_idx: Index of the round, from 0, which seeds random draws.
            archs: Architectures of the server's models.
        """

    @abstractmethod
    def content(self, payload: Payload) -> Content:
        """Return the message with a broadcast.

        Equal broadcasts have the same message object.
        """

    @abstractmethod
    def received(self, payload: Payload) -> Payload:
        """Return the payload that a client decodes from the message with a broadcast."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from the return value of `state_dict`."""
        return


class PlainBroadcasts(Broadcasts):
    """Encoder of broadcasts that clients can read.

    Args:
        links: The links that encode and decode messages.
        skips_encoding: Whether payloads are passed to clients in this process without encoding.
            Ignored if broadcasts are compressed.
    """

    def __init__(self, links: FederationLinks, skips_encoding: bool = False) -> None:
        self._links = links
        self._skips_encoding = skips_encoding and links.down is None

    @override
    def begin(self, round_idx: int, archs: Iterable[ModelSpec]) -> None:
        archs = tuple(archs)
        self._contents: EncodeCache[Content] = EncodeCache(
            lambda payload: (
                payload
                if self._skips_encoding
                else self._links.encode_broadcast(round_idx, payload, archs)
            )
        )
        self._decoded = EncodeCache(
            lambda payload: self._links.simulate_broadcast(round_idx, payload, archs)
        )

    @override
    def content(self, payload: Payload) -> Content:
        return self._contents(payload)

    @override
    def received(self, payload: Payload) -> Payload:
        return payload if self._links.down is None else self._decoded(payload)
