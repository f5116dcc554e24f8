"""Base class of federated methods, declarations of their properties, and helpers for subclasses.

A slot is the name under which a client or the server stores a model. A part of a model is a tuple
of prefixes of tensor names, or None for the whole model. An item is a named entry of an upload or a
broadcast (see `hetero_fl.core.payload`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import GeneratorType
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import Tensor

from hetero_fl.aggregation.means import add_updates, interpolate_model
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.local_training import add_log_prior, local_fit, subtract_log_prior
from hetero_fl.config.base import Settings, StalenessConfig, rename_keys
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.participant import (
    ClientDirectory,
    ClientInfo,
    Part,
    Participant,
    exclude_part,
    floating_tensors,
    select_part,
)
from hetero_fl.core.payload import Item, ItemSpec, Payload, PayloadError
from hetero_fl.core.plan import Plan, Predict, Rows
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.registry import Registry

STUDENT = "student"
"""Slot of the student model that the server trains, a key of `server.models`.

If the server has a model in this slot, `Algorithm.server_model` returns it for deployment.
"""
Items = dict[str, Any]
"""Content of an upload or a broadcast, keyed by item name.

Each value is an `Item`, a tensor, or a dictionary of tensors. A tensor is an item of kind `rows`
with weight 1, a dictionary an item of kind `params` with weight 1.
"""
# Decorator that registers a method: `@register_algorithm("name")`. `register_algorithm["name"]`
# returns the class.
register_algorithm: Registry[type[Algorithm]] = Registry(
    "algorithm",
    lambda: Algorithm,
    all_of="`hetero-fl methods`",
    plugins="hetero_fl.algorithms",
)


@dataclass(frozen=True)
class AsyncPolicy:
    """Policy of an asynchronous method for buffering and weighting uploads.

    Args:
        buffer_size: Number of uploads per aggregation. If None, `runtime.buffer` is used.
        staleness: Settings of the weight of stale uploads. If None, `runtime.staleness` is used.

    Example:
        >>> from hetero_fl.algorithms import AsyncPolicy
        >>> AsyncPolicy(buffer_size=1)
        AsyncPolicy(buffer_size=1, staleness=None)
    """

    buffer_size: int | None = None
    staleness: StalenessConfig | None = None


@dataclass(frozen=True)
class Needs:
    """Requirements of a method, which are checked before a run and listed in tables.

    Args:
        proxy_set: Whether the method uses a proxy set, a public data set on which clients exchange
            predictions. With `labeled`, the method requires a proxy set with labels.
        tasks: Supported kinds of task.
        one_architecture: Whether parameters are averaged within each architecture. A client with a
            unique architecture then learns nothing from other clients.
        all_clients: Whether the rows or models of all clients are collected in one place. Tables
            list such a method as a reference, not as a competitor.
        counts_traffic: Whether the bytes sent count as communication cost.
        one_upload: Whether clients upload only once, in the last round. Such a run cannot be
            extended by further rounds.
        models_per_client: Whether clients with equal settings may have different models.
        asynchronous: Policy of a method that only runs asynchronously. If None, `runtime.mode`
            applies.
        largest_uploads: Settings that result in the largest uploads, for methods whose upload size
            depends on the training.
        also: Descriptions of further requirements, as printed in tables.
        shared_model: Whether the model that predicts the global test set was last trained by
            several clients or by the server. The setting `prior_correction` does not apply to such
            a model.
        unused_options: Client settings that have no meaning for the method, such as
            `fine_tune_epochs`. Runs that set one of these settings are rejected.

    Example:
        >>> from hetero_fl.algorithms import Needs
        >>> Needs(proxy_set="labeled").has_required_proxy
        True
    """

    proxy_set: Literal["unused", "optional", "required", "labeled"] = "unused"
    tasks: tuple[str, ...] = ("multiclass", "multilabel", "regression")
    one_architecture: bool = False
    all_clients: bool = False
    counts_traffic: bool = True
    one_upload: bool = False
    models_per_client: bool = False
    asynchronous: AsyncPolicy | None = None
    largest_uploads: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    shared_model: bool = False
    unused_options: tuple[str, ...] = ()

    @property
    def has_required_proxy(self) -> bool:
        """Whether the method requires a proxy set."""
        return self.proxy_set in ("required", "labeled")


@dataclass(frozen=True)
class SharedPart:
    """The part of a client's model that client and server exchange.

    Use this class as `Algorithm.shared` if prefixes of tensor names do not suffice.

    Args:
        part: Prefixes of the names of exchanged tensors. If None, the whole model is exchanged. If
            `()`, no tensors are exchanged.
        slot: Slot of the model, which is also the name of the exchanged item. Default: `"model"`,
            the client's own model. A method with another slot must define how this model is
            trained and, if its architecture differs from the client's own model, how it is sent
            and aggregated.
        received: Prefixes of the names of tensors that the client replaces with the server's
            tensors. If None, the client replaces all tensors in `part`.
        local: BatchNorm tensors that never leave the client: all tensors of BatchNorm layers, or
            only the running statistics. If None, BatchNorm layers are exchanged like all other
            layers.

    Example:
        >>> from hetero_fl.algorithms import SharedPart
        >>> SharedPart(("backbone.",), local="batch_norm").slot
        'model'
    """

    part: Part = None
    slot: str = "model"
    received: Part = None
    local: Literal["batch_norm", "batch_norm_statistics"] | None = None


class Algorithm(Settings):
    """Base class of federated methods.

    By default, clients train locally, and the server averages the `shared` part of the models
    within each architecture. Settings of a method are pydantic fields. A configuration lists these
    settings next to `algorithm.name`. Hooks that train models or compute predictions are
    generators, called plans (see `hetero_fl.core.plan`). All other hooks are ordinary functions.
    The decorator `@register_algorithm("name")` makes a subclass available under a name.

    Attributes:
        title: Display name. The first sentence of the docstring is the one-line summary.
        renamed_settings: New names of renamed settings, keyed by former name.
        evaluated_when: Description of the evaluated model, for tables.
        shared: Part of the model that is exchanged: None for the whole model, `()` for nothing,
            prefixes of tensor names, or a `SharedPart`.
        uploads: Declarations of the items that clients upload, keyed by item name.
        downloads: Declarations of broadcast items, keyed by item name. Only items whose compression
            differs from the default of their kind need a declaration.
        needs: Requirements of the method.

    Example:
        >>> from pydantic import Field
        >>> from hetero_fl.algorithms import Algorithm, local_fit, register_algorithm, upload_model
        >>> class LongerFedAvg(Algorithm):
        ...     title = "Longer FedAvg"
        ...     factor: int = Field(2, ge=1, description="factor on the local epochs")
        ...
        ...     def train(self, client, received):
        ...         yield from self.deploy(client, received)
        ...         yield local_fit(client, epochs=self.factor * client.settings.epochs)
        ...         return upload_model(self, client)
        >>> LongerFedAvg(factor=3).uploads["model"].kind
        'params'
        >>> register_algorithm["fedavg"].title
        'FedAvg'
    """

    title: ClassVar[str] = ""
    renamed_settings: ClassVar[Mapping[str, str]] = {}
    evaluated_when: ClassVar[str] = "after aggregation, as deployed with the next broadcast"
    shared: ClassVar[Part | SharedPart] = None
    uploads: ClassVar[Mapping[str, ItemSpec]] = {"model": ItemSpec("params")}
    downloads: ClassVar[Mapping[str, ItemSpec]] = {}
    needs: ClassVar[Needs] = Needs(one_architecture=True, shared_model=True)

    @model_validator(mode="before")
    @classmethod
    def _rename_settings(cls, raw: Any) -> Any:
        return rename_keys(raw, cls.renamed_settings, "algorithm")

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        """Derive unset settings from the federation.

        This hook is called once, before models are built. The settings of the returned method are
        saved in the run's `config.yaml`. By default, the method is returned unchanged.

        Args:
            clients: All clients of the federation.

        Returns:
            The method with all settings, and one line of text for each derived setting.

        Raises:
            UserError: If the settings do not suit the clients.
        """
        return self, []

    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        """Return the architectures of a client's models, keyed by slot.

        The client's own model is in the slot `model`. This hook is called once for all clients with
        equal settings, or once for each client if `needs.models_per_client` is set.
        """
        return {"model": client.arch}

    def setup(self, server: Participant) -> None:
        """Initialize the server's state before the first round.

        By default, the state is not changed.
        """

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        """Return the items that the server sends to one client.

        By default, the broadcast contains the shared part of the server's model with the client's
        architecture. The broadcast is empty in rounds in which the client does not replace its
        model.

        Args:
            server: The server.
            recipient: The client. Its `purpose` is "train" or "evaluate".
        """
        part = download_part(self, recipient.settings, server.round_context.round_idx)
        if part == ():
            return {}
        model = server.models[recipient.arch.family_id]
        slot = shared_part_of(self).slot
        return {slot: shareable_tensors(self, recipient.arch, model, part)}

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        """Update the client's models with the received items, so that the client can predict.

        By default, the received tensors replace the tensors of the same names.
        """
        slot = shared_part_of(self).slot
        if slot in received:
            client.load(slot, received[slot])
        yield from ()

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        """Train a client for one round and return the client's upload.

        By default, the client deploys the received items, trains its own model with its own
        settings, and uploads the shared part of the model.
        """
        yield from self.deploy(client, received)
        yield local_fit(client)
        return upload_model(self, client)

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        """Aggregate the uploads of a round at the server.

        By default, the uploaded models are averaged within each architecture.
        """
        slot = shared_part_of(self).slot
        if slot in self.uploads:
            average_models(server, uploads, item=slot)
        yield from ()

    def personalize(self, client: Participant, received: Payload) -> Plan[None]:
        """Adapt the deployed model to the client's own rows before evaluation.

        The engine calls this hook on a copy of the client. By default, the model is trained for the
        number of epochs in the client's setting `fine_tune_epochs`. If this setting is 0 or None,
        the model is not changed. If the client's setting `fine_tune_before` is `local_tests`, the
        adapted model is evaluated on the client's own rows only.
        """
        if client.settings.fine_tune_epochs:
            yield local_fit(client, epochs=client.settings.fine_tune_epochs, label="fine-tune")

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        """Return the client's logits, shape `[N, C]`.

        By default, the client's own model predicts, and `adjust_to_labels` adjusts the logits.

        Args:
            client: The client.
            rows: The rows to predict.
            personal: Whether the rows follow the client's own label distribution.
        """
        logits = yield Predict("model", rows)
        return adjust_to_labels(self, client, logits, personal)

    def server_model(self, server: Participant) -> str | None:
        """Return the slot of the model that the server can deploy, or None if there is none.

        By default, this is the student if there is one. Otherwise, this is the global model,
        provided that all clients have the same architecture, at least one client shares its whole
        model, and no BatchNorm tensors are excluded from the exchange (`SharedPart.local`).
        """
        if STUDENT in server.models:
            return STUDENT
        profiles = server.peers.profiles
        shares_whole_model = any(
            shared_part(self, profile.settings) is None for profile in profiles
        )
        if not shares_whole_model or len(server.models) != 1:
            return None
        (slot,) = server.models
        arch = server.arch[slot]
        # Whether a model writes tensors is found out by running it, so only if necessary.
        is_complete = not arch.local_names or arch.local_names.isdisjoint(arch.written_names)
        return slot if is_complete and not _excluded_names(self, arch) else None


def runs_user_code(algorithm: Algorithm, client_infos: ClientDirectory) -> bool:
    """Return whether the method or a client's objective is defined outside this package.

    Such code may modify tensors in place.
    """
    return is_user_method(algorithm) or any(
        profile.settings.objective is not None for profile in client_infos.profiles
    )


def is_user_method(algorithm: Algorithm) -> bool:
    """Return whether a method is defined outside this package."""
    return not type(algorithm).__module__.startswith("hetero_fl.")


def call_broadcast(algorithm: Algorithm, server: Participant, client_info: ClientInfo) -> Payload:
    """Call the method's `broadcast` and return the result as a payload.

    Args:
        algorithm: The method.
        server: The server.
        client_info: The recipient.

    Raises:
        UserError: If the method did not return a dictionary of items.
    """
    try:
        return Payload.from_hook(algorithm.broadcast(server, client_info))
    except PayloadError as error:
        raise UserError(f"{type(algorithm).__name__}.broadcast: {error}") from None


def shared_part_of(method: Algorithm) -> SharedPart:
    """Return the method's shared part as a `SharedPart`."""
    return method.shared if isinstance(method.shared, SharedPart) else SharedPart(method.shared)


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
    if not a or not b:
        return ()
    prefixes = {p for p in a if p.startswith(b)} | {p for p in b if p.startswith(a)}
    return tuple(sorted(prefixes))


