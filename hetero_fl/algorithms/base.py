"""The interface of a method: what it declares, its hooks in the order of a round, and helpers for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import GeneratorType
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from hetero_fl.aggregation.means import add_updates, interpolate_model
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.local_training import add_log_prior, local_fit
from hetero_fl.config.base import StalenessConfig
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

STUDENT = "student"  # the server's slot of the one model that it trains for itself
Items = dict[str, Any]  # name -> Item, tensor or named tensors
register_algorithm: Registry[type[Algorithm]] = Registry(
    "algorithm", lambda: Algorithm, all_of="`hetero-fl methods`"
)


@dataclass(frozen=True)
class AsyncPolicy:
    """How the server of an asynchronous method takes uploads.

    Attributes:
        buffer_size: Uploads after which it aggregates; None: `runtime.buffer`.
        staleness: The weight of a stale upload; None: `runtime.staleness`.
    """

    buffer_size: int | None = None
    staleness: StalenessConfig | None = None


@dataclass(frozen=True)
class Needs:
    """What a method needs of a federation, for checks before a run and for tables.

    Attributes:
        proxy_set: Whether it trains on a proxy set, and on the labels of that.
        tasks: The kinds of task that it is for.
        one_architecture: Whether it averages parameters within each architecture, so that a client
            with a model of its own learns nothing from others.
        all_clients: Whether all clients' rows or models are in one place: a bound, no competitor.
        counts_traffic: Whether what it sends is traffic of a federation.
        one_upload: Whether clients upload once, in the last round: such a run cannot be extended.
        models_per_client: Whether clients with equal settings may get different models.
        asynchronous: For a method that only runs asynchronously, how its server takes uploads.
        largest_uploads: Settings with which uploads are as long as they can be, where their size
            follows from what is learned.
        also: Further needs, in words that tables print.
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

    @property
    def has_required_proxy(self) -> bool:
        """Whether the method does not run without a proxy set."""
        return self.proxy_set in ("required", "labeled")


@dataclass(frozen=True)
class SharedPart:
    """Which part of a client's model travels, where prefixes of tensor names do not say it all.

    Attributes:
        part: Prefixes of tensor names; None: all of the model, (): nothing.
        slot: The client's model that it is a part of.
        received: What of `part` the client replaces by the server's; None: all of it.
        local: Tensors that stay with the client, whatever part travels.
    """

    part: Part = None
    slot: str = "model"
    received: Part = None
    local: Literal["batch_norm", "batch_norm_statistics"] | None = None


class Algorithm(BaseModel):
    """A federated method. As it stands: FedAvg of the `shared` part, within each architecture.

    Settings are pydantic fields; they stand next to `algorithm.name` in the configuration. A hook
    that computes is a plan (see `hetero_fl.core.plan`); one that does not may be an ordinary
    function.

    Attributes:
        title: The name for tables; the first line of the docstring is the summary.
        evaluated_when: When a model is evaluated, for tables.
        shared: The part of the model that travels: None all, () nothing, else prefixes of tensor
            names, or a `SharedPart`.
        uploads: What clients send.
        downloads: What compression has to know of broadcast items.
        needs: What the method needs of a federation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    title: ClassVar[str] = ""
    evaluated_when: ClassVar[str] = "after aggregation, as deployed with the next broadcast"
    shared: ClassVar[Part | SharedPart] = None
    uploads: ClassVar[Mapping[str, ItemSpec]] = {"model": ItemSpec("params")}
    downloads: ClassVar[Mapping[str, ItemSpec]] = {}
    needs: ClassVar[Needs] = Needs(one_architecture=True)

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        """Derive settings that were left open from the federation.

        Called once, before anything is built; the run's `config.yaml` has the result.

        Returns:
            The method with these settings, and lines that say what was derived.

        Raises:
            UserError: If settings do not fit the clients.
        """
        return self, []

    def models(self, client: ClientInfo) -> Mapping[str, ModelSpec]:
        """Return the models that a client has, by slot; its own is in the slot "model".

        Called once for all clients with the same settings, unless the method needs otherwise.
        """
        return {"model": client.arch}

    def setup(self, server: Participant) -> None:
        """Prepare the server's state before the first round."""

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        """Return what the server sends to one client, to train on or for evaluation only."""
        part = download_part(self, recipient.settings, server.round_context.round_idx)
        if part == ():
            return {}
        model = server.models[recipient.arch.group_id]
        return {"model": shareable_tensors(self, recipient.arch, model, part)}

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        """Make the model that this client would use now."""
        slot = shared_part_of(self).slot
        if slot in received:
            client.load(slot, received[slot])
        yield from ()

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        """Train a client for one round and return its upload."""
        yield from self.deploy(client, received)
        yield local_fit(client)
        return upload_model(self, client)

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        """Combine the uploads of a round at the server."""
        if "model" in self.uploads:
            average_models(server, uploads)
        yield from ()

    def personalize(self, client: Participant, received: Payload) -> Plan[None]:
        """Change the deployed model before it is evaluated; this is done on a copy."""
        yield from ()

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        """Return the client's logits, shape `[N, C]`.

        Args:
            client: The client.
            rows: The rows to predict.
            personal: Whether the rows are distributed as the client's own, so that its label
                frequencies hold.
        """
        logits = yield Predict("model", rows)
        return add_log_prior(client, logits) if personal else logits

    def server_model(self, server: Participant) -> str | None:
        """Return the slot of the server's own model, if it has one.

        It is the student, else the global model of a single group, if clients share all of it.
        What no client shares was never trained at the server.
        """
        if STUDENT in server.models:
            return STUDENT
        profiles = server.peers.profiles
        is_whole = any(shared_part(self, profile.settings) is None for profile in profiles)
        if not is_whole or len(server.models) != 1:
            return None
        (slot,) = server.models
        return None if local_tensor_names(self, server.arch[slot]) else slot


