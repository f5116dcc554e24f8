"""Bases of methods that distill on the proxy set.

Includes label-aligned teachers and the training phase before a client's first round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.teachers import TeacherKind, align_to_labels, proxy_predictions
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import STUDENT, Algorithm, Items, load_objective
from hetero_fl.core.objectives import ProxyReplay, TeacherDistillation, log_prior
from hetero_fl.core.participant import ClientInfo, Columns, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, SampledBatches
from hetero_fl.utils.seeding import keyed_generator

# What distilling methods have in common: opinions on the proxy set, their consensus, and training
# towards it.

TEACHER = "teacher"
PROXY_INDICES = "drawn"  # the round whose rows the teacher speaks of


class ProxyTraining(Algorithm):
    """Settings and pieces of methods that train towards a teacher on the proxy set (KL · T², Hinton et al. 2015)."""

    needs_proxy = True
    is_distillation = True
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

    # The proxy rows of a round -----------------------------------------------------------------------------------
    def proxy_indices(
        self, participant: Participant, round_idx: int | None = None
    ) -> Tensor | None:
        """Which proxy rows a round (by default this one) is about, int64 `[D]`; None for all.

        Both sides draw them by the round's key, so that no index travels.
        """
        if self.proxy_rows is None or self.proxy_rows >= (
            total := len(participant.data("proxy", None)["x"])
        ):
            return None
        draws = keyed_generator(
            participant.round_context.seed,
            participant.round_context.round_idx if round_idx is None else round_idx,
            "proxy rows",
        )
        return torch.randperm(total, generator=draws)[: self.proxy_rows].sort().values

    def store_teacher(self, server: Participant, **content: object) -> None:
        """Keep what this round made, the teacher as a rule, for the next broadcasts, and the round with it."""
        server.state.update(content)
        if self.proxy_rows is not None:
            server.state[PROXY_INDICES] = torch.tensor([server.round_context.round_idx])

    @staticmethod
    def teacher_for(server: Participant, client_info: ClientInfo) -> Items:
        """The teacher, if there is one and the client sees what it speaks of, and where rows are drawn its round, which may
        not be the last."""
        return (
            {}
            if not client_info.has_proxy
            else {
                name: server.state[name]
                for name in (TEACHER, PROXY_INDICES)
                if name in server.state
            }
        )

    def teacher_rows(self, client: Participant, received: Payload) -> Tensor | None:
        """The proxy rows that a received teacher speaks of; None for all."""
        return (
            self.proxy_indices(client, int(received[PROXY_INDICES]))
            if PROXY_INDICES in received
            else None
        )

    # Training towards a teacher ----------------------------------------------------------------------------------
    def digest(
        self,
        client: Participant,
        teacher: Tensor,
        epochs: int,
        rows: Tensor | None = None,
        **objective: object,
    ) -> Fit:
        """The client follows the teacher on the proxy set, or on some `rows` of it, to which the teacher is aligned."""
        follow = TeacherDistillation(client.task.kind, self.temperature, **objective)  # type: ignore[arg-type]
        data = Rows("proxy", rows, extra_columns={TEACHER: teacher})
        return self.fit(
            client, follow, data, epochs=epochs, batch_size=self.proxy_batch_size, label="digest"
        )

    def proxy_replay(
        self, client: Participant, teacher: Tensor, weight: float, rows: Tensor | None = None
    ) -> Fit:
        """Local training with a batch of public rows (those, or all) beside each of its own."""
        public = Rows("proxy", rows).columns(client)["x"]

        def draw(generator: torch.Generator, size: int) -> Columns:
            some = torch.randint(len(public), (size,), generator=generator)
            return {"x": public[some], TEACHER: teacher[some]}

        objective = ProxyReplay(client.task.kind, weight=weight, temperature=self.temperature)
        return self.fit(
            client, objective, extra_batches={"public": SampledBatches(draw, self.proxy_batch_size)}
        )

    def train_student(self, server: Participant, teacher: Tensor) -> Plan[None]:
        """Distil this round's teacher into the server's own student, if one was asked for."""
        if STUDENT in server.models:
            yield self.server_fit(server, STUDENT, teacher, self.student_epochs)

    def server_fit(
        self, server: Participant, slot: str, teacher: Tensor, epochs: int, view: object = None
    ) -> Fit:
        """A fit of one of the server's models to this round's teacher; the student's optimizer lives on."""
        return Fit(
            {slot: None},
            TeacherDistillation(server.task.kind, self.temperature, slot=slot),
            Rows(
                "proxy",
                self.proxy_indices(server),
                extra_columns={TEACHER: teacher},
                preprocess=view,
            ),
            epochs=epochs,
            batch_size=self.proxy_batch_size,
            optimizer=server.optimizer,
            keep=STUDENT if slot == STUDENT else None,
            label=f"distil {slot}",
        )


