"""Hybrid: average what clients have in common and distill the consensus of all. This project's own method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from hetero_fl.aggregation.teachers import TeacherKind
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import (
    Algorithm,
    Items,
    Needs,
    SharedPart,
    register_algorithm,
    upload_model,
)
from hetero_fl.algorithms.distillation import TEACHER, ProxyDistillation
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.core.participant import ClientDirectory, ClientInfo, Participant
from hetero_fl.core.payload import ItemSpec, Payload
from hetero_fl.core.plan import Plan


@register_algorithm("hybrid")
class Hybrid(ProxyDistillation, FedAvg):
    """Average the parameters that clients have in common, and distill the consensus of all on a public proxy set.

    FedAvg over the owners of each tensor, and distillation (KL · T²), in one method. Each client says what it shares: all its
    parameters, its backbone, its proxy predictions, or several. Its defaults make distillation hold under label skew: a
    logit-adjusted local loss (Menon et al. 2021), a contrast-weighted teacher, and replay: while a client trains on its own
    rows it goes on following the teacher on public ones. (Heads that stay with their clients, `heads: keep`, are no longer
    needed then: a head is used under the backbone that it was distilled with. Distilling the teacher after receiving,
    `distil_at: both`, is what replay replaces: it makes the clients' next predictions alike, and the teacher learns nothing
    new from them.) Without a proxy set and in one group, with these off, it is FedAvg; with all-different architectures that
    distill at the clients it is FedMD.
    """

    title = "Hybrid"
    needs = Needs(proxy_set="optional", one_architecture=True)

    teacher: TeacherKind = "contrast"
    heads: Literal["take", "keep"] = Field(
        "take", description="whether clients keep their own heads"
    )
    distil_at: Literal["server", "client", "both"] = Field(
        "server", description="where the teacher is distilled"
    )
    rehearse: NonNegativeFloat = Field(
        0.5, description="weight of the teacher on public rows in local training; 0: none"
    )
    distil_epochs: PositiveInt = Field(
        3, description="epochs of each group's average on the proxy set, at the server"
    )
    digest_epochs: PositiveInt = Field(
        1, description="epochs on the proxy set at the client, after receiving"
    )

    @property
    def shared(self) -> SharedPart:  # type: ignore[override]  # follows from a setting
        """All of the model; clients that keep their heads replace the backbone only."""
        return SharedPart(received=("backbone.",) if self.heads == "keep" else None)

    @property
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # follows from settings
        """Parameters and predictions, and label counts where the teacher is aligned."""
        return {"model": ItemSpec("params"), **super().uploads}

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        clients.set_default("logit_adjustment", True)
        return super().configure(clients)

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        items = super().broadcast(server, recipient)
        replays = self.rehearse > 0 and recipient.purpose == "train"
        if self.distil_at == "server" and not replays:
            return items
        return {**items, **self.teacher_for(server, recipient)}

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if TEACHER in received and self.distil_at != "server":
            yield self.distill(client, received, self.digest_epochs)

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if TEACHER in received and self.rehearse:
            yield self.proxy_replay(client, received, self.rehearse)
        else:
            yield local_fit(client)
        items = upload_model(self, client, self.weight_of(client))
        return {**items, **(yield from self.upload_predictions(client))}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        teacher = self.update_teacher(server, uploads)
        if teacher is None:
            return
        if self.distil_at != "client":
            senders = uploads.senders("model")
            yield from self.distill_into_groups(server, teacher, senders, self.distil_epochs)
        yield from self.train_student(server, teacher)
