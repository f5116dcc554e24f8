"""Base class of federated methods, declarations of their properties, and helpers for subclasses.

A slot is the name under which a client or the server stores a model. A part of a model is a tuple
of prefixes of tensor names, or None for the whole model. An item is a named entry of an upload or a
broadcast (see `hetero_fl.core.payload`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import get_annotations, isfunction, signature
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, model_validator
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.prediction import adjust_to_labels
from hetero_fl.algorithms.round_parts import (
    Items,
    Shared,
    add_model,
    average_models,
    excluded_names,
    load_model,
    local_fit,
    send_model,
    server_slot,
    shared_part,
    shared_parts,
    upload_model,
)
from hetero_fl.config.base import Settings, StalenessConfig, rename_keys
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import (
    ClientDirectory,
    ClientInfo,
    Participant,
)
from hetero_fl.core.payload import ItemSpec, Payload, PayloadError
from hetero_fl.core.plan import Plan, Predict, Rows
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.registry import Registry

STUDENT = "student"
"""Slot of the student model that the server trains, a key of `server.models`.

If the server has a model in this slot, `Algorithm.server_model` returns it for deployment.
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


class Algorithm(Settings):
    """Base class of federated methods.

    By default, clients train locally, and the server averages the `shared` part of the models
    within each architecture. Settings of a method are pydantic fields. A configuration lists these
    settings next to `algorithm.name`. Hooks that train models or compute predictions are
    generators, called plans (see `hetero_fl.core.plan`). All other hooks are ordinary functions.
    The decorator `@register_algorithm("name")` makes a subclass available under a name.

    Attributes:
        title: Display name. The first sentence of the docstring is the one-line summary.
        evaluated_when: Description of the evaluated model, for tables.
        shared: Part of the client's own model that is exchanged: None for the whole model, `()` for
            nothing, prefixes of tensor names, or a `SharedPart`. A mapping from slots to such parts
            exchanges several models, each as the item with the name of the slot.
        uploads: Declarations of the items that clients upload, keyed by item name.
        downloads: Declarations of the items that the server broadcasts, keyed by item name. The
            name `*` stands for all other names.
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
    evaluated_when: ClassVar[str] = "after aggregation, as deployed with the next broadcast"
    shared: ClassVar[Shared] = None
    uploads: ClassVar[Mapping[str, ItemSpec]] = {"model": ItemSpec("params")}
    downloads: ClassVar[Mapping[str, ItemSpec]] = {"model": ItemSpec("params")}
    needs: ClassVar[Needs] = Needs(one_architecture=True, shared_model=True)
    _renamed: ClassVar[Mapping[str, str]] = {}
    """New names of renamed settings, keyed by former name."""
    _broadcasts_means: ClassVar[bool] = True
    """Whether broadcasts follow from the means of the last uploads, as those of the base class.

    A class that overrides a method which takes the server sets this attribute as well, or it is
    False.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        check_bases(cls)
        if any(map(takes_server, overridden_members(cls))):
            cls._broadcasts_means = vars(cls).get("_broadcasts_means", False)

    @model_validator(mode="before")
    @classmethod
    def _rename_settings(cls, raw: Any) -> Any:
        return rename_keys(raw, cls._renamed, "algorithm")

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

        By default, the server gets the model of each slot in `shared` that is averaged over all
        architectures (`ItemSpec.across_architectures`).

        Raises:
            UserError: If a slot in `shared` has no model, or the models of several slots are
                averaged within each architecture.
        """
        first = server.peers.profiles[0]
        groups = []
        for slot in shared_parts(self):
            if slot not in first.models:
                raise UserError(
                    f"{type(self).__name__}.models: no model of the shared slot '{slot}'"
                )
            if slot == server_slot(self, slot, first.arch):
                add_model(server, slot, first.models[slot])
            else:
                groups.append(slot)
        if len(groups) > 1:
            raise UserError(
                f"{type(self).__name__}.uploads: declare all slots but one with "
                f"across_architectures=True, got {', '.join(groups)} without it"
            )

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        """Return the items that the server sends to one client.

        By default, the broadcast contains the shared part of the server's model for each slot in
        `shared`. The broadcast is empty in rounds in which the client does not replace its models.

        Args:
            server: The server.
            recipient: The client. Its `purpose` is "train" or "evaluate".
        """
        items: Items = {}
        for slot in shared_parts(self):
            items |= send_model(self, server, recipient, slot)
        return items

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        """Update the client's models with the received items, so that the client can predict.

        By default, the received tensors replace the tensors of the same names.
        """
        for slot in shared_parts(self):
            load_model(client, received, slot)
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
        for slot in shared_parts(self):
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
        groups = server.models.keys() & {profile.arch.family_id for profile in profiles}
        if not shares_whole_model or len(groups) != 1:
            return None
        (slot,) = groups
        arch = server.arch[slot]
        # Whether a model writes tensors is found out by running it, so only if necessary.
        is_complete = not arch.local_names or arch.local_names.isdisjoint(arch.written_names)
        return slot if is_complete and not excluded_names(self, arch) else None


# Attributes that only describe a method.
DESCRIPTIONS = ("title", "evaluated_when")


def check_bases(method: type[Algorithm]) -> None:
    """Check that no base class of a method silently replaces a hook or setting of another base.

    A hook of one base may precede that of another base if it calls `super()`. The title and the
    description of the evaluated model may differ.

    Args:
        method: The class of the method.

    Raises:
        TypeError: If two bases define the same hook or setting, and the class itself does not.

    Example:
        >>> from hetero_fl.algorithms import FML, Hybrid
        >>> class Both(Hybrid, FML):
        ...     pass
        Traceback (most recent call last):
        ...
        TypeError: Both: the setting 'beta' of Hybrid replaces that of FML; define it in Both
    """
    methods = [base for base in method.__mro__ if issubclass(base, Algorithm)]
    hooks = [name for base in methods for name in vars(base) if not hasattr(BaseModel, name)]
    for name in (*method.model_fields, *dict.fromkeys(hooks)):
        if name.startswith("_") or name in DESCRIPTIONS:
            continue
        owners = [base for base in methods if name in vars(base) or name in get_annotations(base)]
        used = next(owner for owner in owners if not _calls_super(owner, name))
        replaced = [owner for owner in owners[owners.index(used) :] if not issubclass(used, owner)]
        if not replaced or method in owners:
            continue
        first = next(base for base in method.__bases__ if issubclass(base, used))
        second = next(base for base in method.__bases__ if issubclass(base, replaced[0]))
        sort = "setting" if name in method.model_fields else "hook"
        raise TypeError(
            f"{method.__name__}: the {sort} '{name}' of {first.__name__} replaces that of "
            f"{second.__name__}; define it in {method.__name__}"
        )


def _calls_super(owner: type, name: str) -> bool:
    """Return whether a hook that a class defines calls the hook of the next base class."""
    hook = vars(owner).get(name)
    function = hook.fget if isinstance(hook, property) else hook
    code = getattr(function, "__code__", None)
    return code is not None and {"super", name} <= {*code.co_names}


def runs_user_code(algorithm: Algorithm, client_infos: ClientDirectory) -> bool:
    """Return whether the method or a client's objective is defined outside this package.

    Such code may modify tensors in place.
    """
    return is_user_method(algorithm) or any(
        profile.settings.objective is not None for profile in client_infos.profiles
    )


def overridden_members(cls: type) -> list[object]:
    """Return the members of the bases of a class that the class itself redefines."""
    bases = cls.__mro__[1:]
    return [vars(base)[name] for base in bases for name in vars(cls) if name in vars(base)]


def takes_server(member: object) -> bool:
    """Return whether a member of a method is a function of the server."""
    return isfunction(member) and "server" in signature(member).parameters


def is_user_method(algorithm: Algorithm) -> bool:
    """Return whether a method is defined outside this package."""
    return not type(algorithm).__module__.startswith("hetero_fl.")


def broadcasts_means(algorithm: Algorithm) -> bool:
    """Return whether a method's broadcasts follow from the means of the last uploads alone.

    The means determine them without earlier models, states of the server or training.
    """
    return algorithm._broadcasts_means


def call_broadcast(algorithm: Algorithm, server: Participant, client_info: ClientInfo) -> Payload:
    """Call the method's `broadcast` and return the result as a payload.

    Args:
        algorithm: The method.
        server: The server.
        client_info: The recipient.

    Raises:
        UserError: If the method did not return a dictionary of items that are declared in
            `downloads`.
    """
    try:
        items = algorithm.broadcast(server, client_info)
        return Payload.from_hook(items, algorithm.downloads, "downloads")
    except PayloadError as error:
        raise UserError(f"{type(algorithm).__name__}.broadcast: {error}") from None


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
