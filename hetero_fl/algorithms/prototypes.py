"""Methods that exchange class means of logits or features: FD, FedProto, FedTGP and FedGH."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.teachers import MIN_LOG_PROBABILITY, contrast_weights
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Needs, register_algorithm
from hetero_fl.algorithms.round_parts import Items, add_model, local_fit, may_share
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.generative_objectives import AdaptiveMargin
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import ClassTeacherDistillation, PrototypePull, Supervised
from hetero_fl.core.participant import ClientDirectory, ClientInfo, ClientProfile, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import ClassSums, Fit, Plan, Predict, Rows, TensorRows
from hetero_fl.utils.errors import UserError


class CommonFeatureWidth(Algorithm):
    """Base class of methods that need the same feature width for all clients.

    Models with another feature width are extended by a projection to the common width. By default,
    the common width is the most frequent width, or the largest of several equally frequent widths.
    The values of class statistics for C classes and d features have 4·C·(d + 1) bytes per client
    and round; the encoding adds names and shapes, about 500 bytes per message. These statistics are
    computed from private rows and require `statistics` in `shares`.
    """

    needs = Needs(one_architecture=True, also=("one feature width",), shared_model=True)

    feature_dim: PositiveInt | None = Field(
        None,
        description="common feature width; `null`: the most frequent width of the clients' models",
    )

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        widths = Counter[int]()
        for profile in clients.profiles:
            widths[profile.arch.feature_width] += profile.count
        # Of equally frequent widths, take the largest.
        width = self.feature_dim or max(widths, key=lambda w: (widths[w], w))
        if "features" in self.uploads:
            for profile in clients.profiles:
                require_features(profile.first, profile.arch, width)
        method = self.model_copy(update={"feature_dim": width})
        other = [p for p in clients.profiles if p.arch.feature_width != width]
        names = clients.format_clients(other)
        note = f"algorithm.feature_dim is {width}; the models of {names} get a projection"
        return method, [note] if other else []

    @override
    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        arch = client.arch
        if arch.feature_width != self.feature_dim:
            arch = replace(arch, feature_dim=self.feature_dim)
        return {"model": arch}


class CommonHead(CommonFeatureWidth):
    """Base class of methods that need the same feature width and a linear head for all clients."""

    needs = Needs(
        tasks=("multiclass",), also=("one feature width", "linear heads"), shared_model=True
    )

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        require_linear_heads(clients.profiles)
        return super().configure(clients)


def require_features(client_id: str, arch: ModelSpec, width: int) -> None:
    """Check that the features of a model are not the inputs, which would reveal the client's data.

    Args:
        client_id: The client's id, for the error message.
        arch: Architecture of the client's model.
        width: Common feature width.

    Raises:
        UserError: If the features of the model are its inputs.
    """
    if arch.feature_width == width and not any(
        name.startswith("backbone.") for name in arch.parameter_names
    ):
        raise UserError(
            f"clients: '{client_id}': model: the features of '{arch.name}' are its inputs, and "
            "this method uploads features; choose a model with a backbone, such as mlp, or set "
            "algorithm.feature_dim to another width"
        )


def require_linear_heads(profiles: Iterable[ClientProfile]) -> None:
    """Raise UserError if the head of a client's model is not a linear layer with a bias."""
    for profile in profiles:
        head = sorted(n for n in profile.arch.parameter_names if n.startswith("head."))
        if head != ["head.bias", "head.weight"]:
            found = ", ".join(head) or "no parameters"
            raise UserError(
                f"clients: '{profile.first}': model: this method needs a linear head with a bias, "
                f"got {found}"
            )


def require_sent_state(key: str, arch: ModelSpec) -> None:
    """Raise UserError if training changes integers of a model, which are not sent.

    Args:
        key: Key of the model in the configuration.
        arch: A model that is evaluated by another participant than the one that trains it.
    """
    written = (arch.local_names & arch.written_names) - arch.batch_norm_names
    initial = arch.initial_tensors(0)
    if lost := sorted(n for n in written if not initial[n].is_floating_point()):
        raise UserError(
            f"{key}: this method sends models for evaluation, but no integers, such as "
            f"'{lost[0]}', which training changes; keep it as a floating-point number"
        )


