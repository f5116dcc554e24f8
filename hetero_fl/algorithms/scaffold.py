"""SCAFFOLD: control variates against the drift of clients."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveFloat

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import (
    Algorithm,
    Items,
    download_part,
    register_algorithm,
    shared_part,
    upload_model,
)
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.participant import (
    ClientDirectory,
    ClientInfo,
    ClientProfile,
    Participant,
    scheduled_optimizer,
    select_part,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import FitReport, Plan

CONTROL = "control"


@register_algorithm("scaffold")
class Scaffold(FedAvg):
    """Average parameters, and correct each local step by how the client's mean gradient differs from the federation's.

    The correction is c − c_k, of the federation's and the client's mean gradient (Karimireddy et al. 2020, Algorithm 1,
    option II). After K steps of rate η from x to y: c_k⁺ = c_k − c + (x − y)/(Kη), and the server's c moves by |S|/N times the mean of
    c_k⁺ − c_k over the S of N clients that took part, weighted as the models are (the paper: evenly). The correction follows the
    optimizer's step: inside the gradient, momentum would pile it up. A client whose optimizer is not SGD trains with SGD, as
    Kη says nothing of Adam's steps. c_k never leaves the client, its change does.
    """

    title = "SCAFFOLD"
    uploads = {"model": ItemSpec("params"), CONTROL: ItemSpec("update")}

    sgd_lr: PositiveFloat = Field(
        0.01, description="learning rate of SGD for clients whose optimizer is another"
    )
    sgd_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD for these clients")

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        other = [kind for kind in clients.profiles if kind.settings.optimizer.name != "sgd"]
        sgd = f"sgd (lr {self.sgd_lr:g}, momentum {self.sgd_momentum:g}) in place of their own optimizer"
        return self, [
            f"scaffold trains {clients.format_clients(other)} with {sgd}"
        ] if other else []

    def optimizer(self, client: Participant) -> OptimizerConfig:
        """Return the client's SGD of this round, or the method's in place of another optimizer."""
        config = client.settings.optimizer
        if config.name != "sgd":
            changes = {
                "name": "sgd",
                "lr": self.sgd_lr,
                "head_lr": None,
                "momentum": self.sgd_momentum,
            }
            config = config.model_copy(update=changes)
        return scheduled_optimizer(config, client.round_context)

    def setup(self, server: Participant) -> None:
        server.state[CONTROL] = {
            group: {
                n: torch.zeros_like(model[n])
                for n in model
                if n in server.arch[group].parameter_names
            }
            for group, model in server.models.items()
        }

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        items = super().broadcast(server, recipient)
        if "model" in items and recipient.purpose == "train":
            part = download_part(self, recipient.settings, server.round_context.round_idx)
            control = server.state[CONTROL][recipient.arch.spec_id]
            items[CONTROL] = select_part(control, part)
        return items

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        model = client.models["model"]
        optimizer = self.optimizer(client)
        names = client.arch["model"].parameter_names
        shared = {
            n: t
            for n, t in select_part(model, shared_part(self, client.settings)).items()
            if n in names
        }
        mine = client.state.get(CONTROL) or {n: torch.zeros_like(t) for n, t in shared.items()}
        # with nothing received there is nothing to correct
        if CONTROL in received or "since" not in client.state:
            client.state["since"] = {
                CONTROL: received.get(CONTROL, mine),
                "start": shared,
                "path": 0.0,
            }
        # kept until the client uploads, which may be rounds later (`share_every`)
        since = client.state["since"]
        # The runtime multiplies by lr: a head with a rate of its own gets its correction at that rate.
        head = (optimizer.head_lr or optimizer.lr) / optimizer.lr
        rates = {n: head if n.startswith("head.") else 1.0 for n in mine}
        drift = {n: c - mine[n] for n, c in since[CONTROL].items()}
        # ours to change: it is fresh
        drift = {n: d if rates[n] == 1 else d.mul_(rates[n]) for n, d in drift.items()}
        report: FitReport = yield local_fit(client, optimizer=optimizer, drift={"model": drift})
        since["path"] += report.steps * optimizer.lr
        items = upload_model(self, client, self.weight_of(client))
        if items:
            end = client.models["model"]
            moved = {
                n: (x - end[n]).div_(since["path"] * rates[n]) for n, x in since["start"].items()
            }
            client.state[CONTROL] = {
                n: (mine[n] - since[CONTROL][n]).add_(d) for n, d in moved.items()
            }
            change = {n: c - mine[n] for n, c in client.state[CONTROL].items()}
            items[CONTROL] = Item(change, self.weight_of(client), "update")
            del client.state["since"]
        return items

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        sent = uploads.counts_by_group(CONTROL)
        for group, mean in uploads.mean_by_group(CONTROL).items():
            held = server.state[CONTROL][group]
            for name, change in mean.items():
                share = sent[group][name] / self.num_owners(server, group, name)
                held[name] = (share * change).add_(held[name])
        yield from ()

    def num_owners(self, server: Participant, group: str, name: str) -> int:
        """Return how many clients of the federation share a tensor with the group."""
        models = server.models
        common = bool(server.common) and name.startswith(server.common)

        def is_owner(profile: ClientProfile) -> bool:
            part = shared_part(self, profile.settings)
            if part is not None and not name.startswith(part):
                return False
            other = profile.arch.spec_id
            same = common and name in models[other]
            return other == group or (
                same and models[other][name].shape == models[group][name].shape
            )

        return sum(profile.count for profile in server.peers.profiles if is_owner(profile))