def shared_part(method: Algorithm, settings: ClientSettings) -> Part:
    """Return the part of the model that the method shares and the client's settings permit."""
    return common_part(shared_part_of(method).part, permitted_part(settings.shares))


def uploads_in_round(settings: ClientSettings, round_idx: int) -> bool:
    """Return whether a client uploads in a round, given the client's setting `share_every`."""
    return (round_idx + 1) % settings.share_every == 0


def upload_part(method: Algorithm, settings: ClientSettings, round_idx: int) -> Part:
    """Return the part of the model that a client uploads in a round.

    The part is empty if the client does not upload in this round.
    """
    return shared_part(method, settings) if uploads_in_round(settings, round_idx) else ()


def download_part(method: Algorithm, settings: ClientSettings, round_idx: int) -> Part:
    """Return the part of a client's model that the server's model replaces in a round.

    The part is empty except in the first round and in the round after each upload.
    """
    if round_idx % settings.share_every != 0:
        return ()
    return common_part(shared_part(method, settings), shared_part_of(method).received)


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


def local_tensor_names(method: Algorithm, arch: ModelSpec) -> frozenset[str]:
    """Return the names of the tensors that always stay at clients with this architecture.

    These are the BatchNorm tensors that the method excludes (`SharedPart.local`), and the tensors
    that no client shares (`ModelSpec.local_names`).
    """
    return _excluded_names(method, arch) | arch.local_names