# Margin by which the logit of a class without a prototype is lower than the lowest logit of all
# other classes. The probability of such a class is smaller by a factor of e^-20.
MISSING_PROTOTYPE_MARGIN = 20.0


@register_algorithm("fedproto")
class FedProto(CommonFeatureWidth):
    """Exchange class prototypes and train features to be close to the prototype of their class.

    The loss is cross-entropy plus λ·MSE between a feature and the prototype of its class. The
    prototype of a class is the mean feature of all rows of this class at all clients. Examples are
    assigned to the nearest prototype (Tan et al. 2022, Algorithm 1). After local training, clients
    upload the sums of features `[C, d]` and the number of rows `[C]` per class. The next broadcast
    contains the prototypes `[C, d]`. A class that no client uploads in a round keeps its prototype.
    A class without a prototype is never predicted. Before the first aggregation, the head
    classifies.

    Deviation: in the paper, clients upload means. The sums give the same prototypes, and they can
    be added under secure aggregation.

    Use this method where models differ, traffic must be small and local test accuracy matters.
    Published comparisons find FedProto worse than `local` if clients have many architectures,
    because the features are dissimilar. The prototype of a class with one row reveals the features
    of that row.

    References:
        Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI
            2022. https://arxiv.org/abs/2105.00243

    Example:
        >>> from hetero_fl.algorithms import FedProto
        >>> method = FedProto(weight=10.0, inference="own")
        >>> method.shared, method.uploads["features"].kind
        ((), 'class_sums')
    """

    title = "FedProto"
    evaluated_when = (
        "after local training, by the nearest prototype of the last aggregation (saved models: "
        "with their heads)"
    )
    shared = ()
    _broadcasts_means = True
    uploads = {"features": ItemSpec("class_sums", private=True, share="statistics")}
    downloads = {
        "prototypes": ItemSpec("rows", description="prototypes, `[C, d]`"),
        "known": ItemSpec("rows", description="1 for classes with a prototype, otherwise 0, `[C]`"),
    }

    weight: NonNegativeFloat = Field(1.0, description="weight λ of the distance to the prototype")
    inference: Literal["prototype", "own", "head"] = Field(
        "prototype",
        description="`prototype`: predict the class of the nearest prototype; `own`: on local "
        "tests only among the client's classes, as in the authors' code; `head`: predict with "
        "the head",
    )

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # depends on a setting
        """Requirements of the method: one feature width for all clients.

        Settings of the class prior and `fine_tune_epochs` apply only with `inference: head`.
        """
        return Needs(
            tasks=("multiclass",),
            also=("one feature width",),
            unused_options=()
            if self.inference == "head"
            else ("local_prior", "prior_correction", "fine_tune_epochs"),
        )

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return dict(server.state)

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        client.state.update(received)
        yield from ()

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        pull = PrototypePull(client.task.kind, weight=self.weight) if received else None
        yield local_fit(client, pull, context=received)
        return (yield from upload_class_features(client))

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mean = uploads.mean("features")
        if mean is not None:
            sent = uploads.total("features")[1] > 0
            known = server.state.get("known", mean.new_zeros(len(sent)))
            server.state["prototypes"] = torch.where(
                sent, mean, server.state.get("prototypes", torch.zeros_like(mean))
            )
            server.state["known"] = torch.where(sent[:, 0], torch.ones_like(known), known)
        yield from ()

    @override
    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if self.inference == "head" or "prototypes" not in client.state:
            return (yield from super().predict(client, rows, personal))
        features = yield Predict("model", rows, readout="features")
        known = client.state["known"]
        if self.inference == "own" and personal:
            own = known * (client.counts > 0).to(known.dtype)
            known = own if bool(own.any()) else known
        return prototype_logits(features, client.state["prototypes"], known)


