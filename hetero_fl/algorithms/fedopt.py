"""FedAvgM, FedAdam and FedYogi: server optimizers whose gradient is the mean update of a round."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from typing_extensions import override

from hetero_fl.aggregation.means import interpolate_model
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import register_algorithm
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import Participant
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


class AdaptiveServerOptimizer(ServerOptimizer):
    """Base class of server optimizers with second moments (Reddi et al. 2021, Algorithm 2).

    The server computes m ← β₁m + (1 − β₁)Δ and θ ← θ + λ·m/(√v + τ). A subclass computes the second
    moment v from Δ². The initial value of v is τ². As in the paper, there is no bias correction.
    """

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
        raise TypeError(f"{type(self).__name__} has no second moment")


@register_algorithm("fedadam")
class FedAdam(AdaptiveServerOptimizer):
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

    @override
    def second_moment(self, v: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return self.beta2 * v + (1 - self.beta2) * change


@register_algorithm("fedyogi")
class FedYogi(AdaptiveServerOptimizer):
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
