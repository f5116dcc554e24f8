"""Parameter sharing: FedAvg and its proximal form, within each architecture."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, algorithm
from hetero_fl.objectives import Proximal
from hetero_fl.payload import Payload
from hetero_fl.plan import Plan
from hetero_fl.state import Card, Participant


@algorithm("fedavg")
class FedAvg(Algorithm):
    """Weighted averaging of parameters: θ ← θ + λ(Σ w_k θ_k − θ) (McMahan et al. 2017, Algorithm 1).

    On a mixed federation each tensor is averaged among the clients of one architecture.
    """

    weighting: Literal["samples", "uniform"] = Field("samples", description="w_k = n_k / Σn, or all equal")
    server_lr: PositiveFloat = Field(1.0, description="λ: how far the server moves towards the mean")

    def weight_of(self, client: Participant | Card) -> float:
        return super().weight_of(client) if self.weighting == "samples" else 1.0

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        self.average(server, uploads, self.server_lr)
        yield from ()


@algorithm("fedprox")
class FedProx(FedAvg):
    """FedAvg whose clients minimise loss + (μ/2)‖θ − θ_round_start‖² (Li et al. 2020, eq. 2)."""

    mu: NonNegativeFloat = Field(0.01, description="strength of the pull towards the round's start")

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        anchor = client.models["model"]
        yield self.fit(client, Proximal(client.task.kind, mu=self.mu), given={"anchor": anchor})
        return self.share(client)
