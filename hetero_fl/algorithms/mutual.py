"""A small shared model next to each client's own: FML, FedKD, FedMRL."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Upload, Uploads
from hetero_fl.algorithms.base import (
    Algorithm,
    Items,
    Needs,
    SharedPart,
    download_part,
    register_algorithm,
    shared_part,
    upload_model,
    upload_part,
)
from hetero_fl.algorithms.local_training import add_log_prior, local_fit
from hetero_fl.algorithms.prototypes import require_linear_head
from hetero_fl.communication.compression import compress_low_rank, reconstruct_low_rank
from hetero_fl.config.clients import ModelConfig, expand_model_name
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import (
    AdaptiveMutual,
    MutualDistillation,
    NestedRepresentations,
    is_convertible,
    to_shape,
)
from hetero_fl.core.participant import (
    ClientDirectory,
    ClientInfo,
    Part,
    Participant,
    floating_tensors,
    select_part,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan, Predict, Rows, TensorRows
from hetero_fl.core.task import Task
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_key

MENTEE = "mentee"
SMALL = {  # by the number of dimensions; 0: tokens
    0: ModelConfig(name="text_transformer"),
    1: ModelConfig(name="mlp", hidden=[64]),
    2: ModelConfig(name="transformer"),
    3: ModelConfig(name="cnn_gn_small"),
}


class MenteeTraining(Algorithm):
    """Base of methods whose clients train their own model together with the mentee, a small model that travels.

    The mentee has one architecture and sees what its client sees, augmentation included; where clients' views differ in shape,
    images are resized to the mentee's, and their channels averaged or repeated. A client uses its own model on local tests and
    the mentee on the global test.
    """

    evaluated_when = (
        "own model on local tests, the mentee on the global test, as deployed with the next broadcast (the models saved are "
        "clients' own)"
    )
    shared = SharedPart(slot=MENTEE)
    needs = Needs(also=("small common model",))
    # the part of each slot that local training moves
    trained: ClassVar[Mapping[str, Part]] = {"model": None, MENTEE: None}

    mentee: Annotated[ModelConfig, BeforeValidator(expand_model_name)] | None = Field(
        None,
        description="architecture of the mentee; none: cnn_gn_small for images, transformer for series, mlp (64) for tables, "
        "text_transformer for tokens",
    )
    mentee_input: list[PositiveInt] | None = Field(
        None,
        description="shape in which it sees examples, channels first; none: the clients' most frequent, the smallest of equals",
    )

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        shapes = Counter[tuple[int, ...]]()
        for kind in clients.profiles:
            shapes[kind.arch.input_shape] += kind.count
        shape = tuple(self.mentee_input or min(shapes, key=lambda s: (-shapes[s], math.prod(s), s)))
        for kind in sorted(clients.profiles, key=lambda kind: natural_key(kind.first)):
            own = kind.arch.input_shape
            if not is_convertible(own, shape):
                raise UserError(
                    f"algorithm.mentee_input: found {list(shape)}, but examples of {kind.first} are {list(own)}"
                )
        mentee = self.mentee or SMALL[0 if clients.profiles[0].arch.vocabulary else len(shape)]
        notes = (
            []
            if self.mentee
            else [f"algorithm.mentee is {mentee.name}, for inputs {'x'.join(map(str, shape))}"]
        )
        return self.model_copy(update={"mentee": mentee, "mentee_input": list(shape)}), notes

    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        return {"model": client.arch, MENTEE: self.mentee_model(client.arch)}

    def mentee_model(self, own: ModelSpec) -> ModelSpec:
        """Return the mentee's architecture; its outputs and vocabulary are those of any client's own model."""
        assert self.mentee is not None and self.mentee_input is not None  # `configure` has set them
        m = self.mentee
        about = (m.feature_dim, m.options, m.pretrained, own.vocabulary)
        return ModelSpec.from_config(m.name, own.outputs, tuple(self.mentee_input), *about)

    def setup(self, server: Participant) -> None:
        server.arch[MENTEE] = self.mentee_model(server.peers.profiles[0].arch)
        server.models[MENTEE] = server.arch[MENTEE].initial_tensors(server.round_context.seed)

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        part = download_part(self, recipient.settings, server.round_context.round_idx)
        if part == ():
            return {}
        return {MENTEE: floating_tensors(select_part(server.models[MENTEE], part))}

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        shape = client.arch[MENTEE].input_shape
        objective = replace(self.objective(client.task), shape=shape)
        yield local_fit(client, objective, train=self.trained)
        return self.upload_mentee(client)

    def objective(self, task: Task) -> MutualDistillation:
        """Return the loss of own model and mentee."""
        raise TypeError(f"{type(self).__name__} trains no mentee")

    def upload_mentee(self, client: Participant) -> Items:
        """Return the upload of the mentee."""
        return upload_model(self, client)

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        server.models[MENTEE] = {**server.models[MENTEE], **self.mentee_mean(uploads)}
        yield from ()

    @staticmethod
    def mentee_mean(uploads: Uploads) -> Tensors:
        """Return the weighted mean of each of the mentee's tensors over the clients that sent it."""
        return uploads.mean_by_group(MENTEE).get("", {})

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if personal:
            return (yield from super().predict(client, rows, personal))
        seen = to_shape(rows.columns(client)["x"], client.arch[MENTEE].input_shape)
        return (yield Predict(MENTEE, TensorRows({"x": seen})))

    def server_model(self, server: Participant) -> str | None:
        return None  # the mentee is used at the clients, through their preprocessing


