"""Parameter averaging: FedAvg, FedProx, FedNova."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat

from hetero_fl.aggregation.means import add_updates, tie_common_tensors
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, register_algorithm
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.objectives import Proximal
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import FitReport, Plan

# Parameter sharing: FedAvg and its proximal form, within each architecture.


@register_algorithm("fedavg")
class FedAvg(Algorithm):
    """Weighted averaging of parameters: θ ← θ + λ(Σ w_k θ_k − θ) (McMahan et al. 2017, Algorithm 1).

    On a mixed federation each tensor is averaged among the clients of one architecture. `weighting: sum` adds the clients'
    changes up in place of their mean: θ ← θ + λ·Σ(θ_k − θ), for K senders a plain mean with λ·K.
    """

    weighting: Literal["samples", "uniform", "sum"] = Field(
        "samples",
        description="w_k = n_k / Σn, or all equal; sum: w_k = 1, changes are added up and λ is their factor",
    )
    server_lr: PositiveFloat = Field(
        1.0, description="λ: how far the server moves towards the mean"
    )

    def weight_of(self, client: Participant | ClientInfo) -> float:
        return super().weight_of(client) if self.weighting == "samples" else 1.0

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        self.average(server, uploads, self.server_lr)
        yield from ()

    def average(self, server: Participant, uploads: Uploads, rate: float = 1.0) -> None:
        if self.weighting != "sum":
            return super().average(server, uploads, rate)
        owners = uploads.weights_by_group("model")  # each weighs one
        for group, mean in uploads.mean_by_group("model").items():
            parameters = server.arch[group].parameter_names
            server.models[group] = add_updates(
                server.models[group], mean, owners[group], rate, parameters
            )
        return None


@register_algorithm("fedprox")
class FedProx(FedAvg):
    """FedAvg whose clients minimise loss + (μ/2)‖θ − θ_round_start‖² (Li et al. 2020, eq. 2)."""

    mu: NonNegativeFloat = Field(0.01, description="strength of the pull towards the round's start")

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        anchor = client.models["model"]
        yield self.fit(client, Proximal(client.task.kind, mu=self.mu), context={"anchor": anchor})
        return self.share(client)


# FedNova: averaging that does not favor whoever takes more local steps.

PATH = "path"


@register_algorithm("fednova")
class FedNova(Algorithm):
    """θ ← θ + λ·τ_eff·Σ w_k (θ_k − θ)/‖a_k‖₁ with τ_eff = Σ w_k ‖a_k‖₁ (Wang et al., NeurIPS 2020, eqs. 3, 6 and 13).

    ‖a_k‖₁ is how often a client's gradients count in its change: the number of its steps, more with momentum (`path`). Equal
    paths make it FedAvg. Buffers (BatchNorm statistics) are averaged plainly.
    """

    uploads = {"model": ItemSpec("update"), PATH: ItemSpec("params")}

    weighting: Literal["samples", "uniform"] = Field(
        "samples", description="w_k = n_k / Σn, or all equal"
    )
    server_lr: PositiveFloat = Field(
        1.0, description="λ: how far the server moves along the mean direction"
    )

    def weight_of(self, client: Participant | ClientInfo) -> float:
        return super().weight_of(client) if self.weighting == "samples" else 1.0

    def setup(self, server: Participant) -> None:
        tie_common_tensors(server.models, server.common)

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        mine = self.shareable_tensors(
            client.arch["model"], client.models["model"], self.shared_part(client.settings)
        )
        # until it uploads (`share_every`)
        since = client.state.setdefault("since", {"start": mine, PATH: 0.0})
        report: FitReport = yield self.fit(client)
        since[PATH] += accumulated_steps(report.steps, client.optimizer)
        items = self.share(client)
        if items:
            del client.state["since"]
            end = items["model"].values
            names = client.arch["model"].parameter_names
            weight = self.weight_of(client)
            paths = {
                n: torch.tensor(since[PATH] if n in names else 1.0, dtype=t.dtype)
                for n, t in end.items()
            }
            change = {n: (t - since["start"][n]).div_(paths[n]) for n, t in end.items()}
            items = {"model": Item(change, weight, "update"), PATH: Item(paths, weight, "params")}
        return items

    def average(self, server: Participant, uploads: Uploads, rate: float = 1.0) -> None:
        paths = uploads.mean_by_group(PATH)
        for group, mean in uploads.mean_by_group("model").items():
            model = server.models[group]
            names = server.arch[group].parameter_names
            effective = {
                n: paths[group][n] * (rate * self.server_lr if n in names else 1.0) for n in mean
            }
            server.models[group] = {
                **model,
                **{n: model[n] + effective[n] * change for n, change in mean.items()},
            }
        # those of whom nobody was in the cohort, too
        tie_common_tensors(server.models, server.common, paths)


def accumulated_steps(steps: int, optimizer: OptimizerConfig) -> float:
    """‖a‖₁ of so many steps: Σ over gradients of how much of each the model has moved by, in units of the learning rate.

    Momentum ρ: (τ − ρ(1 − ρ^τ)/(1 − ρ))/(1 − ρ), the paper's section 4; Nesterov's, with ρ² in place of the first ρ. Of Adam's
    steps each counts one.
    """
    rho = optimizer.momentum
    if not rho:
        return float(steps)
    head = rho**2 if optimizer.nesterov else rho
    return (steps - head * (1 - rho**steps) / (1 - rho)) / (1 - rho)
