"""Hybrid: average whatever clients have in common, distil the consensus of all into it. This project's own method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from hetero_fl.aggregation.teachers import TeacherKind
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, algorithm
from hetero_fl.algorithms.distillation import TEACHER, Aligning
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.participant import Card, Part, Participant, common_part
from hetero_fl.core.payload import ItemSpec, Payload
from hetero_fl.core.plan import Plan


@algorithm("hybrid")
class Hybrid(Aligning, FedAvg):
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

    def takes(self, settings: ClientSettings, round: int) -> Part:
        part = super().takes(settings, round)
        return common_part(part, ("backbone.",)) if self.heads == "keep" else part

    def broadcast(self, server: Participant, card: Card) -> Items:
        items = super().broadcast(server, card)
        needed = self.distil_at != "server" or (self.rehearse and not card.reading)
        return {**items, **self.remembered(server, card)} if needed else items

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        yield from super().deploy(client, got)
        if TEACHER in got and self.distil_at != "server":
            yield self.digest(client, got[TEACHER], self.digest_epochs, self.taught(client, got))

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        if TEACHER in got and self.rehearse:
            yield self.rehearsal(client, got[TEACHER], self.rehearse, self.taught(client, got))
        else:
            yield self.fit(client)
        items = self.share(client)
        if self.gives(client, "predictions"):
            items["logits"] = yield from self.opinion(client)
            items |= self.told_labels(client)
        return items

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        teacher = uploads.mean("logits")
        if teacher is None:
            return
        teacher = self.moved(server, uploads, teacher)
        self.remember(server, teacher=teacher)
        if self.distil_at != "client":
            yield from self.distil(server, teacher, uploads.senders("model"), self.distil_epochs)
        yield from self.train_student(server, teacher)
