"""What distilling methods have in common: opinions on the proxy set, their consensus, and training towards it."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.teachers import TeacherKind, opinion
from hetero_fl.algorithms.base import STUDENT, Algorithm
from hetero_fl.objectives import Digest
from hetero_fl.payload import Item
from hetero_fl.plan import Fit, Plan, Predict, Rows
from hetero_fl.state import Card, Participant

TEACHER = "teacher"


class OnProxy(Algorithm):
    """Settings and pieces of methods that train towards a teacher on the proxy set (KL · T², Hinton et al. 2015)."""

    needs_proxy = True
    distils = True

    temperature: PositiveFloat = Field(2.0, description="T of the softened softmax")
    proxy_batch_size: PositiveInt = Field(32, description="batch of every fit on the proxy set, at clients and server")
    student_epochs: PositiveInt = Field(2, description="epochs a round of the server's own student on the proxy set")

    def digest(
        self, client: Participant, teacher: Tensor, epochs: int, rows: Tensor | None = None, **objective: object
    ) -> Fit:
        """The client follows the teacher on the proxy set, or on some `rows` of it, to which the teacher is aligned."""
        follow = Digest(client.task.kind, self.temperature, **objective)  # type: ignore[arg-type]
        data = Rows("proxy", rows, beside={TEACHER: teacher})
        return self.fit(client, follow, data, epochs=epochs, batch_size=self.proxy_batch_size, label="digest")

    def train_student(self, server: Participant, teacher: Tensor, rows: Tensor | None = None) -> Plan[None]:
        """Distil the teacher into the server's own student, if one was asked for."""
        if STUDENT in server.models:
            yield self.at_server(server, STUDENT, teacher, self.student_epochs, rows=rows)

    def at_server(
        self,
        server: Participant,
        slot: str,
        teacher: Tensor,
        epochs: int,
        view: object = None,
        rows: Tensor | None = None,
    ) -> Fit:
        """A fit of one of the server's models to the teacher on the proxy set; the student's optimiser lives on."""
        return Fit(
            {slot: None},
            Digest(server.task.kind, self.temperature, slot=slot),
            Rows("proxy", rows, beside={TEACHER: teacher}, through=view),
            epochs=epochs,
            batch_size=self.proxy_batch_size,
            optimizer=server.optimizer,
            keep=STUDENT if slot == STUDENT else None,
            label=f"distil {slot}",
        )


class Distilling(OnProxy):
    """Those whose teacher is a consensus: one for all, made of what each client says with the weight of its word."""

    teacher: TeacherKind = Field("mean", description="weight of a client's word: mean, samples, or contrast by class")

    def opinion(self, client: Participant) -> Plan[Item]:
        """The client's predictions on the proxy set with the weight of its word."""
        logits = yield Predict("model", Rows("proxy"))
        return opinion(client.task, self.teacher, logits, self.released(client), client.n)

    @staticmethod
    def released(client: Participant) -> Tensor | None:
        """Its label counts, if it lets them out."""
        return client.counts if "statistics" in client.settings.shares else None

    def distil(self, server: Participant, teacher: Tensor, cards: Iterable[Card], epochs: int) -> Plan[None]:
        """Distil the teacher into the model of each group that sent something, at the server."""
        views = {c.arch.id: c.preprocess for c in sorted(cards, key=lambda c: c.id, reverse=True)}  # lowest id wins
        yield [self.at_server(server, group, teacher, epochs, views[group]) for group in sorted(views)]