@register_algorithm("fml")
class FML(MenteeTraining):
    """Train each client's own model together with a small shared one; each learns from the other's predictions.

    KL goes both ways; the shared model, the mentee, is averaged (Shen et al. 2020, Algorithm 1, there "meme model").
    """

    title = "FML"
    uploads = {MENTEE: ItemSpec("params", across=True)}

    alpha: float = Field(
        0.5, ge=0, le=1, description="weight of the task for the own model, the rest is KL"
    )
    beta: float = Field(
        0.5, ge=0, le=1, description="weight of the task for the mentee, the rest is KL"
    )

    def objective(self, task: Task) -> MutualDistillation:
        return MutualDistillation(task.kind, alpha=self.alpha, beta=self.beta)


HIDDEN = "hidden"  # W: from the mentee's features to the own model's, kept by the client
WHOLE = 2.0  # an energy that no truncation keeps: updates travel as they are


@register_algorithm("fedkd")
class FedKD(MenteeTraining):
    """Distill each client's own model and a small shared one into each other, the more the better both are.

    Updates of the shared model, the mentee, travel as truncated SVDs (Wu et al. 2022, Algorithm 1). The energy that a truncation keeps rises over the rounds. The server's mentee moves by the mean update as it sends it,
    truncated, so that it stays the one its clients hold; a client that missed a round is sent the mentee whole.
    """

    title = "FedKD"
    uploads = {MENTEE: ItemSpec("update", use="each", ranks=True, across=True)}
    downloads = {"change": ItemSpec("update", ranks=True)}
    trained = {"model": None, MENTEE: None, HIDDEN: ("head.weight",)}
    needs = Needs(
        also=("small common model",),
        largest_uploads={"energy_start": WHOLE, "energy_end": WHOLE},
    )

    hidden_weight: NonNegativeFloat = Field(
        1.0, description="weight of the distance between features"
    )
    energy_start: float = Field(
        0.95, gt=0, le=1, description="share of an update's energy kept in the first round"
    )
    energy_end: float = Field(0.98, gt=0, le=1, description="the same in the last round")

    def kept_energy(self, participant: Participant) -> float:
        """Return the share of an update's energy that is kept in this round."""
        done = participant.round_context.round_idx / max(
            1, participant.round_context.num_rounds - 1
        )
        return self.energy_start + (self.energy_end - self.energy_start) * min(1.0, done)

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        method, notes = super().configure(clients)
        return method, [
            *notes,
            "ranks of updates follow from what is learned: `--check` counts all of them whole",
        ]

    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        models = super().models(client)
        sizes = (client.arch.feature_width, (models[MENTEE].feature_width,))
        return {**models, HIDDEN: ModelSpec.from_config("linear", *sizes)}

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        part = download_part(self, recipient.settings, server.round_context.round_idx)
        state = server.state
        behind = state.get("version", 0) - state.get("held", {}).get(recipient.client_id, -1)
        if part == () or behind == 0:
            return {}
        if behind == 1 and "change" in state:
            return {"change": Item(select_part(state["change"], part), kind="update")}
        return super().broadcast(server, recipient)

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        # W is a matrix
        client.load(HIDDEN, {"head.bias": torch.zeros_like(client.models[HIDDEN]["head.bias"])})
        part = shared_part(self, client.settings)
        mine = floating_tensors(select_part(client.models[MENTEE], part))
        base = received[MENTEE] if MENTEE in received else client.state.get("base", mine)
        if "change" in received:
            base = add_low_rank(base, received["change"])
        if download_part(self, client.settings, client.round_context.round_idx) != ():
            client.load(MENTEE, base)
        client.state["base"] = base

    def objective(self, task: Task) -> MutualDistillation:
        return AdaptiveMutual(task.kind, hidden_weight=self.hidden_weight)

    def upload_mentee(self, client: Participant) -> Items:
        part = upload_part(self, client.settings, client.round_context.round_idx)
        base = select_part(client.state["base"], part)
        update = {n: client.models[MENTEE][n] - t for n, t in base.items()}
        if not update:
            return {}
        factors = compress_low_rank(update, self.kept_energy(client))
        return {MENTEE: Item(factors, float(client.num_rows), "update")}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mentee = server.models[MENTEE]
        version = server.state.get("version", 0)
        updated = [
            u.client
            for u in uploads.each
            if download_part(self, u.client_info.settings, server.round_context.round_idx) != ()
        ]
        server.state["held"] = {**server.state.get("held", {}), **dict.fromkeys(updated, version)}
        restored = (_restore_update(u, mentee) for u in uploads.having(MENTEE))
        specs = {MENTEE: ItemSpec("update", across=True)}
        mean = self.mentee_mean(uploads.with_uploads(restored, specs))
        if mean:
            change = compress_low_rank(mean, self.kept_energy(server))
            server.models[MENTEE] = add_low_rank(mentee, change)
            server.state.update(change=change, version=version + 1)
        yield from ()


