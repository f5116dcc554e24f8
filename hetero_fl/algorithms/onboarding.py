"""A client that joins when a federation has finished: what it receives, and how it goes on training."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field, NonNegativeFloat, PositiveInt

from hetero_fl.algorithms.base import Items, Needs
from hetero_fl.algorithms.distillation import TEACHER, ProxyTraining
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Plan

BACKBONE = "backbone"
SCRATCH = "scratch"
BOTH = "both"
HEAD = ("head.",)


class JoiningClient(ProxyTraining):
    """Train one client on its own labeled rows, from a shared backbone, the consensus of others, both or neither.

    A new head on a received backbone is trained before the backbone moves: by the teacher if there is one, else by a training
    of the head alone (Kumar et al. 2022: linear probing, then fine-tuning). With a teacher, local training goes on replaying
    it: a few labels would soon make it forgotten.

    The start is in the server's state, under `backbone` (named tensors) or `teacher` (logits of the proxy rows,
    `[D, outputs]`), and is received once. Not in the registry: a run of many rounds has no use for it.
    """

    evaluated_when = "after local training"
    shared = ()
    uploads = {}
    needs = Needs(counts_traffic=False)

    digest_epochs: PositiveInt = Field(
        10, description="epochs on the proxy set before local training"
    )
    rehearse: NonNegativeFloat = Field(
        1.0, description="weight of the teacher on public rows in local training; 0: none"
    )
    probe: bool = Field(
        True,
        description="without a teacher: the head is trained alone before a received backbone follows",
    )

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        names = (BACKBONE, TEACHER) if recipient.purpose == "train" else ()
        return {n: server.state[n] for n in names if n in server.state}

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        if BACKBONE in received:
            client.load("model", received[BACKBONE])
        yield from ()

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if TEACHER in received:
            yield self.distill(client, received, self.digest_epochs)
        elif BACKBONE in received and self.probe:
            yield replace(local_fit(client, label="head"), train={"model": HEAD})
        replays = TEACHER in received and self.rehearse > 0
        yield self.proxy_replay(client, received, self.rehearse) if replays else local_fit(client)
        return {}
