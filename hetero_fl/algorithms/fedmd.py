"""FedMD: distillation between models of any architecture on a public proxy set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from typing_extensions import override

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, Needs, register_algorithm
from hetero_fl.algorithms.distillation import TEACHER, InitialPhase, ProxyDistillation
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Plan


@register_algorithm("fedmd")
class FedMD(InitialPhase, ProxyDistillation):
    """Distill the mean of all clients' predictions on a public proxy set into each client's model.

    Clients first distill the last round's consensus on the proxy set, then train on their own rows
    (Li and Wang 2019, Algorithm 1). Clients upload logits, shape `[D, C]` for D proxy rows and C
    classes, and receive the mean of all uploads. Labels of the proxy set are used in the initial
    phase only.

    Use this method where all models differ and no parameter may leave a client. The method needs
    public rows that resemble the private rows. Under label skew, set `logit_adjustment` and either
    `teacher: contrast` or `align`.

    Deviations: the default distance is the KL divergence with T = 2, whereas the authors' code uses
    the mean absolute error of logits. The paper's initial phase is off by default
    (`initial_phase`), so that the proxy set needs no labels. The initial phase has no early
    stopping and is followed by local training in the first round.

    References:
        Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", 2019.
            https://arxiv.org/abs/1910.03581

    Example:
        >>> from hetero_fl.algorithms import FedMD
        >>> FedMD(distance="mae").uploads["logits"].needed_share
        'predictions'
        >>> FedMD(initial_phase=True).needs.proxy_set
        'labeled'
    """

    title = "FedMD"
    evaluated_when = "after local training, as in the paper"
    shared = ()

    distance: Literal["kl", "mae"] = Field(
        "kl", description="distance between a client's logits and the consensus"
    )
    digest_epochs: PositiveInt = Field(
        1, description="epochs on the proxy set before local training"
    )
    initial_phase: bool = Field(
        False,
        description="whether clients train on the labeled proxy set (`data.proxy.labels`) and then "
        "on their own rows before their first round",
    )
    initial_public_epochs: NonNegativeInt = Field(
        20, description="initial phase: epochs on the labeled proxy set"
    )

    @model_validator(mode="after")
    def _check_distance(self) -> FedMD:
        if self.distance == "mae" and self.sharpen != "none":
            raise ValueError(
                "sharpen cannot be combined with distance=mae, because sharpened logits are "
                "defined up to a constant; set only one of them"
            )
        return self

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # depends on settings
        """Requirements of the method: a proxy set, with labels for the initial phase."""
        reads_labels = self.initial_phase and self.initial_public_epochs > 0
        return Needs(proxy_set="labeled" if reads_labels else "required")

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return self.teacher_for(server, recipient) if recipient.purpose == "train" else {}

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.initial_training(client, self.initial_public_epochs)
        if TEACHER in received:
            yield self.distill(client, received, self.digest_epochs, distance=self.distance)
        yield local_fit(client)
        return (yield from self.upload_predictions(client))

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        teacher = self.update_teacher(server, uploads)
        if teacher is not None:
            yield from self.train_student(server, teacher)
