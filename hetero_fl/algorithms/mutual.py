"""A small shared model next to each client's own: FML, FedKD, FedMRL."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Upload, Uploads
from hetero_fl.algorithms.base import Algorithm, Items, register_algorithm
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
    Participant,
    floating_tensors,
    select_part,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, TensorRows
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_key

# A small shared model beside each client's own: what methods with a mentee have in common.

MENTEE = "mentee"
SMALL = {  # by the number of dimensions; 0: tokens
    0: ModelConfig(name="text_transformer"),
    1: ModelConfig(name="mlp", hidden=[64]),
    2: ModelConfig(name="transformer"),
    3: ModelConfig(name="cnn_gn_small"),
}


class MenteeTraining(Algorithm):
    """Each client keeps a model of its own and trains it together with the mentee, which has one architecture and travels.

    The mentee sees what its client sees, augmentation included; where clients' views differ in shape, images are resized
    to the mentee's, and their channels averaged or repeated. At home a client reads its own model, in common the mentee.
    """

    slot = MENTEE
    requires = ("small common model",)
    evaluated_when = "own model at home, the mentee in common, as deployed with the next broadcast (the models saved are clients' own)"

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

    def extra_models(self, arch: ModelSpec) -> dict[str, ModelSpec]:
        return {MENTEE: self.mentee_model(arch)}

    def mentee_model(self, own: ModelSpec) -> ModelSpec:
        """The mentee's architecture, beside that of anybody's own model: all have the same outputs and vocabulary."""
        assert self.mentee is not None and self.mentee_input is not None  # `resolve` has set them
        m = self.mentee
        shape = tuple(self.mentee_input)
        about = (m.feature_dim, m.options, m.pretrained, own.vocabulary)
        return ModelSpec.from_config(m.name, own.outputs, shape, *about)

    # The round -----------------------------------------------------------------------------------------------------
    def setup(self, server: Participant) -> None:
        server.arch[MENTEE] = self.mentee_model(server.peers.profiles[0].arch)
        server.models[MENTEE] = server.arch[MENTEE].initial_tensors(server.round_context.seed)

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        part = self.download_part(recipient.settings, server.round_context.round_idx)
        return (
            {}
            if part == ()
            else {MENTEE: floating_tensors(select_part(server.models[MENTEE], part))}
        )

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield self.fit_both(client)
        return self.share(client)

    def fit_both(self, client: Participant) -> Fit:
        """Local training of both models."""
        raise TypeError(f"{type(self).__name__} trains no mentee")

    def joint_fit(self, client: Participant, objective: MutualDistillation, **besides: Any) -> Fit:
        """A fit of own model and mentee with the client's settings; `besides`: the part of other slots that trains, too."""
        return replace(self.fit(client, objective), train={"model": None, MENTEE: None, **besides})

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        server.models[MENTEE] = {**server.models[MENTEE], **self.mentee_mean(uploads)}
        yield from ()

    @staticmethod
    def mentee_mean(uploads: Uploads) -> Tensors:
        """The weighted mean of each of the mentee's tensors over those who sent it, whatever model they have themselves."""
        return uploads.mean_by_group(MENTEE).get("", {})

    # Reading -------------------------------------------------------------------------------------------------------
    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if personal:
            return (yield from super().predict(client, rows, personal))
        seen = to_shape(rows.columns(client)["x"], client.arch[MENTEE].input_shape)
        return (yield Predict(MENTEE, TensorRows({"x": seen})))

    def server_model_slot(self, server: Participant) -> str | None:
        return None  # the mentee is read at the clients, through their preprocessing


# FML: mutual learning of each client's own model and a shared one.


@register_algorithm("fml")
class FML(MenteeTraining):
    """Own model and a small shared one learn from the rows and from one another (KL, both ways); the shared one, the mentee, is
    averaged (Shen et al. 2020, Algorithm 1, there "meme model")."""

    uploads = {MENTEE: ItemSpec("params", across=True)}

    alpha: float = Field(
        0.5, ge=0, le=1, description="weight of the task for the own model, the rest is KL"
    )
    beta: float = Field(
        0.5, ge=0, le=1, description="weight of the task for the mentee, the rest is KL"
    )

    def fit_both(self, client: Participant) -> Fit:
        shape = client.arch[MENTEE].input_shape
        return self.joint_fit(
            client,
            MutualDistillation(client.task.kind, alpha=self.alpha, beta=self.beta, shape=shape),
        )


