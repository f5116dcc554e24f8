"""Data-free distillation with generators: DENSE and FedGen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import (
    STUDENT,
    Algorithm,
    Items,
    Needs,
    SharedPart,
    may_share,
    register_algorithm,
    shared_part,
    upload_model,
)
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.local_training import add_log_prior, local_fit
from hetero_fl.algorithms.prototypes import CommonHead
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.generative_objectives import (
    GeneratedFeatures,
    Generator,
    GeneratorObjective,
    Synthesis,
    View,
    preprocess_generated,
)
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import TeacherDistillation, is_convertible
from hetero_fl.core.participant import (
    LOOKED,
    ClientDirectory,
    ClientInfo,
    Columns,
    Participant,
    floating_tensors,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, SampledBatches, TensorRows
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.seeding import keyed_generator

GENERATOR = "generator"


class DataFreeDistillation(Algorithm):
    """Base of methods whose server alternates between a generator of examples and a student."""

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

    def generator(self, shape: tuple[int, ...]) -> ModelSpec:
        """Return the generator: from noise to examples of this shape."""
        name = f"python:{Generator.__module__}:{Generator.__name__}"
        options = {"shape": shape}
        return ModelSpec.from_config(name, math.prod(shape), (self.noise,), options=options)

    def sample_noise(self, server: Participant) -> Columns:
        """Draw a batch of noise and labels."""
        draws = keyed_generator(*server.stream("noise"))
        x = torch.randn(self.synthetic_batch, self.noise, generator=draws)
        return {
            "x": x,
            "y": torch.randint(server.task.outputs, (self.synthetic_batch,), generator=draws),
        }

    def train_generator(self, synthesis: Synthesis, noise: Columns, frozen: tuple[str, ...]) -> Fit:
        """Create the step that trains the generator on one batch of noise."""
        return Fit(
            {GENERATOR: None},
            synthesis,
            TensorRows(noise),
            steps=self.generator_steps,
            batch_size=self.synthetic_batch,
            optimizer=OptimizerConfig(lr=self.generator_lr),
            frozen=frozen,
            keep=GENERATOR,
            label=GENERATOR,
        )

    def train_student(self, server: Participant, x: Tensor, teacher: Tensor) -> Fit:
        """Create the step that trains the student on all examples so far."""
        return Fit(
            {STUDENT: None},
            TeacherDistillation(server.task.kind, self.temperature, slot=STUDENT),
            TensorRows({"x": x, "teacher": teacher}),
            steps=self.student_steps,
            batch_size=self.synthetic_batch,
            optimizer=server.optimizer,
            keep=STUDENT,
            label=STUDENT,
        )


@register_algorithm("dense")
class Dense(DataFreeDistillation):
    """Upload every client's model once, at the end, and distill all of them into a student on generated examples.

    Clients train alone and upload θ in the last round. The server then alternates: a generator learns a batch by
    CE + λ₁·BN statistics − λ₂·KL where student and teachers differ; a student learns the teachers' mean logits on all batches
    so far (Zhang et al. 2022, Algorithm 1).

    Teachers may differ in architecture; the student has that of one client, and all clients then use it. Before the last round
    each client uses its own model, as under Local; a run that stops early never gets there.
    """

    title = "DENSE"
    shared = SharedPart(received=())
    uploads = {"model": ItemSpec("params", use="each")}
    needs = Needs(tasks=("multiclass",), one_upload=True)
    evaluated_when = (
        "own model until the last round, then the server's student, through its own preprocessing"
    )

    student: str | None = Field(
        None,
        description="client whose architecture and view the student takes; none: the first of the most frequent",
    )

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        if self.student is not None and self.student not in clients:
            raise UserError(
                f"algorithm.student: found '{self.student}'{suggest_or_list(self.student, islice(clients, LOOKED))}"
            )
        student = self.student or clients.main_profile.first
        arch = clients[student].arch
        if arch.vocabulary:
            raise UserError(
                "algorithm.name: dense makes examples by their gradient, and the examples here are tokens"
            )
        for kind in clients.profiles:
            own = kind.arch.input_shape
            shape = arch.input_shape
            if not is_convertible(shape, own):
                raise UserError(
                    f"algorithm.student: examples of {student} are {list(shape)}, but of {kind.first} {list(own)}"
                )
        note = f"dense: one student for all, a {arch.name} as {student} has it; models travel once, at the end"
        return self.model_copy(update={"student": student}), [note]

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield local_fit(client)
        is_last = client.round_context.round_idx == client.round_context.num_rounds - 1
        is_whole = shared_part(self, client.settings) is None
        return {"model": floating_tensors(client.models["model"])} if is_last and is_whole else {}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        sent = uploads.having("model")
        if not sent:
            return
        reference = self.reference_client(server)
        shape = reference.arch.input_shape
        slots = [f"teacher {u.client}" for u in sent]
        for slot, u in zip(slots, sent, strict=True):
            server.arch[slot] = u.client_info.arch
            server.models[slot] = {**server.models[u.group], **u.payload["model"]}
        server.arch[STUDENT] = reference.arch
        server.models[STUDENT] = server.models[reference.arch.spec_id]
        server.arch[GENERATOR] = self.generator(shape)
        server.models[GENERATOR] = server.arch[GENERATOR].initial_tensors(server.round_context.seed)
        teachers = tuple(
            zip(slots, map(preprocessing_of, (u.client_info for u in sent)), strict=True)
        )
        synthesis = Synthesis(
            shape,
            teachers,
            (STUDENT, preprocessing_of(reference)),
            self.statistics_weight,
            self.adversarial_weight,
        )
        examples = []
        logits = []
        for _ in range(self.synthesis_epochs):
            noise = self.sample_noise(server)
            yield self.train_generator(synthesis, noise, (*slots, STUDENT))
            x = (yield Predict(GENERATOR, TensorRows(noise))).unflatten(1, shape)
            predictions = yield [
                Predict(slot, TensorRows({"x": preprocess_generated(x, view)}))
                for slot, view in teachers
            ]
            examples.append(preprocess_generated(x, preprocessing_of(reference)))
            logits.append(torch.stack(predictions).mean(0))
            yield self.train_student(server, torch.cat(examples), torch.cat(logits))
        server.models[reference.arch.spec_id] = server.models[STUDENT]
        for slot in (*slots, STUDENT, GENERATOR):
            del server.arch[slot], server.models[slot]
        server.state = {"student": self.student}

    def reference_client(self, participant: Participant) -> ClientInfo:
        """Return the client whose architecture and view the student has."""
        assert self.student is not None  # `configure` has set it
        return participant.peers[self.student]

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        if recipient.purpose == "train" or "student" not in server.state:
            return {}
        return {
            STUDENT: floating_tensors(server.models[self.reference_client(server).arch.spec_id])
        }

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if STUDENT in received:
            client.arch[STUDENT] = self.reference_client(client).arch
            client.models[STUDENT] = received[STUDENT]

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if STUDENT not in client.models:
            return (yield from super().predict(client, rows, personal))
        view = self.reference_client(client).preprocess
        logits = yield Predict(STUDENT, replace(rows, preprocess=view))
        return add_log_prior(client, logits) if personal else logits

    def server_model(self, server: Participant) -> str | None:
        slot = self.reference_client(server).arch.spec_id
        mine = [k for k in server.peers.profiles if k.arch.spec_id == slot]
        own = (
            any(k.settings.preprocess.normalize == "own" for k in mine)
            and sum(k.count for k in mine) > 1
        )
        one = not own and len({server.peers[k.first].preprocess for k in mine}) == 1
        # else it is unknown through which view
        return slot if "student" in server.state and one else None


def preprocessing_of(client_info: ClientInfo) -> View:
    """Return how a client's model takes examples."""
    return client_info.arch.input_shape, client_info.preprocess.mean, client_info.preprocess.std