def _excluded_names(method: Algorithm, arch: ModelSpec) -> frozenset[str]:
    local = shared_part_of(method).local
    if local is None:
        return frozenset()
    names = arch.batch_norm_names
    return names if local == "batch_norm" else names - arch.parameter_names


def shareable_tensors(
    method: Algorithm, arch: ModelSpec, tensors: Mapping[str, Tensor], part: Part
) -> Tensors:
    """Return the tensors of a part that client and server exchange.

    Integer buffers and the tensors of `local_tensor_names` are left out.

    Args:
        method: The method.
        arch: Architecture of the model.
        tensors: Tensors of the model, keyed by name.
        part: The shared part.
    """
    local = local_tensor_names(method, arch)
    selected = floating_tensors(select_part(tensors, part))
    return {name: tensor for name, tensor in selected.items() if name not in local}


def kept_state(method: Algorithm, client: Participant) -> dict[str, Tensors]:
    """Return the tensors that a client must store between rounds, keyed by slot.

    These are the tensors of the client's models that no broadcast replaces. Models without such
    floating-point tensors are left out.
    """
    slot = shared_part_of(method).slot
    settings = client.settings
    replaced = download_part(method, settings, 0) if settings.share_every == 1 else ()
    arch = client.arch[slot]
    local = _excluded_names(method, arch)
    if arch.local_names:
        # Frozen parameters are equal for all clients, unless the forward pass writes them.
        local |= arch.local_names - (arch.parameter_names - arch.written_names)
    own = client.models[slot]
    kept = exclude_part(own, replaced) | {n: t for n, t in own.items() if n in local}
    models = {**client.models, slot: kept}
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


