"""Reference points of every table: no federation, the ensemble of all models, all data in one place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, Needs, register_algorithm
from hetero_fl.algorithms.local_training import (
    add_log_prior,
    augmentation,
    local_fit,
    objective_context,
)
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import (
    ClientInfo,
    Participant,
    floating_tensors,
    scheduled_optimizer,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows
from hetero_fl.utils.ordering import natural_order


@register_algorithm("local")
class Local(Algorithm):
    """Train every client alone: the line that every method has to beat."""

    title = "Local"
    evaluated_when = "after local training"
    shared = ()
    uploads = {}
    needs = Needs(counts_traffic=False)


@register_algorithm("ensemble")
class Ensemble(Local):
    """Average the class probabilities of all clients' models, each of which was trained alone.

    Each model sees the rows through its own preprocessing; of regressions outputs are averaged. This is a bound: every client
    would have to hold every other's model.
    """

    title = "Ensemble"
    evaluated_when = "mean prediction of all clients' models after local training (the models saved are the members)"
    uploads = {"member": ItemSpec("params", use="each")}
    needs = Needs(all_clients=True)

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield local_fit(client)
        tensors = floating_tensors(client.models["model"])
        return {"member": Item(tensors, float(client.num_rows), "params")}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        members = dict(server.state.get("members", {}))
        members.update({u.client: u.payload["member"] for u in uploads.having("member")})
        server.state["members"] = members
        yield from ()

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return server.state.get("members", {}) if recipient.purpose == "evaluate" else {}

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        client.state["members"] = {name: received[name] for name in received}
        yield from ()

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        members = [client.peers[i] for i in natural_order(client.state["members"])]
        logits = yield [
            Predict(
                c.client_id,
                Rows(rows.name, preprocess=c.preprocess),
                tensors=client.state["members"][c.client_id],
                arch=c.arch,
            )
            for c in members
        ]
        if client.task.kind == "regression":
            return torch.stack(logits).mean(0)
        if client.task.kind == "multilabel":
            return torch.stack([z.sigmoid() for z in logits]).mean(0).logit(eps=1e-7)
        mean = torch.stack([z.log_softmax(-1) for z in logits]).logsumexp(0)
        return add_log_prior(client, mean) if personal else mean


@register_algorithm("centralized")
class Centralized(Algorithm):
    """Train one model on all clients' rows in one place: what a federation gives up.

    Each round is the clients' local training on the pooled rows, with a new optimizer as a client has; one client that has
    everything, under FedAvg with λ = 1, is the same computation. Each client evaluates the model on its own view of the data.
    """

    title = "Centralized"
    evaluated_when = "the pooled model"
    uploads = {}
    needs = Needs(all_clients=True, counts_traffic=False)

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        model = server.models[pooled_client(server).arch.spec_id]
        return {"model": floating_tensors(model)} if recipient.purpose == "evaluate" else {}

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from ()
        return {}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        reference = pooled_client(server)
        s = reference.settings
        rows = Rows("pooled", preprocess=reference.preprocess)
        counts = server.counts
        if server.task.kind == "multiclass":
            counts = torch.bincount(rows.columns(server)["y"], minlength=server.task.outputs)
        yield Fit(
            {reference.arch.spec_id: None},
            Supervised(server.task.kind, slot=reference.arch.spec_id),
            rows,
            context=objective_context(server.task, counts, s),
            augment=augmentation(s),
            epochs=s.epochs,
            steps=s.steps,
            batch_size=s.batch_size,
            optimizer=scheduled_optimizer(s.optimizer, server.round_context),
            as_id=min(kind.first for kind in server.peers.profiles),
        )

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        client.arch["pooled"] = pooled_client(client).arch
        client.models["pooled"] = received["model"]
        yield from ()

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        view = pooled_client(client).preprocess
        logits = yield Predict("pooled", replace(rows, preprocess=view))
        return add_log_prior(client, logits) if personal else logits

    def server_model(self, server: Participant) -> str | None:
        return pooled_client(server).arch.spec_id


def pooled_client(participant: Participant) -> ClientInfo:
    """Return the first client of the most frequent architecture: the pooled model has its settings."""
    return participant.peers[participant.peers.main_profile.first]