def upload_class_features(client: Participant) -> Plan[Items]:
    """Sum a client's features per class and return the client's upload.

    The upload is empty if the client does not share statistics in this round.
    """
    if not may_share(client, "statistics"):
        return {}
    sums, counts = yield ClassSums("model", readout="features")
    return {"features": Item(sums, counts[:, None], "class_sums")}


def prototype_logits(features: Tensor, prototypes: Tensor, known: Tensor) -> Tensor:
    """Return negative distances to prototypes as logits.

    Args:
        features: Features of the examples, shape `[N, d]`.
        prototypes: Prototypes, shape `[C, d]`.
        known: 1 for classes with a prototype, else 0, shape `[C]`.

    Returns:
        Logits of shape `[N, C]`: −‖f − prototype_c‖₂ for each class c with a prototype. The logits
        of all other classes are lower than the lowest of these logits by
        `MISSING_PROTOTYPE_MARGIN`.

    Example:
        >>> import torch
        >>> from hetero_fl.algorithms.prototypes import prototype_logits
        >>> prototypes = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> prototype_logits(torch.zeros(1, 2), prototypes, torch.ones(2))
        tensor([[-0., -5.]])
    """
    distances = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    has = known > 0
    lowest = -distances[:, has].amax(-1, keepdim=True) - MISSING_PROTOTYPE_MARGIN
    return torch.where(has, -distances, lowest)


# Slots of the server's models: the vectors P̆, one trainable vector per class, and the network F.
VECTORS = "vectors"
PROTOTYPES = "prototypes"


@register_algorithm("fedtgp")
class FedTGP(FedProto):
    """Train well-separated class prototypes at the server, while clients train as in FedProto.

    The prototypes are P̂_c = F(P̆_c), where F consists of a linear layer, ReLU and a second linear
    layer (Zhang et al. 2024, Algorithm 1). In each round, the server continues to train P̆ and F so
    that each client's class means are nearest to the prototype of their class by a margin δ =
    min(largest distance between two class centers, τ). A class center is the unweighted mean of the
    clients' class means.

    Use this method where FedProto's prototypes are too similar. With few local steps per round,
    training can diverge: use more local epochs or a smaller `margin`.

    The default λ is the value in the authors' script. The paper uses 0.1. Deviations: for δ, the
    authors' code uses the largest distance between a center and its nearest neighbor. The authors
    initialize P̆ from a standard normal distribution. Here, the initial values are uniform in
    ±1/√C.

    References:
        Zhang et al., "FedTGP: Trainable Global Prototypes with Adaptive-Margin-Enhanced Contrastive
            Learning for Data and Model Heterogeneity in Federated Learning", AAAI 2024.
            https://arxiv.org/abs/2401.03230

    Example:
        >>> from hetero_fl.algorithms import FedTGP
        >>> FedTGP(margin=50.0).uploads["features"].use  # each client's means are needed
        'each'
    """

    title = "FedTGP"
    uploads = {"features": ItemSpec("class_sums", use="each", private=True, share="statistics")}

    weight: NonNegativeFloat = Field(10.0, description="weight λ of the distance to the prototype")
    margin: PositiveFloat = Field(100.0, description="largest margin τ")
    server_epochs: PositiveInt = Field(
        100, description="epochs per round on the clients' class means, at the server"
    )
    server_lr: PositiveFloat = Field(0.01, description="learning rate of SGD at the server")
    server_batch_size: PositiveInt = Field(
        10, description="batch size of class means, at the server"
    )

    @override
    def setup(self, server: Participant) -> None:
        width = self.feature_dim or 1
        network = ModelSpec.from_config("mlp", width, (width,), options={"hidden": [width]})
        add_model(server, VECTORS, ModelSpec.from_config("linear", width, (server.task.outputs,)))
        add_model(server, PROTOTYPES, network)
        # P̆ has no bias, so the bias of the linear layer stays 0.
        server.load(VECTORS, {"head.bias": torch.zeros(width)})

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        items = [u.payload.item("features") for u in uploads.containing("features")]
        if not items:
            return
        means, has = client_class_means(items)
        seen = has.any(0)
        yield Fit(
            {VECTORS: ("head.weight",), PROTOTYPES: None},
            AdaptiveMargin(PROTOTYPES, VECTORS),
            TensorRows({"x": means[has], "y": has.nonzero()[:, 1]}),
            epochs=self.server_epochs,
            batch_size=self.server_batch_size,
            optimizer=OptimizerConfig(name="sgd", lr=self.server_lr),
            context={
                "margin": largest_center_distance(means, has).clamp(max=self.margin),
                "one_hot": torch.eye(server.task.outputs),
            },
            label=PROTOTYPES,
        )
        vectors = server.models[VECTORS]["head.weight"].T
        server.state["prototypes"] = yield Predict(PROTOTYPES, TensorRows({"x": vectors}))
        known = server.state.get("known", means.new_zeros(len(seen)))
        server.state["known"] = torch.where(seen, torch.ones_like(known), known)