def adjust_to_labels(
    method: Algorithm, client: Participant, logits: Tensor, personal: bool
) -> Tensor:
    """Adjust logits to the label distribution of the predicted rows.

    Args:
        method: The method.
        client: The client. Its settings `local_prior` and `prior_correction` apply.
        logits: Logits, shape `[N, C]`.
        personal: Whether the rows follow the client's own label distribution.

    Returns:
        Logits, shape `[N, C]`. With the client's class prior π, the result for the client's own
        rows is `logits + log π` if `local_prior` applies. The result for other rows is
        `logits - log π` if `prior_correction` is set, unless the model has also been trained by
        other clients or the server. Otherwise, the logits are returned unchanged.
    """
    if personal:
        return add_log_prior(client, logits)
    return logits if method.needs.shared_model else subtract_log_prior(client, logits)


def predicts_proxy_set(method: Algorithm) -> bool:
    """Return whether the method uses clients' predictions on the proxy set."""
    return any(spec.needed_share == "predictions" for spec in method.uploads.values())


def unused_options(method: Algorithm) -> set[str]:
    """Return the client settings that have no meaning for a method."""
    unused = set(method.needs.unused_options)
    if method.needs.shared_model and not predicts_proxy_set(method):
        unused.add("prior_correction")
    if "fine_tune_epochs" in unused:
        unused.add("fine_tune_before")
    return unused


