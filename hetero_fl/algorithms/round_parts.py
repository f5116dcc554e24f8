"""Parts of a round: local training, and the models that are sent, loaded, uploaded and averaged.

A part of a model is a tuple of prefixes of tensor names, or None for the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.config.clients import NO_AUGMENT, ClientSettings
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import LossFunction, Objective, Supervised, log_prior
from hetero_fl.core.participant import (
    ClientInfo,
    Part,
    Participant,
    exclude_part,
    floating_tensors,
    select_part,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Rows
from hetero_fl.core.task import Task
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.registry import import_reference

if TYPE_CHECKING:
    from hetero_fl.algorithms.base import Algorithm


Items = dict[str, Any]
"""Content of an upload or a broadcast, keyed by item name.

Each value is an `Item`, a tensor, or a dictionary of tensors. A tensor is an item of kind `rows`
with weight 1, a dictionary an item of kind `params` with weight 1.
"""


@dataclass(frozen=True)
class SharedPart:
    """The part of a model that client and server exchange.

    Use this class in `Algorithm.shared` if prefixes of tensor names do not suffice.

    Args:
        part: Prefixes of the names of exchanged tensors. If None, the whole model is exchanged. If
            `()`, no tensors are exchanged.
        received: Prefixes of the names of tensors that the client replaces with the server's
            tensors. If None, the client replaces all tensors in `part`.
        local: BatchNorm tensors that never leave the client: all tensors of BatchNorm layers, or
            only the running statistics. If None, BatchNorm layers are exchanged like all other
            layers.

    Example:
        >>> from hetero_fl.algorithms import SharedPart
        >>> SharedPart(("backbone.",), local="batch_norm").received is None
        True
    """

    part: Part = None
    received: Part = None
    local: Literal["batch_norm", "batch_norm_statistics"] | None = None


Shared = Part | SharedPart | Mapping[str, Part | SharedPart]
"""The part of the client's own model that is exchanged, or such a part for each slot."""


def shared_parts(method: Algorithm) -> dict[str, SharedPart]:
    """Return the shared part of each slot whose model is exchanged."""
    shared = method.shared
    parts = shared if isinstance(shared, Mapping) else {"model": shared}
    return {
        slot: part if isinstance(part, SharedPart) else SharedPart(part)
        for slot, part in parts.items()
    }


def shared_part_of(method: Algorithm, slot: str = "model") -> SharedPart:
    """Return the shared part of a slot, which is `()` if the model is not exchanged."""
    return shared_parts(method).get(slot, SharedPart(()))


def server_slot(method: Algorithm, slot: str, arch: ModelSpec) -> str:
    """Return the server's slot of the model that a client exchanges.

    Args:
        method: The method.
        slot: Slot of the client's model.
        arch: Architecture of the client's model.

    Returns:
        The name of the client's slot if all clients share one model
        (`ItemSpec.across_architectures`), otherwise the name of the architecture group.
    """
    spec = method.uploads.get(slot)
    return slot if spec is not None and spec.across_architectures else arch.family_id


def permitted_part(shares: Sequence[str]) -> Part:
    """Return the part of a model that a client with the setting `shares` may exchange."""
    if "parameters" in shares:
        return None
    prefixes = ["backbone." if share == "backbone" else share for share in shares]
    return tuple(prefix for prefix in prefixes if prefix.endswith("."))


def common_part(a: Part, b: Part) -> Part:
    """Return the intersection of two parts."""
    if a is None:
        return b
    if b is None:
        return a
    prefixes = {p for p in a if p.startswith(b)} | {p for p in b if p.startswith(a)}
    return tuple(sorted(prefixes))


def shared_part(method: Algorithm, settings: ClientSettings, slot: str = "model") -> Part:
    """Return the part of a model that the method shares and the client's settings permit."""
    return common_part(shared_part_of(method, slot).part, permitted_part(settings.shares))


def uploads_in_round(settings: ClientSettings, round_idx: int) -> bool:
    """Return whether a client uploads in a round, given the client's setting `share_every`."""
    return (round_idx + 1) % settings.share_every == 0


def upload_part(
    method: Algorithm, settings: ClientSettings, round_idx: int, slot: str = "model"
) -> Part:
    """Return the part of a model that a client uploads in a round.

    The part is empty if the client does not upload in this round.
    """
    return shared_part(method, settings, slot) if uploads_in_round(settings, round_idx) else ()


def download_part(
    method: Algorithm, settings: ClientSettings, round_idx: int, slot: str = "model"
) -> Part:
    """Return the part of a client's model that the server's model replaces in a round.

    The part is empty except in the first round and in the round after each upload.
    """
    if round_idx % settings.share_every != 0:
        return ()
    received = shared_part_of(method, slot).received
    return common_part(shared_part(method, settings, slot), received)


