"""The server's door: what arrives in a round is decoded, checked against what was asked, and folded into the aggregation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.channel.protocol import Arrivals
from hetero_fl.payload import Payload, PayloadError, check_upload, loss_of
from hetero_fl.runtime.dry import Expectations
from hetero_fl.runtime.private_sums import PrivateSums
from hetero_fl.state import Card


@dataclass
class Taken:
    """What came of a round's arrivals: the uploads, the losses that clients told, and why others were refused."""

    uploads: Uploads
    losses: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class Intake:
    """Takes a round's arrivals one by one, so that the server never holds more of them than it needs."""

    def __init__(self, expectations: Expectations, sums: PrivateSums) -> None:
        self.expectations, self.sums = expectations, sums

    def take(self, arrivals: Arrivals, asked: Callable[[Card], Payload], round: int) -> Taken:
        """All that arrived, in client-id order. `asked`: what a client was sent, on which it trained."""
        federation, specs = self.expectations.federation, self.expectations.protection.specs
        noise = self.sums.noise(asked, round)
        taken = Taken(Uploads(specs=specs, common=federation.common, noise=noise))
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

    def receive(self, client: str, data: bytes, asked: Callable[[Card], Payload], round: int) -> Payload:
        """An upload, decoded and checked against what this client was to send. Raises PayloadError."""
        payload, card = Payload.decode(data), self.expectations.federation.cards[client]
        check_upload(payload, self.expectations.protection.specs, self.expectations.of(card, asked(card), round))
        return payload