def predicting_models(
    method: Algorithm, client: Participant, personal: bool
) -> list[tuple[Predict, Any]]:
    """Return the model outputs that the first step of `predict` requests.

    Args:
        method: The method.
        client: The client.
        personal: Whether the client predicts its own rows.

    Returns:
        The `Predict` step of each model, and the preprocessing of the model's inputs (None for the
        client's own preprocessing). The list is empty if the first step requests anything else.
    """
    # Use a copy, because a plan that draws random numbers would advance the client's streams.
    plan = method.predict(replace(client, stream_uses={}), Rows("train"), personal)
    if not isinstance(plan, GeneratorType):
        return []
    step = next(plan, None)
    plan.close()
    return [
        (prediction, getattr(prediction.data, "preprocess", None))
        for prediction in (step if isinstance(step, list) else [step])
        if isinstance(prediction, Predict) and prediction.slot in client.models
    ]


def inference_model(method: Algorithm, client: Participant) -> tuple[str, Any]:
    """Return the model with which a deployed client predicts its own rows.

    This is the model whose logits the first step of `predict` requests. If this step requests
    anything else, for example the outputs of several models, the slot of the client's own model is
    returned.

    Returns:
        The slot of the model, and the preprocessing of the model's inputs (None for the client's
        own preprocessing).
    """
    models = predicting_models(method, client, personal=True)
    if len(models) == 1 and models[0][0].readout == "logits":
        return models[0][0].slot, models[0][1]
    return "model", None


def upload_model(method: Algorithm, client: Participant, weight: float | None = None) -> Items:
    """Return an upload with the shared part of a client's model.

    The upload is empty if the client shares nothing in this round.

    Args:
        method: The method.
        client: The client.
        weight: Weight of the client in the mean. If None, the number of the client's training rows
            is used.

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
    part = upload_part(method, client.settings, client.round_context.round_idx)
    if part == ():
        return {}
    slot = shared_part_of(method).slot
    tensors = shareable_tensors(method, client.arch[slot], client.models[slot], part)
    if not tensors:
        return {}
    weight = float(client.num_rows) if weight is None else weight
    return {slot: Item(tensors, weight, "params")}


def average_models(
    server: Participant, uploads: Uploads, rate: float = 1.0, item: str = "model"
) -> None:
    """Move the model of each architecture group towards the mean of the uploaded models.

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
        parameters = server.arch[group].parameter_names
        server.models[group] = interpolate_model(server.models[group], mean, rate, parameters)


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
