"""Bases of methods that distill on a proxy set.

They share the proxy rows of a round, the consensus of all predictions, its alignment with label
frequencies, and the training phase before a client's first round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.teachers import TeacherKind, align_to_labels, proxy_predictions
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import STUDENT, Algorithm, Items, Needs, may_share
from hetero_fl.algorithms.local_training import load_objective, local_fit
from hetero_fl.core.objectives import ProxyReplay, TeacherDistillation, log_prior
from hetero_fl.core.participant import ClientInfo, Columns, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, SampledBatches
from hetero_fl.utils.seeding import keyed_generator

TEACHER = "teacher"
PROXY_INDICES = "drawn"  # the round whose rows the teacher speaks of


class ProxyTraining(Algorithm):
    """Base of methods that train towards a teacher on the proxy set (KL · T², Hinton et al. 2015)."""

    needs = Needs(proxy_set="required")
    downloads = {TEACHER: ItemSpec("rows", share="predictions")}

    temperature: PositiveFloat = Field(2.0, description="T of the softened softmax")
    proxy_rows: int | None = Field(
        None,
        ge=2,
        description="proxy rows drawn anew each round; none, or more than there are: the whole set",
    )
    proxy_batch_size: PositiveInt = Field(
        32, description="batch of every fit on the proxy set, at clients and server"
    )
    student_epochs: PositiveInt = Field(
        2, description="epochs a round of the server's own student on the proxy set"
    )

    def proxy_indices(
        self, participant: Participant, round_idx: int | None = None
    ) -> Tensor | None:
        """Return the proxy rows of a round (by default this one), int64 `[D]`; None for all.

        Both sides draw them by the round's key, so that no index travels.
        """
        if self.proxy_rows is None:
            return None
        total = len(participant.data("proxy", None)["x"])
        if self.proxy_rows >= total:
            return None
        draws = keyed_generator(
            participant.round_context.seed,
            participant.round_context.round_idx if round_idx is None else round_idx,
            "proxy rows",
        )
        return torch.randperm(total, generator=draws)[: self.proxy_rows].sort().values

    def store_teacher(self, server: Participant, **content: object) -> None:
        """Keep what this round made, usually the teacher, and the round, for the next broadcasts."""
        server.state.update(content)
        if self.proxy_rows is not None:
            server.state[PROXY_INDICES] = torch.tensor([server.round_context.round_idx])

    @staticmethod
    def teacher_for(server: Participant, client_info: ClientInfo) -> Items:
        """Return the teacher and the round of its rows, as far as the server has them, for a client with proxy rows."""
        if not client_info.has_proxy:
            return {}
        return {n: server.state[n] for n in (TEACHER, PROXY_INDICES) if n in server.state}

    def teacher_rows(self, client: Participant, received: Payload) -> Tensor | None:
        """Return the proxy rows that a received teacher is aligned to; None for all."""
        if PROXY_INDICES not in received:
            return None
        return self.proxy_indices(client, int(received[PROXY_INDICES]))

    def distill(
        self,
        client: Participant,
        received: Payload,
        epochs: int,
        teacher: Tensor | None = None,
        **objective: object,
    ) -> Fit:
        """Create the step that trains a client towards the teacher on the teacher's proxy rows.

        Args:
            client: The client.
            received: The broadcast, with the teacher.
            epochs: Epochs on these rows.
            teacher: Logits in place of those that were received, shape `[D, C]`.
            **objective: Further fields of `TeacherDistillation`.
        """
        follow = TeacherDistillation(client.task.kind, self.temperature, **objective)  # type: ignore[arg-type]
        columns = {TEACHER: received[TEACHER] if teacher is None else teacher}
        rows = Rows("proxy", self.teacher_rows(client, received), extra_columns=columns)
        return local_fit(
            client, follow, rows, epochs=epochs, batch_size=self.proxy_batch_size, label="digest"
        )

    def proxy_replay(self, client: Participant, received: Payload, weight: float) -> Fit:
        """Create the step of local training with a batch of the teacher's proxy rows next to each of the client's."""
        public = Rows("proxy", self.teacher_rows(client, received)).columns(client)["x"]
        teacher = received[TEACHER]

        def draw(generator: torch.Generator, size: int) -> Columns:
            some = torch.randint(len(public), (size,), generator=generator)
            return {"x": public[some], TEACHER: teacher[some]}

        objective = ProxyReplay(client.task.kind, weight=weight, temperature=self.temperature)
        batches = {"public": SampledBatches(draw, self.proxy_batch_size)}
        return local_fit(client, objective, extra_batches=batches)

    def train_student(self, server: Participant, teacher: Tensor) -> Plan[None]:
        """Distill this round's teacher into the server's own student, if one was asked for."""
        if STUDENT in server.models:
            yield self.server_fit(server, STUDENT, teacher, self.student_epochs)

    def server_fit(
        self, server: Participant, slot: str, teacher: Tensor, epochs: int, view: object = None
    ) -> Fit:
        """Create the step that fits one of the server's models to this round's teacher.

        Args:
            server: The server.
            slot: The model; the student keeps its optimizer from round to round.
            teacher: Logits of the round's proxy rows, shape `[D, C]`.
            epochs: Epochs on these rows.
            view: The preprocessing of the rows; None: the server's.
        """
        rows = self.proxy_indices(server)
        return Fit(
            {slot: None},
            TeacherDistillation(server.task.kind, self.temperature, slot=slot),
            Rows("proxy", rows, extra_columns={TEACHER: teacher}, preprocess=view),
            epochs=epochs,
            batch_size=self.proxy_batch_size,
            optimizer=server.optimizer,
            keep=STUDENT if slot == STUDENT else None,
            label=f"distil {slot}",  # style: ok (label of a random stream)
        )


COUNTS = "counts"
LABELS = "labels"  # label counts of all uploads so far


class ProxyDistillation(ProxyTraining):
    """Base of methods whose teacher is a consensus of all clients' predictions on the proxy set.

    The teacher can be aligned with the clients' label frequencies, so that no class is lost in the consensus
    (`hetero_fl.aggregation.teachers.align_to_labels`). Clients then send their label counts too, where classes exclude one
    another and `shares` has `statistics`.
    """

    teacher: TeacherKind = Field(
        "mean",
        description="weight of a client's predictions: mean, samples, contrast by class, entropy of each prediction",
    )
    align: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how far the teacher moves towards the clients' label frequencies; 0: not at all",
    )

    @property
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # follows from settings
        """Predictions on the proxy set, and label counts where the teacher is aligned."""
        logits = ItemSpec("rows", private=True, share="predictions", says="logits")
        return {"logits": logits, **self.label_counts_spec()}

    def label_counts_spec(self, use: Literal["sum", "each"] = "sum") -> Mapping[str, ItemSpec]:
        """Return the declaration of label counts, if the teacher is aligned."""
        spec = ItemSpec("counts", use, private=True, share="statistics")
        return {COUNTS: spec} if self.align else {}

    def upload_predictions(self, client: Participant) -> Plan[Items]:
        """Predict the round's proxy rows and return the upload; empty if the client does not share predictions now."""
        if not may_share(client, "predictions"):
            return {}
        logits = yield Predict("model", Rows("proxy", self.proxy_indices(client)))
        return {"logits": self.weighted_predictions(client, logits), **self.label_counts(client)}

    def weighted_predictions(self, client: Participant, logits: Tensor) -> Item:
        """Return a client's predictions with their weight in the teacher."""
        counts = None
        if self.teacher == "contrast" and "statistics" in client.settings.shares:
            counts = client.counts
        return proxy_predictions(client.task, self.teacher, logits, counts, client.num_rows)

    def label_counts(self, client: Participant) -> Items:
        """Return the client's label counts, if the teacher is aligned and the client shares them now."""
        if (
            not self.align
            or client.task.kind != "multiclass"
            or not may_share(client, "statistics")
        ):
            return {}
        return {COUNTS: Item(client.counts, kind="counts")}

    def update_teacher(self, server: Participant, uploads: Uploads) -> Tensor | None:
        """Make the mean of the uploaded logits the teacher and return it; None if there are none."""
        teacher = uploads.mean("logits")
        if teacher is not None:
            teacher = self.align_teacher(server, uploads, teacher)
            self.store_teacher(server, teacher=teacher)
        return teacher

    def align_teacher(self, server: Participant, uploads: Uploads, teacher: Tensor) -> Tensor:
        """Return the teacher, aligned with the labels of all uploads so far: one small cohort may lack a class."""
        if self.align and uploads.is_available(COUNTS):
            server.state[LABELS] = uploads.total(COUNTS)[0] + server.state.get(LABELS, 0)
        if not self.align or LABELS not in server.state:
            return teacher
        # noise may leave less than 0
        log_q = log_prior(server.task, server.state[LABELS].clamp(min=0))
        if log_q is None:
            return teacher
        is_adjusted = bool(server.peers.main_profile.settings.logit_adjustment)
        return align_to_labels(teacher, log_q, self.align, is_adjusted)

    def distill_into_groups(
        self, server: Participant, teacher: Tensor, senders: Iterable[ClientInfo], epochs: int
    ) -> Plan[None]:
        """Distill this round's teacher into the model of each group that sent something, at the server."""
        # the lowest id decides the view
        views = {
            c.arch.spec_id: c.preprocess
            for c in sorted(senders, key=lambda c: c.client_id, reverse=True)
        }
        yield [
            self.server_fit(server, group, teacher, epochs, views[group]) for group in sorted(views)
        ]


