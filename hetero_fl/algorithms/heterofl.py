"""HeteroFL: clients train slices of one wide model."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.averaging import FedAvg
from hetero_fl.algorithms.base import Algorithm, Needs, register_algorithm
from hetero_fl.algorithms.prediction import adjust_to_labels
from hetero_fl.algorithms.round_parts import Items, SharedPart, interpolate_model, local_fit
from hetero_fl.config.clients import ModelConfig, expand_model_name
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import Masked
from hetero_fl.core.participant import ClientDirectory, ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan, Predict, Rows
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_key
from model_zoo import can_narrow, narrow_options, share_of

# The smallest width of Diao et al. 2021.
MIN_WIDTH = 1 / 16
# Default wide models, keyed by the number of input dimensions. The key 0 stands for tokens.
DEFAULT_MODELS = {
    0: ModelConfig(name="text_cnn"),
    1: ModelConfig(name="mlp", hidden=[64]),
    2: ModelConfig(name="mlp", hidden=[64]),
    3: ModelConfig(name="cnn_gn_medium"),
}


def choose_model(client_infos: ClientDirectory) -> ModelConfig:
    """Choose the wide model: the widest model of the family that most clients use.

    A family consists of a model and all narrower copies of this model. Of equally frequent
    families, the family with the widest model is chosen. If no client's model can be narrowed, a
    default model for the shape of the examples is chosen.
    """
    members = Counter[ModelSpec]()
    for profile in sorted(client_infos.profiles, key=lambda p: natural_key(p.first)):
        if can_narrow(profile.arch.name):
            members[profile.arch] += profile.count
    if not members:
        example = client_infos.profiles[0].arch
        return DEFAULT_MODELS[0 if example.vocabulary else len(example.input_shape)]
    family_sizes = {
        arch: sum(n for other, n in members.items() if _relative_width(other, arch) is not None)
        for arch in members
    }
    wide = max(family_sizes, key=lambda arch: (family_sizes[arch], num_parameters(arch)))
    return ModelConfig(name=wide.name, feature_dim=wide.feature_dim, **dict(wide.options))


def derive_width(arch: ModelSpec, wide: ModelSpec) -> float:
    """Return the width of a client with this architecture, relative to the wide model.

    If the architecture is not a narrower copy of the wide model, the width is the power of two from
    1/16 to 1 that is nearest to the square root of the ratio of both numbers of parameters. The
    number of parameters grows with the square of the width.
    """
    width = _relative_width(arch, wide)
    if width is not None:
        return width
    level = round(math.log2(num_parameters(arch) / num_parameters(wide)) / 2)
    return max(MIN_WIDTH, 2.0 ** min(0, level))


def num_parameters(arch: ModelSpec) -> int:
    """Return the number of trainable parameters of a model."""
    return sum(
        math.prod(shape) for name, shape in arch.shapes.items() if name in arch.parameter_names
    )


def _relative_width(arch: ModelSpec, wide: ModelSpec) -> float | None:
    if arch.feature_dim != wide.feature_dim:
        return None
    return share_of(arch.name, dict(arch.options), wide.name, dict(wide.options))


# Names of the tensors of the head. With `masked`, the head is uploaded as one padded tensor, so
# that heads of all widths can be summed.
HEAD = ("head.weight", "head.bias")


def pack_head(weight: Tensor, bias: Tensor, width: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pad a linear head to the width of the wide model.

    Args:
        weight: Weight of the head, shape `[C, d]`.
        bias: Bias of the head, shape `[C]`.
        width: Feature width of the wide model.
        mask: Weight of each class, shape `[C]`.

    Returns:
        Values with the bias in the last column, and the weight of each value, which is 0 in the
        padding. Both have shape `[C, width + 1]`.
    """
    values, weights = weight.new_zeros(2, len(bias), width + 1)
    values[:, : weight.shape[1]] = weight
    values[:, width] = bias
    weights[:, : weight.shape[1]] = 1
    weights[:, width] = 1
    return values, weights * mask[:, None]


def unpack_head(model: Tensors, mean: Tensor, weight: Tensor) -> Tensors:
    """Return the wide model's head after replacing its values with the mean of the packed heads.

    Args:
        model: The wide model.
        mean: Mean of the packed heads, shape `[C, width + 1]`.
        weight: Total weight of each value, shape `[C, width + 1]`. Values with weight 0 keep the
            current value of the wide model.

    Returns:
        The new weight and bias, keyed by tensor name.
    """
    width = mean.shape[1] - 1
    current = torch.cat([model[HEAD[0]], model[HEAD[1]][:, None]], 1)
    new = torch.where(weight > 0, mean, current)
    return {HEAD[0]: new[:, :width].clone(), HEAD[1]: new[:, width].clone()}