def upload_phase(method: Algorithm, share_every: int, round_idx: int, num_rounds: int) -> int:
    """Return a number that is equal for rounds in which uploads contain the same items and shapes.

    Args:
        method: The method.
        share_every: The client's setting `share_every`.
        round_idx: Index of the round.
        num_rounds: Number of rounds of the run.
    """
    if method.needs.one_upload:
        return int(round_idx == num_rounds - 1)
    return round_idx % share_every


def excluded_names(method: Algorithm, arch: ModelSpec, slot: str = "model") -> frozenset[str]:
    """Return the names of the BatchNorm tensors that the method excludes (`SharedPart.local`)."""
    local = shared_part_of(method, slot).local
    if local is None:
        return frozenset()
    names = arch.batch_norm_names
    return names if local == "batch_norm" else names - arch.parameter_names


def shareable_tensors(
    method: Algorithm,
    arch: ModelSpec,
    tensors: Mapping[str, Tensor],
    part: Part,
    slot: str = "model",
) -> Tensors:
    """Return the tensors of a part that client and server exchange.

    Integer buffers, BatchNorm tensors that the method excludes, and tensors that no client shares
    (`ModelSpec.local_names`) are left out.

    Args:
        method: The method.
        arch: Architecture of the model.
        tensors: Tensors of the model, keyed by name.
        part: The shared part.
        slot: Slot of the model.
    """
    local = excluded_names(method, arch, slot) | arch.local_names
    selected = floating_tensors(select_part(tensors, part))
    return {name: tensor for name, tensor in selected.items() if name not in local}


def kept_state(method: Algorithm, client: Participant) -> dict[str, Tensors]:
    """Return the tensors that a client must store between rounds, keyed by slot.

    These are the tensors of the client's models that no broadcast replaces. Models without such
    floating-point tensors are left out.
    """
    settings = client.settings
    models = dict(client.models)
    local: frozenset[str] = frozenset()
    for slot in shared_parts(method):
        replaced = download_part(method, settings, 0, slot) if settings.share_every == 1 else ()
        arch = client.arch[slot]
        kept_names = excluded_names(method, arch, slot)
        if arch.local_names:
            # Frozen parameters are equal for all clients, unless the forward pass writes them.
            kept_names |= arch.local_names - (arch.parameter_names - arch.written_names)
        own = client.models[slot]
        kept = {n: t for n, t in own.items() if n in kept_names}
        models[slot] = exclude_part(own, replaced) | kept
        local |= kept_names
    # Other integers, such as counters of BatchNorm layers, are not worth storing.
    return {
        name: tensors
        for name, tensors in models.items()
        if floating_tensors(tensors) or not local.isdisjoint(tensors)
    }


def may_share(client: Participant, share: str) -> bool:
    """Return whether a client may upload an item of this kind in this round.

    The client must share this kind and upload in this round. Predictions also require the proxy
    set.

    Args:
        client: The client.
        share: The kind, "predictions", "statistics" or "features", as in a client's `shares`.

    Example:
        >>> from hetero_fl.algorithms import may_share
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.participant import Participant
        >>> from hetero_fl.core.task import Task
        >>> settings = ClientSettings(shares=["parameters", "statistics"])
        >>> client = Participant("a", Task("multiclass", 2), {}, {}, None, settings, None)
        >>> may_share(client, "statistics"), may_share(client, "features")
        (True, False)
    """
    if share not in client.settings.shares or (share == "predictions" and not client.has_proxy):
        return False
    return uploads_in_round(client.settings, client.round_context.round_idx)


def describe_unshared(
    items: Mapping[str, Item], specs: Mapping[str, ItemSpec], shares: Sequence[str]
) -> str:
    """Describe the first item of an upload that the client's settings do not permit.

    Args:
        items: The upload.
        specs: The method's declarations of the items.
        shares: The client's setting `shares`.

    Returns:
        The description, or an empty string if all items are permitted.
    """
    part = permitted_part(shares)
    for name, item in items.items():
        share = specs[name].needed_share
        if share != "parameters" and share not in shares:
            return f"'{name}' needs {share}"
        if share == "parameters" and part is not None:
            for tensor in exclude_part(item.tensors, part):
                return f"'{name}' contains {tensor or share}"
    return ""


