"""Parameter averaging: FedAvg, FedAvg-FT, FedProx, FedLC, SCAFFOLD and FedNova."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.uploads import Owner, Uploads, owners_of
from hetero_fl.algorithms.base import Algorithm, Needs, register_algorithm
from hetero_fl.algorithms.round_parts import (
    Items,
    add_up_models,
    average_models,
    download_part,
    local_fit,
    shared_part,
    tie_common_tensors,
    upload_model,
)
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import Batch, Context, ModelViews, Proximal, Supervised
from hetero_fl.core.participant import (
    ClientDirectory,
    ClientInfo,
    Participant,
    floating_tensors,
    scheduled_optimizer,
    select_part,
)
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

    @property
    def _broadcasts_means(self) -> bool:  # type: ignore[override]  # depends on settings
        return self.weighting != "sum" and self.server_lr == 1

    def weight_of(self, client: Participant | ClientInfo) -> float:
        """Return the weight of a client in the mean.

        The weight is the number of training rows with `weighting: samples`, otherwise 1.
        """
        return float(client.num_rows) if self.weighting == "samples" else 1.0

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield from self.local_training(client, received)
        return upload_model(self, client, self.weight_of(client))

    def local_training(self, client: Participant, received: Payload) -> Plan[None]:
        """Train a client that has deployed the received items.

        By default, the client's own model is trained with the client's settings.
        """
        yield local_fit(client)

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
    def local_training(self, client: Participant, received: Payload) -> Plan[None]:
        anchor = client.models["model"]
        yield local_fit(client, Proximal(client.task.kind, mu=self.mu), context={"anchor": anchor})


# Name of the item with the norms ‖a_k‖₁.
PATH = "path"


@register_algorithm("fednova")
class FedNova(FedAvg):
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

    @override
    def setup(self, server: Participant) -> None:
        tie_common_tensors(server.models, server.common)

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        # With `share_every`, the state accumulates over several rounds until the upload.
        start = floating_tensors(client.models["model"])
        since = client.state.setdefault("since", {"start": start, PATH: 0.0})
        report: FitReport = yield local_fit(client)
        since[PATH] += accumulated_steps(report.steps, client.optimizer)
        items = upload_model(self, client, self.weight_of(client))
        if not items:
            return items
        del client.state["since"]
        model = items["model"]
        names = client.arch["model"].parameter_names
        paths = {
            n: torch.tensor(since[PATH] if n in names else 1.0, dtype=t.dtype)
            for n, t in model.values.items()
        }
        change = {n: (t - since["start"][n]).div_(paths[n]) for n, t in model.values.items()}
        return {
            "model": replace(model, values=change, kind="update"),
            PATH: replace(model, values=paths),
        }

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        paths = uploads.mean_by_group(PATH)
        for group, mean in uploads.mean_by_group("model").items():
            model = server.models[group]
            names = server.arch[group].parameter_names
            scale = {n: paths[group][n] * (self.server_lr if n in names else 1.0) for n in mean}
            server.load(group, {n: model[n] + scale[n] * change for n, change in mean.items()})
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


Denominator = Literal["others", "all"]


@dataclass(frozen=True)
class CalibratedMargins(Supervised):
    """The cross-entropy of logits from which a margin is subtracted for each class (FedLC, eq. 5).

    The entry `margins` of the context, shape `[C]`, contains the margins τ·n_c^(-1/4), which are
    infinite for classes without examples.

    Args:
        denominator: Classes in the denominator of the softmax: `others` excludes the true class,
            `all` includes it.
    """

    denominator: Denominator = "others"

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        logits = nets[self.slot](batch.x) - context["margins"]
        if self.denominator == "all":
            return F.cross_entropy(logits, batch.y, reduction="none")
        is_true = torch.arange(logits.shape[-1], device=logits.device) == batch.y[:, None]
        others = logits.masked_fill(is_true, -torch.inf)
        true = logits.gather(-1, batch.y[:, None]).squeeze(-1)
        # If the client has a single class, the denominator is empty and the loss is 0.
        has_others = others.isfinite().any(-1)
        total = torch.where(has_others[:, None], others, 0.0).logsumexp(-1)
        return torch.where(has_others, total - true, 0.0)


def label_margins(counts: Tensor, tau: float) -> Tensor:
    """Return the margin τ·n_c^(−1/4) of each class, shape `[C]`.

    The margin of a class without examples is infinite.

    Args:
        counts: Number of examples of each class, shape `[C]`.
        tau: Factor of the margins.
    """
    margins = tau * counts.to(torch.get_default_dtype()).clamp(min=1).pow(-0.25)
    return margins.masked_fill(counts == 0, torch.inf)


@register_algorithm("fedlc")
class FedLC(FedAvg):
    """Average parameters trained with margins that are larger for classes with few examples.

    Clients minimize the cross-entropy of z_c − τ·n_c^(−1/4), where the client has n_c examples of
    class c (Zhang et al. 2022, eq. 5). In the paper's equation, the denominator of the softmax
    excludes the true class. The margin of classes without examples is infinite, which removes these
    classes from the softmax. The exchange is the same as in FedAvg.

    Use this method where labels are skewed and all clients have the same model. The related rule of
    Menon et al. (2021) is available for other methods as the setting `logit_adjustment`.

    The implementation has not been compared with the authors' code, which does not seem to be
    public, and the paper does not state τ. Other implementations use 0.1 or 1, and the usual
    denominator (`all`).

    References:
        Zhang et al., "Federated Learning with Label Distribution Skew via Logits Calibration", ICML
            2022. https://arxiv.org/abs/2209.00189

    Example:
        >>> from hetero_fl.algorithms import FedLC
        >>> FedLC(tau=0.1).denominator
        'others'
    """

    title = "FedLC"
    needs = Needs(
        one_architecture=True,
        tasks=("multiclass",),
        shared_model=True,
        unused_options=("logit_adjustment", "class_weights", "objective"),
    )

    tau: NonNegativeFloat = Field(1.0, description="factor τ of the margins")
    denominator: Denominator = Field(
        "others",
        description="classes in the denominator of the softmax: all but the true class, or all",
    )

    @override
    def local_training(self, client: Participant, received: Payload) -> Plan[None]:
        objective = CalibratedMargins(client.task.kind, denominator=self.denominator)
        margins = label_margins(client.counts, self.tau)
        yield local_fit(client, objective, context={"margins": margins})


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
    uploads = {
        "model": ItemSpec("params"),
        CONTROL: ItemSpec("update", description="change of the client's control variate"),
    }
    downloads = {
        "model": ItemSpec("params"),
        CONTROL: ItemSpec("params", description="the server's control variate"),
    }

    sgd_lr: PositiveFloat = Field(
        0.01, description="learning rate of SGD for clients with another optimizer"
    )
    sgd_momentum: float = Field(
        0.9, ge=0, lt=1, description="momentum of SGD for clients with another optimizer"
    )

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        other = [p for p in clients.profiles if p.settings.optimizer.name != "sgd"]
        note = (
            f"scaffold trains {clients.format_clients(other)} with sgd (lr {self.sgd_lr:g}, "
            f"momentum {self.sgd_momentum:g}), not their own optimizer"
        )
        return self, [note] if other else []

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
        names = client.arch["model"].parameter_names
        shared = select_part(client.models["model"], shared_part(self, client.settings))
        start = {n: x for n, x in shared.items() if n in names}
        own: Tensors = client.state.get(CONTROL) or {
            n: torch.zeros_like(x) for n, x in start.items()
        }
        # With `share_every`, this state is kept over several rounds until the upload. Without a
        # received control variate there is no correction.
        if CONTROL in received or "since" not in client.state:
            control = received.get(CONTROL, own)
            client.state["since"] = {CONTROL: control, "start": start, "path": 0.0}
        since = client.state["since"]
        optimizer = self.optimizer(client)
        # The engine scales the correction of the head by the learning rate of the other tensors.
        head_rate = (optimizer.head_lr or optimizer.lr) / optimizer.lr
        rates = {n: head_rate if n.startswith("head.") else 1.0 for n in start}
        drift = {n: (c - own[n]).mul_(rates[n]) for n, c in since[CONTROL].items()}
        report: FitReport = yield local_fit(client, optimizer=optimizer, drift={"model": drift})
        since["path"] += report.steps * optimizer.lr
        items = upload_model(self, client, self.weight_of(client))
        if items:
            end = client.models["model"]
            gradient = {
                n: (x - end[n]).div_(since["path"] * rates[n]) for n, x in since["start"].items()
            }
            control = {n: (own[n] - since[CONTROL][n]).add_(g) for n, g in gradient.items()}
            change = {n: c - own[n] for n, c in control.items()}
            items[CONTROL] = Item(change, self.weight_of(client), "update")
            client.state[CONTROL] = control
            del client.state["since"]
        return items

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        sent = uploads.counts_by_group(CONTROL)
        num_owners = self.num_owners(server)
        for group, mean in uploads.mean_by_group(CONTROL).items():
            control = server.state[CONTROL][group]
            owners = owners_of(mean, group, server.common)
            for name, change in mean.items():
                share = sent[group][name] / num_owners[owners[name]]
                control[name] = (share * change).add_(control[name])

    def num_owners(self, server: Participant) -> Counter[Owner]:
        """Return the number of clients whose uploads of a tensor are averaged, for each tensor."""
        counts: Counter[Owner] = Counter()
        for profile in server.peers.profiles:
            group = profile.arch.spec_id
            shared = select_part(server.models[group], shared_part(self, profile.settings))
            for owner in owners_of(shared, group, server.common).values():
                counts[owner] += profile.count
        return counts
