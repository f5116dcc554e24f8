"""Data-free distillation with generators: DENSE and FedGen."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import STUDENT, Algorithm, Items, algorithm
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.prototypes import CommonHead
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.generative_objectives import (
    FromGenerator,
    Generate,
    Generator,
    Synthesis,
    View,
    seen,
)
from hetero_fl.core.model_spec import Architecture
from hetero_fl.core.objectives import Digest, convertible
from hetero_fl.core.participant import LOOKED, Card, Columns, Part, Participant, Roster, floats
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Draws, Fit, Plan, Predict, Table
from hetero_fl.utils.errors import UserError, nearest
from hetero_fl.utils.seeding import generator

# What data-free methods have in common: a generator trained on models alone, and a student trained
# on what it makes.

GENERATOR = "generator"


class DataFree(Algorithm):
    """Settings and steps of a server that alternates between a generator of examples and a student."""

    synthesis_epochs: PositiveInt = Field(
        15, description="alternations of generator and student; the authors: 200"
    )
    generator_steps: PositiveInt = Field(
        30,
        description="steps of the generator on one batch of noise and labels, as the authors have it",
    )
    student_steps: PositiveInt = Field(
        50, description="steps of the student on all batches so far, after each"
    )
    synthetic_batch: int = Field(64, ge=2, description="generated examples of a batch")
    noise: PositiveInt = Field(64, description="width of the generator's input")
    generator_lr: PositiveFloat = Field(1e-3, description="its learning rate (Adam)")
    statistics_weight: NonNegativeFloat = Field(
        1.0, description="λ₁: weight of the BatchNorm statistics"
    )
    adversarial_weight: NonNegativeFloat = Field(
        0.5, description="λ₂: weight of the difference to the student"
    )
    temperature: PositiveFloat = Field(4.0, description="T of the student's softened softmax")

    def generator(self, shape: tuple[int, ...]) -> Architecture:
        """From noise to examples of this shape."""
        name, options = f"python:{Generator.__module__}:{Generator.__name__}", {"shape": shape}
        return Architecture.of(name, math.prod(shape), (self.noise,), options=options)

    def drawn(self, server: Participant) -> Columns:
        """A batch of noise and labels."""
        draws = generator(*server.stream("noise"))
        x = torch.randn(self.synthetic_batch, self.noise, generator=draws)
        return {
            "x": x,
            "y": torch.randint(server.task.outputs, (self.synthetic_batch,), generator=draws),
        }

    def imagine(self, synthesis: Synthesis, noise: Columns, frozen: tuple[str, ...]) -> Fit:
        """The generator's steps on one batch of noise."""
        return Fit(
            {GENERATOR: None},
            synthesis,
            Table(noise),
            steps=self.generator_steps,
            batch_size=self.synthetic_batch,
            optimizer=OptimizerConfig(lr=self.generator_lr),
            frozen=frozen,
            keep=GENERATOR,
            label=GENERATOR,
        )

    def distil(self, server: Participant, x: Tensor, teacher: Tensor) -> Fit:
        """The student's steps on all examples so far."""
        return Fit(
            {STUDENT: None},
            Digest(server.task.kind, self.temperature, slot=STUDENT),
            Table({"x": x, "teacher": teacher}),
            steps=self.student_steps,
            batch_size=self.synthetic_batch,
            optimizer=server.optimizer,
            keep=STUDENT,
            label=STUDENT,
        )


# DENSE: one upload of every client's model, then a student distilled from all of them on examples
# made from them alone.


