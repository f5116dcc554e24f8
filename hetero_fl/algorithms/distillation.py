"""Bases of methods that distill on the proxy set.

Includes label-aligned teachers and the training phase before a client's first round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.teachers import TeacherKind, aligned, opinion
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import STUDENT, Algorithm, Items, own_objective
from hetero_fl.core.objectives import Digest, Rehearsal, log_prior
from hetero_fl.core.participant import Card, Columns, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Draws, Fit, Plan, Predict, Rows
from hetero_fl.utils.seeding import generator

# What distilling methods have in common: opinions on the proxy set, their consensus, and training
# towards it.

TEACHER = "teacher"
DRAWN = "drawn"  # the round whose rows the teacher speaks of


class OnProxy(Algorithm):
    """Settings and pieces of methods that train towards a teacher on the proxy set (KL · T², Hinton et al. 2015)."""

    needs_proxy = True
    distils = True
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
    def drawn(self, who: Participant, round: int | None = None) -> Tensor | None:
        """Which proxy rows a round (by default this one) is about, int64 `[D]`; None for all.

        Both sides draw them by the round's key, so that no index travels.
        """
        if self.proxy_rows is None or self.proxy_rows >= (
            total := len(who.data("proxy", None)["x"])
        ):
            return None
        draws = generator(who.clock.seed, who.clock.round if round is None else round, "proxy rows")
        return torch.randperm(total, generator=draws)[: self.proxy_rows].sort().values

    def remember(self, server: Participant, **made: object) -> None:
        """Keep what this round made, the teacher as a rule, for the next broadcasts, and the round with it."""
        server.state.update(made)
        if self.proxy_rows is not None:
            server.state[DRAWN] = torch.tensor([server.clock.round])

    @staticmethod
    def remembered(server: Participant, card: Card) -> Items:
        """The teacher, if there is one and the client sees what it speaks of, and where rows are drawn its round, which may
        not be the last."""
        return (
            {}
            if not card.has_proxy
            else {name: server.state[name] for name in (TEACHER, DRAWN) if name in server.state}
        )

    def taught(self, client: Participant, got: Payload) -> Tensor | None:
        """The proxy rows that a received teacher speaks of; None for all."""
        return self.drawn(client, int(got[DRAWN])) if DRAWN in got else None

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
        follow = Digest(client.task.kind, self.temperature, **objective)  # type: ignore[arg-type]
        data = Rows("proxy", rows, beside={TEACHER: teacher})
        return self.fit(
            client, follow, data, epochs=epochs, batch_size=self.proxy_batch_size, label="digest"
        )

    def rehearsal(
        self, client: Participant, teacher: Tensor, weight: float, rows: Tensor | None = None
    ) -> Fit:
        """Local training with a batch of public rows (those, or all) beside each of its own."""
        public = Rows("proxy", rows).columns(client)["x"]

        def draw(generator: torch.Generator, size: int) -> Columns:
            some = torch.randint(len(public), (size,), generator=generator)
            return {"x": public[some], TEACHER: teacher[some]}

        objective = Rehearsal(client.task.kind, weight=weight, temperature=self.temperature)
        return self.fit(client, objective, beside={"public": Draws(draw, self.proxy_batch_size)})

    def train_student(self, server: Participant, teacher: Tensor) -> Plan[None]:
        """Distil this round's teacher into the server's own student, if one was asked for."""
        if STUDENT in server.models:
            yield self.at_server(server, STUDENT, teacher, self.student_epochs)

    def at_server(
        self, server: Participant, slot: str, teacher: Tensor, epochs: int, view: object = None
    ) -> Fit:
        """A fit of one of the server's models to this round's teacher; the student's optimiser lives on."""
        return Fit(
            {slot: None},
            Digest(server.task.kind, self.temperature, slot=slot),
            Rows("proxy", self.drawn(server), beside={TEACHER: teacher}, through=view),
            epochs=epochs,
            batch_size=self.proxy_batch_size,
            optimizer=server.optimizer,
            keep=STUDENT if slot == STUDENT else None,
            label=f"distil {slot}",
        )


class Distilling(OnProxy):
    """Those whose teacher is a consensus: one for all, made of what each client says with the weight of its word."""

    teacher: TeacherKind = Field(
        "mean",
        description="weight of a client's word: mean, samples, contrast by class, entropy of each prediction",
    )

    def opinion(self, client: Participant) -> Plan[Item]:
        """The client's predictions on the round's proxy rows with the weight of its word."""
        logits = yield Predict("model", Rows("proxy", self.drawn(client)))
        return opinion(client.task, self.teacher, logits, self.released(client), client.n)

    def released(self, client: Participant) -> Tensor | None:
        """Its label counts, if the teacher weighs by them and it lets them out."""
        return (
            client.counts
            if self.teacher == "contrast" and "statistics" in client.settings.shares
            else None
        )

    def distil(
        self, server: Participant, teacher: Tensor, cards: Iterable[Card], epochs: int
    ) -> Plan[None]:
        """Distil this round's teacher into the model of each group that sent something, at the server."""
        # lowest id wins
        views = {c.arch.id: c.preprocess for c in sorted(cards, key=lambda c: c.id, reverse=True)}
        yield [
            self.at_server(server, group, teacher, epochs, views[group]) for group in sorted(views)
        ]


# A teacher whose mean prediction is held to the label frequencies of the clients, so that no class
# is lost in the consensus.

COUNTS = "counts"
LABELS = "labels"  # how many of each class there were in all uploads so far


class Aligning(Distilling):
    """Those that can align their teacher (`hetero_fl.aggregation.teachers.aligned`). Clients then send their label counts too,
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

    def told_labels(self, client: Participant) -> Items:
        """The client's label counts, if the teacher is aligned and it lets them out; they go with what it says or is."""
        wanted = (
            self.align > 0 and client.task.kind == "multiclass" and self.gives(client, "statistics")
        )
        return {COUNTS: Item(client.counts, kind="counts")} if wanted else {}

    def moved(self, server: Participant, uploads: Uploads, teacher: Tensor) -> Tensor:
        """The teacher, aligned to the labels of all uploads so far: those of one small cohort may lack a class."""
        if self.align and uploads.heard_of(COUNTS):
            server.state[LABELS] = uploads.total(COUNTS)[0] + server.state.get(LABELS, 0)
        if not self.align or LABELS not in server.state:
            return teacher
        # noise may leave less than nought
        log_q = log_prior(server.task, server.state[LABELS].clamp(min=0))
        return (
            teacher if log_q is None else aligned(teacher, log_q, self.align, self.logit_adjustment)
        )


# The initial phase: what a client trains by itself before its first round, once, where a method's
# authors have it.

DONE = "initial_phase"


class InitialPhase(OnProxy):
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
                own_objective(client.settings.objective, client.task),
                Rows("proxy"),
                epochs=public_epochs,
                batch_size=self.proxy_batch_size,
                optimizer=client.optimizer,
                label="initial public",
            )
        yield self.fit(client, epochs=self.initial_private_epochs, label="initial private")
        client.state[DONE] = True
