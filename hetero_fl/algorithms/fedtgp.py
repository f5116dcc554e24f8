"""FedTGP: prototypes are trained at the server, so that classes stand apart."""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import algorithm
from hetero_fl.algorithms.fedproto import FedProto
from hetero_fl.architecture import Architecture
from hetero_fl.config.optimizer import OptimizerConfig
from hetero_fl.latent import AdaptiveMargin
from hetero_fl.payload import Item, ItemSpec
from hetero_fl.plan import Fit, Plan, Predict, Table
from hetero_fl.state import Participant

VECTORS, PROTOTYPES = "vectors", "prototypes"  # at the server: P̆, a trainable row for each class, and the network F


@algorithm("fedtgp")
class FedTGP(FedProto):
    """FedProto whose prototypes are trained at the server, so that classes stand apart (Zhang et al. 2024, Algorithm 1).

    P̂_c = F(P̆_c), F linear, ReLU, linear; P̆ and F are trained so that each client's own prototypes lie nearest to that of
    their class, by a margin δ = min(largest distance of two class centres, τ).

    A class centre is the plain mean of the clients' prototypes. The server starts from the last round's P̆ and F.

    λ is that of the authors' script; the paper says 0.1. Deviations from the authors' code: δ is the
    paper's largest distance of two class centres, where the code takes each class' nearest neighbor
    and then the largest; and P̆ starts uniform within ±1/√C, where the code draws it standard normal.
    """

    uploads = {"features": ItemSpec("class_sums", use="each", private=True, share="statistics")}

    weight: NonNegativeFloat = Field(10.0, description="λ: weight of the distance to the prototype")
    margin: PositiveFloat = Field(100.0, description="τ: largest margin δ")
    server_epochs: PositiveInt = Field(100, description="epochs a round on the clients' prototypes, at the server")
    server_lr: PositiveFloat = Field(0.01, description="learning rate of SGD at the server")
    server_batch_size: PositiveInt = Field(10, description="clients' prototypes a step, at the server")

    def start(self, server: Participant) -> None:
        width, classes = self.feature_dim or 1, server.task.outputs
        server.arch[VECTORS] = Architecture.of("linear", width, (classes,))
        server.arch[PROTOTYPES] = Architecture.of("mlp", width, (width,), options={"hidden": [width]})
        for slot in (VECTORS, PROTOTYPES):
            server.models[slot] = server.arch[slot].initial(server.clock.seed)
        server.load(VECTORS, {"head.bias": torch.zeros(width)})  # P̆ is a table: the bias stays at nought

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        items = [u.payload.item("features") for u in uploads.having("features")]
        if not items:
            return
        means, has = each_mean(items)
        seen, one_hot = has.any(0), torch.eye(server.task.outputs)
        yield Fit(
            {VECTORS: ("head.weight",), PROTOTYPES: None},
            AdaptiveMargin(PROTOTYPES, VECTORS),
            Table({"x": means[has], "y": has.nonzero()[:, 1]}),
            epochs=self.server_epochs,
            batch_size=self.server_batch_size,
            optimizer=OptimizerConfig(name="sgd", lr=self.server_lr),
            given={"margin": largest_gap(means, has).clamp(max=self.margin), "one_hot": one_hot},
            label=PROTOTYPES,
        )
        vectors = server.models[VECTORS]["head.weight"].T
        server.state["prototypes"] = yield Predict(PROTOTYPES, Table({"x": vectors}))
        known = server.state.get("known", torch.zeros(len(seen)))
        server.state["known"] = torch.where(seen, torch.ones_like(known), known)


def each_mean(items: list[Item]) -> tuple[Tensor, Tensor]:
    """Of K clients' sums by class the means `[K, C, d]`, and whether there is one `[K, C]`."""
    counts = torch.stack([torch.as_tensor(item.weight) for item in items])  # [K, C, 1]
    sums = torch.stack([item.values for item in items if isinstance(item.values, Tensor)])
    return sums / counts.clamp(min=1), counts[..., 0] > 0


def largest_gap(means: Tensor, has: Tensor) -> Tensor:
    """The largest Euclidean distance of two class centres, each the mean over the clients that have the class."""
    mine = has[..., None].to(means.dtype)
    centres, there = (means * mine).sum(0) / mine.sum(0).clamp(min=1), has.any(0)
    apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(there[:, None] & there, apart, torch.zeros_like(apart)).max()
