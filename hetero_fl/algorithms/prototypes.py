"""Class prototypes and common feature widths: FedProto, FedTGP, FedGH."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, Needs, may_share, register_algorithm
from hetero_fl.algorithms.local_training import local_fit
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.generative_objectives import AdaptiveMargin
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import PrototypePull, Supervised
from hetero_fl.core.participant import ClientDirectory, ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import ClassSums, Fit, Plan, Predict, Rows, TensorRows
from hetero_fl.utils.errors import UserError

# Methods that compare or exchange features: all clients need features of one width.


class CommonFeatureWidth(Algorithm):
    """Base of methods for features of one width: a model with another width ends in a projection to the common one."""

    needs = Needs(one_architecture=True, also=("one feature width",))
    features_leave: ClassVar[bool] = True  # the clients', row by row or as means of classes

    feature_dim: PositiveInt | None = Field(
        None,
        description="common width of the features; none: the most frequent of the clients', the widest of equals",
    )

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        widths = Counter[int]()
        for kind in clients.profiles:
            widths[kind.arch.feature_width] += kind.count
        width = self.feature_dim or max(widths, key=lambda w: (widths[w], w))
        for kind in clients.profiles if self.features_leave else []:
            require_features(kind.first, kind.arch, width)
        other = [kind for kind in clients.profiles if kind.arch.feature_width != width]
        listed = clients.format_clients(other)
        notes = (
            [f"algorithm.feature_dim is {width}: the models of {listed} end in a projection to it"]
            if other
            else []
        )
        return self.model_copy(update={"feature_dim": width}), notes

    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        fits = client.arch.feature_width == self.feature_dim
        return {
            "model": client.arch if fits else replace(client.arch, feature_dim=self.feature_dim)
        }


class CommonHead(CommonFeatureWidth):
    """Base of methods for features of one width and heads that fit one another: each a single linear layer."""

    needs = Needs(tasks=("multiclass",), also=("one feature width", "linear heads"))

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        for kind in clients.profiles:
            require_linear_head(kind.first, kind.arch)
        return super().configure(clients)


def require_features(client_id: str, arch: ModelSpec, width: int) -> None:
    """Raise UserError for a model whose features are the example itself: uploaded, they would be the client's data."""
    if arch.feature_width == width and not any(
        name.startswith("backbone.") for name in arch.parameter_names
    ):
        raise UserError(
            f"clients: {client_id}: model: the features of '{arch.name}' are the example itself, and this method sends features; "
            "choose one that learns its own, such as mlp, or set algorithm.feature_dim to another width"
        )


def require_linear_head(client_id: str, arch: ModelSpec) -> None:
    """Raise UserError for a model whose head is anything but a linear layer with a bias."""
    head = sorted(n for n in arch.parameter_names if n.startswith("head."))
    if head != ["head.bias", "head.weight"]:
        found = ", ".join(head) or "no parameters"
        raise UserError(
            f"clients: {client_id}: model: its head has {found}; this method needs a linear layer with a bias"
        )


# how far below the farthest prototype a class without one stands: e^-20 of its probability
NEVER = 20.0


@register_algorithm("fedproto")
class FedProto(CommonFeatureWidth):
    """Exchange each class's mean features; each client pulls its features towards the mean of their class.

    The loss is cross-entropy plus λ·MSE of features to the prototype of their class, the mean feature over all clients' rows;
    an example belongs to the class of the nearest prototype (Tan et al. 2022, Algorithm 1). Clients upload sums of features and counts by class, taken after their local training; the server divides the total
    of the sums by the total of the counts. A class that no client sends in a round keeps its prototype. Before there is any,
    the head decides.
    """

    title = "FedProto"
    evaluated_when = "after local training, by the nearest prototype of the last aggregation (the models saved have their heads)"
    shared = ()
    uploads = {"features": ItemSpec("class_sums", private=True, share="statistics")}
    needs = Needs(tasks=("multiclass",), also=("one feature width",))

    weight: NonNegativeFloat = Field(1.0, description="λ: weight of the distance to the prototype")
    inference: Literal["prototype", "own", "head"] = Field(
        "prototype",
        description="nearest prototype; on local tests the nearest of its own classes only (the authors' code); or the model's "
        "head",
    )

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        return dict(server.state)

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        client.state.update({name: received[name] for name in received})
        yield from ()

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        if "prototypes" in received:
            pull = PrototypePull(client.task.kind, weight=self.weight)
            yield local_fit(client, pull, context={name: received[name] for name in received})
        else:
            yield local_fit(client)
        return (yield from upload_class_features(client))

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

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if self.inference == "head" or "prototypes" not in client.state:
            return (yield from super().predict(client, rows, personal))
        features = yield Predict("model", rows, readout="features")
        known = client.state["known"]
        mine = known * (client.counts > 0).to(known.dtype)
        if self.inference == "own" and personal and bool(mine.any()):
            known = mine
        return prototype_logits(features, client.state["prototypes"], known)


def upload_class_features(client: Participant) -> Plan[Items]:
    """Sum the client's features by class and return the upload; empty if it does not share statistics now."""
    if not may_share(client, "statistics"):
        return {}
    sums, counts = yield ClassSums("model", readout="features")
    return {"features": Item(sums, counts[:, None], "class_sums")}


def prototype_logits(features: Tensor, prototypes: Tensor, known: Tensor) -> Tensor:
    """Return −‖f − prototype_c‖₂ as logits `[N, C]`; a class without a prototype stands below all others."""
    apart = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    has = known > 0
    return torch.where(has, -apart, -apart[:, has].amax(-1, keepdim=True) - NEVER)