def client_class_means(items: list[Item]) -> tuple[Tensor, Tensor]:
    """Return the class means of K clients, and a mask of the means that exist.

    Args:
        items: Sums and counts of features per class, one item per client.

    Returns:
        Means of shape `[K, C, d]`, and a mask of shape `[K, C]`.
    """
    counts = torch.stack([torch.as_tensor(item.weight) for item in items])
    sums = torch.stack([item.values for item in items if isinstance(item.values, Tensor)])
    return sums / counts.clamp(min=1), counts[..., 0] > 0


def largest_center_distance(means: Tensor, has: Tensor) -> Tensor:
    """Return the largest Euclidean distance between two class centers, a scalar.

    A class center is the unweighted mean of the class means over the clients that have the class.
    The result is 0 if fewer than two classes exist.

    Args:
        means: Class means of K clients, shape `[K, C, d]`.
        has: Mask of existing class means, shape `[K, C]`.
    """
    mask = has[..., None].to(means.dtype)
    centers = (means * mask).sum(0) / mask.sum(0).clamp(min=1)
    exists = has.any(0)
    distances = torch.cdist(centers, centers, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(exists[:, None] & exists, distances, torch.zeros_like(distances)).max()


HEAD = "head"


@register_algorithm("fedgh")
class FedGH(CommonHead):
    """Train a shared head at the server on clients' mean features of each class.

    Clients of any architecture replace the head with the server's head, train on their own rows,
    and keep the backbone (Yi et al. 2023, Algorithm 1). After local training, clients upload the
    sums of features `[C, d]` and the number of rows `[C]` per class. The server trains the head on
    one example per client and class, the mean feature. Models are evaluated with the new head.
    Before the first aggregation, clients keep their own heads.

    Use this method where backbones differ and all clients have all classes. Otherwise, the head
    predicts classes that the client's features do not separate. Deviation: the server trains for
    100 epochs per round, because a head with little training reduces accuracy. The paper uses each
    example once.

    References:
        Yi et al., "FedGH: Heterogeneous Federated Learning with Generalized Global Header", ACM MM
            2023. https://arxiv.org/abs/2303.13137

    Example:
        >>> from hetero_fl.algorithms import FedGH
        >>> FedGH(server_lr=0.1).needs.also
        ('one feature width', 'linear heads')
    """

    title = "FedGH"
    shared = ()
    uploads = {"features": ItemSpec("class_sums", use="each", private=True, share="statistics")}
    downloads = {HEAD: ItemSpec("params", description="parameters of the head, C·(d + 1)")}

    server_epochs: PositiveInt = Field(
        100, description="epochs per round on the clients' class means, at the server"
    )
    server_lr: PositiveFloat = Field(0.01, description="learning rate of SGD at the server")
    server_batch_size: PositiveInt = Field(
        10, description="batch size of class means, at the server"
    )

    @override
    def setup(self, server: Participant) -> None:
        sizes = (server.task.outputs, (self.feature_dim or 1,))
        add_model(server, HEAD, ModelSpec.from_config("linear", *sizes))

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        # An untrained head would discard what clients have learned.
        is_due = (
            server.state.get("trained", False)
            and server.round_context.round_idx % recipient.settings.share_every == 0
        )
        return {HEAD: server.models[HEAD]} if is_due else {}

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        if HEAD in received:
            client.load("model", received[HEAD])
        yield from ()

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield local_fit(client)
        return (yield from upload_class_features(client))

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        items = [u.payload.item("features") for u in uploads.containing("features")]
        if not items:
            return
        means, has = client_class_means(items)
        yield Fit(
            {HEAD: None},
            Supervised(slot=HEAD),
            TensorRows({"x": means[has], "y": has.nonzero()[:, 1]}),
            epochs=self.server_epochs,
            batch_size=self.server_batch_size,
            optimizer=OptimizerConfig(name="sgd", lr=self.server_lr),
            label=HEAD,
        )
        server.state["trained"] = True


@register_algorithm("fd")
class FD(Algorithm):
    """Distill the mean logits of each class over all clients into the clients' models.

    The local loss is cross-entropy plus λ·KL·T² towards the mean logits of the example's class
    (Jeong et al. 2018, Algorithm 1). Clients upload the sums of logits `[C, C]` and the number of
    rows `[C]` per class. The server divides the total sums by the total counts and broadcasts the
    means `[C, C]`.

    Use this method where models differ, there is no proxy set and traffic must be small. Expect a
    small gain over `local`.

    Deviations: a client's own logits are part of its teacher, and logits are computed after local
    training.

    References:
        Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated Distillation
            and Augmentation under Non-IID Private Data", 2018. https://arxiv.org/abs/1811.11479

    Example:
        >>> from hetero_fl.algorithms import FD
        >>> FD(temperature=2.0).uploads["class_logits"].kind
        'class_sums'
        >>> FD().needs.tasks
        ('multiclass',)
    """

    title = "FD"
    evaluated_when = "after local training"
    shared = ()
    _broadcasts_means = True
    uploads = {
        "class_logits": ItemSpec(
            "class_sums",
            private=True,
            share="statistics",
            description="sums of logits by class, `[C, C]`, and counts `[C]`",
        )
    }
    downloads = {
        "teacher": ItemSpec(
            "rows",
            share="predictions",
            description="mean logits by class of all clients, `[C, C]`",
        ),
        "known": ItemSpec("rows", description="1 for classes with mean logits, otherwise 0, `[C]`"),
    }
    needs = Needs(tasks=("multiclass",))

    weight: NonNegativeFloat = Field(1.0, description="weight λ of the distillation loss")
    temperature: PositiveFloat = Field(1.0, description="temperature T of the softmax")
    teacher: Literal["mean", "contrast"] = Field(
        "mean", description="mean of logits by counts, or contrast-weighted mean of clipped log p"
    )

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return dict(server.state.get("consensus", {})) if recipient.purpose == "train" else {}

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        loss = ClassTeacherDistillation(
            client.task.kind, weight=self.weight, temperature=self.temperature
        )
        yield local_fit(client, loss if received else None, context=received)
        if not may_share(client, "statistics"):
            return {}
        return {"class_logits": (yield from self.class_statistics(client))}

    def class_statistics(self, client: Participant) -> Plan[Item]:
        """Return an item with the sums of the client's outputs per true class, shape `[C, C]`.

        The outputs are logits. With `teacher: contrast`, the outputs are clipped log-probabilities
        instead, multiplied by the contrast weight of each class.
        """
        if self.teacher == "mean":
            sums, counts = yield ClassSums("model")
            return Item(sums, counts[:, None], "class_sums")
        sums, counts = yield ClassSums(
            "model", readout="log_probabilities", at_least=MIN_LOG_PROBABILITY
        )
        weight = contrast_weights(client.counts).to(sums.dtype) / max(1, client.num_rows)
        return Item(sums * weight, counts[:, None] * weight, "class_sums")

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mean = uploads.mean("class_logits")
        if mean is not None:
            weight = uploads.total("class_logits")[1]
            server.state["consensus"] = {
                "teacher": mean,
                "known": (weight > 0).any(-1).to(mean.dtype),
            }
        yield from ()
