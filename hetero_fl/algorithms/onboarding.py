"""Training of a client that joins after a federation has finished.

Fine-tuning on a received backbone follows Kumar et al. 2022 (https://arxiv.org/abs/2202.10054).
"""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveInt
from typing_extensions import override

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
    """Train one new client on its own rows, starting from a shared backbone, a teacher or both.

    A client that receives a teacher distills the teacher before local training. Local training then
    also distills the teacher on proxy rows, which preserves what the model has learned. A client
    that receives only a backbone trains the new head alone before it trains the whole model (linear
    probing followed by fine-tuning, Kumar et al. 2022).

    The server's state contains `backbone` (a dictionary of tensors), `teacher` (logits of the proxy
    rows, shape `[D, outputs]`), both or neither. The client receives these items once. The method
    is not registered, because it is not meant for runs of several rounds.
    """

    evaluated_when = "after local training"
    shared = ()
    uploads = {}
    needs = Needs(counts_traffic=False)

    digest_epochs: PositiveInt = Field(
        10, description="epochs on the proxy set before local training"
    )
    replay_weight: NonNegativeFloat = Field(
        1.0, description="weight of the teacher on proxy rows in local training; 0 disables it"
    )
    probe: bool = Field(
        True,
        description="whether to train the head alone first if only a backbone is received",
    )

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        names = (BACKBONE, TEACHER) if recipient.purpose == "train" else ()
        return {name: server.state[name] for name in names if name in server.state}

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        if BACKBONE in received:
            client.load("model", received[BACKBONE])
        yield from ()

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if TEACHER in received:
            yield self.distill(client, received, self.digest_epochs)
        elif BACKBONE in received and self.probe:
            yield local_fit(client, train={"model": HEAD}, label="head")
        weight = self.replay_weight
        if TEACHER in received and weight > 0:
            yield self.proxy_replay(client, received, weight)
        else:
            yield local_fit(client)
        return {}