# at the server: P̆, a trainable row for each class, and the network F
VECTORS = "vectors"
PROTOTYPES = "prototypes"


@register_algorithm("fedtgp")
class FedTGP(FedProto):
    """Train one prototype per class at the server, so that classes stand apart; clients follow as in FedProto.

    Each client pulls its features towards these prototypes (Zhang et al. 2024, Algorithm 1). P̂_c = F(P̆_c), F linear, ReLU, linear; P̆ and F are trained so that each client's own prototypes lie nearest to that of
    their class, by a margin δ = min(largest distance of two class centres, τ).

    A class centre is the plain mean of the clients' prototypes. The server starts from the last round's P̆ and F.

    λ is that of the authors' script; the paper says 0.1. Deviations from the authors' code: δ is the
    paper's largest distance of two class centres, where the code takes each class' nearest neighbor
    and then the largest; and P̆ starts uniform within ±1/√C, where the code draws it standard normal.
    """

    title = "FedTGP"
    uploads = {"features": ItemSpec("class_sums", use="each", private=True, share="statistics")}

    weight: NonNegativeFloat = Field(10.0, description="λ: weight of the distance to the prototype")
    margin: PositiveFloat = Field(100.0, description="τ: largest margin δ")
    server_epochs: PositiveInt = Field(
        100, description="epochs a round on the clients' prototypes, at the server"
    )
    server_lr: PositiveFloat = Field(0.01, description="learning rate of SGD at the server")
    server_batch_size: PositiveInt = Field(
        10, description="clients' prototypes a step, at the server"
    )

    def setup(self, server: Participant) -> None:
        width = self.feature_dim or 1
        classes = server.task.outputs
        server.arch[VECTORS] = ModelSpec.from_config("linear", width, (classes,))
        server.arch[PROTOTYPES] = ModelSpec.from_config(
            "mlp", width, (width,), options={"hidden": [width]}
        )
        for slot in (VECTORS, PROTOTYPES):
            server.models[slot] = server.arch[slot].initial_tensors(server.round_context.seed)
        # P̆ is a table: the bias stays at 0
        server.load(VECTORS, {"head.bias": torch.zeros(width)})

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        items = [u.payload.item("features") for u in uploads.having("features")]
        if not items:
            return
        means, has = client_class_means(items)
        seen = has.any(0)
        one_hot = torch.eye(server.task.outputs)
        yield Fit(
            {VECTORS: ("head.weight",), PROTOTYPES: None},
            AdaptiveMargin(PROTOTYPES, VECTORS),
            TensorRows({"x": means[has], "y": has.nonzero()[:, 1]}),
            epochs=self.server_epochs,
            batch_size=self.server_batch_size,
            optimizer=OptimizerConfig(name="sgd", lr=self.server_lr),
            context={
                "margin": largest_center_distance(means, has).clamp(max=self.margin),
                "one_hot": one_hot,
            },
            label=PROTOTYPES,
        )
        vectors = server.models[VECTORS]["head.weight"].T
        server.state["prototypes"] = yield Predict(PROTOTYPES, TensorRows({"x": vectors}))
        known = server.state.get("known", means.new_zeros(len(seen)))
        server.state["known"] = torch.where(seen, torch.ones_like(known), known)


def client_class_means(items: list[Item]) -> tuple[Tensor, Tensor]:
    """Return the means of K clients' sums by class `[K, C, d]`, and whether there is one `[K, C]`."""
    counts = torch.stack([torch.as_tensor(item.weight) for item in items])  # [K, C, 1]
    sums = torch.stack([item.values for item in items if isinstance(item.values, Tensor)])
    return sums / counts.clamp(min=1), counts[..., 0] > 0


def largest_center_distance(means: Tensor, has: Tensor) -> Tensor:
    """Return the largest Euclidean distance of two class centers, each the mean over the clients with the class."""
    mine = has[..., None].to(means.dtype)
    centres = (means * mine).sum(0) / mine.sum(0).clamp(min=1)
    there = has.any(0)
    apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(there[:, None] & there, apart, torch.zeros_like(apart)).max()


HEAD = "head"


@register_algorithm("fedgh")
class FedGH(CommonHead):
    """Train one head for all clients at the server, on each client's mean features by class.

    Clients of any architecture train on their own rows from this head; the rest of each model stays with its client (Yi et al.
    2023, Algorithm 1). Clients upload sums of features and counts by class, taken after their local training. Each client's mean of a class
    is one example at the server, whatever its count.
    """

    title = "FedGH"
    shared = ()
    uploads = {"features": ItemSpec("class_sums", use="each", private=True, share="statistics")}

    server_epochs: PositiveInt = Field(
        100, description="epochs a round on the clients' class means, at the server"
    )
    server_lr: PositiveFloat = Field(0.01, description="learning rate of SGD at the server")
    server_batch_size: PositiveInt = Field(10, description="class means a step, at the server")

    def setup(self, server: Participant) -> None:
        server.arch[HEAD] = ModelSpec.from_config(
            "linear", server.task.outputs, (self.feature_dim or 1,)
        )
        server.models[HEAD] = server.arch[HEAD].initial_tensors(server.round_context.seed)

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        due = (
            server.state.get("trained", False)
            and server.round_context.round_idx % recipient.settings.share_every == 0
        )
        # an untrained head would only undo what clients know
        return {HEAD: server.models[HEAD]} if due else {}

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        if HEAD in received:
            client.load("model", received[HEAD])
        yield from ()

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield local_fit(client)
        return (yield from upload_class_features(client))

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        items = [u.payload.item("features") for u in uploads.having("features")]
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
