"""Federated distillation without a public set: clients exchange their mean logits by class."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from hetero_fl.aggregation.teachers import CLIP, contrast_weights
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, Needs, may_share, register_algorithm
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.core.objectives import ClassTeacherDistillation
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import ClassSums, Plan


@register_algorithm("fd")
class FD(Algorithm):
    """Exchange each class's mean logits; each client learns from its rows and from the mean of the row's class.

    The loss is cross-entropy plus λ·KL·T² towards the consensus logits of the example's class (Jeong et al. 2018,
    Algorithm 1). Clients upload sums of logits and counts by class; the server divides the total of the sums by the total of the counts.
    """

    title = "FD"
    evaluated_when = "after local training"
    shared = ()
    uploads = {"class_logits": ItemSpec("class_sums", private=True, share="statistics")}
    downloads = {"teacher": ItemSpec("rows", share="predictions")}
    needs = Needs(tasks=("multiclass",))

    weight: NonNegativeFloat = Field(1.0, description="λ: weight of the distillation term")
    temperature: PositiveFloat = Field(1.0, description="T of the softened softmax")
    teacher: Literal["mean", "contrast"] = Field(
        "mean", description="by counts, or contrast-weighted clipped log p"
    )

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return dict(server.state.get("consensus", {})) if recipient.purpose == "train" else {}

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        if "teacher" in received:
            follow = ClassTeacherDistillation(
                client.task.kind, weight=self.weight, temperature=self.temperature
            )
            yield local_fit(client, follow, context={n: received[n] for n in ("teacher", "known")})
        else:
            yield local_fit(client)
        if not may_share(client, "statistics"):
            return {}
        return {"class_logits": (yield from self.class_statistics(client))}

    def class_statistics(self, client: Participant) -> Plan[Item]:
        """Return the sums of the client's logits by true class, `[C, C]`, with their divisors as the weight."""
        if self.teacher == "mean":
            sums, counts = yield ClassSums("model")
            return Item(sums, counts[:, None], "class_sums")
        sums, counts = yield ClassSums("model", readout="log_probabilities", at_least=CLIP)
        weight = contrast_weights(client.counts).to(sums.dtype) / max(1, client.num_rows)
        return Item(sums * weight, counts[:, None] * weight, "class_sums")

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mean = uploads.mean("class_logits")
        if mean is not None:
            weight = uploads.total("class_logits")[1]
            server.state["consensus"] = {
                "teacher": mean,
                "known": (weight > 0).any(-1).to(mean.dtype),
            }
        yield from ()
