"""HeteroFL: clients train slices of one wide model."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from hetero_fl.aggregation.means import interpolate_model, leading_slice, leading_slice_means
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import (
    Algorithm,
    Items,
    Needs,
    SharedPart,
    register_algorithm,
    upload_model,
)
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.local_training import add_log_prior, local_fit
from hetero_fl.config.clients import ModelConfig, expand_model_name
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import Masked
from hetero_fl.core.participant import ClientDirectory, ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Plan, Predict, Rows
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_key, natural_order
from model_zoo import can_narrow, narrow_options, share_of

# Which family of widths a federation has: the wide model, and each client's share of its channels.

NARROWEST = 1 / 16  # as in Diao et al. 2021
LISTED = 1000  # clients, above which nobody's width is written down by id
WIDE = {  # by the number of dimensions; 0: tokens
    0: ModelConfig(name="text_cnn"),
    1: ModelConfig(name="mlp", hidden=[64]),
    2: ModelConfig(name="mlp", hidden=[64]),
    3: ModelConfig(name="cnn_gn_medium"),
}


def choose_model(client_infos: ClientDirectory) -> ModelConfig:
    """The widest of the kind that most clients run, of the kinds that can be narrowed; the wider kind of equals.

    A model and its narrower copies are one kind. Where no client runs any such, one that suits the examples.
    """
    members = Counter[ModelSpec]()
    for kind in sorted(client_infos.profiles, key=lambda kind: natural_key(kind.first)):
        if can_narrow(kind.arch.name):
            members[kind.arch] += kind.count
    if not members:
        example = client_infos.profiles[0].arch
        return WIDE[0 if example.vocabulary else len(example.input_shape)]
    widest = {
        a: sum(n for other, n in members.items() if _share(other, a) is not None) for a in members
    }
    wide = max(widest, key=lambda a: (widest[a], num_parameters(a)))
    return ModelConfig(name=wide.name, feature_dim=wide.feature_dim, **dict(wide.options))


def choose_widths(
    configured: Mapping[str, float] | Sequence[float] | None,
    model: ModelConfig,
    client_infos: ClientDirectory,
) -> dict[str, float] | None:
    """Each client's share of the wide model's channels, by id; None where there are more than LISTED and their own models say
    it. Raises UserError for shares that do not fit.

    Not given: as `derived` of the client's own model.
    """
    if not can_narrow(model.name):
        raise UserError(
            f"algorithm.model: {model.name} has no narrower copies; take mlp, tabular, a cnn or a resnet"
        )
    if len(client_infos) > LISTED:
        if configured is not None:
            raise UserError(
                f"algorithm.widths: found {len(client_infos):,} clients; by id or in turn they are for up to {LISTED:,}. Leave it "
                "out, and give the groups models of these widths"
            )
        widest = max(client_infos.profiles, key=lambda kind: derive_width(kind.arch, model))
        _check_whole(model, derive_width(widest.arch, model))
        return None
    ids = natural_order(client_infos)
    if configured is None:
        widths = {id: derive_width(client_infos[id].arch, model) for id in ids}
    elif isinstance(configured, Mapping):
        for pattern in configured:
            if not any(fnmatchcase(id, pattern) for id in ids):
                raise UserError(
                    f"algorithm.widths: no client is called '{pattern}'{suggest_or_list(pattern, ids)}"
                )
        matched = {
            id: [w for pattern, w in configured.items() if fnmatchcase(id, pattern)] for id in ids
        }
        if missing := [id for id in ids if not matched[id]]:
            raise UserError(
                f"algorithm.widths: none is given for {missing[0]}; `'*': 1` stands for everybody else"
            )
        widths = {id: matched[id][0] for id in ids}
    else:
        if not configured:
            raise UserError(
                "algorithm.widths: found no number; give shares of the width, such as [1, 0.5, 0.25]"
            )
        widths = {id: configured[i % len(configured)] for i, id in enumerate(ids)}
    for id, width in widths.items():
        if not 0 < width <= 1:
            raise UserError(
                f"algorithm.widths: {id}: found {width:g}; a share of the width is above 0 and at most 1"
            )
    _check_whole(model, max(widths.values()))
    return widths


def describe_widths(
    model: ModelConfig, widths: Mapping[str, float] | None, client_infos: ClientDirectory
) -> list[str]:
    """Return a line on which clients train which share of the wide model."""
    if widths is None:
        kinds = defaultdict(list)
        for kind in client_infos.profiles:
            kinds[derive_width(kind.arch, model)].append(kind)
        listed = {width: client_infos.format_clients(mine, 4) for width, mine in kinds.items()}
    else:
        members = defaultdict(list)
        for client_id, width in widths.items():
            members[width].append(client_id)
        listed = {
            width: ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
            for width, ids in members.items()
        }
    parts = [
        f"{'all' if w == 1 else f'{w:g}'} of it for {listed[w]}"
        for w in sorted(listed, reverse=True)
    ]
    return [f"algorithm.model is {model.name}, in place of clients' own models: {'; '.join(parts)}"]


def derive_width(arch: ModelSpec, model: ModelConfig) -> float:
    """A client's share by its own model: that of a narrower copy of the wide one; of another the power of two nearest to the
    root of its part of the wide model's parameters, which grow with the square of the width.
    """
    wide = wide_model(model, arch)
    share = _share(arch, wide)
    if share is not None:
        return share
    level = round(math.log2(num_parameters(arch) / num_parameters(wide)) / 2)
    return max(NARROWEST, 2.0 ** min(0, level))


def wide_model(model: ModelConfig, arch: ModelSpec) -> ModelSpec:
    """Return the wide model for the inputs of a client with this architecture."""
    sizes = (arch.outputs, arch.input_shape, model.feature_dim)
    return ModelSpec.from_config(model.name, *sizes, model.options, vocabulary=arch.vocabulary)


def num_parameters(arch: ModelSpec) -> int:
    """How many trainable numbers a model has."""
    return sum(
        math.prod(shape) for name, shape in arch.shapes.items() if name in arch.parameter_names
    )


def _share(arch: ModelSpec, wide: ModelSpec) -> float | None:
    if arch.feature_dim != wide.feature_dim:
        return None
    return share_of(arch.name, dict(arch.options), wide.name, dict(wide.options))


def _check_whole(model: ModelConfig, widest: float) -> None:
    if widest < 1:
        raise UserError(
            f"algorithm.widths: nobody has the whole of {model.name}, the widest has {widest:g} of it; "
            "give a client width 1, or name a narrower algorithm.model"
        )


# The head of a model of which each client trains a leading slice and leaves out the classes that it
# lacks.

HEAD = ("head.weight", "head.bias")


def pack_head(weight: Tensor, bias: Tensor, width: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A linear head `[C, d]`, `[C]` as wide as the wide one, so that heads of all widths add up: values `[C, width + 1]` with
    the bias last, and their weights, which are those of the classes, `mask` `[C]`, and nought where the client owns nothing."""
    values, weights = weight.new_zeros(2, len(bias), width + 1)
    values[:, : weight.shape[1]], values[:, width] = weight, bias
    weights[:, : weight.shape[1]], weights[:, width] = 1, 1
    return values, weights * mask[:, None]