# FedKD: adaptive mutual distillation with a shared small model, whose updates travel compressed.

HIDDEN = "hidden"  # W: from the mentee's features to the own model's, kept by the client
WHOLE = 2.0  # an energy that no truncation keeps: updates travel as they are


@register_algorithm("fedkd")
class FedKD(MenteeTraining):
    """Own model and mentee distil into one another, the more the better both are; updates of the mentee travel as truncated
    SVDs (Wu et al. 2022, Algorithm 1).

    The energy that a truncation keeps rises over the rounds. The server's mentee moves by the mean update as it sends it,
    truncated, so that it stays the one its clients hold; a client that missed a round is sent the mentee whole.
    """

    uploads = {MENTEE: ItemSpec("update", use="each", ranks=True, across=True)}
    downloads = {"change": ItemSpec("update", ranks=True)}

    hidden_weight: NonNegativeFloat = Field(
        1.0, description="weight of the distance between features"
    )
    energy_start: float = Field(
        0.95, gt=0, le=1, description="share of an update's energy kept in the first round"
    )
    energy_end: float = Field(0.98, gt=0, le=1, description="the same in the last round")

    def kept_energy(self, participant: Participant) -> float:
        """The share that is kept in this round."""
        done = participant.round_context.round_idx / max(
            1, participant.round_context.num_rounds - 1
        )
        return self.energy_start + (self.energy_end - self.energy_start) * min(1.0, done)

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        method, notes = super().configure(clients)
        return method, [
            *notes,
            "ranks of updates follow from what is learnt: `--check` counts all of them whole",
        ]

    def with_worst_case_size(self) -> Algorithm:
        return self.model_copy(update={"energy_start": WHOLE, "energy_end": WHOLE})

    def extra_models(self, arch: ModelSpec) -> dict[str, ModelSpec]:
        mentee = self.mentee_model(arch)
        return {
            MENTEE: mentee,
            HIDDEN: ModelSpec.from_config("linear", arch.feature_width, (mentee.feature_width,)),
        }

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        part = self.download_part(recipient.settings, server.round_context.round_idx)
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
        mine = floating_tensors(
            select_part(client.models[MENTEE], self.shared_part(client.settings))
        )
        base = received[MENTEE] if MENTEE in received else client.state.get("base", mine)
        if "change" in received:
            base = {
                **base,
                **{
                    n: base[n] + d
                    for n, d in reconstruct_low_rank(received["change"], base).items()
                },
            }
        if self.download_part(client.settings, client.round_context.round_idx) != ():
            client.load(MENTEE, base)
        client.state["base"] = base

    def fit_both(self, client: Participant) -> Fit:
        shape = client.arch[MENTEE].input_shape
        objective = AdaptiveMutual(client.task.kind, shape=shape, hidden_weight=self.hidden_weight)
        return self.joint_fit(client, objective, hidden=("head.weight",))

    def share(self, client: Participant) -> Items:
        base = select_part(
            client.state["base"], self.upload_part(client.settings, client.round_context.round_idx)
        )
        update = {n: client.models[MENTEE][n] - t for n, t in base.items()}
        return (
            {
                MENTEE: Item(
                    compress_low_rank(update, self.kept_energy(client)),
                    self.weight_of(client),
                    "update",
                )
            }
            if update
            else {}
        )

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mentee = server.models[MENTEE]
        version = server.state.get("version", 0)
        took = [
            u.client
            for u in uploads.each
            if self.download_part(u.client_info.settings, server.round_context.round_idx) != ()
        ]
        server.state["held"] = {**server.state.get("held", {}), **dict.fromkeys(took, version)}
        restored = (_restore_update(u, mentee) for u in uploads.having(MENTEE))
        mean = self.mentee_mean(
            uploads.with_uploads(restored, {MENTEE: ItemSpec("update", across=True)})
        )
        if mean:
            change = compress_low_rank(mean, self.kept_energy(server))
            server.models[MENTEE] = {
                **mentee,
                **{n: mentee[n] + d for n, d in reconstruct_low_rank(change, mentee).items()},
            }
            server.state.update(change=change, version=version + 1)
        yield from ()