def send_model(
    method: Algorithm, server: Participant, recipient: ClientInfo, slot: str = "model"
) -> Items:
    """Return a broadcast with the shared part of the server's model for a client's slot.

    The broadcast is empty in rounds in which the client does not replace its model.

    Args:
        method: The method.
        server: The server.
        recipient: The client.
        slot: Slot of the client's model, which is also the name of the item.

    Example:
        >>> from hetero_fl.algorithms import FedAvg, send_model
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.model_spec import ModelSpec
        >>> from hetero_fl.core.participant import ClientInfo, Participant
        >>> arch = ModelSpec.from_config("linear", 2, (3,))
        >>> group = arch.spec_id
        >>> models = {group: arch.initial_tensors(0)}
        >>> server = Participant("server", None, {group: arch}, models, None, None, None)
        >>> recipient = ClientInfo("a", arch, 50, None, ClientSettings())
        >>> sorted(send_model(FedAvg(), server, recipient)["model"])
        ['head.bias', 'head.weight']
    """
    part = download_part(method, recipient.settings, server.round_context.round_idx, slot)
    if part == ():
        return {}
    arch = recipient.models.get(slot, recipient.arch)
    tensors = server.models[server_slot(method, slot, arch)]
    return {slot: shareable_tensors(method, arch, tensors, part, slot)}


def load_model(client: Participant, received: Payload, slot: str = "model") -> None:
    """Replace tensors of a client's model with the received tensors of the same names.

    Example:
        >>> import torch
        >>> from hetero_fl.algorithms import load_model
        >>> from hetero_fl.core.participant import Participant
        >>> from hetero_fl.core.payload import Payload
        >>> models = {"model": {"head.bias": torch.zeros(2)}}
        >>> client = Participant("a", None, {}, models, None, None, None)
        >>> load_model(client, Payload({"model": {"head.bias": torch.ones(2)}}))
        >>> client.models["model"]["head.bias"]
        tensor([1., 1.])
    """
    if slot in received:
        client.load(slot, received[slot])


def upload_model(
    method: Algorithm,
    client: Participant,
    weight: float | None = None,
    slots: Iterable[str] | None = None,
) -> Items:
    """Return an upload with the shared parts of a client's models.

    The upload is empty if the client shares nothing in this round.

    Args:
        method: The method.
        client: The client.
        weight: Weight of the client in the mean. If None, the number of the client's training rows
            is used.
        slots: Slots of the models. If None, all models that the method shares are uploaded.

    Example:
        >>> from hetero_fl.algorithms import FedAvg, FedPer, upload_model
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.model_spec import ModelSpec
        >>> from hetero_fl.core.participant import Participant
        >>> from hetero_fl.core.task import Task
        >>> arch = ModelSpec.from_config("linear", 2, (3,))
        >>> models = {"model": arch.initial_tensors(0)}
        >>> task = Task("multiclass", 2)
        >>> settings = ClientSettings()
        >>> client = Participant("a", task, {"model": arch}, models, None, settings, None, 50)
        >>> item = upload_model(FedAvg(), client)["model"]
        >>> sorted(item.values), item.weight
        (['head.bias', 'head.weight'], 50.0)
        >>> upload_model(FedPer(), client)  # FedPer shares the backbone only
        {}
    """
    weight = float(client.num_rows) if weight is None else weight
    items: Items = {}
    for slot in shared_parts(method) if slots is None else slots:
        part = upload_part(method, client.settings, client.round_context.round_idx, slot)
        tensors = shareable_tensors(method, client.arch[slot], client.models[slot], part, slot)
        if tensors:
            items[slot] = Item(tensors, weight, "params")
    return items


def add_model(
    participant: Participant, slot: str, arch: ModelSpec, tensors: Tensors | None = None
) -> None:
    """Add a model to a participant.

    Args:
        participant: The client or the server.
        slot: Slot of the model.
        arch: Architecture of the model.
        tensors: Tensors of the model. If None, the initial tensors of the run are used.
    """
    seed = participant.round_context.seed
    participant.arch[slot] = arch
    participant.models[slot] = arch.initial_tensors(seed) if tensors is None else tensors


