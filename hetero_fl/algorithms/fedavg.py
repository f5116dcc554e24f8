"""Parameter averaging: FedAvg, FedAvg-FT, FedProx and FedNova."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from typing_extensions import override

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
from hetero_fl.core.participant import ClientDirectory, ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import FitReport, Plan


@register_algorithm("fedavg")
class FedAvg(Algorithm):
    """Average the parameters of all clients with the same model.

    The server computes θ ← θ + λ(Σ w_k θ_k − θ) (McMahan et al. 2017, Algorithm 1). With several
    architectures, models are averaged within each architecture, and tensors that `clients.common`
    names are averaged across architectures. BatchNorm statistics are averaged like weights. Integer
    buffers are not sent.

    `weighting: sum` adds the clients' updates without averaging: θ ← θ + λ·Σ(θ_k − θ). With K
    uploads this equals uniform weights and a server learning rate of λ·K, except that buffers never
    move beyond the mean.

    Use this method where clients have the same model and similar labels. With skewed labels and
    many local epochs, the models of the clients drift apart.

    References:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
            AISTATS 2017. https://arxiv.org/abs/1602.05629

    Example:
        >>> from hetero_fl.algorithms import FedAvg
        >>> method = FedAvg(weighting="uniform", server_lr=0.5)
        >>> method.uploads["model"].kind, method.needs.one_architecture
        ('params', True)
    """

    title = "FedAvg"

    weighting: Literal["samples", "uniform", "sum"] = Field(
        "samples",
        description="client weights: w_k = n_k / Σn, all equal, or w_k = 1 without normalization",
    )
    server_lr: PositiveFloat = Field(1.0, description="server learning rate λ")

    def weight_of(self, client: Participant | ClientInfo) -> float:
        """Return the weight of a client in the mean.

        The weight is the number of training rows with `weighting: samples`, otherwise 1.
        """
        return float(client.num_rows) if self.weighting == "samples" else 1.0

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield local_fit(client)
        return upload_model(self, client, self.weight_of(client))

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        if self.weighting == "sum":
            add_up_models(server, uploads, self.server_lr)
        else:
            average_models(server, uploads, self.server_lr)
        yield from ()


@register_algorithm("fedavg_ft")
class FedAvgFT(FedAvg):
    """Average parameters and fine-tune the average on each client's own rows before evaluation.

    The method equals `fedavg` with `fine_tune_epochs: 5`, the value of FedBABU, for clients whose
    settings do not specify `fine_tune_epochs`.

    Example:
        >>> from hetero_fl.algorithms import FedAvgFT
        >>> FedAvgFT().model_dump()
        {'weighting': 'samples', 'server_lr': 1.0}
    """

    title = "FedAvg-FT"
    evaluated_when = (
        "after aggregation and fine-tuning of the client's copy, on both test sets (the server's "
        "own model: before fine-tuning)"
    )

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        clients.set_default("fine_tune_epochs", 5)
        return super().configure(clients)


@register_algorithm("fedprox")
class FedProx(FedAvg):
    """Average parameters trained with a proximal term that keeps clients close to the average.

    Clients minimize loss + (μ/2)‖θ − θ_0‖², where θ_0 is the client's model at the start of the
    round, after the received parameters have been loaded (Li et al. 2020, eq. 2). The norm includes
    all parameters. The exchange is the same as in FedAvg.

    Use this method where the models of clients drift apart because of skewed labels, many local
    epochs or unequal amounts of work. A large μ keeps the models close to the received model. With
    μ = 0, the method equals FedAvg. The paper tunes μ between 0.001 and 1.

    References:
        Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020.
            https://arxiv.org/abs/1812.06127

    Example:
        >>> from hetero_fl.algorithms import FedProx
        >>> FedProx(mu=0.1).model_dump()
        {'weighting': 'samples', 'server_lr': 1.0, 'mu': 0.1}
    """

    title = "FedProx"

    mu: NonNegativeFloat = Field(0.01, description="weight μ of the proximal term")

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        anchor = client.models["model"]
        yield local_fit(client, Proximal(client.task.kind, mu=self.mu), context={"anchor": anchor})
        return upload_model(self, client, self.weight_of(client))


# Name of the item with the norms ‖a_k‖₁.
PATH = "path"


@register_algorithm("fednova")
class FedNova(Algorithm):
    """Average updates normalized by each client's number of local steps.

    The server computes θ ← θ + λ·τ_eff·Σ w_k (θ_k − θ)/‖a_k‖₁ with τ_eff = Σ w_k ‖a_k‖₁ (Wang et
    al., NeurIPS 2020, eqs. 3, 6 and 13). Without momentum, ‖a_k‖₁ is the number τ of local steps.
    With momentum ρ, ‖a_k‖₁ is (τ − ρ(1 − ρ^τ)/(1 − ρ))/(1 − ρ), where ρ² replaces the first ρ for
    Nesterov momentum. Clients upload ‖a_k‖₁ as the item `path`. If ‖a_k‖₁ is equal for all clients,
    the method equals FedAvg. Buffers (BatchNorm statistics) are averaged without normalization.

    Use this method where clients take unequal numbers of steps, because data sets differ in size or
    a deadline stops some clients early. In this case, FedAvg minimizes a different objective. The
    theory covers SGD. A step of any other optimizer counts as 1.

    References:
        Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
            Optimization", NeurIPS 2020. https://arxiv.org/abs/2007.07481

    Example:
        >>> from hetero_fl.algorithms import FedNova
        >>> {name: spec.kind for name, spec in FedNova().uploads.items()}
        {'model': 'update', 'path': 'params'}
    """

    title = "FedNova"
    uploads = {"model": ItemSpec("update"), PATH: ItemSpec("params")}

    weighting: Literal["samples", "uniform"] = Field(
        "samples", description="client weights: w_k = n_k / Σn, or all equal"
    )
    server_lr: PositiveFloat = Field(1.0, description="server learning rate λ")

    @override
    def setup(self, server: Participant) -> None:
        tie_common_tensors(server.models, server.common)

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        arch = client.arch["model"]
        part = shared_part(self, client.settings)
        start = shareable_tensors(self, arch, client.models["model"], part)
        # With `share_every`, the state accumulates over several rounds until the upload.
        since = client.state.setdefault("since", {"start": start, PATH: 0.0})
        report: FitReport = yield local_fit(client)
        since[PATH] += accumulated_steps(report.steps, client.optimizer)
        weight = float(client.num_rows) if self.weighting == "samples" else 1.0
        items = upload_model(self, client)
        if not items:
            return items
        del client.state["since"]
        end = items["model"].values
        names = arch.parameter_names
        paths = {
            n: torch.tensor(since[PATH] if n in names else 1.0, dtype=t.dtype)
            for n, t in end.items()
        }
        change = {n: (t - since["start"][n]).div_(paths[n]) for n, t in end.items()}
        return {"model": Item(change, weight, "update"), PATH: Item(paths, weight, "params")}

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        paths = uploads.mean_by_group(PATH)
        for group, mean in uploads.mean_by_group("model").items():
            model = server.models[group]
            names = server.arch[group].parameter_names
            scale = {n: paths[group][n] * (self.server_lr if n in names else 1.0) for n in mean}
            updated = {n: model[n] + scale[n] * change for n, change in mean.items()}
            server.models[group] = {**model, **updated}
        # This also updates groups without a client in the cohort.
        tie_common_tensors(server.models, server.common, paths)
        yield from ()


def accumulated_steps(steps: int, optimizer: OptimizerConfig) -> float:
    """Return ‖a‖₁, the sum of the coefficients of all gradients in a client's update.

    Coefficients are expressed as multiples of the learning rate. For SGD without momentum and for
    all other optimizers, the sum is the number of steps τ. With momentum ρ, the sum is
    (τ − ρ(1 − ρ^τ)/(1 − ρ))/(1 − ρ) (Wang et al. 2020, section 4). With Nesterov momentum, ρ²
    replaces the first ρ.
    """
    rho = optimizer.momentum
    if not rho:
        return float(steps)
    first = rho**2 if optimizer.nesterov else rho
    return (steps - first * (1 - rho**steps) / (1 - rho)) / (1 - rho)
