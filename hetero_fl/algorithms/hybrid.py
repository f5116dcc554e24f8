"""Hybrid: average whatever clients have in common, distil the consensus of all into it. This project's own method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from hetero_fl.aggregation.teachers import TeacherKind
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, register_algorithm
from hetero_fl.algorithms.distillation import TEACHER, TeacherAlignment
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.participant import ClientInfo, Part, Participant, common_part
from hetero_fl.core.payload import ItemSpec, Payload
from hetero_fl.core.plan import Plan


@register_algorithm("hybrid")
class Hybrid(TeacherAlignment, FedAvg):
    """FedAvg over the owners of each tensor, and distillation (KL · T²) of the consensus on the proxy set, in one method.

    Each client says what it shares: all its parameters, its backbone, its proxy predictions, or several. Its defaults make
    distillation hold under label skew: a logit-adjusted local loss (Menon et al. 2021), a contrast-weighted teacher, and
    rehearsal: while a client trains on its own rows it goes on following the teacher on public ones. (Heads that stay with
    their clients, `heads: keep`, are no longer needed then: a head is read under the backbone that it was distilled with.
    Digesting the teacher after receiving, `distil_at: both`, is what rehearsal replaces: it makes the
    clients' next opinions alike, and the teacher learns nothing new from them.) Without a proxy set and in one group, with
    these off, it is FedAvg; with all-different architectures that digest at the clients it is FedMD.
    """

    needs_proxy = False  # without one it averages only

    logit_adjustment: bool = True
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
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # what travels follows from the settings
        """Label counts go with the rest where the teacher is aligned."""
        return {
            "model": ItemSpec("params"),
            "logits": ItemSpec("rows", private=True, share="predictions", says="logits"),
            **self.label_counts(),
        }

    def download_part(self, settings: ClientSettings, round_idx: int) -> Part:
        part = super().download_part(settings, round_idx)
        return common_part(part, ("backbone.",)) if self.heads == "keep" else part

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        items = super().broadcast(server, recipient)
        needed = self.distil_at != "server" or (self.rehearse and not recipient.is_evaluation)
        return {**items, **self.teacher_for(server, recipient)} if needed else items

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if TEACHER in received and self.distil_at != "server":
            yield self.digest(
                client, received[TEACHER], self.digest_epochs, self.teacher_rows(client, received)
            )

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if TEACHER in received and self.rehearse:
            yield self.proxy_replay(
                client, received[TEACHER], self.rehearse, self.teacher_rows(client, received)
            )
        else:
            yield self.fit(client)
        items = self.share(client)
        if self.may_share(client, "predictions"):
            items["logits"] = yield from self.proxy_predictions(client)
            items |= self.label_counts_item(client)
        return items

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        teacher = uploads.mean("logits")
        if teacher is None:
            return
        teacher = self.align_teacher(server, uploads, teacher)
        self.store_teacher(server, teacher=teacher)
        if self.distil_at != "client":
            yield from self.distill_into_groups(
                server, teacher, uploads.senders("model"), self.distil_epochs
            )
        yield from self.train_student(server, teacher)
