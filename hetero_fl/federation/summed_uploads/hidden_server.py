"""The server's part of a method, computed by clients because the server cannot decrypt uploads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.communication.homomorphic.key import SEAL_BYTES
from hetero_fl.communication.homomorphic.messages import PLAIN
from hetero_fl.communication.homomorphic.protocol import (
    DecryptedSum,
    Purpose,
    ServerReplica,
)
from hetero_fl.communication.protocol import EncodeCache
from hetero_fl.communication.vector_layout import VectorLayout
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import SUM_KINDS, Payload, PayloadError
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.federation import FederationSpec, as_sender
from hetero_fl.federation.server_link import ServerLink
from hetero_fl.federation.summed_uploads.derived_setup import DerivedSetup, uploads_from_sum
from hetero_fl.utils.serialization import (
    CodecError,
    as_bytes,
    as_tensor,
    decode,
    encode,
    encoded_size,
)

FORM = "hetero_fl state of the server 1"


def encode_state(server: Participant) -> bytes:
    """Encode the models and the state of the server."""
    return encode({"models": server.models, "state": server.state}, FORM)


def decode_state(data: bytes) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Decode the models and the state of the server.

    Raises:
        PayloadError: If the data is malformed.
    """
    try:
        tree = decode(data, FORM)
        return tree["models"], tree["state"]
    except (CodecError, KeyError, TypeError) as error:
        raise PayloadError(f"state of the server: malformed ({error})") from None


def state_size(server: Participant) -> int:
    """Return the size of the server's encoded models and state in bytes."""
    return encoded_size({"models": server.models, "state": server.state}, FORM)


def state_message_size(server: Participant, is_sealed: bool) -> int:
    """Return the size of a message with the server's state in bytes.

    Args:
        server: The server.
        is_sealed: Whether the state is sealed, as after the first aggregation.
    """
    return len(PLAIN) + state_size(server) + (SEAL_BYTES if is_sealed else 0)


class HiddenServer(DerivedSetup, ServerReplica):
    """Server whose broadcasts and aggregations clients compute from its state.

    A client creates the server of a round from the state that the server's messages contain.

    Args:
        algorithm: The method.
        federation: The federation.
    """

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        super().__init__(algorithm, federation)
        # The last state and the server with this state.
        self._last: tuple[bytes, int, Participant] | None = None
        self._encode = EncodeCache(Payload.encode)

    @override
    def layout(self, round_idx: int) -> VectorLayout:
        layout = super().layout(round_idx)
        if not layout.unit_weights:
            layout.unit_weights = self._unit_weights(round_idx)
        return layout

    def _unit_weights(self, round_idx: int) -> frozenset[str]:
        """Return the names of weighted items whose weights do not exceed 1 in a dry run.

        Values that are already sums are not included, because they grow with the number of rows.
        """
        largest: dict[str, float] = {}
        for profile in self.federation.client_infos.profiles:
            for name, item in self.upload_form(profile.first, round_idx).items():
                weight = float(torch.as_tensor(item.weight, dtype=torch.float64).abs().max())
                largest[name] = max(weight, largest.get(name, 0.0))
        return frozenset(
            name
            for name, weight in largest.items()
            if weight <= 1 and self.expectations.specs[name].kind not in SUM_KINDS
        )

    @override
    def broadcast(self, client: str, state: bytes, round_idx: int, purpose: Purpose) -> bytes:
        server = self._server(state, round_idx)
        return self._encode(self._payload(server, client, purpose))

    def _payload(self, server: Participant, client: str, purpose: Purpose) -> Payload:
        info = replace(self.federation.client_infos[client], purpose=purpose)
        return call_broadcast(self.algorithm, as_sender(server, client), info)

    @override
    def aggregate(
        self, state: bytes, decrypted: DecryptedSum, round_idx: int, backend: Any
    ) -> bytes:
        server = self._server(state, round_idx)
        forms = []
        for client in decrypted.clients:
            received = self._payload(server, client, "train")
            info = self.federation.client_infos[client]
            forms.append((info, self.expectations.expected_items(info, received, round_idx)))
        layout = self.layout(round_idx)
        # The mean loss is not reported, because a server that forges the sum could have other
        # numbers in its place.
        uploads, _ = uploads_from_sum(decrypted.vector, decrypted.unit, layout, forms)
        # The aggregation changes the server.
        self._last = None
        run_plan(server, self.algorithm.aggregate(server, uploads), backend)
        return encode_state(server)

    def _server(self, state: bytes, round_idx: int) -> Participant:
        """Return the server with a state in a round.

        Raises:
            PayloadError: If the state is malformed.
        """
        if self._last is None or self._last[:2] != (state, round_idx):
            models, private = decode_state(state)
            server = replace(
                self.server,
                arch=dict(self.server.arch),
                models=self.federation.memory.to_storage(models),
                state=self.federation.memory.to_storage(private),
                round_context=self.federation.round_context(round_idx),
                stream_uses={},
            )
            self._last = state, round_idx, server
            # The cached broadcasts belong to another state.
            self._encode = EncodeCache(Payload.encode)
        return self._last[2]


class SealedLink(ServerLink):
    """Link of a server that cannot read its own state, which is the message of all broadcasts.

    Attributes:
        state: Message with the state, which only clients can read. Empty before the first
            aggregation.
    """

    hides_server = True
    state = b""

    @override
    def clear(self) -> None:
        super().clear()
        # The initial state may be set after the construction of the trainer.
        self._initial = b""

    @override
    def content(self, payload: Payload) -> bytes:
        if self.state:
            return self.state
        if not self._initial:
            self._initial = PLAIN + encode_state(self.server)
        return self._initial

    @override
    def received(self, payload: Payload) -> Payload:
        return payload

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"sealed": as_tensor(self.state)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.state = as_bytes(state["sealed"])
