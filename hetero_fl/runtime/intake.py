"""The server's door: what arrives in a round is decoded, checked against what was asked, and folded into the aggregation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.channel.protocol import Arrivals, Protocol, Summed
from hetero_fl.channel.secure import SecureSum
from hetero_fl.payload import Payload, PayloadError, check_upload, loss_of
from hetero_fl.runtime.dry import Expectations
from hetero_fl.runtime.links import Links
from hetero_fl.runtime.secure import opened
from hetero_fl.state import Card


@dataclass
class Taken:
    """What came of a round's arrivals: the uploads, the losses that clients told (of a secure sum the `mean` alone), and why
    others were refused."""

    uploads: Uploads
    losses: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class Intake:
    """Takes a round's arrivals one by one, so that the server never holds more of them than it needs."""

    def __init__(self, expectations: Expectations, links: Links, protocol: Protocol) -> None:
        self.expectations, self.links, self.protocol = expectations, links, protocol

    def take(self, arrivals: Arrivals | Summed, asked: Callable[[Card], Payload], round: int) -> Taken:
        """All that arrived, in client-id order. `asked`: what a client received, on which it trained."""
        if isinstance(arrivals, Summed):
            return self.open(arrivals, asked, round)
        federation, specs = self.expectations.federation, self.expectations.algorithm.uploads
        taken = Taken(Uploads(specs=specs, common=federation.common))
        for client, body in arrivals:
            try:
                payload = self.receive(client, body, asked, round)
            except PayloadError as error:
                taken.refused[client] = str(error)
                continue
            del body  # a model's worth each: nobody holds one longer than need be
            taken.uploads.add(Upload(federation.cards[client], payload))
            if (loss := loss_of(payload.report)) is not None:
                taken.losses[client] = loss
            del payload
        return taken

    def open(self, summed: Summed, asked: Callable[[Card], Payload], round: int) -> Taken:
        """A secure sum: uploads of which only sums are known."""
        assert isinstance(self.protocol, SecureSum)
        cards = [self.expectations.federation.cards[client] for client in summed.clients]
        forms = [(card, self.expectations.of(card, asked(card), round)) for card in cards]
        uploads, loss = opened(summed, self.protocol.agreed.layout(round), self.protocol.fixed, forms)
        return Taken(uploads, {} if loss is None else {"mean": loss}, dict(summed.left))

    def receive(self, client: str, data: bytes, asked: Callable[[Card], Payload], round: int) -> Payload:
        """An upload, decoded and checked against what this client was to send. Raises PayloadError."""
        card = self.expectations.federation.cards[client]
        got = asked(card)
        like = self.expectations.of(card, got, round)
        payload = self.links.uploaded(card, round, data, like, got)
        check_upload(payload, self.expectations.algorithm.uploads, like)
        return payload
