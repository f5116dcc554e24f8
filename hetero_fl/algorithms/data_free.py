"""Data-free distillation with generators: DENSE and FedGen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.averaging import FedAvg
from hetero_fl.algorithms.base import STUDENT, Algorithm, Needs, register_algorithm
from hetero_fl.algorithms.prediction import adjust_to_labels
from hetero_fl.algorithms.prototypes import CommonHead, require_sent_state
from hetero_fl.algorithms.round_parts import (
    Items,
    SharedPart,
    add_model,
    local_fit,
    may_share,
    shared_part,
)
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.generative_objectives import (
    GeneratedFeatures,
    Generator,
    GeneratorObjective,
    Synthesis,
    View,
    preprocess_generated,
)
from hetero_fl.core.images import is_convertible
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import TeacherDistillation
from hetero_fl.core.participant import (
    MAX_SEARCHED_CLIENTS,
    ClientDirectory,
    ClientInfo,
    Participant,
    floating_tensors,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, SampledBatches, TensorRows
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.seeding import keyed_generator

GENERATOR = "generator"


@register_algorithm("dense")
class Dense(Algorithm):
    """Upload every model once after local training and distill all models on generated examples.

    Clients train alone and upload their parameters in the last round. The server then uses the
    uploaded models as teachers and alternates between two steps (Zhang et al. 2022, Algorithm 1).
    First, a generator minimizes CE + λ₁·BN − λ₂·KL on one batch, where BN is the distance of the
    batch from the BatchNorm statistics of the teachers, and KL is the divergence between teachers
    and student on the examples for which they predict different classes. Then, a student learns the
    mean logits of the teachers on all batches generated so far.

    The student has the architecture of one client. After the last round, all clients use the
    student. Before the last round, each client uses its own model, as with `local`. A run that
    stops early trains no student.

    Use this method where clients can be reached only once and there is no proxy set. The method is
    weak where clients have different classes or models without BatchNorm.

    Deviations from the authors' code: defaults are smaller, one generator is used for all batches,
    images are not augmented, and BN is averaged over the teachers.

    References:
        Zhang et al., "DENSE: Data-Free One-Shot Federated Learning", NeurIPS 2022.
            https://arxiv.org/abs/2112.12371

    Example:
        >>> from hetero_fl.algorithms import Dense
        >>> method = Dense(student="site_1", synthesis_epochs=200)
        >>> method.needs.one_upload, method.uploads["model"].use
        (True, 'each')
    """

    title = "DENSE"
    shared = SharedPart(received=())
    uploads = {"model": ItemSpec("params", use="each")}
    downloads = {STUDENT: ItemSpec("params", description="the server's student, for evaluation")}
    needs = Needs(
        tasks=("multiclass",),
        one_upload=True,
        shared_model=True,
        unused_options=("fine_tune_epochs",),
    )
    evaluated_when = (
        "own model until the last round, then the server's student, through its own preprocessing"
    )

    student: str | None = Field(
        None,
        description="client whose architecture and preprocessing the student has; `null`: the "
        "first client with the most frequent architecture",
    )
    synthesis_epochs: PositiveInt = Field(
        15, description="alternations between generator and student; 200 in the paper"
    )
    generator_steps: PositiveInt = Field(
        30, description="steps of the generator on one batch of noise and labels"
    )
    student_steps: PositiveInt = Field(
        50, description="steps of the student per alternation, on all batches so far"
    )
    synthetic_batch: int = Field(64, ge=2, description="batch size of generated examples")
    noise: PositiveInt = Field(64, description="width of the generator's input")
    generator_lr: PositiveFloat = Field(1e-3, description="learning rate of Adam for the generator")
    statistics_weight: NonNegativeFloat = Field(
        1.0, description="weight λ₁ of the loss on BatchNorm statistics"
    )
    adversarial_weight: NonNegativeFloat = Field(
        0.5, description="weight λ₂ of the adversarial loss"
    )
    temperature: PositiveFloat = Field(
        4.0, description="temperature T of the softmax in the student's distillation"
    )

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        if self.student is not None and self.student not in clients:
            suggestion = suggest_or_list(self.student, islice(clients, MAX_SEARCHED_CLIENTS))
            raise UserError(f"algorithm.student: unknown client '{self.student}'{suggestion}")
        student = self.student or clients.main_profile.first
        arch = clients[student].arch
        check_student(clients, student)
        note = (
            f"dense: the student is a {arch.name}, as at {student}; clients upload their models in "
            "the last round"
        )
        return self.model_copy(update={"student": student}), [note]

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield local_fit(client)
        is_last = client.round_context.round_idx == client.round_context.num_rounds - 1
        shares_all = shared_part(self, client.settings) is None
        return {"model": floating_tensors(client.models["model"])} if is_last and shares_all else {}

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        sent = uploads.containing("model")
        if not sent:
            return
        reference = self.reference_client(server)
        shape = reference.arch.input_shape
        teachers = {f"teacher {u.client}": preprocessing_of(u.client_info) for u in sent}
        for slot, u in zip(teachers, sent, strict=True):
            tensors = {**server.models[u.group], **u.payload["model"]}
            add_model(server, slot, u.client_info.arch, tensors)
        add_model(server, STUDENT, reference.arch, server.models[reference.arch.spec_id])
        add_model(server, GENERATOR, generator_spec(shape, self.noise))
        synthesis = Synthesis(
            shape,
            tuple(teachers.items()),
            (STUDENT, preprocessing_of(reference)),
            self.statistics_weight,
            self.adversarial_weight,
        )
        examples = []
        logits = []
        for _ in range(self.synthesis_epochs):
            noise = self.sample_noise(server)
            yield self.train_generator(synthesis, noise, (*teachers, STUDENT))
            x = (yield Predict(GENERATOR, TensorRows(noise))).unflatten(1, shape)
            predictions = yield [
                Predict(slot, TensorRows({"x": preprocess_generated(x, preprocess)}))
                for slot, preprocess in teachers.items()
            ]
            examples.append(preprocess_generated(x, preprocessing_of(reference)))
            logits.append(torch.stack(predictions).mean(0))
            yield self.train_student(server, torch.cat(examples), torch.cat(logits))
        server.models[reference.arch.spec_id] = server.models[STUDENT]
        for slot in (*teachers, STUDENT, GENERATOR):
            del server.arch[slot], server.models[slot]
        server.state = {"student": self.student}

    def reference_client(self, participant: Participant) -> ClientInfo:
        """Return the client whose architecture and preprocessing the student has."""
        assert self.student is not None, "set by configure"
        return participant.peers[self.student]

    def sample_noise(self, server: Participant) -> Tensors:
        """Sample a batch of noise `x`, shape `[B, noise]`, and labels `y`, shape `[B]`."""
        generator = keyed_generator(*server.stream("noise"))
        x = torch.randn(self.synthetic_batch, self.noise, generator=generator)
        y = torch.randint(server.task.outputs, (self.synthetic_batch,), generator=generator)
        return {"x": x, "y": y}

    def train_generator(self, synthesis: Synthesis, noise: Tensors, frozen: tuple[str, ...]) -> Fit:
        """Create the `Fit` step that trains the generator on one batch of noise.

        Args:
            synthesis: Objective of the generator.
            noise: The batch of noise and labels.
            frozen: Slots of the models that the objective uses without training them.
        """
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
        """Create the `Fit` step that trains the student on generated examples.

        Args:
            server: The server.
            x: All examples generated so far, shape `[N, *shape]`.
            teacher: Mean logits of the teachers, shape `[N, C]`.
        """
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

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        if recipient.purpose == "train" or "student" not in server.state:
            return {}
        return {
            STUDENT: floating_tensors(server.models[self.reference_client(server).arch.spec_id])
        }

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if STUDENT in received:
            add_model(client, STUDENT, self.reference_client(client).arch, received[STUDENT])

    @override
    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if STUDENT not in client.models:
            return (yield from super().predict(client, rows, personal))
        preprocess = self.reference_client(client).preprocess
        logits = yield Predict(STUDENT, replace(rows, preprocess=preprocess))
        return adjust_to_labels(self, client, logits, personal)

    @override
    def server_model(self, server: Participant) -> str | None:
        slot = self.reference_client(server).arch.spec_id
        profiles = [p for p in server.peers.profiles if p.arch.spec_id == slot]
        normalizes_own_rows = (
            any(p.settings.preprocess.normalize == "own" for p in profiles)
            and sum(p.count for p in profiles) > 1
        )
        # The student is usable at the server only if its preprocessing is unambiguous.
        has_one_preprocess = (
            not normalizes_own_rows
            and len({server.peers[p.first].preprocess for p in profiles}) == 1
        )
        return slot if "student" in server.state and has_one_preprocess else None


def check_student(clients: ClientDirectory, student: str) -> None:
    """Check that generated examples of the student's shape suit the models of all clients."""
    arch = clients[student].arch
    if arch.vocabulary:
        raise UserError(
            "algorithm.name: dense cannot generate tokens; choose another method for text"
        )
    for profile in clients.profiles:
        require_sent_state(f"clients: '{profile.first}': model", profile.arch)
        own = profile.arch.input_shape
        if not is_convertible(arch.input_shape, own):
            raise UserError(
                f"algorithm.student: expected a client whose example shape can be converted to "
                f"that of {profile.first}, {list(own)}, got {student} with {list(arch.input_shape)}"
            )