def add_low_rank(tensors: Tensors, change: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors with a compressed change added."""
    restored = reconstruct_low_rank(change, tensors)
    return {**tensors, **{n: tensors[n] + d for n, d in restored.items()}}


def _restore_update(upload: Upload, like: dict[str, torch.Tensor]) -> Upload:
    item = upload.payload.item(MENTEE)
    values = reconstruct_low_rank(item.values, like)  # type: ignore[arg-type]
    return Upload(upload.client_info, Payload({MENTEE: replace(item, values=values)}))


PROJECTION = "projection"  # P: kept by the client


@register_algorithm("fedmrl")
class FedMRL(MenteeTraining):
    """Train each client's own network together with a small shared one, on features of both, one nested in the other.

    The shared network G alone is averaged, each client's own F stays (Yi et al. 2024, Algorithm 1). G's features have width d₁, F's d₂ > d₁. A private linear projection takes both to width d₂, all of which goes to F's head
    and the first d₁ to G's; the loss is the sum of both.

    A client's model is all three: F's head on the projected features is what predicts, on local and global tests.
    """

    title = "FedMRL"
    evaluated_when = "own head on projected features, as deployed with the next broadcast (the models saved are clients' own F alone)"
    uploads = {MENTEE: ItemSpec("params", across=True)}
    trained = {"model": None, MENTEE: None, PROJECTION: None}
    needs = Needs(also=("small common model", "linear heads"))

    own_weight: NonNegativeFloat = Field(1.0, description="m_F: weight of the own head's loss")
    mentee_weight: NonNegativeFloat = Field(
        1.0, description="m_G: weight of the mentee's head's loss"
    )

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        made, notes = super().configure(clients)
        assert isinstance(made, FedMRL) and made.mentee is not None
        for kind in clients.profiles:
            require_linear_head(kind.first, kind.arch)
        narrowest = min(clients.profiles, key=lambda kind: kind.arch.feature_width)
        name = narrowest.first
        least = narrowest.arch.feature_width
        width = made.mentee_model(narrowest.arch).feature_width
        if width < least:
            return made, notes
        if made.mentee.feature_dim or least < 2:
            is_set = made.mentee.feature_dim is not None
            key = "algorithm.mentee.feature_dim" if is_set else f"clients: {name}: model"
            raise UserError(
                f"{key}: the mentee's features have width {width}, those of {name} {least}, not more"
            )
        mentee = made.mentee.model_copy(update={"feature_dim": least // 2})
        note = f"algorithm.mentee.feature_dim is {least // 2}: less than the {least} of {name}"
        return made.model_copy(update={"mentee": mentee}), [*notes, note]

    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        models = super().models(client)
        width = client.arch.feature_width
        both = (models[MENTEE].feature_width + width,)
        return {**models, PROJECTION: ModelSpec.from_config("linear", width, both)}

    def objective(self, task: Task) -> MutualDistillation:
        return NestedRepresentations(task.kind, alpha=self.own_weight, beta=self.mentee_weight)

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        seen = to_shape(rows.columns(client)["x"], client.arch[MENTEE].input_shape)
        g = yield Predict(MENTEE, TensorRows({"x": seen}), readout="features")
        f = yield Predict("model", rows, readout="features")
        r = yield Predict(PROJECTION, TensorRows({"x": torch.cat([g, f], 1)}))
        own = client.models["model"]
        head = ModelSpec.from_config("linear", client.task.outputs, (r.shape[1],))
        tensors = {n: own[n] for n in ("head.weight", "head.bias")}
        logits = yield Predict("head", TensorRows({"x": r}), tensors=tensors, arch=head)
        return add_log_prior(client, logits) if personal else logits