class ProxyDistillation(ProxyTraining):
    """Those whose teacher is a consensus: one for all, made of what each client says with the weight of its word."""

    teacher: TeacherKind = Field(
        "mean",
        description="weight of a client's word: mean, samples, contrast by class, entropy of each prediction",
    )

    def proxy_predictions(self, client: Participant) -> Plan[Item]:
        """The client's predictions on the round's proxy rows with the weight of its word."""
        logits = yield Predict("model", Rows("proxy", self.proxy_indices(client)))
        return proxy_predictions(
            client.task, self.teacher, logits, self.released_label_counts(client), client.num_rows
        )

    def released_label_counts(self, client: Participant) -> Tensor | None:
        """Its label counts, if the teacher weighs by them and it lets them out."""
        return (
            client.counts
            if self.teacher == "contrast" and "statistics" in client.settings.shares
            else None
        )

    def distill_into_groups(
        self, server: Participant, teacher: Tensor, client_infos: Iterable[ClientInfo], epochs: int
    ) -> Plan[None]:
        """Distil this round's teacher into the model of each group that sent something, at the server."""
        # lowest id wins
        views = {
            c.arch.spec_id: c.preprocess
            for c in sorted(client_infos, key=lambda c: c.client_id, reverse=True)
        }
        yield [
            self.server_fit(server, group, teacher, epochs, views[group]) for group in sorted(views)
        ]


# A teacher whose mean prediction is held to the label frequencies of the clients, so that no class
# is lost in the consensus.

COUNTS = "counts"
LABELS = "labels"  # how many of each class there were in all uploads so far


class TeacherAlignment(ProxyDistillation):
    """Those that can align their teacher (`hetero_fl.aggregation.teachers.align_to_labels`). Clients then send their label counts too,
    where labels exclude one another and `shares` has `statistics`."""

    align: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how far the teacher moves towards the clients' label frequencies; 0: not at all",
    )

    def label_counts(self, use: Literal["sum", "each"] = "sum") -> Mapping[str, ItemSpec]:
        """What there is to declare besides what a method sends anyway."""
        return (
            {COUNTS: ItemSpec("counts", use, private=True, share="statistics")}
            if self.align
            else {}
        )

    def label_counts_item(self, client: Participant) -> Items:
        """The client's label counts, if the teacher is aligned and it lets them out; they go with what it says or is."""
        wanted = (
            self.align > 0
            and client.task.kind == "multiclass"
            and self.may_share(client, "statistics")
        )
        return {COUNTS: Item(client.counts, kind="counts")} if wanted else {}

    def align_teacher(self, server: Participant, uploads: Uploads, teacher: Tensor) -> Tensor:
        """The teacher, aligned to the labels of all uploads so far: those of one small cohort may lack a class."""
        if self.align and uploads.is_available(COUNTS):
            server.state[LABELS] = uploads.total(COUNTS)[0] + server.state.get(LABELS, 0)
        if not self.align or LABELS not in server.state:
            return teacher
        # noise may leave less than nought
        log_q = log_prior(server.task, server.state[LABELS].clamp(min=0))
        return (
            teacher
            if log_q is None
            else align_to_labels(teacher, log_q, self.align, self.logit_adjustment)
        )


# The initial phase: what a client trains by itself before its first round, once, where a method's
# authors have it.

DONE = "initial_phase"


class InitialPhase(ProxyTraining):
    """Methods whose clients can train before their first round: on labeled public rows, then on their own.

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
        yield self.fit(client, epochs=self.initial_private_epochs, label="initial private")
        client.state[DONE] = True
