"""Homomorphic encryption: the server forwards the encrypted sum, from which clients compute means.

The server reads neither uploads nor sums nor models, so that its own models never change. A client
decrypts the last sum, aggregates it as the server would, and reads its broadcast from the result.
This suffices for methods whose broadcasts are the means of the last uploads (see
`hetero_fl.algorithms.base.broadcasts_means`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from typing_extensions import override

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.communication.homomorphic import KEY_NAME, SharedKey, ciphertext_shape
from hetero_fl.communication.protocol import (
    UPLOAD,
    Content,
    DirectProtocol,
    Message,
    TrainingRequest,
    encoded,
    refusal,
)
from hetero_fl.communication.vector_layout import FixedPoint, weight_unit
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload, PayloadError, check_upload
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.federation import FederationSpec, as_sender
from hetero_fl.federation.server_link import ServerLink
from hetero_fl.federation.summed_uploads.derived_setup import DerivedSetup, uploads_from_sum

# Name of the item with ciphertexts, uint8, one in each row.
CIPHERTEXTS = "ciphertexts"
SPECS = {CIPHERTEXTS: ItemSpec("rows")}


class HomomorphicEncryption(DirectProtocol):
    """Protocol of uploads that are encrypted with CKKS (Cheon et al. 2017) under the clients' key.

    Clients train and send the encrypted vector of their upload. Broadcasts contain the encrypted
    sum of the last uploads, and before the first sum the initial model.

    The server is assumed to follow the protocol. Clients cannot tell whether the ciphertexts that
    they receive are the sum of those that other clients sent.

    Args:
        algorithm: The method.
        federation: The federation. Its key is None at the server.
    """

    accepts_unencoded = False

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        config = federation.channel.homomorphic
        assert config is not None
        self.algorithm = algorithm
        self.federation = federation
        self.shared_setup = DerivedSetup(algorithm, federation)
        self.fixed = FixedPoint.from_config(config, federation.cohort, "channel.homomorphic")
        self.noise_bits = config.num_noise_bits(federation.cohort)
        # The last message with a sum, and the server after the aggregation of this sum.
        self._last: tuple[Content, Participant] | None = None

    @property
    def key(self) -> SharedKey:
        """Key of the clients.

        Raises:
            PayloadError: If this participant has no key.
        """
        if self.federation.shared_key is None:
            raise PayloadError("channel.homomorphic: this participant does not have the shared key")
        return self.federation.shared_key

    @cached_property
    def unit(self) -> float:
        """Factor by which clients divide values and weights."""
        return 2.0 ** weight_unit(map(self.shared_setup.num_rows, self.shared_setup.client_ids))

    @override
    def answer(
        self, client_id: str, message: Message, round_idx: int, notes: MutableMapping[str, bytes]
    ) -> Message | TrainingRequest:
        def encrypt(upload: Content) -> Message:
            try:
                payload = Payload.decode(encoded(upload))
                return Message(UPLOAD, self._encrypt(client_id, payload, round_idx).encode())
            except PayloadError as error:
                return refusal(error)

        try:
            return TrainingRequest(self.broadcast_in(client_id, message), encrypt)
        except PayloadError as error:
            return refusal(error)

    def _encrypt(self, client_id: str, payload: Payload, round_idx: int) -> Payload:
        group = self.shared_setup.aggregation_group(client_id)
        vector = self.shared_setup.layout(round_idx).pack(group, payload, self.unit)
        rows = self.key.encrypt(self.fixed.encode(vector), self.noise_bits)
        return Payload({CIPHERTEXTS: torch.from_numpy(rows)}, {"key": self.key.name})

    @override
    def broadcast_in(self, client_id: str, message: Message) -> Content:
        if self._last is None or self._last[0] is not message.content:
            payload = Payload.decode(message.body)
            if CIPHERTEXTS not in payload:
                return message.content
            self._last = message.content, self._aggregate(payload)
        client_info = self.federation.client_infos[client_id]
        if message.kind != "train":
            client_info = replace(client_info, purpose="evaluate")
        round_context = self.federation.round_context(message.round_idx)
        server = replace(self._last[1], round_context=round_context)
        return call_broadcast(self.algorithm, as_sender(server, client_id), client_info)

    def _aggregate(self, payload: Payload) -> Participant:
        """Return a server that contains only what follows from an encrypted sum."""
        round_idx = payload.report.get("round")
        if not isinstance(round_idx, int) or not 0 <= round_idx < self.federation.num_rounds:
            raise PayloadError(f"round of the sum: unknown round {round_idx!r}")
        check_upload(payload, SPECS, self.form(round_idx).items_by_name)
        layout = self.shared_setup.layout(round_idx)
        words = self.key.decrypt(payload[CIPHERTEXTS].numpy(), layout.size, self.noise_bits)
        forms = self.shared_setup.upload_forms(round_idx)
        uploads, _ = uploads_from_sum(self.fixed.decode(words), self.unit, layout, forms)
        server = self.federation.server()
        server.round_context = self.federation.round_context(round_idx)
        self.algorithm.setup(server)
        # Tensors that no client of the sum uploads stay as they are at the recipient.
        server.models = {slot: {} for slot in server.models}
        # A mean needs no step of computation.
        run_plan(
            server,
            self.algorithm.aggregate(server, uploads),
            self.shared_setup.expectations.backend,
        )
        return server

    def form(self, round_idx: int, **report: Any) -> Payload:
        """Return a payload with the shape of encrypted uploads and their sum in a round."""
        shape = ciphertext_shape(self.shared_setup.layout(round_idx).size)
        return Payload({CIPHERTEXTS: torch.zeros((), dtype=torch.uint8).expand(shape)}, report)

    @override
    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        encrypted = self.form(round_idx, key="0" * KEY_NAME)
        return {"train": (broadcast, encrypted.encoded_size)}

    @override
    def broadcast_size(self, round_idx: int, broadcast: int) -> int:
        # Groups of clients that upload in other rounds than others may receive an earlier sum.
        last = max(
            (i for i in range(round_idx) if self.shared_setup.layout(i).slices), default=None
        )
        return broadcast if last is None else self.form(last, round=last).encoded_size


class EncryptedLink(ServerLink):
    """Link of a server that forwards the encrypted sum of the last uploads.

    Args:
        protocol: The protocol.
        *args: Arguments of `ServerLink`.
        **options: Arguments of `ServerLink`.

    Attributes:
        sums: Last encrypted sum of each architecture group, or of all clients under "" if the
            method does not average within groups.
        key_name: Name of the key of the first upload of the run.
    """

    def __init__(self, protocol: HomomorphicEncryption, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.protocol = protocol
        self.specs = SPECS
        self.sums: dict[str, Payload] = {}
        self.key_name: Any = None

    @property
    @override
    def server_slot(self) -> str | None:
        return None

    def group_of(self, client_info: ClientInfo) -> str:
        """Return the group whose sum a client receives."""
        return client_info.arch.spec_id if self.algorithm.needs.one_architecture else ""

    @override
    def broadcast(self, client_info: ClientInfo) -> Payload:
        group = self.group_of(client_info)
        return self.sums[group] if group in self.sums else super().broadcast(client_info)

    @override
    def expected_items(
        self, client_info: ClientInfo, received: Payload, round_idx: int
    ) -> Mapping[str, Item]:
        return self.protocol.form(round_idx).items_by_name

    @override
    def state_dict(self) -> dict[str, Any]:
        sums = {group: payload.tree() for group, payload in self.sums.items()}
        return {"sums": sums, "key": self.key_name}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {group: Payload.from_untrusted(tree) for group, tree in state["sums"].items()}
        self.key_name = state["key"]
