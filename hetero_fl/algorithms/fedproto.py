"""FedProto: clients of any architecture agree on where the features of each class lie."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, algorithm
from hetero_fl.algorithms.width import CommonWidth
from hetero_fl.objectives import PrototypePull
from hetero_fl.payload import Item, ItemSpec, Payload
from hetero_fl.plan import ClassSums, Plan, Predict, Rows
from hetero_fl.state import Card, Participant

NEVER = 20.0  # how far below the farthest prototype a class without one stands: e^-20 of its probability


@algorithm("fedproto")
class FedProto(CommonWidth):
    """Cross-entropy plus λ·MSE of features to the prototype of their class, the mean feature over all clients' rows; an example
    belongs to the nearest prototype (Tan et al. 2022, Algorithm 1).

    Clients upload sums of features and counts by class, taken after their local training; the server divides the total
    of the sums by the total of the counts. A class that nobody sends in a round keeps its prototype. Before there is any,
    the head decides.
    """

    shared = ()
    uploads = {"features": ItemSpec("class_sums", private=True, share="statistics")}
    tasks = ("multiclass",)
    reads = (
        "after private training, by the nearest prototype of the last aggregation (the models saved hold their heads)"
    )

    weight: NonNegativeFloat = Field(1.0, description="λ: weight of the distance to the prototype")
    inference: Literal["prototype", "own", "head"] = Field(
        "prototype",
        description="nearest prototype; at home the nearest of its own classes only (the authors' code); or the model's head",
    )

    def broadcast(self, server: Participant, card: Card) -> Items:
        return dict(server.state)

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        client.state.update({name: got[name] for name in got})
        yield from ()

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        if "prototypes" in got:
            pull = PrototypePull(client.task.kind, weight=self.weight)
            yield self.fit(client, pull, given={name: got[name] for name in got})
        else:
            yield self.fit(client)
        if not self.gives(client, "statistics"):
            return {}
        sums, counts = yield ClassSums("model", readout="features")
        return {"features": Item(sums, counts[:, None], "class_sums")}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mean = uploads.mean("features")
        if mean is not None:
            sent = uploads.total("features")[1] > 0
            known = server.state.get("known", torch.zeros(len(sent), dtype=mean.dtype))
            server.state["prototypes"] = torch.where(sent, mean, server.state.get("prototypes", torch.zeros_like(mean)))
            server.state["known"] = torch.where(sent[:, 0], torch.ones_like(known), known)
        yield from ()

    def predict(self, client: Participant, rows: Rows, home: bool) -> Plan[Tensor]:
        if self.inference == "head" or "prototypes" not in client.state:
            return (yield from super().predict(client, rows, home))
        features = yield Predict("model", rows, readout="features")
        known = client.state["known"]
        mine = known * (client.counts > 0).to(known.dtype)
        if self.inference == "own" and home and bool(mine.any()):
            known = mine
        return nearness(features, client.state["prototypes"], known)


def nearness(features: Tensor, prototypes: Tensor, known: Tensor) -> Tensor:
    """−‖f − prototype_c‖₂ as logits `[N, C]`. A class without a prototype stands below all others: it never wins."""
    apart = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    has = known > 0
    return torch.where(has, -apart, -apart[:, has].amax(-1, keepdim=True) - NEVER)