def average_models(
    server: Participant, uploads: Uploads, rate: float = 1.0, item: str = "model"
) -> None:
    """Move the model of each architecture group towards the mean of the uploaded models.

    If the item is declared with `across_architectures`, there is one model for all clients, in the
    server's slot with the name of the item.
    Buffers are replaced by their mean, regardless of `rate`.

    Args:
        server: The server.
        uploads: Uploads of the round.
        rate: Server learning rate λ. If 1, parameters are replaced by their mean as well.
        item: Name of the item with the models.

    Example:
        >>> import torch
        >>> from hetero_fl.aggregation.uploads import Upload, Uploads
        >>> from hetero_fl.algorithms import average_models
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.model_spec import ModelSpec
        >>> from hetero_fl.core.participant import ClientInfo, Participant
        >>> from hetero_fl.core.payload import Item, Payload
        >>> arch = ModelSpec.from_config("linear", 1, (1,))
        >>> def upload(client_id, value, num_rows):
        ...     info = ClientInfo(client_id, arch, num_rows, None, ClientSettings())
        ...     tensors = {"head.weight": torch.full((1, 1), value)}
        ...     return Upload(info, Payload({"model": Item(tensors, num_rows, "params")}))
        >>> group = arch.spec_id
        >>> models = {group: arch.initial_tensors(0)}
        >>> server = Participant("server", None, {group: arch}, models, None, None, None)
        >>> average_models(server, Uploads([upload("a", 1.0, 30), upload("b", 2.0, 10)]))
        >>> server.models[group]["head.weight"]
        tensor([[1.2500]])
    """
    for group, mean in uploads.mean_by_group(item).items():
        slot = group or item
        parameters = server.arch[slot].parameter_names
        server.models[slot] = interpolate_model(server.models[slot], mean, rate, parameters)


def add_up_models(server: Participant, uploads: Uploads, factor: float) -> None:
    """Add the scaled sum of the clients' updates to the model of each architecture group.

    Each upload must have weight 1, or the staleness weight of the upload in an asynchronous run.

    Args:
        server: The server.
        uploads: Uploads of the round with the item "model".
        factor: Factor by which the sum is multiplied.
    """
    total_weights = uploads.weights_by_group("model")
    for group, mean in uploads.mean_by_group("model").items():
        parameters = server.arch[group].parameter_names
        server.models[group] = add_updates(
            server.models[group], mean, total_weights[group], factor, parameters
        )


def interpolate_model(
    current: Tensors, mean: Tensors, rate: float, parameters: Iterable[str]
) -> Tensors:
    """Move a model toward a mean: `current + rate * (mean - current)` for parameters.

    Buffers such as BatchNorm statistics are set to the mean, because a rate above 1 could make a
    running variance negative.

    Args:
        current: The current tensors, keyed by name.
        mean: Means of some or all tensors.
        rate: Server learning rate. If 1, the result is exactly the mean.
        parameters: Names of the parameters. All other tensors are buffers.

    Returns:
        The new tensors, keyed by name. Tensors without a mean do not change.
    """
    trainable = set(parameters)
    return _move(current, mean, {name: rate if name in trainable else 1.0 for name in mean})


def add_updates(
    current: Tensors,
    mean: Tensors,
    total_weights: Mapping[str, float],
    factor: float,
    parameters: Iterable[str],
) -> Tensors:
    """Add the weighted sum of the clients' updates: `current + factor * Σ s_k (θ_k - current)`.

    The sum is computed as `factor * S * (mean - current)` with the total weight S = Σ s_k. If no
    upload is stale, all weights s_k are 1 and S is the number of clients that own the tensor. For
    buffers, `factor * S` is limited to 1, because extrapolation beyond the mean could make a
    running variance negative.

    Args:
        current: The current tensors, keyed by name.
        mean: Weighted means of some or all tensors over their owners.
        total_weights: Total weight S of each mean, keyed by tensor name.
        factor: Factor of the updates.
        parameters: Names of the parameters. All other tensors are buffers.

    Returns:
        The new tensors, keyed by name. Tensors without a mean do not change.
    """
    trainable = set(parameters)
    rates = {name: factor * total_weights[name] for name in mean}
    limits = {name: math.inf if name in trainable else 1.0 for name in mean}
    return _move(current, mean, {name: min(limits[name], rate) for name, rate in rates.items()})


def _move(current: Tensors, mean: Tensors, rates: Mapping[str, float]) -> Tensors:
    """Move each tensor toward its mean by a factor. With the factor 1, the result is the mean."""
    moved = {
        n: m if rates[n] == 1 else current[n] + rates[n] * (m - current[n]) for n, m in mean.items()
    }
    return {**current, **moved}


