"""Server optimizers: the server follows the mean update of a round as if it were a gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat

from hetero_fl.aggregation.means import interpolate_model
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import register_algorithm
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Plan


class ServerOptimizer(FedAvg):
    """Base of methods that move parameters by an optimizer over Δ = Σ w_k θ_k − θ, within each architecture.

    Buffers take the mean as it is, since an extrapolated variance may be negative. The optimizer's state stays at the server.
    Δ is what clients moved from the server's present model. A tensor that no client sends in a round does not move, and
    neither does its state.
    """

    weighting: Literal["samples", "uniform"] = Field(
        "samples", description="w_k = n_k / Σn, or all equal"
    )

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
        """Return the parameters after the step.

        Args:
            model: The server's model.
            mean: The mean of the clients' parameters.
            optimizer_state: Tensors by kind and name, updated in place.
        """
        raise TypeError(f"{type(self).__name__} has no server optimizer")


@register_algorithm("fedavgm")
class FedAvgM(ServerOptimizer):
    """Average parameters, with momentum at the server.

    The rule is v ← β·v + Δ, θ ← θ + λ·v (Hsu et al. 2019, section 4.2; Reddi et al. 2021).
    """

    title = "FedAvgM"

    momentum: float = Field(0.9, ge=0, lt=1, description="β: what is kept of the earlier updates")

    def server_step(
        self, model: Tensors, mean: Tensors, optimizer_state: dict[str, Tensors]
    ) -> Tensors:
        velocity = optimizer_state.setdefault("velocity", {})
        # θ + λΔ: with β = 0 FedAvg to the bit
        ahead = interpolate_model(model, mean, self.server_lr, mean)
        for n, average in mean.items():
            earlier = self.momentum * velocity[n] if n in velocity else torch.zeros_like(average)
            velocity[n] = earlier + (average - model[n])
            ahead[n] = ahead[n] + self.server_lr * earlier
        return {n: ahead[n] for n in mean}


class AdaptiveServerOptimizer(ServerOptimizer):
    """Base of server optimizers with second moments (Reddi et al. 2021, Algorithm 2).

    The rule is m ← β₁m + (1 − β₁)Δ, θ ← θ + λ·m/(√v + τ), v from Δ² as the method has it, τ² at first; no correction of the
    first rounds' bias, as in the paper.
    """

    server_lr: PositiveFloat = Field(0.01, description="λ: about how far a parameter moves a round")
    beta1: float = Field(0.9, ge=0, lt=1, description="β₁: what is kept of the mean update")
    beta2: float = Field(0.99, ge=0, lt=1, description="β₂: what is kept of its square")
    tau: PositiveFloat = Field(1e-3, description="τ: adaptivity, added to √v; small adapts more")

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
        """Return v after a round whose mean update has these squares."""
        raise TypeError(f"{type(self).__name__} has no second moment")


@register_algorithm("fedadam")
class FedAdam(AdaptiveServerOptimizer):
    """Follow the mean update with the Adam optimizer at the server.

    The second moment is v ← β₂v + (1 − β₂)Δ² (Reddi et al. 2021, Algorithm 2).
    """

    title = "FedAdam"

    def second_moment(self, v: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return self.beta2 * v + (1 - self.beta2) * change


@register_algorithm("fedyogi")
class FedYogi(AdaptiveServerOptimizer):
    """Follow the mean update with the Yogi optimizer at the server.

    The second moment is v ← v − (1 − β₂)Δ²·sign(v − Δ²), so that one large update does not dominate v (Reddi et al. 2021,
    Algorithm 2).
    """

    title = "FedYogi"

    def second_moment(self, v: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return v - (1 - self.beta2) * change * (v - change).sign()
