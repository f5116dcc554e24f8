"""FD: federated distillation of the mean logits of each class, without a proxy set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from typing_extensions import override

from hetero_fl.aggregation.teachers import MIN_LOG_PROBABILITY, contrast_weights
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, Needs, may_share, register_algorithm
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.core.objectives import ClassTeacherDistillation
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import ClassSums, Plan


@register_algorithm("fd")
class FD(Algorithm):
    """Distill the mean logits of each class over all clients into the clients' models.

    The local loss is cross-entropy plus λ·KL·T² towards the mean logits of the example's class
    (Jeong et al. 2018, Algorithm 1). Clients upload the sums of logits `[C, C]` and the number of
    rows `[C]` per class. The server divides the total sums by the total counts and broadcasts the
    means `[C, C]`.

    Use this method where models differ, there is no proxy set and traffic must be small. Expect a
    small gain over `local`.

    Deviations: a client's own logits are part of its teacher, and logits are computed after local
    training.

    References:
        Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated Distillation
            and Augmentation under Non-IID Private Data", 2018. https://arxiv.org/abs/1811.11479

    Example:
        >>> from hetero_fl.algorithms import FD
        >>> FD(temperature=2.0).uploads["class_logits"].kind
        'class_sums'
        >>> FD().needs.tasks
        ('multiclass',)
    """

    title = "FD"
    evaluated_when = "after local training"
    shared = ()
    uploads = {"class_logits": ItemSpec("class_sums", private=True, share="statistics")}
    downloads = {"teacher": ItemSpec("rows", share="predictions")}
    needs = Needs(tasks=("multiclass",))

    weight: NonNegativeFloat = Field(1.0, description="weight λ of the distillation loss")
    temperature: PositiveFloat = Field(1.0, description="temperature T of the softmax")
    teacher: Literal["mean", "contrast"] = Field(
        "mean", description="mean of logits by counts, or contrast-weighted mean of clipped log p"
    )

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return dict(server.state.get("consensus", {})) if recipient.purpose == "train" else {}

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        if "teacher" in received:
            objective = ClassTeacherDistillation(
                client.task.kind, weight=self.weight, temperature=self.temperature
            )
            context = {name: received[name] for name in ("teacher", "known")}
            yield local_fit(client, objective, context=context)
        else:
            yield local_fit(client)
        if not may_share(client, "statistics"):
            return {}
        return {"class_logits": (yield from self.class_statistics(client))}

    def class_statistics(self, client: Participant) -> Plan[Item]:
        """Return an item with the sums of the client's outputs per true class, shape `[C, C]`.

        The outputs are logits. With `teacher: contrast`, the outputs are clipped log-probabilities
        instead, multiplied by the contrast weight of each class.
        """
        if self.teacher == "mean":
            sums, counts = yield ClassSums("model")
            return Item(sums, counts[:, None], "class_sums")
        sums, counts = yield ClassSums(
            "model", readout="log_probabilities", at_least=MIN_LOG_PROBABILITY
        )
        weight = contrast_weights(client.counts).to(sums.dtype) / max(1, client.num_rows)
        return Item(sums * weight, counts[:, None] * weight, "class_sums")

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mean = uploads.mean("class_logits")
        if mean is not None:
            weight = uploads.total("class_logits")[1]
            server.state["consensus"] = {
                "teacher": mean,
                "known": (weight > 0).any(-1).to(mean.dtype),
            }
        yield from ()
