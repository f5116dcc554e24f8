"""Methods whose server applies updates with an optimizer, or on arrival.

FedAvgM, FedAdam and FedYogi take the mean update of a round as a gradient. FedAsync and FedBuff run
asynchronously and reduce the weight of stale uploads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from typing_extensions import override

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.averaging import FedAvg
from hetero_fl.algorithms.base import Algorithm, AsyncPolicy, Needs, register_algorithm
from hetero_fl.algorithms.round_parts import (
    Items,
    add_up_models,
    interpolate_model,
    local_fit,
    tie_common_tensors,
    upload_model,
)
from hetero_fl.config.base import StalenessConfig, StalenessKind
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import Proximal
from hetero_fl.core.participant import ClientDirectory, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan


class ServerOptimizer(FedAvg):
    """Base class of methods that apply an optimizer to the mean update Δ = Σ w_k θ_k − θ.

    Each architecture has its own optimizer state, which stays at the server. Tensors that no client
    uploads in a round do not change, and neither does the optimizer state of these tensors. Buffers
    are set to the mean, because an extrapolated variance could be negative.
    """

    weighting: Literal["samples", "uniform"] = Field(
        "samples", description="client weights: w_k = n_k / Σn, or all equal"
    )

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        states: dict[str, Any] = server.state.setdefault("optimizer", {})
        for group, mean in uploads.mean_by_group("model").items():
            parameters = server.arch[group].parameter_names
            model = server.models[group]
            buffers = {n: t for n, t in mean.items() if n not in parameters}
            trained = {n: t for n, t in mean.items() if n in parameters}
            moved = self.server_step(model, trained, states.setdefault(group, {}))
            server.models[group] = {**model, **buffers, **moved}
        yield from ()

    def server_step(
        self, model: Tensors, mean: Tensors, optimizer_state: dict[str, Tensors]
    ) -> Tensors:
        """Return the parameters after one step of the server optimizer.

        Args:
            model: Current model of the server.
            mean: Mean of the clients' parameters.
            optimizer_state: State of the optimizer, keyed by kind and tensor name. The state is
                updated in place.
        """
        raise TypeError(f"{type(self).__name__} has no server optimizer")


@register_algorithm("fedavgm")
class FedAvgM(ServerOptimizer):
    """Average parameters with momentum at the server.

    The server computes v ← β·v + Δ and θ ← θ + λ·v, where Δ = Σ w_k θ_k − θ (Hsu et al. 2019,
    section 4.2). The momentum stays at the server. The exchange is the same as in FedAvg. With β =
    0, the method equals FedAvg.

    Use this method in long runs in which the mean update is noisy, because few clients participate
    in a round or labels are skewed. The momentum has little effect in runs of a few rounds. Tune λ
    together with β.

    References:
        Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
            Classification", 2019. https://arxiv.org/abs/1909.06335

    Example:
        >>> from hetero_fl.algorithms import FedAvgM
        >>> FedAvgM(momentum=0.95).server_lr
        1.0
    """

    title = "FedAvgM"

    momentum: float = Field(0.9, ge=0, lt=1, description="momentum coefficient β")

    @override
    def server_step(
        self, model: Tensors, mean: Tensors, optimizer_state: dict[str, Tensors]
    ) -> Tensors:
        velocity = optimizer_state.setdefault("velocity", {})
        # Computing θ + λΔ first makes the method with β = 0 equal FedAvg bit for bit.
        ahead = interpolate_model(model, mean, self.server_lr, mean)
        for n, average in mean.items():
            earlier = self.momentum * velocity[n] if n in velocity else torch.zeros_like(average)
            velocity[n] = earlier + (average - model[n])
            ahead[n] = ahead[n] + self.server_lr * earlier
        return {n: ahead[n] for n in mean}


@register_algorithm("fedadam")
class FedAdam(ServerOptimizer):
    """Apply the mean update with the Adam optimizer at the server.

    With Δ = Σ w_k θ_k − θ, the server computes m ← β₁m + (1 − β₁)Δ, v ← β₂v + (1 − β₂)Δ² and θ ← θ
    + λ·m/(√v + τ) (Reddi et al. 2021, Algorithm 2). The initial value of v is τ². As in the paper,
    there is no bias correction. Buffers are set to the mean, because an extrapolated variance could
    be negative. The exchange is the same as in FedAvg.

    Use this method in long runs where the updates of different parameters differ much in size. Tune
    λ first, for example with `--grid`: λ is roughly the distance that a parameter moves per round.

    References:
        Reddi et al., "Adaptive Federated Optimization", ICLR 2021. https://arxiv.org/abs/2003.00295

    Example:
        >>> from hetero_fl.algorithms import FedAdam
        >>> method = FedAdam(server_lr=0.1)
        >>> method.beta1, method.beta2, method.tau
        (0.9, 0.99, 0.001)
    """

    title = "FedAdam"

    server_lr: PositiveFloat = Field(0.01, description="server learning rate λ")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay rate β₁ of the mean update")
    beta2: float = Field(0.99, ge=0, lt=1, description="decay rate β₂ of the squared update")
    tau: PositiveFloat = Field(1e-3, description="τ, added to √v; smaller values adapt more")

    @override
    def server_step(
        self, model: Tensors, mean: Tensors, optimizer_state: dict[str, Tensors]
    ) -> Tensors:
        first = optimizer_state.setdefault("first", {})
        second = optimizer_state.setdefault("second", {})
        moved = {}
        for n, average in mean.items():
            change = average - model[n]
            m = first.get(n, torch.zeros_like(change))
            v = second.get(n, torch.full_like(change, self.tau**2))
            first[n] = self.beta1 * m + (1 - self.beta1) * change
            second[n] = self.second_moment(v, change.square())
            moved[n] = model[n] + self.server_lr * first[n] / (second[n].sqrt() + self.tau)
        return moved

    def second_moment(self, v: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """Return the second moment after the round.

        Args:
            v: Second moment before the round.
            change: Squared mean update Δ² of the round.
        """
        return self.beta2 * v + (1 - self.beta2) * change


@register_algorithm("fedyogi")
class FedYogi(FedAdam):
    """Apply the mean update with the Yogi optimizer at the server.

    The method is FedAdam with the second moment v ← v − (1 − β₂)Δ²·sign(v − Δ²), so that one large
    update does not dominate v (Reddi et al. 2021, Algorithm 2). Prefer FedYogi to FedAdam if the
    size of the updates changes over the run.

    References:
        Reddi et al., "Adaptive Federated Optimization", ICLR 2021. https://arxiv.org/abs/2003.00295

    Example:
        >>> import torch
        >>> from hetero_fl.algorithms import FedYogi
        >>> FedYogi(beta2=0.9).second_moment(torch.tensor(1.0), torch.tensor(4.0))
        tensor(1.4000)
    """

    title = "FedYogi"

    @override
    def second_moment(self, v: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return v - (1 - self.beta2) * change * (v - change).sign()


class StalenessWeighted(Algorithm):
    """Base class of asynchronous methods that reduce the weight of stale uploads.

    Tensors that several architectures share (`clients.common`) are kept equal in all models of the
    server.
    """

    staleness: StalenessKind = Field(
        "polynomial",
        description="s(τ): 1, (1 + τ)^−a, or 1 up to τ = b and 1/(a·(τ − b) + 1) after it",
    )
    a: NonNegativeFloat | None = Field(
        None, description="parameter a of s(τ); `null`: 0.5 for polynomial, 10 for hinge"
    )
    b: NonNegativeInt = Field(4, description="parameter b of the hinge: staleness without penalty")

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # depends on settings
        """Requirements of the method: one architecture, and the policy for stale uploads."""
        staleness = StalenessConfig(kind=self.staleness, a=self.a, b=self.b)
        return Needs(
            one_architecture=True, shared_model=True, asynchronous=AsyncPolicy(1, staleness)
        )

    @override
    def setup(self, server: Participant) -> None:
        tie_common_tensors(server.models, server.common)


@register_algorithm("fedasync")
class FedAsync(StalenessWeighted):
    """Mix every upload into the server's model on arrival, with less weight for stale uploads.

    The server computes θ ← (1 − α·s(τ))·θ + α·s(τ)·θ_k, where the staleness τ is the number of
    server versions since the client received its model (Xie et al. 2019, Algorithm 1). With several
    architectures, an upload updates the model of its architecture. The setting `staleness` selects
    the function s. By default, s is the polynomial (1 + τ)^−a. BatchNorm statistics are mixed in
    the same way as weights. The method always runs asynchronously, regardless of `runtime.mode`.

    Use this method where clients differ in speed and no client should wait for another. With
    strongly skewed labels and a large α, each upload pulls the model towards the labels of one
    client. `fedbuff` averages several uploads first. The paper uses α from 0.6 to 0.9 and ρ from
    0.005 to 0.01.

    References:
        Xie et al., "Asynchronous Federated Optimization", OPT 2020.
            https://arxiv.org/abs/1903.03934

    Example:
        >>> from hetero_fl.algorithms import FedAsync
        >>> policy = FedAsync(staleness="hinge", b=2).needs.asynchronous
        >>> policy.buffer_size, policy.staleness.kind
        (1, 'hinge')
    """

    title = "FedAsync"

    alpha: float = Field(
        0.6, gt=0, le=1, description="mixing weight α of an upload without staleness"
    )
    rho: NonNegativeFloat = Field(
        0.0, description="weight ρ of the proximal term in local training"
    )

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if self.rho:
            anchor = {"anchor": client.models["model"]}
            yield local_fit(client, Proximal(client.task.kind, mu=self.rho), context=anchor)
        else:
            yield local_fit(client)
        # The trainer multiplies the weight by s(τ).
        return upload_model(self, client, weight=1.0)

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        add_up_models(server, uploads, self.alpha)
        tie_common_tensors(server.models, server.common, uploads.weights_by_group("model"))
        yield from ()


BUFFERS = "buffers"
# Buffer size K in the paper's experiments.
PAPER_BUFFER_SIZE = 10


@register_algorithm("fedbuff")
class FedBuff(StalenessWeighted):
    """Collect updates in a buffer and apply the staleness-weighted mean when the buffer is full.

    Clients upload Δ_k = θ_k − θ. After every K uploads the server computes θ ← θ + λ·Σ s(τ_k)·Δ_k /
    K with s(τ) = 1/√(1 + τ) (Nguyen et al. 2022, Algorithm 1). With several architectures, the sum
    and the divisor K are computed separately for each architecture in the buffer. BatchNorm
    statistics are moved towards the clients' statistics with the same weights, because adding a
    change could make a variance negative. The method always runs asynchronously.

    Use this method like `fedasync`, with many clients or skewed labels. If K is close to the number
    of clients, the server waits almost as long as in synchronous rounds.

    References:
        Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022.
            https://arxiv.org/abs/2106.06639

    Example:
        >>> from hetero_fl.algorithms import FedBuff
        >>> FedBuff(buffer=5).needs.asynchronous.buffer_size
        5
        >>> FedBuff().uploads["model"].kind
        'update'
    """

    title = "FedBuff"
    uploads = {"model": ItemSpec("update"), BUFFERS: ItemSpec("params")}

    buffer: PositiveInt | None = Field(
        None, description="buffer size K; `null`: 10 as in the paper, at most half of the clients"
    )
    server_lr: PositiveFloat = Field(1.0, description="server learning rate λ")

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # depends on settings
        """Requirements of the method: the requirements of the base class, with buffer size K."""
        needs = super().needs
        assert needs.asynchronous is not None
        return replace(needs, asynchronous=replace(needs.asynchronous, buffer_size=self.buffer))

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        if self.buffer is not None:
            return self, []
        size = max(1, min(PAPER_BUFFER_SIZE, len(clients) // 2))
        note = f"algorithm.buffer is {size}: half of the clients (paper: {PAPER_BUFFER_SIZE})"
        notes = [] if size == PAPER_BUFFER_SIZE else [note]
        return self.model_copy(update={"buffer": size}), notes

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        start = client.models["model"]
        yield local_fit(client)
        items = upload_model(self, client)
        if not items:
            return {}
        model = items["model"].values
        names = client.arch["model"].parameter_names
        change = {n: t - start[n] for n, t in model.items() if n in names}
        buffers = {n: t for n, t in model.items() if n not in names}
        upload: Items = {"model": Item(change, 1.0, "update")}
        if buffers:
            upload[BUFFERS] = Item(buffers, 1.0, "params")
        return upload

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        shares = mean_weights(uploads, "model")
        for group, mean in uploads.mean_by_group("model").items():
            model = server.models[group]
            rates = {n: self.server_lr * share for n, share in shares[group].items()}
            server.load(group, {n: model[n] + rates[n] * change for n, change in mean.items()})
        tie_common_tensors(server.models, server.common, shares)
        shares = mean_weights(uploads, BUFFERS)
        for group, mean in uploads.mean_by_group(BUFFERS).items():
            model = server.models[group]
            server.load(group, {n: model[n].lerp(t, shares[group][n]) for n, t in mean.items()})
        tie_common_tensors(server.models, server.common, shares)
        yield from ()


def mean_weights(uploads: Uploads, name: str) -> dict[str, dict[str, float]]:
    """Return the mean staleness weight Σ s / K of each tensor, keyed by group and name.

    K is the number of clients that uploaded the tensor. The weighted mean of the updates,
    multiplied by this factor, is Σ s·Δ / K.
    """
    counts = uploads.counts_by_group(name)
    return {
        group: {n: weight / counts[group][n] for n, weight in weights.items()}
        for group, weights in uploads.weights_by_group(name).items()
    }
