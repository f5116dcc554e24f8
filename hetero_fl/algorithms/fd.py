"""Federated distillation without a public set: clients exchange their mean logits by class."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from hetero_fl.aggregation.teachers import CLIP, contrast_weights
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, register_algorithm
from hetero_fl.core.objectives import ClassTeacherDistillation
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import ClassSums, Plan


@register_algorithm("fd")
class FD(Algorithm):
    """Cross-entropy plus λ·KL·T² towards the consensus logits of the example's class (Jeong et al. 2018, Algorithm 1).

    Clients upload sums of logits and counts by class; the server divides the total of the sums by the total of the counts.
    """

    shared = ()
    uploads = {"class_logits": ItemSpec("class_sums", private=True, share="statistics")}
    downloads = {"teacher": ItemSpec("rows", share="predictions")}
    tasks = ("multiclass",)
    evaluated_when = "after private training"

    weight: NonNegativeFloat = Field(1.0, description="λ: weight of the distillation term")
    temperature: PositiveFloat = Field(1.0, description="T of the softened softmax")
    teacher: Literal["mean", "contrast"] = Field(
        "mean", description="by counts, or contrast-weighted clipped log p"
    )

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return dict(server.state.get("consensus", {})) if not recipient.is_evaluation else {}

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        if "teacher" in received:
            follow = ClassTeacherDistillation(
                client.task.kind, weight=self.weight, temperature=self.temperature
            )
            yield self.fit(
                client, follow, context={"teacher": received["teacher"], "known": received["known"]}
            )
        else:
            yield self.fit(client)
        return (
            {"class_logits": (yield from self.class_statistics(client))}
            if self.may_share(client, "statistics")
            else {}
        )

    def class_statistics(self, client: Participant) -> Plan[Item]:
        """Sums `[C, C]` by true class of the client's logits, and what they are to be divided by."""
        if self.teacher == "mean":
            sums, counts = yield ClassSums("model")
            return Item(sums, counts[:, None], "class_sums")
        sums, counts = yield ClassSums("model", readout="log_probabilities", at_least=CLIP)
        say = contrast_weights(client.counts).to(sums.dtype) / max(1, client.num_rows)
        return Item(sums * say, counts[:, None] * say, "class_sums")

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mean = uploads.mean("class_logits")
        if mean is not None:
            weight = uploads.total("class_logits")[1]
            server.state["consensus"] = {
                "teacher": mean,
                "known": (weight > 0).any(-1).to(mean.dtype),
            }
        yield from ()
