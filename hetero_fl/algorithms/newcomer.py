"""Somebody who joins when a federation has finished: what it receives, and how it trains on."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from hetero_fl.algorithms.base import Items
from hetero_fl.algorithms.distillation import TEACHER, OnProxy
from hetero_fl.payload import Payload
from hetero_fl.plan import Plan
from hetero_fl.state import Card, Participant

BACKBONE = "backbone"
SCRATCH = "scratch"


class Newcomer(OnProxy):
    """A client that begins with a shared backbone, or with the consensus of others on public rows, or with nothing, and then
    trains alone on its own labelled rows.

    What it begins with lies in the server's state, under `backbone` (named tensors) or `teacher` (logits of the proxy rows,
    `[D, outputs]`), and is received once. Not in the registry: a run of many rounds has no use for it.
    """

    shared = ()
    uploads = {}
    counted = False
    needs_proxy = False
    distils = False
    reads = "after private training"

    digest_epochs: PositiveInt = Field(20, description="epochs on the proxy set before private training")

    def broadcast(self, server: Participant, card: Card) -> Items:
        return {} if card.reading else {n: server.state[n] for n in (BACKBONE, TEACHER) if n in server.state}

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        if BACKBONE in got:
            client.load("model", got[BACKBONE])
        yield from ()

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        if TEACHER in got:
            yield self.digest(client, got[TEACHER], self.digest_epochs)
        yield self.fit(client)
        return {}