def generator_spec(shape: tuple[int, ...], noise: int) -> ModelSpec:
    """Return the specification of a generator that maps noise to examples of a shape."""
    name = f"python:{Generator.__module__}:{Generator.__name__}"
    return ModelSpec.from_config(name, math.prod(shape), (noise,), options={"shape": shape})


def preprocessing_of(client_info: ClientInfo) -> View:
    """Return a client's input shape, and the mean and standard deviation that normalize inputs."""
    return client_info.arch.input_shape, client_info.preprocess.mean, client_info.preprocess.std


@register_algorithm("fedgen")
class FedGen(CommonHead, FedAvg):
    """Average parameters, and train clients on additional features from a generator at the server.

    The method is FedAvg within each architecture, extended by a generator G(y, ε) that maps a class
    y and noise ε to features. Clients train on their own rows and additionally train their heads on
    generated features (Zhu et al. 2021, Algorithm 1). The server trains G so that the clients'
    heads classify a generated feature as class y. Each head is weighted by the client's share of
    all examples of this class. The server sends the model, the generator and the label counts of
    the round.

    All architectures share one generator, which consists of a linear layer, BatchNorm, ReLU and a
    second linear layer. If a client does not share label counts, the client's classes are assumed
    to be balanced. If a client does not share the head, this head does not contribute to the
    training of G.

    Use this method under label skew without a proxy set. The authors' code sets `weight` and
    `latent_weight` to 10, with a `decay` of 0.98.

    References:
        Zhu et al., "Data-Free Knowledge Distillation for Heterogeneous Federated Learning", ICML
            2021. https://arxiv.org/abs/2105.10056

    Example:
        >>> from hetero_fl.algorithms import FedGen
        >>> sorted(FedGen(weight=10.0, decay=0.98).uploads)
        ['counts', 'model']
    """

    title = "FedGen"
    uploads = {
        "model": ItemSpec("params", use="each"),
        "counts": ItemSpec("counts", use="each", private=True, share="statistics"),
    }
    downloads = {
        "model": ItemSpec("params"),
        GENERATOR: ItemSpec("params", description="parameters and buffers of the generator"),
        "labels": ItemSpec("rows", description="label counts of the last round's clients, `[C]`"),
    }

    weight: NonNegativeFloat = Field(
        1.0, description="weight α of the loss on generated features, at the client"
    )
    latent_weight: NonNegativeFloat = Field(
        0.0,
        description="weight β of the KL divergence to the head's predictions on features generated "
        "for the classes of the batch",
    )
    decay: float = Field(1.0, gt=0, le=1, description="factor on both weights per round")
    diversity: NonNegativeFloat = Field(
        1.0, description="weight η of the diversity loss, at the server"
    )
    generator_steps: PositiveInt = Field(50, description="steps per round of the generator")
    generator_lr: PositiveFloat = Field(3e-4, description="learning rate of Adam for the generator")
    generator_hidden: PositiveInt = Field(256, description="hidden units of the generator")
    generator_batch_size: PositiveInt = Field(
        32, ge=2, description="generated features per step, at server and clients"
    )
    noise_dim: PositiveInt = Field(
        32, description="width of the generator's standard normal noise ε"
    )

    def generator(self, classes: int) -> ModelSpec:
        """Return the specification of the generator.

        The generator maps a one-hot class and noise to features.
        """
        options = {"hidden": [self.generator_hidden], "norm": "batch"}
        return ModelSpec.from_config(
            "mlp", self.feature_dim or 1, (classes + self.noise_dim,), options=options
        )

    @override
    def setup(self, server: Participant) -> None:
        add_model(server, GENERATOR, self.generator(server.task.outputs))

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        items = super().broadcast(server, recipient)
        if "labels" in server.state and recipient.purpose == "train":
            items |= {
                GENERATOR: floating_tensors(server.models[GENERATOR]),
                "labels": server.state["labels"],
            }
        return items

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        items: Items = yield from super().train(client, received)
        if items and may_share(client, "statistics"):
            items["counts"] = Item(client.counts, kind="counts")
        return items

    @override
    def local_training(self, client: Participant, received: Payload) -> Plan[None]:
        if GENERATOR not in received:
            yield from super().local_training(client, received)
            return
        add_model(client, GENERATOR, self.generator(client.task.outputs))
        client.load(GENERATOR, received[GENERATOR])
        fade = self.decay**client.round_context.round_idx
        objective = GeneratedFeatures(
            client.task.kind,
            weight=self.weight * fade,
            latent_weight=self.latent_weight * fade,
            generator=GENERATOR,
        )
        draw = self.sample_inputs(received["labels"])
        batches = {"fake": SampledBatches(draw, self.generator_batch_size)}
        if self.latent_weight:
            # A last batch with a single example is merged into the previous one, so a batch may
            # have one more example.
            size = client.settings.batch_size + 1
            batches["noise"] = SampledBatches(
                lambda g, size: {"x": torch.randn(size, self.noise_dim, generator=g)}, size
            )
        yield local_fit(
            client,
            objective,
            context={"one_hot": torch.eye(client.task.outputs)},
            frozen=(GENERATOR,),
            extra_batches=batches,
        )
        # The next broadcast contains a new generator.
        del client.models[GENERATOR]

    def sample_inputs(self, labels: Tensor) -> Callable[[torch.Generator, int], Tensors]:
        """Return a function that samples inputs of the generator: one-hot classes and noise.

        Args:
            labels: Relative frequencies of the sampled classes, shape `[C]`.
        """
        # The random generator is on the CPU, so the frequencies must be, too.
        labels = labels.cpu()
        one_hot = torch.eye(len(labels))

        def sample(generator: torch.Generator, size: int) -> Tensors:
            y = torch.multinomial(labels, size, replacement=True, generator=generator)
            noise = torch.randn(size, self.noise_dim, generator=generator)
            return {"x": torch.cat([one_hot[y], noise], 1), "y": y}

        return sample

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        teachers = [u for u in uploads.containing("model") if "head.weight" in u.payload["model"]]
        if not teachers:
            return
        classes = server.task.outputs
        balanced = [
            u.payload["model"]["head.weight"].new_full((classes,), u.client_info.num_rows / classes)
            for u in teachers
        ]
        counts = torch.stack(
            [u.payload.get("counts", b) for u, b in zip(teachers, balanced, strict=True)]
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
                "client_weights": counts / torch.where(labels > 0, labels, torch.ones_like(labels)),
            },
            keep=GENERATOR,
            label=GENERATOR,
        )