@register_algorithm("fedgen")
class FedGen(CommonHead, FedAvg):
    """Average parameters, and train a generator of features at the server from which clients learn as well.

    FedAvg within each architecture, and a generator G(y, ε) of features that clients draw in addition to their own rows
    (Zhu et al. 2021, Algorithm 1). The server trains G to make what the clients' heads take for class y, each head weighted by its client's share of that
    class. Classes are drawn by their frequency among the round's clients.

    Heads of all architectures teach the one generator. A client that does not share its label counts counts as if its rows
    were spread evenly; one that keeps its head does not teach. G: linear, BatchNorm, ReLU, linear. The authors' code
    takes weight 10 and latent_weight 10, both with decay 0.98.
    """

    title = "FedGen"
    features_leave = False  # G makes its own
    uploads = {
        "model": ItemSpec("params", use="each"),
        "counts": ItemSpec("counts", use="each", private=True, share="statistics"),
    }

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

    def generator(self, classes: int) -> ModelSpec:
        """Return the generator: from class and noise to features."""
        options = {"hidden": [self.generator_hidden], "norm": "batch"}
        return ModelSpec.from_config(
            "mlp", self.feature_dim or 1, (classes + self.noise_dim,), options=options
        )

    def setup(self, server: Participant) -> None:
        server.arch[GENERATOR] = self.generator(server.task.outputs)
        server.models[GENERATOR] = server.arch[GENERATOR].initial_tensors(server.round_context.seed)

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        items = super().broadcast(server, recipient)
        if "labels" in server.state and recipient.purpose == "train":
            items |= {
                GENERATOR: floating_tensors(server.models[GENERATOR]),
                "labels": server.state["labels"],
            }
        return items

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if GENERATOR in received:
            arch = client.arch[GENERATOR] = self.generator(client.task.outputs)
            client.models[GENERATOR] = {
                **arch.initial_tensors(client.round_context.seed),
                **received[GENERATOR],
            }
            yield self.fit_with_generator(client, received["labels"])
            del client.models[GENERATOR]  # the next broadcast has another
        else:
            yield local_fit(client)
        items = upload_model(self, client, self.weight_of(client))
        if items and may_share(client, "statistics"):
            items["counts"] = Item(client.counts, kind="counts")
        return items

    def fit_with_generator(self, client: Participant, labels: Tensor) -> Fit:
        """Create the step of local training with drawn features next to each batch."""
        fade = self.decay**client.round_context.round_idx
        objective = GeneratedFeatures(
            client.task.kind,
            weight=self.weight * fade,
            latent_weight=self.latent_weight * fade,
            generator=GENERATOR,
        )
        batches = {"fake": SampledBatches(self.sample_inputs(labels), self.generator_batch_size)}
        if self.latent_weight:
            size = client.settings.batch_size + 1  # a last batch of one joins the one before
            batches["noise"] = SampledBatches(
                lambda g, size: {"x": torch.randn(size, self.noise_dim, generator=g)}, size
            )
        context = {"one_hot": torch.eye(client.task.outputs)}
        return local_fit(
            client, objective, context=context, frozen=(GENERATOR,), extra_batches=batches
        )

    def sample_inputs(self, labels: Tensor) -> Callable[[torch.Generator, int], Columns]:
        """Return a sampler of classes with these frequencies `[C]`, one-hot next to noise."""
        labels = labels.cpu()  # as the generators that draw
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
        evenly = [
            u.payload["model"]["head.weight"].new_full((classes,), u.client_info.num_rows / classes)
            for u in teachers
        ]
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
            GeneratorObjective(self.diversity, GENERATOR),
            SampledBatches(self.sample_inputs(labels), self.generator_batch_size),
            steps=self.generator_steps,
            optimizer=OptimizerConfig(name="adam", lr=self.generator_lr),
            context={
                "heads": heads,
                "say": counts / torch.where(labels > 0, labels, torch.ones_like(labels)),
            },
            keep=GENERATOR,
            label=GENERATOR,
        )

    def server_model(self, server: Participant) -> str | None:
        groups = [slot for slot in server.models if slot != GENERATOR]
        is_whole = any(
            shared_part(self, profile.settings) is None for profile in server.peers.profiles
        )
        return groups[0] if is_whole and len(groups) == 1 else None