def unpack_head(model: Tensors, mean: Tensor, weight: Tensor) -> Tensors:
    """The wide head with the mean of packed ones wherever anybody had a say."""
    width = mean.shape[1] - 1
    now = torch.cat([model[HEAD[0]], model[HEAD[1]][:, None]], 1)
    new = torch.where(weight > 0, mean, now)
    return {HEAD[0]: new[:, :width].clone(), HEAD[1]: new[:, width].clone()}


# HeteroFL: one wide model at the server, of which each client trains a leading slice.


@register_algorithm("heterofl")
class HeteroFL(FedAvg):
    """Train leading slices of one wide model; average each element over its owners (Diao et al. 2021, Algorithm 1).

    The wide model takes the place of the clients' own: each trains as many of its channels as its width allows. Each owner counts once, as in the authors' code. Deviation: the mask of absent classes is off by default. BatchNorm is
    static: batches are normalized by their own statistics, which differ by width and stay with the client; scales and shifts
    are averaged. Each client is evaluated with its own narrow model, so the scaler is applied there as well.
    """

    title = "HeteroFL"
    shared = SharedPart(local="batch_norm_statistics")
    uploads = {"model": ItemSpec("params"), "head": ItemSpec("params", private=True)}

    weighting: Literal["uniform", "samples"] = Field(
        "uniform", description="each owner counts once, or as n_k"
    )
    model: Annotated[ModelConfig, BeforeValidator(expand_model_name)] | None = Field(
        None,
        description="the wide model; none: the clients' most frequent kind that can be narrowed, its widest",
    )
    widths: dict[str, float] | list[float] | None = Field(
        None,
        description="share of the wide model's channels by id or pattern, or in turn; none: as wide as its own model is",
    )
    scaler: bool = Field(
        True, description="divide what a narrow model's layers give by its share of the width"
    )
    masked: bool = Field(
        False,
        description="hold the logits of classes that a client lacks at nought, and average their rows without it",
    )

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # follows from a setting
        """Models that are slices of one, by client where widths are."""
        return Needs(also=("one model family",), models_per_client=self.widths is not None)

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        model = self.model or choose_model(clients)
        widths = choose_widths(self.widths, model, clients)
        views = sorted({kind.arch.input_shape for kind in clients.profiles})
        if self.masked and len(views) > 1:
            raise UserError(
                f"algorithm.masked: clients see examples of {len(views)} shapes, averaged apart; it is for one: {views}"
            )
        return self.model_copy(update={"model": model, "widths": widths}), describe_widths(
            model, widths, clients
        )

    def wide_model(self, arch: ModelSpec) -> ModelSpec:
        """Return the wide model for the inputs of a client with this architecture."""
        assert self.model is not None  # `configure` has set it
        return wide_model(self.model, arch)

    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        # `configure` has set them
        assert self.model is not None and not isinstance(self.widths, list)
        wide = self.wide_model(client.arch)
        if self.widths is None:
            width = derive_width(client.arch, self.model)
            label = f"slice of {wide.name}"
        else:
            width = self.widths[client.client_id]
            label = f"{wide.name} at {width:.3g}"
        if width == 1:
            return {"model": wide}
        name, options = narrow_options(wide.name, dict(wide.options), width, self.scaler)
        narrow = replace(wide, name=name, options=tuple(sorted(options.items())))
        return {"model": replace(narrow, label=label, group=wide.spec_id)}

    def setup(self, server: Participant) -> None:
        server.arch = {
            arch.spec_id: arch
            for arch in (self.wide_model(kind.arch) for kind in server.peers.profiles)
        }
        server.models = {
            id: server.arch[id].initial_tensors(server.round_context.seed)
            for id in sorted(server.arch)
        }

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        items = super().broadcast(server, recipient)
        return {
            name: {n: leading_slice(t, recipient.arch.shapes[n]) for n, t in wide.items()}
            for name, wide in items.items()
        }

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        if self.uses_mask(client):
            present = {"present": self.present_classes(client)}
            yield local_fit(client, Masked(client.task.kind), context=present)
        else:
            yield local_fit(client)
        return self.upload_slice(client)

    def uses_mask(self, client: Participant) -> bool:
        """Return whether the mask applies to the client's task."""
        return self.masked and client.task.kind == "multiclass"

    @staticmethod
    def present_classes(client: Participant) -> Tensor:
        """Return 1 for each class that the client has rows of, else 0, shape `[C]`; all 1 if it does not share that."""
        every = torch.ones_like(client.counts)
        if "statistics" not in client.settings.shares:
            return every
        return (client.counts > 0).to(every.dtype)

    def upload_slice(self, client: Participant) -> Items:
        """Return the upload of the client's slice, its head apart where classes are masked."""
        items = upload_model(self, client, self.weight_of(client))
        if not items or not self.uses_mask(client) or HEAD[0] not in items["model"].values:
            return items
        model = dict(items["model"].values)
        width = self.wide_model(client.arch["model"]).shapes[HEAD[0]][1]
        weight = self.weight_of(client) * self.present_classes(client)
        values, weight = pack_head(model.pop(HEAD[0]), model.pop(HEAD[1]), width, weight)
        head = Item(values, weight, "params")
        return {"model": replace(items["model"], values=model), "head": head}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        families: dict[str, dict[str, None]] = {}
        for sender in uploads.senders("model"):
            families.setdefault(sender.arch.group_id, {})[sender.arch.spec_id] = None
        # Of the tensors that all senders of a group share.
        weights = {g: max(w.values()) for g, w in uploads.weights_by_group("model").items()}
        means = uploads.mean_by_group("model")
        head = uploads.mean("head")
        for family, groups in families.items():
            model = server.models[family]
            mean = leading_slice_means(model, [(means[group], weights[group]) for group in groups])
            if head is not None:
                mean |= unpack_head(model, head, uploads.total("head")[1])
            server.models[family] = interpolate_model(
                model, mean, self.server_lr, server.arch[family].parameter_names
            )
        yield from ()

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if not personal or not self.uses_mask(client):
            return (yield from super().predict(client, rows, personal))
        logits = yield Predict("model", rows)
        return add_log_prior(client, logits * self.present_classes(client))