DONE = "initial_phase"


class InitialPhase(ProxyTraining):
    """Base of methods whose clients can train before their first round: on labeled public rows, then on their own.

    A client does so when it first takes part, whichever round that is, and remembers it in its
    private state: the phase happens again only where nothing came of that round. A model that is
    evaluated before has not had it.
    """

    initial_phase: bool = Field(
        False, description="train before the first round in which a client takes part"
    )
    initial_private_epochs: PositiveInt = Field(
        25, description="initial phase: epochs on the client's own rows"
    )

    def initial_training(self, client: Participant, public_epochs: int = 0) -> Plan[None]:
        """Train a client that takes part for the first time, if the initial phase is on.

        Public rows have the task's loss without the client's label frequencies or class weights,
        which are those of its own rows.

        Args:
            client: Whose round it is.
            public_epochs: Epochs on the labeled proxy set; 0: it is left out.
        """
        if not self.initial_phase or DONE in client.state:
            return
        if public_epochs and client.has_proxy:
            yield Fit(
                {"model": None},
                load_objective(client.settings.objective, client.task),
                Rows("proxy"),
                epochs=public_epochs,
                batch_size=self.proxy_batch_size,
                optimizer=client.optimizer,
                label="initial public",
            )
        yield local_fit(client, epochs=self.initial_private_epochs, label="initial private")
        client.state[DONE] = True