def leading_slice(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a view of the first `shape[i]` elements of a tensor along each dimension i."""
    return tensor[tuple(slice(0, size) for size in shape)]


def leading_slice_means(current: Tensors, members: Iterable[tuple[Tensors, float]]) -> Tensors:
    """Return the weighted mean of each element over the members that contain the element.

    Args:
        current: The current tensors, keyed by name.
        members: Tensors, keyed by name, and weight of each member. Each tensor is a leading slice
            of the current tensor with the same name.

    Returns:
        The means of the tensors that at least one member sent. Elements that no member sent do not
        change.
    """
    means: Tensors = {}
    weights: dict[str, Tensor] = {}
    for tensors, weight in members:
        for name, tensor in tensors.items():
            if name not in means:
                means[name] = current[name].clone()
                weights[name] = torch.zeros_like(current[name])
            mean = leading_slice(means[name], tensor.shape)
            owned = leading_slice(weights[name], tensor.shape)
            owned += weight
            # 1 for the first owner, so that a single value is not rounded.
            share = torch.where(owned > 0, weight / owned, 0.0)
            mean.copy_(torch.lerp(mean, tensor, share))
    return means


@register_algorithm("heterofl")
class HeteroFL(FedAvg):
    """Train slices of one wide model and average each element over the clients that have it.

    A wide model replaces the clients' models. Each client trains, uploads and receives as many
    leading channels as its width specifies (Diao et al. 2021, Algorithm 1). All clients have equal
    weight, as in the authors' code. BatchNorm is static, as in the paper: each batch is normalized
    with the statistics of the batch, running statistics stay at the client, and scales and shifts
    are averaged. Each client is evaluated with its own slice of the wide model. The wide model is
    evaluated only if it has no BatchNorm.

    The width of a client is that of the client's model, if this model is a narrower copy of the
    wide model. Otherwise, it is the power of two from 1/16 to 1 that is nearest to the square root
    of the ratio of parameter counts.

    Use this method where clients differ in compute only. At least one client must have the full
    width.

    Deviations: the mask of absent classes is off by default. The mask reveals a client's classes to
    the server and requires `statistics` in `shares`. The outputs of narrow models are divided in
    evaluation as well, because each client is evaluated with its own slice.

    References:
        Diao et al., "HeteroFL: Computation and Communication Efficient Federated Learning for
            Heterogeneous Clients", ICLR 2021. https://arxiv.org/abs/2010.01264

    Example:
        >>> from hetero_fl.algorithms import HeteroFL
        >>> HeteroFL(model="cnn", masked=True).model.name
        'cnn'
    """

    title = "HeteroFL"
    shared = SharedPart(local="batch_norm_statistics")
    uploads = {"model": ItemSpec("params"), "head": ItemSpec("params", private=True)}

    _removed = {"widths": "models of these widths for the groups of clients"}

    weighting: Literal["uniform", "samples"] = Field(
        "uniform", description="client weights: all equal, or w_k = n_k"
    )
    model: Annotated[ModelConfig, BeforeValidator(expand_model_name)] | None = Field(
        None,
        description="the wide model; `null`: the widest model of the clients' most frequent "
        "family that can be narrowed, or else cnn_gn_medium, mlp or text_cnn by the kind of data",
    )
    scaler: bool = Field(
        True, description="whether to divide layer outputs of a narrow model by its width"
    )
    masked: bool = Field(
        False,
        description="whether logits of classes that a client lacks are 0 and its head rows for "
        "these classes are not averaged",
    )

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # depends on a setting
        """Requirements of the method: one model family for all clients."""
        return Needs(
            also=("one model family",),
            shared_model=True,
            unused_options=("fine_tune_epochs",) if self.masked else (),
        )

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        model = self.model or choose_model(clients)
        if not can_narrow(model.name):
            raise UserError(
                f"algorithm.model: {model.name} has no narrower copies; choose mlp, tabular, a "
                "cnn or a resnet"
            )
        method = self.model_copy(update={"model": model})
        by_width = defaultdict(list)
        for profile in clients.profiles:
            width = derive_width(profile.arch, method.wide_model(profile.arch))
            by_width[width].append(profile)
        if max(by_width) < 1:
            raise UserError(
                f"algorithm.model: at least one client must have the full width of {model.name}, "
                f"the widest has {max(by_width):g}; choose a narrower model"
            )
        shapes = sorted({profile.arch.input_shape for profile in clients.profiles})
        if self.masked and len(shapes) > 1:
            raise UserError(
                f"algorithm.masked: examples must have the same shape for all clients, got {shapes}"
            )
        widths = [
            f"width {width:g} for {clients.format_clients(profiles, 4)}"
            for width, profiles in sorted(by_width.items(), reverse=True)
        ]
        note = f"algorithm.model is {model.name} and replaces clients' models: {'; '.join(widths)}"
        return method, [note]

    def wide_model(self, arch: ModelSpec) -> ModelSpec:
        """Return the wide model with the input shape and outputs of a client's architecture."""
        assert self.model is not None, "configure sets the model"
        sizes = (arch.outputs, arch.input_shape, self.model.feature_dim)
        options = self.model.options
        return ModelSpec.from_config(self.model.name, *sizes, options, vocabulary=arch.vocabulary)

    @override
    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        wide = self.wide_model(client.arch)
        width = derive_width(client.arch, wide)
        if width == 1:
            return {"model": wide}
        name, options = narrow_options(wide.name, dict(wide.options), width, self.scaler)
        narrow = replace(wide, name=name, options=tuple(sorted(options.items())))
        label = f"{wide.name} at {width:.3g}"
        return {"model": replace(narrow, label=label, family=wide.spec_id)}

    @override
    def setup(self, server: Participant) -> None:
        models = [self.wide_model(profile.arch) for profile in server.peers.profiles]
        server.arch = {arch.spec_id: arch for arch in models}
        server.models = {
            group: server.arch[group].initial_tensors(server.round_context.seed)
            for group in sorted(server.arch)
        }

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        items = super().broadcast(server, recipient)
        return {
            name: {n: leading_slice(t, recipient.arch.shapes[n]) for n, t in wide.items()}
            for name, wide in items.items()
        }

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        items: Items = yield from super().train(client, received)
        if not items or not self.uses_mask(client) or HEAD[0] not in items["model"].values:
            return items
        model = dict(items["model"].values)
        width = self.wide_model(client.arch["model"]).shapes[HEAD[0]][1]
        weight = self.weight_of(client) * self.present_classes(client)
        values, weight = pack_head(model.pop(HEAD[0]), model.pop(HEAD[1]), width, weight)
        head = Item(values, weight, "params")
        return {"model": replace(items["model"], values=model), "head": head}

    @override
    def local_training(self, client: Participant, received: Payload) -> Plan[None]:
        if self.uses_mask(client):
            present = {"present": self.present_classes(client)}
            yield local_fit(client, Masked(client.task.kind), context=present)
        else:
            yield local_fit(client)

    def uses_mask(self, client: Participant) -> bool:
        """Return whether the mask applies: `masked` is set and the task is multiclass."""
        return self.masked and client.task.kind == "multiclass"

    @staticmethod
    def present_classes(client: Participant) -> Tensor:
        """Return 1 for classes in the client's training rows and 0 for all others, shape `[C]`.

        All values are 1 if the client does not share statistics.
        """
        ones = client.models["model"][HEAD[0]].new_ones(client.task.outputs)
        if "statistics" not in client.settings.shares:
            return ones
        return (client.counts > 0).to(ones)

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        family_of = {c.arch.spec_id: c.arch.family_id for c in uploads.senders("model")}
        # The maximum is the weight of the tensors that all clients of a group share.
        weights = {g: max(w.values()) for g, w in uploads.weights_by_group("model").items()}
        means = uploads.mean_by_group("model")
        head = uploads.mean("head")
        for family in dict.fromkeys(family_of.values()):
            model = server.models[family]
            members = [(means[g], weights[g]) for g in family_of if family_of[g] == family]
            mean = leading_slice_means(model, members)
            if head is not None:
                mean |= unpack_head(model, head, uploads.total("head")[1])
            server.models[family] = interpolate_model(
                model, mean, self.server_lr, server.arch[family].parameter_names
            )
        yield from ()

    @override
    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if not personal or not self.uses_mask(client):
            return (yield from super().predict(client, rows, personal))
        logits = yield Predict("model", rows)
        return adjust_to_labels(self, client, logits * self.present_classes(client), personal)
