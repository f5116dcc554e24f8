"""Methods with a small common model next to each client's model: FML, FedKD and FedMRL."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.uploads import Upload, Uploads
from hetero_fl.algorithms.base import Algorithm, Needs, register_algorithm
from hetero_fl.algorithms.prediction import adjust_to_labels, model_rows
from hetero_fl.algorithms.prototypes import require_linear_heads
from hetero_fl.algorithms.round_parts import (
    Items,
    download_part,
    local_fit,
    shareable_tensors,
    shared_part,
    upload_model,
    upload_part,
)
from hetero_fl.config.clients import ModelConfig, expand_model_name
from hetero_fl.core.images import is_convertible
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.mutual_objectives import (
    AdaptiveMutual,
    MutualDistillation,
    NestedRepresentations,
)
from hetero_fl.core.participant import (
    ClientDirectory,
    ClientInfo,
    Part,
    Participant,
    select_part,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan, Predict, Rows, TensorRows
from hetero_fl.core.task import Task
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_key

# Slot of the small common model.
MENTEE = "mentee"
# Default mentees, keyed by the number of input dimensions. The key 0 stands for tokens.
DEFAULT_MENTEES = {
    0: ModelConfig(name="text_transformer"),
    1: ModelConfig(name="mlp", hidden=[64]),
    2: ModelConfig(name="transformer"),
    3: ModelConfig(name="cnn_gn_small"),
}


class MenteeTraining(Algorithm):
    """Base class of methods that train a small common model, the mentee, with each client's model.

    Only the mentee is exchanged and averaged over all clients. Without compression, a mentee of m
    parameters requires 4·m bytes per round in each direction. The mentee has the same architecture
    for all clients. In local training, a client's own model and its mentee are trained on the same
    augmented batches. Images of another shape are resized to the mentee's input shape, and channels
    are averaged or repeated. By default, a client's own model is evaluated on the local test set,
    and the mentee on the global test set.

    With `shares: [backbone]`, only the mentee's backbone is shared. The mentee of a client that
    shares no parameters is trained on this client only.

    Attributes:
        trained: Part of each model that local training updates, keyed by slot.

    Example:
        >>> from hetero_fl.algorithms import MenteeTraining
        >>> from hetero_fl.core.mutual_objectives import MutualDistillation
        >>> class EqualWeights(MenteeTraining):
        ...     def objective(self, task):
        ...         return MutualDistillation(task.kind, alpha=0.5, beta=0.5)
        >>> EqualWeights().shared
        {'mentee': None}
    """

    evaluated_when = (
        "own model on local tests, the mentee on the global test, as deployed with the next "
        "broadcast (saved models: clients' own)"
    )
    shared = {MENTEE: None}
    uploads = {MENTEE: ItemSpec("params", across_architectures=True)}
    downloads = {MENTEE: ItemSpec("params")}
    needs = Needs(
        also=("small common model",), shared_model=True, unused_options=("fine_tune_epochs",)
    )
    trained: ClassVar[Mapping[str, Part]] = {"model": None, MENTEE: None}

    mentee: Annotated[ModelConfig, BeforeValidator(expand_model_name)] | None = Field(
        None,
        description="architecture of the mentee; `null`: cnn_gn_small for images, transformer for "
        "series, mlp (64) for tables, text_transformer for tokens",
    )
    mentee_input: list[PositiveInt] | None = Field(
        None,
        description="input shape of the mentee, channels first; `null`: the most frequent shape of "
        "the clients' examples",
    )

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        shapes = Counter[tuple[int, ...]]()
        for profile in clients.profiles:
            shapes[profile.arch.input_shape] += profile.count
        # Of equally frequent shapes, take the smallest.
        shape = tuple(self.mentee_input or min(shapes, key=lambda s: (-shapes[s], math.prod(s), s)))
        for profile in sorted(clients.profiles, key=lambda p: natural_key(p.first)):
            own = profile.arch.input_shape
            if not is_convertible(own, shape):
                raise UserError(
                    f"algorithm.mentee_input: expected a shape to which examples of "
                    f"{profile.first}, {list(own)}, can be converted, got {list(shape)}"
                )
        dimensions = 0 if clients.profiles[0].arch.vocabulary else len(shape)
        mentee = self.mentee or DEFAULT_MENTEES[dimensions]
        size = "x".join(map(str, shape))
        notes = [] if self.mentee else [f"algorithm.mentee is {mentee.name} for inputs of {size}"]
        return self.model_copy(update={"mentee": mentee, "mentee_input": list(shape)}), notes

    @override
    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        return {"model": client.arch, MENTEE: self.mentee_model(client.arch)}

    def mentee_model(self, own: ModelSpec) -> ModelSpec:
        """Return the architecture of the mentee, given the client's own architecture.

        The mentee has the outputs and the vocabulary of the client's own model.
        """
        assert self.mentee is not None and self.mentee_input is not None, "set by configure"
        config = self.mentee
        return ModelSpec.from_config(
            config.name,
            own.outputs,
            tuple(self.mentee_input),
            config.feature_dim,
            config.options,
            pretrained=config.pretrained,
            vocabulary=own.vocabulary,
        )

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        objective = replace(self.objective(client.task), shape=client.arch[MENTEE].input_shape)
        yield local_fit(client, objective, train=self.trained)
        return upload_model(self, client)

    def objective(self, task: Task) -> MutualDistillation:
        """Return the objective that trains a client's own model and the mentee.

        Subclasses must override this method.
        """
        raise TypeError(f"{type(self).__name__} does not define objective")

    @override
    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        slot = "model" if personal else MENTEE
        logits = yield Predict(slot, model_rows(client, slot, rows))
        return adjust_to_labels(self, client, logits, personal)


@register_algorithm("fml")
class FML(MenteeTraining):
    """Train each client's model and a small common model by mutual distillation.

    The client's own model minimizes α·CE + (1 − α)·KL, where KL is the divergence from the
    predictions of the common model, the mentee ("meme model" in the paper). The mentee minimizes
    β·CE + (1 − β)·KL with the divergence from the predictions of the client's own model. In a
    regression, mean squared errors replace CE and KL. The server averages the mentee (Shen et al.
    2020, Algorithm 1).

    Use this method where you need a common model and personal models of any architecture. The
    global test accuracy is the accuracy of the mentee. A mentee that is too small for the task is
    also a poor teacher.

    References:
        Shen et al., "Federated Mutual Learning", 2020. https://arxiv.org/abs/2006.16765

    Example:
        >>> from hetero_fl.algorithms import FML
        >>> method = FML(alpha=0.7, mentee="cnn_gn_small")
        >>> method.shared, method.mentee.name
        ({'mentee': None}, 'cnn_gn_small')
    """

    title = "FML"
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="weight α of the task loss of the client's model; the KL loss has weight 1 − α",
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="weight β of the task loss of the mentee; the KL loss has weight 1 − β",
    )

    @override
    def objective(self, task: Task) -> MutualDistillation:
        return MutualDistillation(task.kind, alpha=self.alpha, beta=self.beta)


# Slot of the projection W from the mentee's features to the features of the client's own model.
HIDDEN = "hidden"


# An energy above 1 disables the truncation, so that matrices have their largest size.
FULL_ENERGY = 2.0


@register_algorithm("fedkd")
class FedKD(MenteeTraining):
    """Distill each client's model and a small common model into each other, with low-rank updates.

    Distillation terms are divided by the sum of the task losses of both models. Updates of the
    common model, the mentee, are truncated singular value decompositions that keep a share of the
    energy, the sum of squared singular values. The share changes linearly from `energy_start` to
    `energy_end` over the rounds (Wu et al. 2022, Algorithm 1). The server applies the truncated
    mean update to its own mentee, so that it stays equal to the mentees of clients that receive
    each update. Clients that missed an update receive the whole mentee. Vectors, and matrices whose
    truncated form would not be smaller, are sent without truncation.

    Use this method like FML where traffic must be small. The ranks of the updates depend on the
    training, so `--check` prints an upper bound of the traffic.

    Deviations: the denominator of the distillation terms is detached, because the gradient of the
    denominator would reward errors. The mean squared error between features is counted once,
    whereas the authors' code counts the error once for each model.

    References:
        Wu et al., "Communication-Efficient Federated Learning via Knowledge Distillation", Nature
            Communications 2022. https://arxiv.org/abs/2108.13323

    Example:
        >>> from hetero_fl.algorithms import FedKD
        >>> FedKD(energy_start=0.9).uploads["mentee"].kind
        'update'
    """

    title = "FedKD"
    uploads = {MENTEE: ItemSpec("update", use="each", ranks=True, across_architectures=True)}
    downloads = {
        MENTEE: ItemSpec("params"),
        "change": ItemSpec(
            "update",
            ranks=True,
            description="change of the mentee since the last round, as truncated SVDs",
        ),
    }
    trained = {"model": None, MENTEE: None, HIDDEN: ("head.weight",)}
    needs = Needs(
        also=("small common model",),
        largest_uploads={"energy_start": FULL_ENERGY, "energy_end": FULL_ENERGY},
        shared_model=True,
        unused_options=("fine_tune_epochs",),
    )

    hidden_weight: NonNegativeFloat = Field(
        1.0, description="weight of the mean squared error between features"
    )
    energy_start: float = Field(
        0.95, gt=0, le=1, description="share of an update's energy kept in the first round"
    )
    energy_end: float = Field(
        0.98, gt=0, le=1, description="share of an update's energy kept in the last round"
    )

    def kept_energy(self, participant: Participant) -> float:
        """Return the share of an update's energy that is kept in this round.

        The share changes linearly from `energy_start` to `energy_end` over the run.
        """
        context = participant.round_context
        done = min(1.0, context.round_idx / max(1, context.num_rounds - 1))
        return self.energy_start + (self.energy_end - self.energy_start) * done

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        method, notes = super().configure(clients)
        note = "ranks of updates depend on the training; `--check` counts updates of full rank"
        return method, [*notes, note]

    @override
    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        models = super().models(client)
        sizes = (client.arch.feature_width, (models[MENTEE].feature_width,))
        return {**models, HIDDEN: ModelSpec.from_config("linear", *sizes)}

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        part = download_part(self, recipient.settings, server.round_context.round_idx, MENTEE)
        state = server.state
        behind = state.get("version", 0) - state.get("held", {}).get(recipient.client_id, -1)
        if part == () or behind == 0:
            return {}
        if behind == 1 and "change" in state:
            return {"change": Item(select_part(state["change"], part), kind="update")}
        return super().broadcast(server, recipient)

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        # W is a linear map without bias.
        client.load(HIDDEN, {"head.bias": torch.zeros_like(client.models[HIDDEN]["head.bias"])})
        part = shared_part(self, client.settings, MENTEE)
        own = shareable_tensors(self, client.arch[MENTEE], client.models[MENTEE], part, MENTEE)
        base = received[MENTEE] if MENTEE in received else client.state.get("base", own)
        if "change" in received:
            base = add_low_rank(base, received["change"])
        if download_part(self, client.settings, client.round_context.round_idx, MENTEE) != ():
            client.load(MENTEE, base)
        client.state["base"] = base

    @override
    def objective(self, task: Task) -> MutualDistillation:
        return AdaptiveMutual(task.kind, hidden_weight=self.hidden_weight)

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from super().train(client, received)
        part = upload_part(self, client.settings, client.round_context.round_idx, MENTEE)
        base = select_part(client.state["base"], part)
        update = {n: client.models[MENTEE][n] - t for n, t in base.items()}
        if not update:
            return {}
        factors = compress_low_rank(update, self.kept_energy(client))
        return {MENTEE: Item(factors, float(client.num_rows), "update")}

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mentee = server.models[MENTEE]
        version = server.state.get("version", 0)
        held = server.state.setdefault("held", {})
        round_idx = server.round_context.round_idx
        for u in uploads.each:
            if download_part(self, u.client_info.settings, round_idx, MENTEE) != ():
                held[u.client] = version
        restored = (_restore_update(u, mentee) for u in uploads.containing(MENTEE))
        specs = {MENTEE: ItemSpec("update", across_architectures=True)}
        mean = uploads.with_uploads(restored, specs).mean_by_group(MENTEE).get("")
        if mean:
            change = compress_low_rank(mean, self.kept_energy(server))
            server.models[MENTEE] = add_low_rank(mentee, change)
            server.state.update(change=change, version=version + 1)
        yield from ()


def compress_low_rank(tensors: Mapping[str, Tensor], energy: float) -> Tensors:
    """Approximate matrices by a truncated SVD (Wu et al. 2022, FedKD, eq. 8).

    A tensor of two or more dimensions is treated as a matrix `[m, n]`, where m is the size of the
    first dimension. The matrix becomes a tensor `[k, m + n]` of k rank-one terms. Each row contains
    a left singular vector, multiplied by the singular value, and a right singular vector. If k such
    rows do not have fewer values than the matrix, the values of the matrix are instead written into
    rows of length m + n, padded with zeros. The two cases differ in the number of rows. Tensors
    with fewer than two dimensions do not change.

    Args:
        tensors: Finite tensors, keyed by name.
        energy: Fraction of the sum of squared singular values that the terms must reach, 0 to 1. If
            greater than 1, no matrix is factored.

    Returns:
        The compressed tensors, keyed by name.
    """
    return {
        n: _terms(t.reshape(len(t), -1), energy) if t.ndim > 1 else t for n, t in tensors.items()
    }


def reconstruct_low_rank(packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensors:
    """Reconstruct tensors from the result of `compress_low_rank`.

    Args:
        packed: The return value of `compress_low_rank`.
        like: Tensors with the original shapes, keyed by name.

    Returns:
        The tensors with the original shapes, keyed by name.
    """
    return {n: _matrix(t, like[n]) if like[n].ndim > 1 else t for n, t in packed.items()}


def _num_packed_rows(m: int, n: int) -> int:
    """Return the number of rows of length m + n that are needed for m * n values."""
    return -(-m * n // (m + n))


def _terms(matrix: Tensor, energy: float) -> Tensor:
    m, n = matrix.shape
    most = _num_packed_rows(m, n)
    if energy <= 1:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        kept = s.square().cumsum(0)
        k = min(int((kept < energy * kept[-1]).sum()) + 1, len(s))
        if k < most:
            return torch.cat([u[:, :k].T * s[:k, None], v[:k]], 1)
    padding = matrix.new_zeros(most * (m + n) - m * n)
    return torch.cat([matrix.reshape(-1), padding]).reshape(most, m + n)


def _matrix(packed: Tensor, like: Tensor) -> Tensor:
    m = len(like)
    n = like[0].numel()
    if len(packed) == _num_packed_rows(m, n):
        return packed.reshape(-1)[: m * n].reshape(like.shape)
    return (packed[:, :m].T @ packed[:, m:]).reshape(like.shape)


def add_low_rank(tensors: Tensors, change: Mapping[str, Tensor]) -> Tensors:
    """Add a low-rank change to tensors and return the new tensors.

    Tensors that are absent from `change` are returned unchanged.
    """
    restored = reconstruct_low_rank(change, tensors)
    return {**tensors, **{n: tensors[n] + d for n, d in restored.items()}}


def _restore_update(upload: Upload, like: Tensors) -> Upload:
    item = upload.payload.item(MENTEE)
    values = reconstruct_low_rank(item.values, like)  # type: ignore[arg-type]
    return Upload(upload.client_info, Payload({MENTEE: replace(item, values=values)}))


# Slot of the projection of the concatenated features of both models. The projection stays at the
# client.
PROJECTION = "projection"
FEATURE_DIM = "algorithm.mentee.feature_dim"


@register_algorithm("fedmrl")
class FedMRL(MenteeTraining):
    """Train each client's model and a small common model on nested projections of their features.

    Only the common model G, the mentee, is averaged (Yi et al. 2024, Algorithm 1). The features of
    G have width d₁, and the features of the client's model F have width d₂ > d₁. A private linear
    projection maps the concatenated features of both models to width d₂. The head of F uses all
    components of the projection, and the head of G uses the first d₁ components. The loss is the
    sum of both losses, weighted by `own_weight` and `mentee_weight`.

    The head of every client's model must be a linear layer with a bias. Otherwise, `UserError` is
    raised.

    The mentee must be narrower than every client's model. If it is not and `mentee.feature_dim` is
    None, the mentee's feature width is set to half of the smallest width of the clients' models. If
    it is not and `mentee.feature_dim` is set, or the smallest width is 1, `UserError` is raised.

    Clients predict with the head of F on the projected features, on local and global test sets. A
    prediction needs G, F and the projection. The saved models contain only F.

    References:
        Yi et al., "Federated Model Heterogeneous Matryoshka Representation Learning", NeurIPS 2024.
            https://arxiv.org/abs/2406.00488

    Example:
        >>> from hetero_fl.algorithms import FedMRL
        >>> sorted(FedMRL.trained), list(FedMRL.uploads)
        (['mentee', 'model', 'projection'], ['mentee'])
    """

    title = "FedMRL"
    evaluated_when = (
        "own head on projected features, as deployed with the next broadcast (saved models: "
        "clients' F only)"
    )
    trained = {"model": None, MENTEE: None, PROJECTION: None}
    needs = Needs(also=("small common model", "linear heads"), unused_options=("fine_tune_epochs",))

    own_weight: NonNegativeFloat = Field(1.0, description="weight m_F of the own head's loss")
    mentee_weight: NonNegativeFloat = Field(1.0, description="weight m_G of the mentee head's loss")

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        method, notes = super().configure(clients)
        assert isinstance(method, FedMRL) and method.mentee is not None
        require_linear_heads(clients.profiles)
        narrowest = min(clients.profiles, key=lambda p: p.arch.feature_width)
        smallest = narrowest.arch.feature_width
        width = method.mentee_model(narrowest.arch).feature_width
        if width < smallest:
            return method, notes
        if method.mentee.feature_dim or smallest < 2:
            is_unset = method.mentee.feature_dim is None
            key = f"clients: '{narrowest.first}': model" if is_unset else FEATURE_DIM
            raise UserError(
                f"{key}: the mentee's feature width must be smaller than that of "
                f"{narrowest.first}, got {width} and {smallest}"
            )
        mentee = method.mentee.model_copy(update={"feature_dim": smallest // 2})
        note = f"{FEATURE_DIM} is {smallest // 2}, half of the feature width of {narrowest.first}"
        return method.model_copy(update={"mentee": mentee}), [*notes, note]

    @override
    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        models = super().models(client)
        width = client.arch.feature_width
        both = (models[MENTEE].feature_width + width,)
        return {**models, PROJECTION: ModelSpec.from_config("linear", width, both)}

    @override
    def objective(self, task: Task) -> MutualDistillation:
        return NestedRepresentations(task.kind, alpha=self.own_weight, beta=self.mentee_weight)

    @override
    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        g, f = yield [
            Predict(MENTEE, model_rows(client, MENTEE, rows), readout="features"),
            Predict("model", rows, readout="features"),
        ]
        r = yield Predict(PROJECTION, TensorRows({"x": torch.cat([g, f], 1)}))
        own = client.models["model"]
        head = ModelSpec.from_config("linear", client.task.outputs, (r.shape[1],))
        tensors = {n: own[n] for n in ("head.weight", "head.bias")}
        logits = yield Predict("head", TensorRows({"x": r}), tensors=tensors, arch=head)
        return adjust_to_labels(self, client, logits, personal)
