"""DS-FL: distillation of a sharpened mean prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.teachers import MIN_LOG_PROBABILITY, Sharpening
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, Needs, may_share, register_algorithm
from hetero_fl.algorithms.distillation import TEACHER, ProxyDistillation, predicted_probabilities
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.core.objectives import MIN_PROBABILITY
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan
from hetero_fl.core.task import Task


@register_algorithm("ds_fl")
class DSFL(ProxyDistillation):
    """Distill the sharpened mean of all clients' probabilities on sampled proxy rows.

    Clients train, upload probabilities on the round's proxy rows, and distill the sharpened mean,
    as does the server's student (Itahara et al. 2020, Algorithm 1). The teacher is broadcast as
    logits.

    The default `sharpen: era` is the entropy reduction of the paper, and `power` is the sharpening
    of SCARLET (Azuma et al. 2025).

    Use this method where the mean prediction is uncertain.

    References:
        Itahara et al., "Distillation-Based Semi-Supervised Federated Learning for
            Communication-Efficient Collaborative Training with Non-IID Private Data", IEEE TMC
            2023. https://arxiv.org/abs/2008.06180
        Azuma et al., "Soft-Label Caching and Sharpening for Communication-Efficient Federated
            Distillation", 2025. https://arxiv.org/abs/2504.19602

    Example:
        >>> from hetero_fl.algorithms import DSFL
        >>> list(DSFL(era_temperature=0.5).uploads), list(DSFL(align=0.5).uploads)
        (['probabilities'], ['probabilities', 'counts'])
    """

    title = "DS-FL"
    renamed_settings = {"distil_epochs": "distill_epochs"}
    shared = ()
    needs = Needs(proxy_set="required", tasks=("multiclass", "multilabel"), shared_model=True)
    evaluated_when = (
        "after distillation of the newest consensus, as deployed with the next broadcast"
    )

    _removed = {
        "cache_life": "a smaller proxy_rows for fewer bytes",
        "bits": "channel.compress=[{quantize: 4}] for fewer bytes",
    }

    temperature: PositiveFloat = 1.0
    proxy_rows: int | None = Field(
        1000,
        ge=2,
        description="proxy rows sampled in each round; `null`: the whole proxy set",
    )
    distill_epochs: PositiveInt = Field(
        1, description="epochs of distillation per round at the client"
    )
    sharpen: Sharpening = "era"

    @property
    @override
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # depends on settings
        """Declarations of the probabilities, and of label counts if the teacher is aligned."""
        spec = ItemSpec("rows", private=True, share="predictions")
        return {"probabilities": spec, **self.label_counts_spec()}

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return self.teacher_for(server, recipient)

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if TEACHER in received:
            yield self.distill(client, received, self.distill_epochs)

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield local_fit(client)
        if not may_share(client, "predictions"):
            return {}
        logits = yield from self.predict_proxy(client, self.proxy_indices(client))
        weighted = self.weighted_probabilities(client, logits)
        return {"probabilities": weighted, **self.label_counts(client)}

    def weighted_probabilities(self, client: Participant, logits: Tensor) -> Item:
        """Return an item with a client's (log) probabilities and their weight in the teacher."""
        p = predicted_probabilities(client.task, logits)
        if self.averages_logarithms(client.task):
            p = p.log().clamp(min=MIN_LOG_PROBABILITY)
        return replace(self.weighted_predictions(client, logits), values=p)

    def averages_logarithms(self, task: Task) -> bool:
        """Return whether log-probabilities are averaged instead of probabilities."""
        return self.teacher == "contrast" and task.kind == "multiclass"

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mean = uploads.mean("probabilities")
        if mean is None:
            return
        teacher = self.sharpened_teacher(server.task, self.align_mean(server, uploads, mean))
        self.store_teacher(server, teacher=teacher)
        yield from self.train_student(server, teacher)

    def align_mean(self, server: Participant, uploads: Uploads, mean: Tensor) -> Tensor:
        """Align the mean prediction with the label frequencies, before sharpening.

        The mean is returned unchanged if `align` is 0 or the task is not multiclass.

        Args:
            server: The server.
            uploads: Uploads of the round.
            mean: Mean of the uploaded (log) probabilities, shape `[D, C]`.
        """
        if not self.align or server.task.kind != "multiclass":
            return mean
        if self.averages_logarithms(server.task):
            return self.align_teacher(server, uploads, mean)
        logits = mean.clamp(min=MIN_PROBABILITY).log()
        return self.align_teacher(server, uploads, logits).softmax(-1)

    def sharpened_teacher(self, task: Task, mean: Tensor) -> Tensor:
        """Sharpen the mean of the (log) probabilities and return the teacher's logits."""
        return self.sharpened_logits(
            task, mean.softmax(-1) if self.averages_logarithms(task) else mean
        )