def tie_common_tensors(
    models: dict[str, Tensors],
    common: Sequence[str],
    updated: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> None:
    """Replace each tensor that several groups share by a single tensor, in place.

    Groups share a tensor if the name starts with a prefix in `common` and the shapes are equal.
    Methods that add updates to models call this function, because the results differ between groups
    that start from different tensors. Means of models are equal in all groups.

    Args:
        models: The models, keyed by group and tensor name.
        common: Prefixes of the names of common tensors.
        updated: Names of the updated tensors, keyed by group. All groups receive the first updated
            tensor. If no tensor was updated, all groups receive the tensor of the first group.
    """
    first: dict[tuple[str, torch.Size], Tensor] = {}
    for group, names in [*updated.items(), *models.items()]:
        for name in names if common else ():
            if name.startswith(tuple(common)):
                first.setdefault((name, models[group][name].shape), models[group][name])
    for group, model in models.items():
        models[group] = {
            name: first.get((name, tensor.shape), tensor) for name, tensor in model.items()
        }


def local_fit(
    client: Participant,
    objective: Objective | None = None,
    data: Rows | None = None,
    *,
    epochs: int | None = None,
    context: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Fit:
    """Create the `Fit` step that trains a client's model with the client's own settings.

    The supervised loss applies the client's `objective`, `logit_adjustment` and `class_weights`.

    Args:
        client: The client.
        objective: Objective to minimize, in which the client's setting `objective` replaces the
            supervised loss. If None, this setting is minimized itself.
        data: Rows to train on. If None, the client's training rows are used.
        epochs: Number of epochs. If None, the client's setting `epochs` or `steps` is used.
        context: Tensors that the objective needs in addition to the batch.
        **changes: Values of other fields of `Fit`, such as `train` or `label`.

    Returns:
        The step, to be yielded by the method's plan.

    Example:
        >>> from hetero_fl.algorithms import local_fit
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.participant import Participant
        >>> from hetero_fl.core.task import Task
        >>> settings = ClientSettings(epochs=2, batch_size=16)
        >>> client = Participant("a", Task("multiclass", 2), {}, {}, None, settings, None)
        >>> step = local_fit(client)
        >>> step.epochs, step.batch_size, step.train
        (2, 16, {'model': None})
        >>> local_fit(client, train={"model": ("head.",)}, epochs=5).epochs
        5
    """
    settings = client.settings
    objective = load_objective(settings.objective, client.task, objective)
    data = data or Rows()
    is_supervised = isinstance(objective, Supervised)
    augments = data.name in ("train", "pooled") and settings.augment != NO_AUGMENT
    fields: dict[str, Any] = {
        "train": {"model": None},
        "epochs": settings.epochs if epochs is None else epochs,
        "steps": settings.steps if epochs is None else None,
        "batch_size": settings.batch_size,
        "optimizer": client.optimizer,
        "augment": settings.augment if augments else None,
    }
    return Fit(
        objective=objective,
        data=data,
        context={**(supervised_context(client) if is_supervised else {}), **(context or {})},
        **{**fields, **changes},
    )


def load_objective(
    reference: str | None, task: Task, objective: Objective | None = None
) -> Objective:
    """Return the objective that a reference names, or an objective with the loss that it names.

    Args:
        reference: Reference to a loss function, an `Objective` or a subclass of `Objective`. If
            None, the supervised loss is not replaced.
        task: The learning task. Its kind is passed to the objective.
        objective: Objective of the method. If None, the supervised loss.

    Raises:
        UserError: If the reference cannot be imported or is not an objective, or is not a loss
            function although the method has an objective.
    """
    own = Supervised(task.kind) if objective is None else objective
    if reference is None or not isinstance(own, Supervised):
        return own
    found = import_reference(reference, "objective", Objective, takes="logits, y")
    is_class = isinstance(found, type) and issubclass(found, Objective)
    if not is_class and not isinstance(found, Objective):
        return replace(own, function=LossFunction(found, task))
    if objective is not None:
        raise UserError(
            f"objective: the method combines the local loss with {type(own).__name__}, so it needs "
            f"a function of logits and targets, got the objective {reference}"
        )
    create: Callable[..., Objective] = found
    return create(task.kind) if is_class else found


def supervised_context(client: Participant) -> dict[str, Tensor]:
    """Return the tensors that the supervised loss needs in addition to the batch.

    Args:
        client: The client, whose settings `logit_adjustment` and `class_weights` are used.

    Returns:
        A dictionary with the entries "log_prior" and "class_weights", each of shape `[C]`. Entries
        that the settings do not require are left out.
    """
    settings = client.settings
    context: dict[str, Tensor] = {}
    if client.task.kind != "multiclass":
        return context
    # Read the label counts only if they are used, because reading them may spend privacy budget.
    prior = log_prior(client.task, client.counts) if settings.logit_adjustment else None
    if prior is not None:
        context["log_prior"] = prior
    weights = settings.class_weights
    if weights is not None:
        n = client.counts.to(torch.get_default_dtype())
        w = 1 / n.clamp(min=1) if weights == "balanced" else n.new_tensor(weights)
        # Scale the weights so that their mean over the training rows is one.
        context["class_weights"] = w * n.sum() / (w * n).sum()
    return context