@algorithm("dense")
class Dense(DataFree):
    """One-shot and data-free: clients train alone and upload θ once, in the last round. The server then alternates: a
    generator learns a batch by CE + λ₁·BN statistics − λ₂·KL where student and teachers differ; a student distils the
    teachers' mean logits on all batches so far (Zhang et al. 2022, Algorithm 1).

    Teachers may differ in architecture; the student has that of one client, which everybody then uses. Before the last
    round each client is read with its own model, as under Local; a run that stops early never gets there.
    """

    shared = None
    uploads = {"model": ItemSpec("params", use="each")}
    tasks = ("multiclass",)
    one_shot = True
    reads = (
        "own model until the last round, then the server's student, through its own preprocessing"
    )

    student: str | None = Field(
        None,
        description="client whose architecture and view the student takes; none: the first of the most frequent",
    )

    def resolve(self, cards: Roster) -> tuple[Algorithm, list[str]]:
        if self.student is not None and self.student not in cards:
            raise UserError(
                f"algorithm.student: found '{self.student}'{nearest(self.student, islice(cards, LOOKED))}"
            )
        student = self.student or cards.foremost.first
        arch = cards[student].arch
        if arch.vocabulary:
            raise UserError(
                "algorithm.name: dense makes examples by their gradient, and the examples here are tokens"
            )
        for kind in cards.kinds:
            own, shape = kind.arch.input_shape, arch.input_shape
            if not convertible(shape, own):
                raise UserError(
                    f"algorithm.student: examples of {student} are {list(shape)}, but of {kind.first} {list(own)}"
                )
        note = f"dense: one student for all, a {arch.name} as {student} has it; models travel once, at the end"
        return self.model_copy(update={"student": student}), [note]

    # One upload --------------------------------------------------------------------------------------------------
    def phase(self, share_every: int, round: int, rounds: int) -> int:
        return int(round == rounds - 1)

    def takes(self, settings: ClientSettings, round: int) -> Part:
        return ()

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield self.fit(client)
        last, whole = (
            client.clock.round == client.clock.rounds - 1,
            self.part(client.settings) is None,
        )
        return {"model": floats(client.models["model"])} if last and whole else {}

    # The student -------------------------------------------------------------------------------------------------
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        sent = uploads.having("model")
        if not sent:
            return
        card = self.of(server)
        shape = card.arch.input_shape
        slots = [f"teacher {u.client}" for u in sent]
        for slot, u in zip(slots, sent, strict=True):
            server.arch[slot], server.models[slot] = (
                u.card.arch,
                {**server.models[u.group], **u.payload["model"]},
            )
        server.arch[STUDENT], server.models[STUDENT] = card.arch, server.models[card.arch.id]
        server.arch[GENERATOR] = self.generator(shape)
        server.models[GENERATOR] = server.arch[GENERATOR].initial(server.clock.seed)
        teachers = tuple(zip(slots, map(view_of, (u.card for u in sent)), strict=True))
        synthesis = Synthesis(
            shape,
            teachers,
            (STUDENT, view_of(card)),
            self.statistics_weight,
            self.adversarial_weight,
        )
        examples, logits = [], []
        for _ in range(self.synthesis_epochs):
            noise = self.drawn(server)
            yield self.imagine(synthesis, noise, (*slots, STUDENT))
            x = (yield Predict(GENERATOR, Table(noise))).unflatten(1, shape)
            said = yield [Predict(slot, Table({"x": seen(x, view)})) for slot, view in teachers]
            examples.append(seen(x, view_of(card)))
            logits.append(torch.stack(said).mean(0))
            yield self.distil(server, torch.cat(examples), torch.cat(logits))
        server.models[card.arch.id] = server.models[STUDENT]
        for slot in (*slots, STUDENT, GENERATOR):
            del server.arch[slot], server.models[slot]
        server.state = {"student": self.student}

    def of(self, who: Participant) -> Card:
        """The client whose architecture and view the student takes."""
        assert self.student is not None  # `resolve` has set it
        return who.peers[self.student]

    # Reading -----------------------------------------------------------------------------------------------------
    def broadcast(self, server: Participant, card: Card) -> Items:
        trained = card.reading and "student" in server.state
        return {STUDENT: floats(server.models[self.of(server).arch.id])} if trained else {}

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        yield from super().deploy(client, got)
        if STUDENT in got:
            client.arch[STUDENT], client.models[STUDENT] = self.of(client).arch, got[STUDENT]

    def used(self, client: Participant) -> tuple[str, Any]:
        return (
            (STUDENT, self.of(client).preprocess)
            if STUDENT in client.models
            else super().used(client)
        )

    def server_slot(self, server: Participant) -> str | None:
        slot = self.of(server).arch.id
        mine = [k for k in server.peers.kinds if k.arch.id == slot]
        own = (
            any(k.settings.preprocess.normalize == "own" for k in mine)
            and sum(k.count for k in mine) > 1
        )
        one = not own and len({server.peers[k.first].preprocess for k in mine}) == 1
        # else nobody knows through which view
        return slot if "student" in server.state and one else None


def view_of(card: Card) -> View:
    """How a client's model takes examples."""
    return card.arch.input_shape, card.preprocess.mean, card.preprocess.std


# FedGen: a generator of features, made at the server from the clients' heads, goes with the
# averaged model.