def runs_user_code(algorithm: Algorithm, client_infos: ClientDirectory) -> bool:
    """Return whether the method or an objective is defined outside this package.

    Such code may change in place what it is given.
    """
    return is_user_method(algorithm) or any(
        profile.settings.objective is not None for profile in client_infos.profiles
    )


def is_user_method(algorithm: Algorithm) -> bool:
    """Return whether a method is defined outside this package."""
    return not type(algorithm).__module__.startswith("hetero_fl.")


def call_broadcast(algorithm: Algorithm, server: Participant, client_info: ClientInfo) -> Payload:
    """Return what the method broadcasts to a client.

    Raises:
        UserError: If it is no dictionary of items.
    """
    try:
        return Payload.from_hook(algorithm.broadcast(server, client_info))
    except PayloadError as error:
        raise UserError(f"{type(algorithm).__name__}.broadcast: {error}") from None


# What of a client's model travels.


def shared_part_of(method: Algorithm) -> SharedPart:
    """Return the method's shared part, also where it declares prefixes only."""
    return method.shared if isinstance(method.shared, SharedPart) else SharedPart(method.shared)


def permitted_part(shares: Sequence[str]) -> Part:
    """Return the part of its model that a client with these `shares` may share."""
    if "parameters" in shares:
        return None
    prefixes = ["backbone." if share == "backbone" else share for share in shares]
    return tuple(prefix for prefix in prefixes if prefix.endswith("."))


def common_part(a: Part, b: Part) -> Part:
    """Return what lies in both parts."""
    if a is None or b is None:
        return b if a is None else a
    shorter = (
        {p for p in a if p.startswith(b)} | {p for p in b if p.startswith(a)} if a and b else set()
    )
    return tuple(sorted(shorter))


def shared_part(method: Algorithm, settings: ClientSettings) -> Part:
    """Return what a client shares of its model: the method's part, as far as its settings allow."""
    return common_part(shared_part_of(method).part, permitted_part(settings.shares))


def uploads_in_round(settings: ClientSettings, round_idx: int) -> bool:
    """Return whether a client uploads in this round."""
    return (round_idx + 1) % settings.share_every == 0


def upload_part(method: Algorithm, settings: ClientSettings, round_idx: int) -> Part:
    """Return what of its model a client uploads in this round."""
    return shared_part(method, settings) if uploads_in_round(settings, round_idx) else ()


def download_part(method: Algorithm, settings: ClientSettings, round_idx: int) -> Part:
    """Return what of its model a client replaces by the server's: in the round after each upload."""
    if round_idx % settings.share_every != 0:
        return ()
    return common_part(shared_part(method, settings), shared_part_of(method).received)


