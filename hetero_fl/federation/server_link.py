"""The server's end of the link to the clients, which sends broadcasts and decodes uploads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.communication.protocol import Content, EncodeCache, encoded
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, Payload, check_size, check_upload
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.expected import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec, as_sender
from hetero_fl.privacy.server_side import ServerPrivacy


class ServerLink:
    """The server's end of the link to the clients.

    Args:
        algorithm: The method.
        federation: The federation.
        server: The server, in its present state and round.
        expectations: Names, shapes and dtypes of the items of uploads.
        per_round: Number of clients in a round. If None, all clients participate.
        skips_encoding: Whether payloads are passed to clients in this process without encoding.
            Ignored if broadcasts are compressed.

    Attributes:
        channel: Encoder and decoder of messages.
        specs: Declarations of the items that arrive, keyed by name.
        robust: Settings of robust rules, or None if items are averaged.
        privacy: Noise on sums and clipping bounds at the server, or None if there is no noise.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        federation: FederationSpec,
        server: Participant,
        expectations: ExpectedUploads,
        *,
        per_round: int | None = None,
        skips_encoding: bool = False,
    ) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.server = server
        self.expectations = expectations
        self.specs = expectations.specs
        aggregation = federation.aggregation
        self.robust = None if aggregation.is_plain_mean else aggregation
        self.channel = FederationLinks(algorithm, federation)
        self.skips_encoding = skips_encoding
        self.privacy = ServerPrivacy.from_federation(
            expectations.privacy, federation, expectations.expected_items, per_round
        )
        self._contents: EncodeCache[Content] = EncodeCache(self._encode)
        self._decoded = EncodeCache(self._decode)
        self.clear()

    def clear(self) -> None:
        """Drop messages that are outdated because the server has changed."""
        self._contents.clear()
        self._decoded.clear()

    @property
    def server_slot(self) -> str | None:
        """Name of the server's model that is evaluated and saved.

        None if the server has no model, or cannot read its model.
        """
        return self.algorithm.server_model(self.server)

    def broadcast(self, client_info: ClientInfo) -> Payload:
        """Return the payload of the server's broadcast to a client.

        The method may be called several times and in any order of clients, because random draws are
        seeded with the client id.
        """
        sender = as_sender(self.server, client_info.client_id)
        payload = call_broadcast(self.algorithm, sender, client_info)
        return payload if self.privacy is None else self.privacy.add_bounds(payload)

    def content(self, payload: Payload) -> Content:
        """Return the message with a broadcast.

        Equal broadcasts have the same message object.
        """
        return self._contents(payload)

    def received(self, payload: Payload) -> Payload:
        """Return the payload that a client decodes from the message with a broadcast."""
        return payload if self.channel.down is None else self._decoded(payload)

    def _encode(self, payload: Payload) -> Content:
        if self.skips_encoding and self.channel.down is None:
            return payload
        round_idx = self.server.round_context.round_idx
        return self.channel.encode_broadcast(round_idx, payload, self.server.arch.values())

    def _decode(self, payload: Payload) -> Payload:
        round_idx = self.server.round_context.round_idx
        return self.channel.decode_broadcast(round_idx, encoded(self.content(payload)))

    def received_by(self, client_info: ClientInfo) -> Payload:
        """Return the payload that a client decodes from its broadcast."""
        return self.received(self.broadcast(client_info))

    def received_model(self, client_info: ClientInfo, name: str) -> Tensors:
        """Return the tensors of a model that a client received as the item `name`, keyed by name.

        The result is empty if the client received no model as this item.
        """
        item = self.received_by(client_info).items_by_name.get(name)
        if item is None or item.kind != "params" or not isinstance(item.values, dict):
            return {}
        return item.values

    def expected_items(
        self, client_info: ClientInfo, received: Payload, round_idx: int
    ) -> Mapping[str, Item]:
        """Return the items that arrive in a client's upload, with placeholder values.

        Args:
            client_info: The sender.
            received: The broadcast on which the client trained.
            round_idx: Index of the round, from 0.
        """
        return self.expectations.expected_items(client_info, received, round_idx)

    def decode_upload(
        self,
        client_info: ClientInfo,
        content: Content,
        received: Payload,
        round_idx: int,
        attempt: int = 0,
    ) -> Payload:
        """Decode an upload, and validate the structure.

        Args:
            client_info: The sender.
            content: The upload, encoded or as a payload.
            received: The broadcast on which the client trained.
            round_idx: Index of the round, from 0.
            attempt: Number of times that the client has already trained in this round.

        Raises:
            PayloadError: If the upload is malformed or does not have the expected structure.
        """
        expected = self.expected_items(client_info, received, round_idx)
        if isinstance(content, Payload):
            payload = Payload.from_untrusted(content.tree())
        else:
            check_size(len(content), self.specs, expected)
            payload = self.channel.decode_upload(
                client_info, round_idx, content, expected, received, attempt=attempt
            )
        payload = payload.to(self.federation.memory.storage_device)
        check_upload(payload, self.specs, expected, client_info.num_rows)
        return payload

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {} if self.privacy is None else {"bounds": dict(self.privacy.factors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from the return value of `state_dict`."""
        if self.privacy is not None:
            self.privacy.factors = dict(state["bounds"])