@algorithm("fedgen")
class FedGen(CommonHead, FedAvg):
    """FedAvg within each architecture, and a generator G(y, ε) of features from which clients learn beside their own rows
    (Zhu et al. 2021, Algorithm 1).

    The server trains G to make what the clients' heads take for class y, each head weighted by its client's share of that
    class. Classes are drawn by their frequency among the round's clients.

    Heads of all architectures teach the one generator. A client that does not release its label counts speaks as if its
    rows were spread evenly; one that keeps its head does not teach. G: linear, BatchNorm, ReLU, linear. The authors' code
    takes weight 10 and latent_weight 10, both with decay 0.98.
    """

    features_leave = False  # G makes its own
    uploads = {
        "model": ItemSpec("params", use="each"),
        "counts": ItemSpec("counts", use="each", private=True, share="statistics"),
    }
    tasks = ("multiclass",)

    weight: NonNegativeFloat = Field(
        1.0, description="α: weight of the loss on drawn features, at the client"
    )
    latent_weight: NonNegativeFloat = Field(
        0.0,
        description="β: weight of KL from the head's word on features drawn for the batch's own classes",
    )
    decay: float = Field(1.0, gt=0, le=1, description="factor on both weights from round to round")
    diversity: NonNegativeFloat = Field(
        1.0, description="η: weight of the diversity term, at the server"
    )
    generator_steps: PositiveInt = Field(50, description="steps a round of the generator")
    generator_lr: PositiveFloat = Field(3e-4, description="learning rate of Adam for the generator")
    generator_hidden: PositiveInt = Field(256, description="units in the generator")
    generator_batch_size: PositiveInt = Field(
        32, ge=2, description="features drawn a step, at server and clients"
    )
    noise_dim: PositiveInt = Field(
        32, description="width of the generator's noise ε, standard normal"
    )

    def generator(self, classes: int) -> Architecture:
        """From class and noise to features."""
        options = {"hidden": [self.generator_hidden], "norm": "batch"}
        return Architecture.of(
            "mlp", self.feature_dim or 1, (classes + self.noise_dim,), options=options
        )

    def start(self, server: Participant) -> None:
        server.arch[GENERATOR] = self.generator(server.task.outputs)
        server.models[GENERATOR] = server.arch[GENERATOR].initial(server.clock.seed)

    def broadcast(self, server: Participant, card: Card) -> Items:
        items = super().broadcast(server, card)
        if "labels" in server.state and not card.reading:
            items |= {GENERATOR: floats(server.models[GENERATOR]), "labels": server.state["labels"]}
        return items

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        if GENERATOR in got:
            arch = client.arch[GENERATOR] = self.generator(client.task.outputs)
            client.models[GENERATOR] = {**arch.initial(client.clock.seed), **got[GENERATOR]}
            yield self.with_generator(client, got["labels"])
            del client.models[GENERATOR]  # it comes anew
        else:
            yield self.fit(client)
        items = self.share(client)
        if items and self.gives(client, "statistics"):
            items["counts"] = Item(client.counts, kind="counts")
        return items

    def with_generator(self, client: Participant, labels: Tensor) -> Fit:
        """Local training with drawn features beside each batch."""
        fade = self.decay**client.clock.round
        objective = FromGenerator(
            client.task.kind,
            weight=self.weight * fade,
            latent_weight=self.latent_weight * fade,
            generator=GENERATOR,
        )
        beside = {"fake": Draws(self.drawn(labels), self.generator_batch_size)}
        if self.latent_weight:
            size = client.settings.batch_size + 1  # a last batch of one joins the one before
            beside["noise"] = Draws(
                lambda g, size: {"x": torch.randn(size, self.noise_dim, generator=g)}, size
            )
        given = {"one_hot": torch.eye(client.task.outputs)}
        return self.fit(client, objective, given=given, frozen=(GENERATOR,), beside=beside)

    def drawn(self, labels: Tensor) -> Callable[[torch.Generator, int], Columns]:
        """Draws of classes with these frequencies `[C]`, one-hot beside noise."""
        one_hot = torch.eye(len(labels))

        def draw(generator: torch.Generator, size: int) -> Columns:
            y = torch.multinomial(labels, size, replacement=True, generator=generator)
            noise = torch.randn(size, self.noise_dim, generator=generator)
            return {"x": torch.cat([one_hot[y], noise], 1), "y": y}

        return draw

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        teachers = [u for u in uploads.having("model") if "head.weight" in u.payload["model"]]
        if not teachers:
            return
        classes = server.task.outputs
        evenly = [torch.full((classes,), u.card.n / classes) for u in teachers]
        counts = torch.stack(
            [u.payload.get("counts", e) for u, e in zip(teachers, evenly, strict=True)]
        )
        labels = server.state["labels"] = counts.sum(0)
        heads = {
            n: torch.stack([u.payload["model"][f"head.{n}"] for u in teachers])
            for n in ("weight", "bias")
        }
        yield Fit(
            {GENERATOR: None},
            Generate(self.diversity, GENERATOR),
            Draws(self.drawn(labels), self.generator_batch_size),
            steps=self.generator_steps,
            optimizer=OptimizerConfig(name="adam", lr=self.generator_lr),
            given={
                "heads": heads,
                "say": counts / torch.where(labels > 0, labels, torch.ones_like(labels)),
            },
            keep=GENERATOR,
            label=GENERATOR,
        )

    def server_slot(self, server: Participant) -> str | None:
        groups = {slot: tensors for slot, tensors in server.models.items() if slot != GENERATOR}
        whole = any(self.part(kind.settings) is None for kind in server.peers.kinds)
        return next(iter(groups)) if whole and len(groups) == 1 else None
