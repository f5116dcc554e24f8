"""Asynchronous methods: FedAsync and FedBuff."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from hetero_fl.aggregation.means import tie_common_tensors
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import (
    Algorithm,
    AsyncPolicy,
    Items,
    Needs,
    add_up_models,
    register_algorithm,
    upload_model,
)
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.config.base import Kind, StalenessConfig
from hetero_fl.core.objectives import Proximal
from hetero_fl.core.participant import ClientDirectory, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan


class StalenessWeighted(Algorithm):
    """Base of methods that only run asynchronously and weight stale uploads themselves.

    What architectures have in common (`clients.common`) is one at the server, whichever of them moves it.
    """

    staleness: Kind = Field(
        "polynomial",
        description="s(τ): constant 1; (1 + τ)^−a; hinge: 1 up to τ = b, 1/(a·(τ − b) + 1) after it",
    )
    a: NonNegativeFloat | None = Field(
        None, description="how steep s is; none: 0.5 of the polynomial, 10 of the hinge"
    )
    b: NonNegativeInt = Field(4, description="of the hinge: versions that cost nothing")

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # follows from settings
        """One architecture, and the server's policy for stale uploads."""
        staleness = StalenessConfig(kind=self.staleness, a=self.a, b=self.b)
        return Needs(one_architecture=True, asynchronous=AsyncPolicy(1, staleness))

    def setup(self, server: Participant) -> None:
        tie_common_tensors(server.models, server.common)


@register_algorithm("fedasync")
class FedAsync(StalenessWeighted):
    """Move the server's model towards every upload as it comes, the less the older the model it started from.

    The rule is θ ← (1 − α·s(τ))·θ + α·s(τ)·θ_k, where τ counts the versions made since the client was given its task
    (Xie et al. 2019, Algorithm 1). On a mixed federation an upload moves the model of its architecture. s(τ) = 1/(1 + τ) is the polynomial with a = 1. Runs
    asynchronously whatever `runtime.mode` says.
    """

    title = "FedAsync"

    alpha: float = Field(
        0.6, gt=0, le=1, description="α: how far a fresh upload moves the server's model"
    )
    rho: NonNegativeFloat = Field(
        0.0, description="ρ: pull of local training towards the model that was received"
    )

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if self.rho:
            anchor = {"anchor": client.models["model"]}
            yield local_fit(client, Proximal(client.task.kind, mu=self.rho), context=anchor)
        else:
            yield local_fit(client)
        return upload_model(self, client, weight=1.0)  # what arrives weighs s(τ)

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        add_up_models(server, uploads, self.alpha)
        tie_common_tensors(server.models, server.common, uploads.weights_by_group("model"))
        yield from ()


BUFFERS = "buffers"
PAPER = 10  # K


@register_algorithm("fedbuff")
class FedBuff(StalenessWeighted):
    """Collect clients' changes in a buffer and add their mean when it is full; stale changes count less.

    Clients send Δ_k = θ_k − θ as received; of every K the server makes θ ← θ + λ·Σ s(τ_k)·Δ_k / K, s = 1/√(1 + τ)
    (Nguyen et al. 2022, Algorithm 1). On a mixed federation the sum and its divisor are those of each architecture in the buffer.
    BatchNorm's statistics move towards the clients' by the same weights, though never past them: a variance plus changes of
    another one could be negative. Runs asynchronously whatever `runtime.mode` says.
    """

    title = "FedBuff"
    uploads = {"model": ItemSpec("update"), BUFFERS: ItemSpec("params")}

    buffer: PositiveInt | None = Field(
        None, description="K; none: 10 as in the paper, but no more than half of the clients"
    )
    server_lr: PositiveFloat = Field(1.0, description="λ: the server's learning rate")

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # follows from settings
        """As every asynchronous method, with a buffer of its own size."""
        needs = super().needs
        assert needs.asynchronous is not None
        return replace(needs, asynchronous=replace(needs.asynchronous, buffer_size=self.buffer))

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        if self.buffer is not None:
            return self, []
        size = max(1, min(PAPER, len(clients) // 2))
        note = f"algorithm.buffer is {size}: half of the clients, where the paper has {PAPER}"
        return self.model_copy(update={"buffer": size}), [] if size == PAPER else [note]

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        start = client.models["model"]
        yield local_fit(client)
        items = upload_model(self, client)
        if not items:
            return {}
        model = items["model"].values
        names = client.arch["model"].parameter_names
        moved = {n: t - start[n] for n, t in model.items() if n in names}
        kept = {n: t for n, t in model.items() if n not in names}
        return {
            "model": Item(moved, 1.0, "update"),
            **({BUFFERS: Item(kept, 1.0, "params")} if kept else {}),
        }

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        shares = mean_weights(uploads, "model")
        for group, mean in uploads.mean_by_group("model").items():
            model = server.models[group]
            moved = {
                n: model[n] + self.server_lr * shares[group][n] * change
                for n, change in mean.items()
            }
            server.models[group] = {**model, **moved}
        tie_common_tensors(server.models, server.common, shares)
        shares = mean_weights(uploads, BUFFERS)
        for group, mean in uploads.mean_by_group(BUFFERS).items():
            model = server.models[group]
            near = {n: model[n].lerp(tensor, shares[group][n]) for n, tensor in mean.items()}
            server.models[group] = {**model, **near}
        tie_common_tensors(server.models, server.common, shares)
        yield from ()


def mean_weights(uploads: Uploads, name: str) -> dict[str, dict[str, float]]:
    """Return Σ s / K of each tensor by group, K being its senders.

    The weighted mean times this is Σ s·Δ / K.
    """
    counts = uploads.counts_by_group(name)
    return {
        group: {n: weight / counts[group][n] for n, weight in weights.items()}
        for group, weights in uploads.weights_by_group(name).items()
    }
