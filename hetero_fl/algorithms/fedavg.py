"""Parameter averaging: FedAvg, FedProx, FedNova."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat

from hetero_fl.aggregation.means import tie_common_tensors
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import (
    Algorithm,
    Items,
    add_up_models,
    average_models,
    register_algorithm,
    shareable_tensors,
    shared_part,
    upload_model,
)
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.objectives import Proximal
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import FitReport, Plan


@register_algorithm("fedavg")
class FedAvg(Algorithm):
    """Average the parameters of all clients with the same model.

    The rule is θ ← θ + λ(Σ w_k θ_k − θ) (McMahan et al. 2017, Algorithm 1). On a mixed federation each tensor is averaged
    among the clients of one architecture. `weighting: sum` adds the clients' changes up in place of their mean:
    θ ← θ + λ·Σ(θ_k − θ), for K senders a plain mean with λ·K.
    """

    title = "FedAvg"

    weighting: Literal["samples", "uniform", "sum"] = Field(
        "samples",
        description="w_k = n_k / Σn, or all equal; sum: w_k = 1, changes are added up and λ is their factor",
    )
    server_lr: PositiveFloat = Field(
        1.0, description="λ: how far the server moves towards the mean"
    )

    def weight_of(self, client: Participant | ClientInfo) -> float:
        """Return the weight of a client's parameters in the mean."""
        return float(client.num_rows) if self.weighting == "samples" else 1.0

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield local_fit(client)
        return upload_model(self, client, self.weight_of(client))

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        if self.weighting == "sum":
            add_up_models(server, uploads, self.server_lr)
        else:
            average_models(server, uploads, self.server_lr)
        yield from ()


@register_algorithm("fedprox")
class FedProx(FedAvg):
    """Average parameters, and keep each client's training close to the average that it started from.

    Clients minimize loss + (μ/2)‖θ − θ_round_start‖² (Li et al. 2020, eq. 2).
    """

    title = "FedProx"

    mu: NonNegativeFloat = Field(0.01, description="strength of the pull towards the round's start")

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        anchor = client.models["model"]
        yield local_fit(client, Proximal(client.task.kind, mu=self.mu), context={"anchor": anchor})
        return upload_model(self, client, self.weight_of(client))


PATH = "path"


@register_algorithm("fednova")
class FedNova(Algorithm):
    """Average each client's change divided by the length of its path, so that more steps count no more.

    The rule is θ ← θ + λ·τ_eff·Σ w_k (θ_k − θ)/‖a_k‖₁ with τ_eff = Σ w_k ‖a_k‖₁ (Wang et al., NeurIPS 2020, eqs. 3, 6 and 13).
    ‖a_k‖₁ is how often a client's gradients count in its change: the number of its steps, more with momentum (`path`). Equal
    paths make it FedAvg. Buffers (BatchNorm statistics) are averaged plainly.
    """

    title = "FedNova"
    uploads = {"model": ItemSpec("update"), PATH: ItemSpec("params")}

    weighting: Literal["samples", "uniform"] = Field(
        "samples", description="w_k = n_k / Σn, or all equal"
    )
    server_lr: PositiveFloat = Field(
        1.0, description="λ: how far the server moves along the mean direction"
    )

    def setup(self, server: Participant) -> None:
        tie_common_tensors(server.models, server.common)

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        arch = client.arch["model"]
        part = shared_part(self, client.settings)
        mine = shareable_tensors(self, arch, client.models["model"], part)
        # until it uploads (`share_every`)
        since = client.state.setdefault("since", {"start": mine, PATH: 0.0})
        report: FitReport = yield local_fit(client)
        since[PATH] += accumulated_steps(report.steps, client.optimizer)
        weight = float(client.num_rows) if self.weighting == "samples" else 1.0
        items = upload_model(self, client)
        if items:
            del client.state["since"]
            end = items["model"].values
            names = arch.parameter_names
            paths = {
                n: torch.tensor(since[PATH] if n in names else 1.0, dtype=t.dtype)
                for n, t in end.items()
            }
            change = {n: (t - since["start"][n]).div_(paths[n]) for n, t in end.items()}
            items = {"model": Item(change, weight, "update"), PATH: Item(paths, weight, "params")}
        return items

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        paths = uploads.mean_by_group(PATH)
        for group, mean in uploads.mean_by_group("model").items():
            model = server.models[group]
            names = server.arch[group].parameter_names
            effective = {n: paths[group][n] * (self.server_lr if n in names else 1.0) for n in mean}
            server.models[group] = {
                **model,
                **{n: model[n] + effective[n] * change for n, change in mean.items()},
            }
        # groups without a client in the cohort, too
        tie_common_tensors(server.models, server.common, paths)
        yield from ()


def accumulated_steps(steps: int, optimizer: OptimizerConfig) -> float:
    """Return ‖a‖₁: the sum over gradients of how much of each the model has moved by.

    The unit is the learning rate. With momentum ρ it is (τ − ρ(1 − ρ^τ)/(1 − ρ))/(1 − ρ), section 4 of the paper; with
    Nesterov's, ρ² stands in place of the first ρ. Each of Adam's steps counts one.
    """
    rho = optimizer.momentum
    if not rho:
        return float(steps)
    head = rho**2 if optimizer.nesterov else rho
    return (steps - head * (1 - rho**steps) / (1 - rho)) / (1 - rho)
