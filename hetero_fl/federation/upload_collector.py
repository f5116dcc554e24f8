"""The server's door: what arrives in a round is decoded, checked against what was asked, and folded into the aggregation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.communication.protocol import AggregatedUploads, Arrivals, Protocol
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import (
    Payload,
    PayloadError,
    check_size,
    check_upload,
    logged_from_report,
    loss_from_report,
)
from hetero_fl.federation.channel import FederationLinks, open_sums
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.privacy.server import ServerPrivacy
from hetero_fl.robustness.robust_means import AggregationRules, ReferenceTensors


@dataclass
class CollectedUploads:
    """What came of a round's arrivals: the uploads, the losses that clients told (of a secure sum the `mean` alone), why others
    were refused, who lied, and the magnitude of each upload."""

    uploads: Uploads
    losses: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    malicious: list[str] = field(default_factory=list)
    magnitudes: dict[str, float] = field(default_factory=dict)
    rules: AggregationRules | None = None
    # by client, what a method logged
    logged: dict[str, dict[str, float]] = field(default_factory=dict)


class UploadCollector:
    """Takes a round's arrivals one by one, so that the server never holds more of them than it needs.

    `memory`: what aggregation rules remember from round to round.
    """

    def __init__(
        self,
        expectations: ExpectedUploads,
        links: FederationLinks,
        protocol: Protocol,
        sums: ServerPrivacy,
    ) -> None:
        self.expectations = expectations
        self.links = links
        self.protocol = protocol
        self.sums = sums
        self.memory: dict[str, Any] = {}

    def collect(
        self,
        arrivals: Arrivals | AggregatedUploads,
        broadcast_to: Callable[[ClientInfo], Payload],
        round_idx: int,
    ) -> CollectedUploads:
        """All that arrived, in client-id order. `broadcast_to`: what a client received, on which it trained.

        Simulated liars know one another's uploads: from the first of them on, all are held until the last has come.
        """
        if isinstance(arrivals, AggregatedUploads):
            return self.open_sums(arrivals, broadcast_to, round_idx)
        federation = self.expectations.federation
        specs = self.expectations.protection.specs
        rules = self.make_rules(broadcast_to)
        reference = reference_tensors(broadcast_to)
        taken = CollectedUploads(
            Uploads(
                specs=specs,
                common=federation.common,
                rules=rules,
                noise=self.sums.sum_noise(broadcast_to, round_idx),
            ),
            rules=rules,
        )
        held: dict[str, Payload] = {}
        for client, body in arrivals:
            try:
                payload = self.decode_upload(client, body, broadcast_to, round_idx)
            except PayloadError as error:
                taken.refused[client] = str(error)
                continue
            taken.magnitudes[client] = payload.magnitude
            del body  # a model's worth each: nobody holds one longer than need be
            if (loss := loss_from_report(payload.report)) is not None:
                taken.losses[client] = loss
            if logged := logged_from_report(payload.report):
                taken.logged[client] = logged
            if federation.malicious is not None and federation.malicious.is_malicious(
                client, round_idx
            ):
                taken.malicious.append(client)
            if taken.malicious:
                held[client] = payload
            else:
                taken.uploads.add(Upload(federation.client_infos[client], payload))
            del payload
        if federation.malicious is not None and taken.malicious:
            honest = {
                client: (federation.client_infos[client], held[client])
                for client in taken.malicious
            }
            senders = len(taken.uploads) + len(held)
            held |= federation.malicious.poison(
                honest, round_idx, senders, reference, self.expectations.trained_names
            )
        for client, payload in held.items():
            taken.magnitudes[client] = payload.norm()  # of what was forged
            taken.uploads.add(Upload(federation.client_infos[client], payload))
        return taken

    def open_sums(
        self,
        aggregated: AggregatedUploads,
        broadcast_to: Callable[[ClientInfo], Payload],
        round_idx: int,
    ) -> CollectedUploads:
        """A secure sum: uploads of which only sums are known."""
        assert isinstance(self.protocol, SecureAggregation)
        cards = [self.expectations.federation.client_infos[client] for client in aggregated.clients]
        forms = [
            (card, self.expectations.expected_items(card, broadcast_to(card), round_idx))
            for card in cards
        ]
        layout = self.protocol.agreed.layout(round_idx)
        noise = self.sums.sum_noise(broadcast_to, round_idx)
        uploads, loss = open_sums(aggregated, layout, self.protocol.fixed, forms, noise)
        return CollectedUploads(
            uploads, {} if loss is None else {"mean": loss}, dict(aggregated.dropouts)
        )

    def make_rules(self, broadcast_to: Callable[[ClientInfo], Payload]) -> AggregationRules | None:
        """What stands in for the mean in this round, if anything does."""
        federation = self.expectations.federation
        if federation.aggregation.is_plain_mean:
            return None
        terms = (
            federation.aggregation,
            federation.task,
            reference_tensors(broadcast_to),
            self.expectations.trained_names,
        )
        return AggregationRules(*terms, memory=self.memory)

    def decode_upload(
        self,
        client: str,
        data: bytes,
        broadcast_to: Callable[[ClientInfo], Payload],
        round_idx: int,
        attempt: int = 0,
    ) -> Payload:
        """An upload, decoded and checked against what this client was to send. `attempt`: how often it was asked in that round
        before. Raises PayloadError."""
        card = self.expectations.federation.client_infos[client]
        got = broadcast_to(card)
        like = self.expectations.expected_items(card, got, round_idx)
        specs = self.expectations.protection.specs
        check_size(len(data), specs, like)
        payload = self.links.decode_upload(card, round_idx, data, like, got, attempt)
        check_upload(payload, specs, like)
        return payload


def reference_tensors(broadcast_to: Callable[[ClientInfo], Payload]) -> ReferenceTensors:
    """The named tensors that a client was sent under an item's name; {} if none were."""

    def reference(client_info: ClientInfo, name: str) -> Tensors:
        sent = broadcast_to(client_info).items_.get(name)
        return (
            sent.values
            if sent is not None and isinstance(sent.values, dict) and sent.kind == "params"
            else {}
        )

    return reference
