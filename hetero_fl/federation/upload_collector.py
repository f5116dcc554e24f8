"""The server's door: what arrives in a round is decoded, checked against what was asked, and folded into the aggregation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.communication.protocol import Arrivals, Protocol, Summed
from hetero_fl.communication.secure_aggregation.protocol import SecureSum
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import Card
from hetero_fl.core.payload import Payload, PayloadError, check_size, check_upload, loss_of
from hetero_fl.federation.channel import Links, opened
from hetero_fl.federation.dry_run import Expectations
from hetero_fl.privacy.server import PrivateSums
from hetero_fl.robustness.robust_means import Reference, Rules


@dataclass
class Taken:
    """What came of a round's arrivals: the uploads, the losses that clients told (of a secure sum the `mean` alone), why others
    were refused, who lied, and the magnitude of each upload."""

    uploads: Uploads
    losses: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    liars: list[str] = field(default_factory=list)
    magnitudes: dict[str, float] = field(default_factory=dict)
    rules: Rules | None = None


class Intake:
    """Takes a round's arrivals one by one, so that the server never holds more of them than it needs.

    `memory`: what aggregation rules remember from round to round.
    """

    def __init__(
        self, expectations: Expectations, links: Links, protocol: Protocol, sums: PrivateSums
    ) -> None:
        self.expectations, self.links, self.protocol, self.sums = (
            expectations,
            links,
            protocol,
            sums,
        )
        self.memory: dict[str, Any] = {}

    def take(
        self, arrivals: Arrivals | Summed, asked: Callable[[Card], Payload], round: int
    ) -> Taken:
        """All that arrived, in client-id order. `asked`: what a client received, on which it trained.

        Simulated liars know one another's uploads: from the first of them on, all are held until the last has come.
        """
        if isinstance(arrivals, Summed):
            return self.open(arrivals, asked, round)
        federation, specs = self.expectations.federation, self.expectations.protection.specs
        rules, reference = self.rules(asked), received(asked)
        taken = Taken(
            Uploads(
                specs=specs,
                common=federation.common,
                rules=rules,
                noise=self.sums.noise(asked, round),
            ),
            rules=rules,
        )
        held: dict[str, Payload] = {}
        for client, body in arrivals:
            try:
                payload = self.receive(client, body, asked, round)
            except PayloadError as error:
                taken.refused[client] = str(error)
                continue
            taken.magnitudes[client] = payload.magnitude
            del body  # a model's worth each: nobody holds one longer than need be
            if (loss := loss_of(payload.report)) is not None:
                taken.losses[client] = loss
            if federation.liars is not None and federation.liars.lie(client, round):
                taken.liars.append(client)
            if taken.liars:
                held[client] = payload
            else:
                taken.uploads.add(Upload(federation.cards[client], payload))
            del payload
        if federation.liars is not None and taken.liars:
            honest = {client: (federation.cards[client], held[client]) for client in taken.liars}
            senders = len(taken.uploads) + len(held)
            held |= federation.liars.forge(
                honest, round, senders, reference, self.expectations.trained
            )
        for client, payload in held.items():
            taken.magnitudes[client] = payload.norm()  # of what was forged
            taken.uploads.add(Upload(federation.cards[client], payload))
        return taken

    def open(self, summed: Summed, asked: Callable[[Card], Payload], round: int) -> Taken:
        """A secure sum: uploads of which only sums are known."""
        assert isinstance(self.protocol, SecureSum)
        cards = [self.expectations.federation.cards[client] for client in summed.clients]
        forms = [(card, self.expectations.of(card, asked(card), round)) for card in cards]
        layout, noise = self.protocol.agreed.layout(round), self.sums.noise(asked, round)
        uploads, loss = opened(summed, layout, self.protocol.fixed, forms, noise)
        return Taken(uploads, {} if loss is None else {"mean": loss}, dict(summed.left))

    def rules(self, asked: Callable[[Card], Payload]) -> Rules | None:
        """What stands in for the mean in this round, if anything does."""
        federation = self.expectations.federation
        if federation.aggregation.plain:
            return None
        terms = (
            federation.aggregation,
            federation.task,
            received(asked),
            self.expectations.trained,
        )
        return Rules(*terms, memory=self.memory)

    def receive(
        self, client: str, data: bytes, asked: Callable[[Card], Payload], round: int, again: int = 0
    ) -> Payload:
        """An upload, decoded and checked against what this client was to send. `again`: how often it was asked in that round
        before. Raises PayloadError."""
        card = self.expectations.federation.cards[client]
        got = asked(card)
        like, specs = self.expectations.of(card, got, round), self.expectations.protection.specs
        check_size(len(data), specs, like)
        payload = self.links.uploaded(card, round, data, like, got, again)
        check_upload(payload, specs, like)
        return payload


def received(asked: Callable[[Card], Payload]) -> Reference:
    """The named tensors that a client was sent under an item's name; {} if none were."""

    def reference(card: Card, name: str) -> Tensors:
        sent = asked(card).items_.get(name)
        return (
            sent.values
            if sent is not None and isinstance(sent.values, dict) and sent.kind == "params"
            else {}
        )

    return reference
