"""SCAFFOLD: control variates that correct client drift."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveFloat
from typing_extensions import override

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
    """Average parameters, with control variates that correct the drift of clients' local steps.

    Each local step is corrected by c − c_k, where the control variates c and c_k estimate the mean
    gradients of the federation and of client k (Karimireddy et al. 2020, Algorithm 1, option II).
    If K steps with learning rate η lead from x to y, the client computes c_k⁺ = c_k − c + (x −
    y)/(Kη). The server adds |S|/N times the weighted mean of c_k⁺ − c_k to c, where |S| of the N
    clients participated. The server also sends c and clients also upload the change of c_k, so the
    traffic is twice the traffic of FedAvg.

    Use this method where clients participate often. An outdated c_k corrects steps in the wrong
    direction.

    Deviations: the mean uses the clients' weights, whereas the paper uses uniform weights. The
    correction is applied after the optimizer step, because momentum would accumulate a correction
    of the gradient. With momentum, c and c_k therefore estimate the mean optimizer step divided by
    η, which is the scale of the correction. Clients whose optimizer is not SGD train with SGD,
    because Kη does not describe the length of an adaptive optimizer's path.

    References:
        Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML
            2020. https://arxiv.org/abs/1910.06378

    Example:
        >>> from hetero_fl.algorithms import Scaffold
        >>> list(Scaffold(sgd_lr=0.05).uploads)
        ['model', 'control']
    """

    title = "SCAFFOLD"
    uploads = {"model": ItemSpec("params"), CONTROL: ItemSpec("update")}

    sgd_lr: PositiveFloat = Field(
        0.01, description="learning rate of SGD for clients with another optimizer"
    )
    sgd_momentum: float = Field(
        0.9, ge=0, lt=1, description="momentum of SGD for clients with another optimizer"
    )

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        other = [p for p in clients.profiles if p.settings.optimizer.name != "sgd"]
        if not other:
            return self, []
        sgd = f"sgd (lr {self.sgd_lr:g}, momentum {self.sgd_momentum:g})"
        note = (
            f"scaffold trains {clients.format_clients(other)} with {sgd}, not their own optimizer"
        )
        return self, [note]

    def optimizer(self, client: Participant) -> OptimizerConfig:
        """Return the SGD configuration with which a client trains in this round.

        Clients with SGD keep their own optimizer. All other clients train with `sgd_lr` and
        `sgd_momentum`. The learning rate follows the client's schedule.
        """
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

    @override
    def setup(self, server: Participant) -> None:
        server.state[CONTROL] = {
            group: {
                n: torch.zeros_like(model[n])
                for n in model
                if n in server.arch[group].parameter_names
            }
            for group, model in server.models.items()
        }

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        items = super().broadcast(server, recipient)
        if "model" in items and recipient.purpose == "train":
            part = download_part(self, recipient.settings, server.round_context.round_idx)
            control = server.state[CONTROL][recipient.arch.spec_id]
            items[CONTROL] = select_part(control, part)
        return items

    @override
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
        own = client.state.get(CONTROL) or {n: torch.zeros_like(t) for n, t in shared.items()}
        # Without a received control variate there is no correction.
        if CONTROL in received or "since" not in client.state:
            client.state["since"] = {
                CONTROL: received.get(CONTROL, own),
                "start": shared,
                "path": 0.0,
            }
        # With `share_every`, this state is kept over several rounds until the upload.
        since = client.state["since"]
        # The engine scales the correction by `lr`; rescale it for a head with its own rate.
        head_rate = (optimizer.head_lr or optimizer.lr) / optimizer.lr
        rates = {n: head_rate if n.startswith("head.") else 1.0 for n in own}
        drift = {n: c - own[n] for n, c in since[CONTROL].items()}
        drift = {n: d if rates[n] == 1 else d.mul_(rates[n]) for n, d in drift.items()}
        report: FitReport = yield local_fit(client, optimizer=optimizer, drift={"model": drift})
        since["path"] += report.steps * optimizer.lr
        items = upload_model(self, client, self.weight_of(client))
        if items:
            end = client.models["model"]
            gradient = {
                n: (x - end[n]).div_(since["path"] * rates[n]) for n, x in since["start"].items()
            }
            client.state[CONTROL] = {
                n: (own[n] - since[CONTROL][n]).add_(g) for n, g in gradient.items()
            }
            change = {n: c - own[n] for n, c in client.state[CONTROL].items()}
            items[CONTROL] = Item(change, self.weight_of(client), "update")
            del client.state["since"]
        return items

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        sent = uploads.counts_by_group(CONTROL)
        for group, mean in uploads.mean_by_group(CONTROL).items():
            control = server.state[CONTROL][group]
            for name, change in mean.items():
                share = sent[group][name] / self.num_owners(server, group, name)
                control[name] = (share * change).add_(control[name])
        yield from ()

    def num_owners(self, server: Participant, group: str, name: str) -> int:
        """Return the number of clients whose uploads of a tensor are averaged for a group.

        Args:
            server: The server.
            group: Identifier of the architecture group.
            name: Name of the tensor.
        """
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
