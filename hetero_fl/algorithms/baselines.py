"""The bounds that every table needs: no federation, the ensemble of all, and all data in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, objective_context, register_algorithm
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import ClientInfo, Participant, floating_tensors
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows
from hetero_fl.utils.ordering import natural_order


@register_algorithm("local")
class Local(Algorithm):
    """Each client trains alone. The line that every method has to beat."""

    shared = ()
    uploads = {}
    counts_traffic = False
    evaluated_when = "after private training"


@register_algorithm("ensemble")
class Ensemble(Local):
    """The mean softmax (regression: mean output) of all clients' models, each through its own preprocessing.

    Members train alone; every client would have to hold every other's model.
    """

    uploads = {"member": ItemSpec("params", use="each")}
    counts_traffic = True
    needs_all_clients = True
    evaluated_when = "mean prediction of all clients' models after private training (the models saved are the members)"

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield self.fit(client)
        return {
            "member": Item(
                floating_tensors(client.models["model"]), float(client.num_rows), "params"
            )
        }

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        members = dict(server.state.get("members", {}))
        members.update({u.client: u.payload["member"] for u in uploads.having("member")})
        server.state["members"] = members
        yield from ()

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return server.state.get("members", {}) if recipient.is_evaluation else {}

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        client.state["members"] = {name: received[name] for name in received}
        yield from ()

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        cards = [client.peers[i] for i in natural_order(client.state["members"])]
        logits = yield [
            Predict(
                c.client_id,
                Rows(rows.name, preprocess=c.preprocess),
                tensors=client.state["members"][c.client_id],
                arch=c.arch,
            )
            for c in cards
        ]
        if client.task.kind == "regression":
            return torch.stack(logits).mean(0)
        if client.task.kind == "multilabel":
            return torch.stack([z.sigmoid() for z in logits]).mean(0).logit(eps=1e-7)
        mean = torch.stack([z.log_softmax(-1) for z in logits]).logsumexp(0)
        return self.add_log_prior(client, mean) if personal else mean


@register_algorithm("centralized")
class Centralized(Algorithm):
    """All clients' training rows in one place: what federation gives up. One model, read on each client's view of its data.

    Each round is the clients' local training on the pooled rows, with the optimizer made anew as a client's is; one client
    that holds everything, under FedAvg with λ = 1, is the same computation.
    """

    shared = None
    uploads = {}
    counts_traffic = False
    needs_all_clients = True
    evaluated_when = "the pooled model"

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return (
            {"model": floating_tensors(server.models[self.pooled_client(server).arch.spec_id])}
            if recipient.is_evaluation
            else {}
        )

    @staticmethod
    def pooled_client(server: Participant) -> ClientInfo:
        """The client whose architecture and settings the pooled model takes: the first of the most frequent architecture."""
        return server.peers[server.peers.main_profile.first]

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from ()
        return {}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        card = self.pooled_client(server)
        s = card.settings
        rows = Rows("pooled", preprocess=card.preprocess)
        counts = server.counts
        if server.task.kind == "multiclass":
            counts = torch.bincount(rows.columns(server)["y"], minlength=server.task.outputs)
        yield Fit(
            {card.arch.spec_id: None},
            Supervised(server.task.kind, slot=card.arch.spec_id),
            rows,
            context=objective_context(server.task, counts, s, self.logit_adjustment),
            augment=s.augment.or_none,
            epochs=s.epochs,
            steps=s.steps,
            batch_size=s.batch_size,
            optimizer=s.optimizer.at_round(
                server.round_context.round_idx, server.round_context.num_rounds
            ),
            as_id=min(kind.first for kind in server.peers.profiles),
        )

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        client.arch["pooled"], client.models["pooled"] = (
            self.pooled_client(client).arch,
            received["model"],
        )
        yield from ()

    def inference_model(self, client: Participant) -> tuple[str, Any]:
        return "pooled", self.pooled_client(client).preprocess

    def server_model_slot(self, server: Participant) -> str | None:
        return self.pooled_client(server).arch.spec_id
