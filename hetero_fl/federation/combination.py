"""Combination of the uploads of a round, and the update of the server with the result.

The round itself knows only `RoundUploads`. Its subclasses add what an option changes: simulated
attacks, and sums that the server cannot take apart or cannot read.
"""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.robust_means import AggregationRules
from hetero_fl.aggregation.uploads import MeanCombiner, discount_upload
from hetero_fl.communication.homomorphic import EncryptedSum
from hetero_fl.communication.protocol import AggregatedUploads, RoundProtocol
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.engine.driver import Backend, run_plans
from hetero_fl.federation.server_link import ServerLink
from hetero_fl.federation.summed_uploads import CIPHERTEXTS, EncryptedLink, uploads_from_sum
from hetero_fl.privacy.server_side import SumNoise
from hetero_fl.robustness.attacks import MaliciousClients


class RoundUploads:
    """Uploads of a round, which are added to the aggregation on arrival.

    Only one upload is in memory at a time, unless a robust rule or the method needs all of them.

    Args:
        link: The server's link to the clients.
        round_idx: Index of the round, from 0.
        rules: Robust aggregation rules. If None, items are averaged.

    Attributes:
        magnitudes: Largest norm of a tensor in each upload, keyed by client id.
        malicious: Ids of simulated malicious clients whose uploads arrived.
        mean_loss: Mean training loss, if the clients reveal only their sum. Otherwise None.
    """

    def __init__(
        self,
        link: ServerLink,
        round_idx: int,
        rules: AggregationRules | None = None,
    ) -> None:
        self.link = link
        self.round_idx = round_idx
        self.rules = rules
        self.noise: SumNoise | None = None
        if link.privacy is not None:
            self.noise = link.privacy.sum_noise(link.received_by, round_idx)
        self.uploads = Uploads(
            specs=link.expectations.specs,
            common=link.federation.common,
            new_combiner=MeanCombiner if rules is None else rules.combiner,
            noise=self.noise,
        )
        self.magnitudes: dict[str, float] = {}
        self.malicious: list[str] = []
        self.mean_loss: float | None = None

    def __len__(self) -> int:
        return len(self.uploads)

    def add(self, client_info: ClientInfo, payload: Payload, staleness_weight: float = 1.0) -> None:
        """Add an upload. Uploads must be added in the order of client ids.

        Args:
            client_info: The sender.
            payload: The upload.
            staleness_weight: Factor on the weights of the upload.
        """
        self.magnitudes[client_info.client_id] = payload.magnitude
        # The weights in the payload are discounted here; methods may also read the factor.
        discounted = discount_upload(payload, staleness_weight)
        self.uploads.add(Upload(client_info, discounted, staleness_weight))

    def finish(self, result: AggregatedUploads | None) -> None:
        """Complete the uploads after the last exchange of the round."""
        return

    def update_server(self, backend: Backend) -> None:
        """Update the server and the bounds of its privacy with the uploads.

        Raises:
            DivergedError: If training at the server diverges.
        """
        server = self.link.server
        plan = self.link.algorithm.aggregate(server, self.uploads)
        (outcome,) = run_plans([(server, plan)], backend)
        outcome.result()
        if self.link.privacy is not None:
            self.link.privacy.adapt_bounds(self.uploads)

    def describe_largest(self) -> str:
        """Return the continuation of a message with the largest upload, or "" if it is private."""
        if not self.magnitudes or self.link.privacy is not None:
            return ""
        client = max(self.magnitudes, key=lambda c: self.magnitudes[c])
        largest = f"{self.magnitudes[client]:.3g}"
        return f"; the upload of {client} has the largest magnitude, {largest}"

    def record(self) -> dict[str, Any]:
        """Return entries of the round's record."""
        entries: dict[str, Any] = {}
        if self.rules is not None and self.rules.too_few:
            entries["too_few"] = self.rules.too_few
        if self.link.federation.malicious is not None:
            entries["attacks"] = {"malicious": self.malicious}
        return entries


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


def begin_uploads(protocol: RoundProtocol, link: ServerLink, round_idx: int) -> RoundUploads:
    """Return the uploads of a round, to which no upload has been added.

    Args:
        protocol: Protocol by which uploads reach the server.
        link: The server's link to the clients.
        round_idx: Index of the round, from 0.
    """
    if isinstance(protocol, SecureAggregation):
        return SummedUploads(protocol, link, round_idx)
    if isinstance(link, EncryptedLink):
        return EncryptedUploads(link, round_idx)
    rules = None
    if link.robust is not None:
        rules = AggregationRules(
            link.robust,
            link.federation.task,
            link.received_model,
            link.expectations.trained_names,
        )
    if link.federation.malicious is not None:
        return AttackedUploads(link.federation.malicious, link, round_idx, rules)
    return RoundUploads(link, round_idx, rules)
