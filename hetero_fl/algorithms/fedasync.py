"""FedAsync: every upload moves the server's model as it comes, the less the staler it is."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from hetero_fl.aggregation.averaging import add, tie
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, algorithm
from hetero_fl.config.staleness import Kind, StalenessConfig
from hetero_fl.objectives import Proximal
from hetero_fl.payload import Payload
from hetero_fl.plan import Plan
from hetero_fl.state import Card, Participant


class Stale(Algorithm):
    """Methods that are for asynchronous running, and say themselves what a stale upload is worth.

    What architectures have in common (`clients.common`) is one at the server, whichever of them moves it.
    """

    asynchronous = True

    staleness: Kind = Field(
        "polynomial", description="s(τ): constant 1; (1 + τ)^−a; hinge: 1 up to τ = b, 1/(a·(τ − b) + 1) after it"
    )
    a: NonNegativeFloat | None = Field(None, description="how steep s is; none: 0.5 of the polynomial, 10 of the hinge")
    b: NonNegativeInt = Field(4, description="of the hinge: versions that cost nothing")

    @property
    def discount(self) -> StalenessConfig:
        return StalenessConfig(kind=self.staleness, a=self.a, b=self.b)

    def start(self, server: Participant) -> None:
        tie(server.models, server.common)

    def weight_of(self, client: Participant | Card) -> float:
        return 1.0  # so that what arrives weighs s(τ)


@algorithm("fedasync")
class FedAsync(Stale):
    """Asynchronous mixing: θ ← (1 − α·s(τ))·θ + α·s(τ)·θ_k for every upload as it comes, τ being the versions that were made
    since the client was given its task (Xie et al. 2019, Algorithm 1).

    On a mixed federation an upload moves the model of its architecture. s(τ) = 1/(1 + τ) is the polynomial with a = 1. Runs
    asynchronously whatever `runtime.mode` says.
    """

    alpha: float = Field(0.6, gt=0, le=1, description="α: how far a fresh upload moves the server's model")
    rho: NonNegativeFloat = Field(0.0, description="ρ: pull of local training towards the model that was received")

    @property
    def goal(self) -> int:
        return 1

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        if not self.rho:
            return (yield from super().train(client, got))
        yield from self.deploy(client, got)
        anchor = {"anchor": client.models["model"]}
        yield self.fit(client, Proximal(client.task.kind, mu=self.rho), given=anchor)
        return self.share(client)

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        owners = uploads.weights_by_group("model")  # s(τ) of the one that came
        for group, mean in uploads.mean_by_group("model").items():
            parameters = server.arch[group].parameter_names
            server.models[group] = add(server.models[group], mean, owners[group], self.alpha, parameters)
        tie(server.models, server.common, owners)
        yield from ()