def upload_phase(method: Algorithm, share_every: int, round_idx: int, num_rounds: int) -> int:
    """Return what of the round decides the form of an upload: that of equal phases is the same."""
    if method.needs.one_upload:
        return int(round_idx == num_rounds - 1)
    return round_idx % share_every


def local_tensor_names(method: Algorithm, arch: ModelSpec) -> frozenset[str]:
    """Return the names of tensors that stay with a client of this architecture."""
    local = shared_part_of(method).local
    if local is None:
        return frozenset()
    names = arch.batch_norm_names
    return names if local == "batch_norm" else names - arch.parameter_names


def shareable_tensors(
    method: Algorithm, arch: ModelSpec, tensors: Mapping[str, Tensor], part: Part
) -> Tensors:
    """Return the tensors of a part that travel: the same at client and server."""
    local = local_tensor_names(method, arch)
    selected = floating_tensors(select_part(tensors, part))
    return {name: tensor for name, tensor in selected.items() if name not in local}


def kept_state(method: Algorithm, client: Participant) -> dict[str, Tensors]:
    """Return what of its models a client keeps between rounds: what no broadcast replaces."""
    slot = shared_part_of(method).slot
    settings = client.settings
    replaced = download_part(method, settings, 0) if settings.share_every == 1 else ()
    local = local_tensor_names(method, client.arch[slot])
    own = client.models[slot]
    kept = exclude_part(own, replaced) | {n: t for n, t in own.items() if n in local}
    models = {**client.models, slot: kept}
    # counters alone are not worth it
    return {slot: tensors for slot, tensors in models.items() if floating_tensors(tensors)}


def may_share(client: Participant, share: str) -> bool:
    """Return whether a client uploads a kind of thing in this round.

    Args:
        client: The client.
        share: "predictions", "statistics" or "features", as in a client's `shares`.
    """
    if share not in client.settings.shares or (share == "predictions" and not client.has_proxy):
        return False
    return uploads_in_round(client.settings, client.round_context.round_idx)


def describe_unshared(
    items: Mapping[str, Item], specs: Mapping[str, ItemSpec], shares: Sequence[str]
) -> str:
    """Return which item of an upload may not leave; empty if all may.

    Args:
        items: The upload.
        specs: What the method declares of its items.
        shares: The client's `shares`.
    """
    part = permitted_part(shares)
    for name, item in items.items():
        share = specs[name].needed_share
        if share != "parameters" and share not in shares:
            return f"'{name}' needs {share}"
        if share == "parameters" and part is not None:
            for tensor in exclude_part(item.tensors, part):
                return f"'{name}' holds {tensor or share}"
    return ""


def inference_model(method: Algorithm, client: Participant) -> tuple[str, Any]:
    """Return the model with which a deployed client predicts its own rows.

    That is the one whose logits `predict` asks for first. Where `predict` combines several, it is
    the client's own.

    Returns:
        The slot, and the preprocessing if it is not the client's own.
    """
    # A copy: a plan that draws random numbers must not move the client's streams.
    plan = method.predict(replace(client, stream_uses={}), Rows("test"), True)
    if not isinstance(plan, GeneratorType):
        return "model", None
    step = next(plan, None)
    plan.close()
    if isinstance(step, Predict) and step.readout == "logits" and step.slot in client.models:
        return step.slot, getattr(step.data, "preprocess", None)
    return "model", None


# Averaging of models.


def upload_model(method: Algorithm, client: Participant, weight: float | None = None) -> Items:
    """Return the upload of the client's shared part; empty if it shares nothing in this round.

    Args:
        method: The method.
        client: The client.
        weight: Its weight in the mean; None: the number of its training rows.
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


def average_models(server: Participant, uploads: Uploads, rate: float = 1.0) -> None:
    """Move each group's model towards the mean over the owners of each tensor."""
    for group, mean in uploads.mean_by_group("model").items():
        parameters = server.arch[group].parameter_names
        server.models[group] = interpolate_model(server.models[group], mean, rate, parameters)


def add_up_models(server: Participant, uploads: Uploads, factor: float) -> None:
    """Add the changes of all clients to each group's model; `factor` scales them.

    For uploads whose weight is one, or what staleness leaves of it.
    """
    owners = uploads.weights_by_group("model")
    for group, mean in uploads.mean_by_group("model").items():
        parameters = server.arch[group].parameter_names
        server.models[group] = add_updates(
            server.models[group], mean, owners[group], factor, parameters
        )
