"""FedMD: models of any kind learn from one another through their predictions on a public set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, register_algorithm
from hetero_fl.algorithms.distillation import TEACHER, InitialPhase, TeacherAlignment
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import ItemSpec, Payload
from hetero_fl.core.plan import Plan


@register_algorithm("fedmd")
class FedMD(InitialPhase, TeacherAlignment):
    """Clients digest the consensus of proxy logits, then train on private data (Li & Wang 2019, Algorithm 1).

    The authors' code takes the mean absolute error of logits; KL with T = 2 is what our comparisons use.

    Deviation: the paper's initial phase, in which each client trains on the labeled public set and
    then on its own rows, is off by default (`initial_phase`), so that labels of the proxy set are not
    needed. With it, the first round has its usual local epochs besides, and the authors' early
    stopping is left out.
    """

    shared = ()
    evaluated_when = "after private training, as in the paper"

    distance: Literal["kl", "mae"] = Field(
        "kl", description="between a client's logits and the consensus"
    )
    digest_epochs: PositiveInt = Field(
        1, description="epochs on the proxy set before private training"
    )
    initial_phase: bool = Field(
        False,
        description="before a client's first round: train on the labels of the proxy set (`data.proxy.labels`), then on its "
        "own rows",
    )
    initial_public_epochs: NonNegativeInt = Field(
        20, description="initial phase: epochs on the labeled proxy set"
    )

    @property
    def reads_proxy_labels(self) -> bool:
        return self.initial_phase and self.initial_public_epochs > 0

    @property
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # what travels follows from the settings
        """Label counts go with the rest where the teacher is aligned."""
        return {
            "logits": ItemSpec("rows", private=True, share="predictions", says="logits"),
            **self.label_counts(),
        }

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return {} if recipient.is_evaluation else self.teacher_for(server, recipient)

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.initial_training(client, self.initial_public_epochs)
        if TEACHER in received:
            rows = self.teacher_rows(client, received)
            yield self.digest(
                client, received[TEACHER], self.digest_epochs, rows, distance=self.distance
            )
        yield self.fit(client)
        if not self.may_share(client, "predictions"):
            return {}
        return {
            "logits": (yield from self.proxy_predictions(client)),
            **self.label_counts_item(client),
        }

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        teacher = uploads.mean("logits")
        if teacher is not None:
            teacher = self.align_teacher(server, uploads, teacher)
            self.store_teacher(server, teacher=teacher)
            yield from self.train_student(server, teacher)
