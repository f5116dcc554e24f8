"""Hybrid: average whatever clients have in common, distil the consensus of all into it. This project's own method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from hetero_fl.aggregation.teachers import TeacherKind
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, algorithm
from hetero_fl.algorithms.distillation import TEACHER, Distilling
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.config.clients import ClientSettings
from hetero_fl.payload import ItemSpec, Payload
from hetero_fl.plan import Plan
from hetero_fl.state import Card, Part, Participant, common_part


@algorithm("hybrid")
class Hybrid(Distilling, FedAvg):
    """FedAvg over the owners of each tensor, and distillation (KL · T²) of the consensus on the proxy set, in one method.

    Each client says what it shares: all its parameters, its backbone, its proxy predictions, or several. Its defaults are
    the four changes that make distillation hold under label skew: logit-adjusted local loss (Menon et al. 2021), a
    contrast-weighted teacher, heads that stay with their clients, and digestion at the client after receiving. Without a
    proxy set and in one group, with the four changes off, it is FedAvg; with all-different architectures that digest at
    the clients it is FedMD.
    """

    needs_proxy = False  # without one it averages only
    uploads = {"model": ItemSpec("params"), "logits": ItemSpec("rows", share="predictions")}
    reads = "after aggregation, as deployed with the next broadcast and digested"

    logit_adjustment: bool = True
    teacher: TeacherKind = "contrast"
    heads: Literal["keep", "take"] = Field("keep", description="whether clients keep their own heads")
    distil_at: Literal["server", "client", "both"] = Field("both", description="where the teacher is distilled")
    distil_epochs: PositiveInt = Field(2, description="epochs of each group's average on the proxy set, at the server")
    digest_epochs: PositiveInt = Field(1, description="epochs on the proxy set at the client, after receiving")

    def takes(self, settings: ClientSettings, round: int) -> Part:
        part = super().takes(settings, round)
        return common_part(part, ("backbone.",)) if self.heads == "keep" else part

    def broadcast(self, server: Participant, card: Card) -> Items:
        items = super().broadcast(server, card)
        if TEACHER in server.state and self.distil_at != "server":
            items[TEACHER] = server.state[TEACHER]
        return items

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        yield from super().deploy(client, got)
        if TEACHER in got:
            yield self.digest(client, got[TEACHER], self.digest_epochs)

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        items: Items = yield from Algorithm.train(self, client, got)
        if client.has_proxy and self.gives(client, "predictions"):
            items["logits"] = yield from self.opinion(client)
        return items

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        teacher = uploads.mean("logits")
        if teacher is None:
            return
        server.state[TEACHER] = teacher
        if self.distil_at != "client":
            yield from self.distil(server, teacher, [u.card for u in uploads.having("model")], self.distil_epochs)
        yield from self.train_student(server, teacher)
