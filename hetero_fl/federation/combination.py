"""Combination of the uploads of a round, and the update of the server with the result.

The round itself knows only `RoundUploads`. Its subclasses add what an option changes: simulated
attacks, sums that the server cannot take apart, and a server that clients compute.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from typing_extensions import override

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.means import discount_upload
from hetero_fl.aggregation.robust_means import AggregationRules
from hetero_fl.communication.protocol import AggregatedUploads, RoundProtocol, SealedAggregate
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Payload
from hetero_fl.engine.driver import Backend, DivergedError, run_plans
from hetero_fl.federation.server_link import ServerLink
from hetero_fl.federation.summed_uploads.derived_setup import uploads_from_sum
from hetero_fl.federation.summed_uploads.hidden_server import SealedLink
from hetero_fl.privacy.server_side import SumNoise
from hetero_fl.robustness.attacks import MaliciousClients

# Result of the exchanges of a round. None if the server reads each upload.
RoundResult: TypeAlias = AggregatedUploads | SealedAggregate | None


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
            rules=rules,
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
        discounted = discount_upload(payload, staleness_weight)
        self.uploads.add(Upload(client_info, discounted, staleness_weight))

    def finish(self, result: RoundResult) -> None:
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
    def finish(self, result: RoundResult) -> None:
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
    def finish(self, result: RoundResult) -> None:
        assert isinstance(result, AggregatedUploads)
        expected_items = self.link.expectations.expected_items
        forms = []
        for client_id in result.clients:
            info = self.link.federation.client_infos[client_id]
            forms.append((info, expected_items(info, self.link.received_by(info), self.round_idx)))
        layout = self.protocol.agreed.layout(self.round_idx)
        vector = self.protocol.fixed.decode(result.total)
        self.uploads, self.mean_loss = uploads_from_sum(
            vector, result.unit, layout, forms, self.noise
        )


class SealedUploads(RoundUploads):
    """Uploads that a client sums and aggregates, because the server cannot read them."""

    @override
    def finish(self, result: RoundResult) -> None:
        assert isinstance(result, SealedAggregate)
        self.result = result
        client_infos = self.link.federation.client_infos
        self.uploads = Uploads(Upload(client_infos[c], Payload()) for c in result.clients)

    @override
    def update_server(self, backend: Backend) -> None:
        if self.result.diverged:
            raise DivergedError(self.result.diverged)
        assert isinstance(self.link, SealedLink)
        self.link.state = self.result.state


class Combination:
    """Combination of the uploads of each round, as the configuration of the run requires.

    Args:
        protocol: Protocol by which uploads reach the server.
        link: The server's link to the clients.
    """

    def __init__(self, protocol: RoundProtocol, link: ServerLink) -> None:
        self._protocol = protocol
        self._link = link
        config = link.federation.aggregation
        self._rules_config = None if config.is_plain_mean else config

    def begin_round(self, round_idx: int) -> RoundUploads:
        """Return the uploads of a round, to which no upload has been added."""
        link = self._link
        if isinstance(self._protocol, SecureAggregation):
            return SummedUploads(self._protocol, link, round_idx)
        if link.hides_server:
            return SealedUploads(link, round_idx)
        rules = None
        if self._rules_config is not None:
            rules = AggregationRules(
                self._rules_config,
                link.federation.task,
                link.received_model,
                link.expectations.trained_names,
            )
        if link.federation.malicious is not None:
            return AttackedUploads(link.federation.malicious, link, round_idx, rules)
        return RoundUploads(link, round_idx, rules)
