"""Somebody who joins when a federation has finished: what it receives, and how it trains on."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field, NonNegativeFloat, PositiveInt

from hetero_fl.algorithms.base import Items
from hetero_fl.algorithms.distillation import TEACHER, ProxyTraining
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Plan

BACKBONE = "backbone"
SCRATCH = "scratch"
BOTH = "both"
HEAD = ("head.",)


class JoiningClient(ProxyTraining):
    """A client that begins with a shared backbone, with the consensus of others on public rows, with both or with nothing, and
    then trains alone on its own labelled rows.

    A new head on a received backbone is trained before the backbone moves: by the teacher if there is one, else by a training
    of the head alone (Kumar et al. 2022: linear probing, then fine-tuning). With a teacher, private training goes on
    rehearsing it: a few labels would soon make it forgotten.

    What it begins with lies in the server's state, under `backbone` (named tensors) or `teacher` (logits of the proxy rows,
    `[D, outputs]`), and is received once. Not in the registry: a run of many rounds has no use for it.
    """

    shared = ()
    uploads = {}
    counts_traffic = False
    needs_proxy = False
    is_distillation = False
    evaluated_when = "after private training"

    digest_epochs: PositiveInt = Field(
        10, description="epochs on the proxy set before private training"
    )
    rehearse: NonNegativeFloat = Field(
        1.0, description="weight of the teacher on public rows in private training; 0: none"
    )
    probe: bool = Field(
        True,
        description="without a teacher: the head is trained alone before a received backbone follows",
    )

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return (
            {}
            if recipient.is_evaluation
            else {n: server.state[n] for n in (BACKBONE, TEACHER) if n in server.state}
        )

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        if BACKBONE in received:
            client.load("model", received[BACKBONE])
        yield from ()

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if TEACHER in received:
            yield self.digest(client, received[TEACHER], self.digest_epochs)
        elif BACKBONE in received and self.probe:
            yield replace(self.fit(client, label="head"), train={"model": HEAD})
        yield (
            self.proxy_replay(client, received[TEACHER], self.rehearse)
            if TEACHER in received and self.rehearse
            else self.fit(client)
        )
        return {}