def _restore_update(upload: Upload, like: dict[str, torch.Tensor]) -> Upload:
    item = upload.payload.item(MENTEE)
    values = reconstruct_low_rank(item.values, like)  # type: ignore[arg-type]
    return Upload(upload.client_info, Payload({MENTEE: replace(item, values=values)}))


# FedMRL: features of a shared small model and of each client's own, one nested in the other.

PROJECTION = "projection"  # P: kept by the client


@register_algorithm("fedmrl")
class FedMRL(MenteeTraining):
    """A small shared network G beside each client's own F, trained on features of both, one nested in the other; G alone is
    averaged (Yi et al. 2024, Algorithm 1).

    G's features have width d₁, F's d₂ > d₁. A private linear projection takes both to width d₂, all of which goes to F's head
    and the first d₁ to G's; the loss is the sum of both.

    A client's model is all three: F's head on the projected features is what is read, at home and in common.
    """

    uploads = {MENTEE: ItemSpec("params", across=True)}
    requires = ("linear heads",)
    evaluated_when = "own head on projected features, as deployed with the next broadcast (the models saved are clients' own F alone)"

    own_weight: NonNegativeFloat = Field(1.0, description="m_F: weight of the own head's loss")
    mentee_weight: NonNegativeFloat = Field(
        1.0, description="m_G: weight of the mentee's head's loss"
    )

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        made, notes = super().configure(clients)
        assert isinstance(made, FedMRL) and made.mentee is not None
        widths = {kind.first: kind.arch.feature_width for kind in clients.profiles}
        for kind in clients.profiles:
            require_linear_head(kind.first, kind.arch)
        least = min(widths, key=widths.__getitem__)
        width = made.mentee_model(clients[least].arch).feature_width
        if width < widths[least]:
            return made, notes
        if made.mentee.feature_dim or widths[least] < 2:
            key = (
                "algorithm.mentee.feature_dim"
                if made.mentee.feature_dim
                else f"clients: {least}: model"
            )
            raise UserError(
                f"{key}: the mentee's features have width {width}, those of {least} {widths[least]}, not more"
            )
        half = widths[least] // 2
        mentee = made.mentee.model_copy(update={"feature_dim": half})
        notes = [
            *notes,
            f"algorithm.mentee.feature_dim is {half}: less than the {widths[least]} of {least}",
        ]
        return made.model_copy(update={"mentee": mentee}), notes

    def extra_models(self, arch: ModelSpec) -> dict[str, ModelSpec]:
        mentee = self.mentee_model(arch)
        return {
            MENTEE: mentee,
            PROJECTION: ModelSpec.from_config(
                "linear", arch.feature_width, (mentee.feature_width + arch.feature_width,)
            ),
        }

    def fit_both(self, client: Participant) -> Fit:
        shape = client.arch[MENTEE].input_shape
        objective = NestedRepresentations(
            client.task.kind, alpha=self.own_weight, beta=self.mentee_weight, shape=shape
        )
        return self.joint_fit(client, objective, projection=None)

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        seen = to_shape(rows.columns(client)["x"], client.arch[MENTEE].input_shape)
        g = yield Predict(MENTEE, TensorRows({"x": seen}), readout="features")
        f = yield Predict("model", rows, readout="features")
        r = yield Predict(PROJECTION, TensorRows({"x": torch.cat([g, f], 1)}))
        own = client.models["model"]
        head = ModelSpec.from_config("linear", client.task.outputs, (r.shape[1],))
        tensors = {n: own[n] for n in ("head.weight", "head.bias")}
        logits = yield Predict("head", TensorRows({"x": r}), tensors=tensors, arch=head)
        return self.add_log_prior(client, logits) if personal else logits
