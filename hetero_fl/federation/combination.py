"""Kinds of uploads of a round, and the choice of the kind.

The round itself knows only `RoundUploads`. The subclasses in this module add what an option
changes: simulated attacks, and sums that the server cannot take apart or cannot read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from typing_extensions import override

from hetero_fl.aggregation import Upload
from hetero_fl.communication.homomorphic import EncryptedSum
from hetero_fl.communication.protocol import AggregatedUploads, RoundProtocol
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.engine.driver import Backend
from hetero_fl.federation.round import RoundUploads, ServerLink
from hetero_fl.federation.summed_uploads import CIPHERTEXTS, EncryptedLink, uploads_from_sum
from hetero_fl.robustness.attacks import MaliciousClients


class AttackedUploads(RoundUploads):
    """Uploads of which some come from simulated malicious clients.

    When the upload of a malicious client has arrived, this upload and all later uploads are stored
    until the end of the round, because an attack may depend on the uploads of all of them.
    """

    def __init__(self, malicious: MaliciousClients, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.attacks = malicious
        self._held: dict[str, tuple[ClientInfo, Payload]] = {}

    @override
    def add(self, client_info: ClientInfo, payload: Payload, staleness_weight: float = 1.0) -> None:
        client_id = client_info.client_id
        if self.attacks.is_malicious(client_id, self.round_idx):
            self.malicious.append(client_id)
        if not self.malicious:
            super().add(client_info, payload, staleness_weight)
            return
        self._held[client_id] = (client_info, payload)

    @override
    def finish(self, result: AggregatedUploads | None) -> None:
        """Replace the uploads of malicious clients by the attack, and add all stored uploads."""
        poisoned = self.attacks.poison(
            {client_id: self._held[client_id] for client_id in self.malicious},
            self.round_idx,
            len(self.uploads) + len(self._held),
            self.link.received_model,
            self.link.expectations.trained_names,
        )
        for client_id, (client_info, payload) in self._held.items():
            sent = poisoned.get(client_id, payload)
            super().add(client_info, sent)
            self.magnitudes[client_id] = sent.norm()


class SummedUploads(RoundUploads):
    """Uploads of which the server learns only the sum."""

    def __init__(self, protocol: SecureAggregation, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.protocol = protocol

    @override
    def finish(self, result: AggregatedUploads | None) -> None:
        assert isinstance(result, AggregatedUploads)
        expected_items = self.link.expectations.expected_items
        forms = []
        for client_id in result.clients:
            info = self.link.federation.client_infos[client_id]
            forms.append((info, expected_items(info, self.link.received_by(info), self.round_idx)))
        layout = self.protocol.shared_setup.layout(self.round_idx)
        vector = self.protocol.fixed.decode(result.total)
        self.uploads, self.mean_loss = uploads_from_sum(
            vector, result.unit, layout, forms, self.noise
        )


class EncryptedUploads(RoundUploads):
    """Uploads of which the server adds the ciphertexts, without reading them."""

    link: EncryptedLink

    def __init__(self, link: EncryptedLink, round_idx: int) -> None:
        super().__init__(link, round_idx)
        self.total = EncryptedSum(link.protocol.shared_setup.layout(round_idx).size)
        # Groups of clients whose tensors are part of the sum.
        self.groups: set[str] = set()

    @override
    def add(self, client_info: ClientInfo, payload: Payload, staleness_weight: float = 1.0) -> None:
        key_name = payload.report.get("key")
        if self.link.key_name not in (None, key_name):
            raise PayloadError(
                "upload: encrypted with another key than the first upload of the run; copy the key "
                "file of one client to all clients"
            )
        self.total.add(payload[CIPHERTEXTS].numpy())
        self.link.key_name = key_name
        self.uploads.add(Upload(client_info, Payload()))
        if self.link.protocol.shared_setup.upload_form(client_info.client_id, self.round_idx):
            self.groups.add(self.link.group_of(client_info))

    @override
    def update_server(self, backend: Backend) -> None:
        rows = torch.from_numpy(self.total.rows())
        message = Payload({CIPHERTEXTS: rows}, {"round": self.round_idx})
        self.link.sums.update(dict.fromkeys(self.groups, message))


def make_uploads(protocol: RoundProtocol, link: ServerLink) -> Callable[[int], RoundUploads]:
    """Return a function that creates the uploads of a round from the index of the round.

    Args:
        protocol: Protocol by which uploads reach the server.
        link: The server's link to the clients.
    """
    if isinstance(protocol, SecureAggregation):
        return partial(SummedUploads, protocol, link)
    if isinstance(link, EncryptedLink):
        return partial(EncryptedUploads, link)
    if link.federation.malicious is not None:
        return partial(AttackedUploads, link.federation.malicious, link)
    return partial(RoundUploads, link)
