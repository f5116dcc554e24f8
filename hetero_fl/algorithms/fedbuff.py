"""FedBuff: asynchronous training with a buffer, of changes and not of models."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from hetero_fl.aggregation.averaging import tie
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, algorithm
from hetero_fl.algorithms.fedasync import Stale
from hetero_fl.payload import Item, ItemSpec, Payload
from hetero_fl.plan import Plan
from hetero_fl.state import Participant, Roster

BUFFERS = "buffers"
PAPER = 10  # K


@algorithm("fedbuff")
class FedBuff(Stale):
    """Buffered asynchronous aggregation: clients send Δ_k = θ_k − θ as received; of every K the server makes
    θ ← θ + λ·Σ s(τ_k)·Δ_k / K, s = 1/√(1 + τ) (Nguyen et al. 2022, Algorithm 1).

    On a mixed federation the sum and its divisor are those of each architecture in the buffer.
    BatchNorm's statistics move towards the clients' by the same weights, though never past them: a variance plus changes of
    another one could be negative. Runs asynchronously whatever `runtime.mode` says.
    """

    uploads = {"model": ItemSpec("update"), BUFFERS: ItemSpec("params")}

    buffer: PositiveInt | None = Field(
        None, description="K; none: 10 as in the paper, but no more than half of the clients"
    )
    server_lr: PositiveFloat = Field(1.0, description="λ: the server's learning rate")

    @property
    def goal(self) -> int | None:
        return self.buffer

    def resolve(self, cards: Roster) -> tuple[Algorithm, list[str]]:
        if self.buffer is not None:
            return self, []
        size = max(1, min(PAPER, len(cards) // 2))
        told = (
            [] if size == PAPER else [f"algorithm.buffer is {size}: half of the clients, where the paper has {PAPER}"]
        )
        return self.model_copy(update={"buffer": size}), told

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        start = client.models["model"]
        yield self.fit(client)
        items = self.share(client)
        if not items:
            return {}
        model, names = items["model"].values, client.arch["model"].parameter_names
        moved = {n: t - start[n] for n, t in model.items() if n in names}
        kept = {n: t for n, t in model.items() if n not in names}
        return {"model": Item(moved, 1.0, "update"), **({BUFFERS: Item(kept, 1.0, "params")} if kept else {})}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        shares = mean_weights(uploads, "model")
        for group, mean in uploads.mean_by_group("model").items():
            model = server.models[group]
            moved = {n: model[n] + self.server_lr * shares[group][n] * change for n, change in mean.items()}
            server.models[group] = {**model, **moved}
        tie(server.models, server.common, shares)
        shares = mean_weights(uploads, BUFFERS)
        for group, mean in uploads.mean_by_group(BUFFERS).items():
            model = server.models[group]
            near = {n: model[n].lerp(tensor, shares[group][n]) for n, tensor in mean.items()}
            server.models[group] = {**model, **near}
        tie(server.models, server.common, shares)
        yield from ()


def mean_weights(uploads: Uploads, name: str) -> dict[str, dict[str, float]]:
    """Σ s / K of each tensor by group, K being its senders: what the weighted mean is multiplied by to be Σ s·Δ / K."""
    counts = uploads.counts_by_group(name)
    return {
        group: {n: weight / counts[group][n] for n, weight in weights.items()}
        for group, weights in uploads.weights_by_group(name).items()
    }
