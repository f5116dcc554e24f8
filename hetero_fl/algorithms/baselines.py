"""The bounds that every table needs: no federation, the ensemble of all, and all data in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, algorithm, local_given
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import Card, Participant, floats
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows
from hetero_fl.utils.ordering import in_order


@algorithm("local")
class Local(Algorithm):
    """Each client trains alone. The line that every method has to beat."""

    shared = ()
    uploads = {}
    counted = False
    reads = "after private training"


@algorithm("ensemble")
class Ensemble(Local):
    """The mean softmax (regression: mean output) of all clients' models, each through its own preprocessing.

    Members train alone; every client would have to hold every other's model.
    """

    uploads = {"member": ItemSpec("params", use="each")}
    counted = True
    everybody = True
    reads = "mean prediction of all clients' models after private training (the models saved are the members)"

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield self.fit(client)
        return {"member": Item(floats(client.models["model"]), float(client.n), "params")}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        members = dict(server.state.get("members", {}))
        members.update({u.client: u.payload["member"] for u in uploads.having("member")})
        server.state["members"] = members
        yield from ()

    def broadcast(self, server: Participant, card: Card) -> Items:
        return server.state.get("members", {}) if card.reading else {}

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        client.state["members"] = {name: got[name] for name in got}
        yield from ()

    def predict(self, client: Participant, rows: Rows, home: bool) -> Plan[Tensor]:
        cards = [client.peers[i] for i in in_order(client.state["members"])]
        logits = yield [
            Predict(
                c.id,
                Rows(rows.name, through=c.preprocess),
                tensors=client.state["members"][c.id],
                arch=c.arch,
            )
            for c in cards
        ]
        if client.task.kind == "regression":
            return torch.stack(logits).mean(0)
        if client.task.kind == "multilabel":
            return torch.stack([z.sigmoid() for z in logits]).mean(0).logit(eps=1e-7)
        mean = torch.stack([z.log_softmax(-1) for z in logits]).logsumexp(0)
        return self.with_prior(client, mean) if home else mean


@algorithm("centralized")
class Centralized(Algorithm):
    """All clients' training rows in one place: what federation gives up. One model, read on each client's view of its data.

    Each round is the clients' local training on the pooled rows, with the optimiser made anew as a client's is; one client
    that holds everything, under FedAvg with λ = 1, is the same computation.
    """

    shared = None
    uploads = {}
    counted = False
    everybody = True
    reads = "the pooled model"

    def broadcast(self, server: Participant, card: Card) -> Items:
        return {"model": floats(server.models[self.pool(server).arch.id])} if card.reading else {}

    @staticmethod
    def pool(server: Participant) -> Card:
        """The client whose architecture and settings the pooled model takes: the first of the most frequent architecture."""
        return server.peers[server.peers.foremost.first]

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from ()
        return {}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        card = self.pool(server)
        s, rows = card.settings, Rows("pooled", through=card.preprocess)
        counts = server.counts
        if server.task.kind == "multiclass":
            counts = torch.bincount(rows.columns(server)["y"], minlength=server.task.outputs)
        yield Fit(
            {card.arch.id: None},
            Supervised(server.task.kind, slot=card.arch.id),
            rows,
            given=local_given(server.task, counts, s, self.logit_adjustment),
            augment=s.augment.active,
            epochs=s.epochs,
            steps=s.steps,
            batch_size=s.batch_size,
            optimizer=s.optimizer.at(server.clock.round, server.clock.rounds),
            as_id=min(kind.first for kind in server.peers.kinds),
        )

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        client.arch["pooled"], client.models["pooled"] = self.pool(client).arch, got["model"]
        yield from ()

    def used(self, client: Participant) -> tuple[str, Any]:
        return "pooled", self.pool(client).preprocess

    def server_slot(self, server: Participant) -> str | None:
        return self.pool(server).arch.id
