"""Participants of a federation (clients and the server), and the server's directory of clients.

A slot is the name under which a participant stores a model. A part of a model is a tuple of
prefixes of tensor names, or None for the whole model. A profile is a set of clients with equal
settings and architectures (`ClientProfile`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.population import Population
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.task import Task
from hetero_fl.utils.caching import BoundedCache
from hetero_fl.utils.ordering import natural_key, natural_order
from hetero_fl.utils.seeding import Key

# The columns of a data set, keyed by name. Rows of "x" may be read from files when they are used.
Columns = Mapping[str, Tensor]
# Maximum number of clients that are searched for messages and suggestions.
MAX_SEARCHED_CLIENTS = 1000
CACHED_CLIENTS = 4096
# Maximum number of values that a client may log in a round. A report may contain a few more values.
MAX_LOGGED = 60
# A part of a model: prefixes of tensor names, or None for the whole model.
Part = tuple[str, ...] | None


def copy_tensors(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return detached copies of tensors that do not share memory with the originals.

    Example:
        >>> import torch
        >>> from hetero_fl.core.participant import copy_tensors
        >>> weights = {"head.weight": torch.zeros(2)}
        >>> copy = copy_tensors(weights)
        >>> _ = copy["head.weight"].add_(1)
        >>> weights["head.weight"]
        tensor([0., 0.])
    """
    return {n: t.detach().clone() for n, t in tensors.items()}


def select_part(tensors: Mapping[str, Tensor], part: Part) -> Tensors:
    """Return the tensors that belong to a part of a model, keyed by name."""
    return {n: t for n, t in tensors.items() if part is None or n.startswith(part)}


def exclude_part(tensors: Mapping[str, Tensor], part: Part) -> Tensors:
    """Return the tensors that do not belong to a part of a model, keyed by name."""
    return {} if part is None else {n: t for n, t in tensors.items() if not n.startswith(part)}


def floating_tensors(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the floating-point tensors, without integer buffers such as `num_batches_tracked`.

    Example:
        >>> import torch
        >>> from hetero_fl.core.participant import floating_tensors
        >>> tensors = {"weight": torch.zeros(2), "num_batches_tracked": torch.tensor(3)}
        >>> list(floating_tensors(tensors))
        ['weight']
    """
    return {n: t for n, t in tensors.items() if t.is_floating_point()}


@dataclass(frozen=True)
class RoundContext:
    """The current round of a run, which determines the seeds of random streams.

    Args:
        seed: Seed of the run.
        round_idx: Index of the round, starting at 0.
        num_rounds: Number of rounds of the run.
        attempt: Number of times that the participant has already trained in this round. Always 0 in
            synchronous runs.
    """

    seed: int = 0
    round_idx: int = 0
    num_rounds: int = 1
    attempt: int = 0


@dataclass(frozen=True)
class ClientInfo:
    """The properties of a client that the server can access.

    Args:
        client_id: Name of the client.
        arch: Architecture of the client's model.
        num_rows: Number of training rows.
        preprocess: Preprocessing of the client, a `hetero_fl.data.Preprocess`, which is applied to
            the client's own examples and, for this client, to public examples. With
            `normalize: own`, it contains statistics of the client's training rows.
        settings: Settings of the client.
        purpose: Purpose of a broadcast to the client. With `evaluate`, the client is evaluated
            without training.
        has_proxy: Whether the client can use the proxy set, if the run has a proxy set.
        models: Architectures of all models of the client, keyed by slot. If not empty, the entry
            `model` equals `arch`. Default: empty.

    Example:
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.model_spec import ModelSpec
        >>> from hetero_fl.core.participant import ClientInfo
        >>> arch = ModelSpec.from_config("linear", 2, (3,))
        >>> client = ClientInfo("site_1", arch, 120, None, ClientSettings())
        >>> client.client_id, client.num_rows, client.purpose
        ('site_1', 120, 'train')
    """

    client_id: str
    arch: ModelSpec
    num_rows: int
    preprocess: Any
    settings: ClientSettings
    purpose: Literal["train", "evaluate"] = "train"
    has_proxy: bool = True
    models: Mapping[str, ModelSpec] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class ClientProfile:
    """A set of clients with equal settings and architectures.

    Args:
        settings: Settings of the clients.
        models: Architectures of the clients' models, keyed by slot.
        first: Name of the first of these clients in the configuration.
        count: Number of clients.
    """

    settings: ClientSettings
    models: Mapping[str, ModelSpec]
    first: str
    count: int

    @property
    def arch(self) -> ModelSpec:
        """Architecture of the clients' own model, the slot `model`."""
        return self.models["model"]


class ClientDirectory(Mapping[str, ClientInfo]):
    """All clients of a federation, keyed by name, with the properties that the server can access.

    Each `ClientInfo` is created on access. Use `profiles` for properties that depend only on the
    settings of clients, because the number of profiles does not grow with the number of clients.

    Args:
        clients: The population of clients.
        models: Architectures of each profile in `clients.profiles`, keyed by slot. If clients with
            equal settings may have different models, pass the architectures of each client, keyed
            by client name and slot.
        data: The federated data, a `hetero_fl.data.FederatedData`.

    Attributes:
        clients: The population of clients.
        profiles: Profiles of the clients.
    """

    def __init__(
        self,
        clients: Population,
        models: Sequence[Mapping[str, ModelSpec]] | Mapping[str, Mapping[str, ModelSpec]],
        data: Any,
    ) -> None:
        self.clients = clients
        self._data = data
        # Index of each client's profile in `profiles`. None if the profiles are those of `clients`.
        self._places: dict[str, int] | None = None
        if isinstance(models, Mapping):
            self._places, self.profiles = _split_profiles(clients, models)
        else:
            self.profiles = [
                ClientProfile(profile.settings, slots, profile.first, profile.count)
                for profile, slots in zip(clients.profiles, models, strict=True)
            ]
        self._client_infos: BoundedCache[ClientInfo] = BoundedCache(CACHED_CLIENTS)

    def profile(self, client_id: str) -> ClientProfile:
        """Return the profile of a client."""
        return self.profiles[
            self.clients.profile(client_id).number
            if self._places is None
            else self._places[client_id]
        ]

    def set_default(self, name: str, value: object) -> None:
        """Set a setting of all clients for which the setting is None.

        Methods call this function in `Algorithm.configure`.

        Args:
            name: A field of `ClientSettings`.
            value: The value to set.
        """
        self.clients.set_default(name, value)
        self.profiles = [replace(p, settings=self.clients[p.first]) for p in self.profiles]
        self._client_infos = BoundedCache(CACHED_CLIENTS)

    @property
    def main_profile(self) -> ClientProfile:
        """Profile of the first client (in natural order) with the most frequent architecture."""
        members = Counter[str]()
        for profile in self.profiles:
            members[profile.arch.spec_id] += profile.count
        return min(
            self.profiles,
            key=lambda profile: (-members[profile.arch.spec_id], natural_key(profile.first)),
        )

    def format_clients(self, profiles: Sequence[ClientProfile], max_names: int = 6) -> str:
        """Return the names of the first clients with these profiles, such as `a, b and 3 more`."""
        first_clients = {profile.first for profile in profiles}
        matching = (
            client_id
            for client_id in islice(self.clients.ids, MAX_SEARCHED_CLIENTS)
            if self.profile(client_id).first in first_clients
        )
        shown = list(islice(matching, max_names)) or natural_order(first_clients)[:max_names]
        more = sum(profile.count for profile in profiles) - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more else "")

    def __getitem__(self, client_id: str) -> ClientInfo:
        info = self._client_infos.get(client_id)
        if info is None:
            info = self._make_info(client_id)
            self._client_infos[client_id] = info
        return info

    def _make_info(self, client_id: str) -> ClientInfo:
        profile = self.profile(client_id)
        data = self._data
        view = self._data.preprocess(client_id)
        return ClientInfo(
            client_id,
            profile.arch,
            data.n_rows(client_id, "train"),
            view,
            profile.settings,
            has_proxy=data.has_proxy(view),
            models=profile.models,
        )

    def __contains__(self, client_id: object) -> bool:
        return client_id in self.clients

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)


def _split_profiles(
    clients: Population, models: Mapping[str, Mapping[str, ModelSpec]]
) -> tuple[dict[str, int], list[ClientProfile]]:
    """Split the profiles of a population by the architectures of the clients.

    Args:
        clients: The population of clients.
        models: Architectures, keyed by client name and slot.

    Returns:
        The index of each client's profile, and the profiles.
    """
    members: dict[tuple[int, tuple[tuple[str, ModelSpec], ...]], list[str]] = {}
    for client_id in natural_order(models):
        key = (clients.profile(client_id).number, tuple(sorted(models[client_id].items())))
        members.setdefault(key, []).append(client_id)
    settings = [profile.settings for profile in clients.profiles]
    places = {
        client_id: place
        for place, client_ids in enumerate(members.values())
        for client_id in client_ids
    }
    return places, [
        ClientProfile(settings[number], dict(slots), client_ids[0], len(client_ids))
        for (number, slots), client_ids in members.items()
    ]


@dataclass
class Participant:
    """A client or the server: its models, data and state.

    Args:
        participant_id: Name of the client, or `server`.
        task: The learning task.
        arch: Architectures, keyed by slot. A client's own model is in the slot `model`. The server
            has a slot for each group of models that are averaged.
        models: Tensors of the models, keyed by slot and tensor name.
        data: Function `data(name, preprocess)` that returns the columns of a named data set. If
            `preprocess` is None, the participant's own preprocessing is used.
        settings: Settings of the client.
        label_counts: Function that returns the number of training rows per class.
        num_rows: Number of training rows.
        has_proxy: Whether the participant can use the proxy set.
        peers: All clients, with the properties that the participant can access.
        common: Prefixes of the names of tensors that are averaged across architectures.
        state: Private state that the method keeps between rounds.
        round_context: The current round of the run.
        stream_uses: Index of the last use of each random stream in this round, keyed by label.
        logged: Values that the participant logged in this round, keyed by name.

    Example:
        >>> import torch
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.model_spec import ModelSpec
        >>> from hetero_fl.core.participant import Participant
        >>> from hetero_fl.core.task import Task
        >>> arch = ModelSpec.from_config("linear", 2, (3,))
        >>> data = {"train": {"x": torch.rand(4, 3), "y": torch.tensor([0, 1, 1, 1])}}
        >>> client = Participant(
        ...     "site_1",
        ...     Task("multiclass", 2),
        ...     {"model": arch},
        ...     {"model": arch.initial_tensors(seed=0)},
        ...     lambda name, preprocess: data[name],
        ...     ClientSettings(),
        ...     lambda: torch.bincount(data["train"]["y"]),
        ...     num_rows=4,
        ... )
        >>> client.counts
        tensor([1, 3])
        >>> client.load("model", {"head.bias": torch.ones(2)})
        >>> client.models["model"]["head.bias"]
        tensor([1., 1.])
    """

    participant_id: str
    task: Task
    arch: dict[str, ModelSpec]
    models: dict[str, Tensors]
    data: Callable[[str, Any], Columns]
    settings: ClientSettings
    # A function, because most methods do not use the counts.
    label_counts: Callable[[], Tensor]
    num_rows: int = 0
    has_proxy: bool = False
    peers: ClientDirectory = field(
        default_factory=lambda: ClientDirectory(Population.from_settings({}), [], None)
    )
    common: tuple[str, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)
    round_context: RoundContext = RoundContext()
    stream_uses: dict[str, int] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)

    @cached_property
    def counts(self) -> Tensor:
        """Number of training rows per class, shape `[outputs]`."""
        return self.label_counts()

    def log(self, name: str, value: float) -> None:
        """Log a value in the record of this round.

        The field `logged` of the record contains the logged values of each client. Values are sent
        together with the upload, unless uploads are private or only the sum of uploads is revealed.

        Args:
            name: Name of the value.
            value: The value.

        Raises:
            ValueError: If more than `MAX_LOGGED` different names are logged in a round.
        """
        if name not in self.logged and len(self.logged) == MAX_LOGGED:
            raise ValueError(
                f"log: cannot log {name!r}; a client may log at most {MAX_LOGGED} values per round"
            )
        self.logged[name] = float(value)

    def load(self, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace some tensors of the model in a slot.

        The new tensors are not copied and must not be modified in place afterwards.

        Args:
            slot: The slot.
            tensors: New tensors, keyed by name. All other tensors of the model are kept.
        """
        plain = {n: t.detach() if t.requires_grad else t for n, t in tensors.items()}
        self.models[slot] = {**self.models[slot], **plain}

    def stream(self, label: str, stream_id: str | None = None) -> tuple[Key, ...]:
        """Return the key that seeds a new random stream.

        Each call with the same label in a round returns another key.

        Args:
            label: Label of the stream.
            stream_id: Name of the participant whose stream is used. If None, this participant's own
                stream is used.
        """
        use = self.stream_uses.get(label, -1) + 1
        self.stream_uses[label] = use
        # "again" is part of the key, so another word would change the results of asynchronous runs.
        attempt = ("again", self.round_context.attempt) if self.round_context.attempt else ()
        return (
            self.round_context.seed,
            self.round_context.round_idx,
            stream_id or self.participant_id,
            label,
            use,
            *attempt,
        )

    @property
    def optimizer(self) -> OptimizerConfig:
        """Optimizer settings of this round, with learning rates according to the schedule."""
        return scheduled_optimizer(self.settings.optimizer, self.round_context)


def scheduled_optimizer(config: OptimizerConfig, context: RoundContext) -> OptimizerConfig:
    """Return the optimizer settings of a round, with learning rates according to the schedule."""
    done = min(1.0, context.round_idx / max(1, context.num_rounds - 1))
    factor = {
        "constant": 1.0,
        "step": config.gamma ** (context.round_idx // config.step_rounds),
        "cosine": config.gamma + (1 - config.gamma) * (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - (1 - config.gamma) * done,
    }[config.schedule]
    if factor == 1.0:
        return config
    head = None if config.head_lr is None else config.head_lr * factor
    return config.model_copy(update={"lr": config.lr * factor, "head_lr": head})


def copy_tree(tree: Any) -> Any:
    """Return a deep copy of a tree of dictionaries, lists and tensors, with detached tensors."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {k: copy_tree(v) for k, v in tree.items()}
    return [copy_tree(v) for v in tree] if isinstance(tree, list) else tree


def move_tree(tree: Any, device: torch.device) -> Any:
    """Move all tensors of a tree of dictionaries, lists and tensors to a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {k: move_tree(v, device) for k, v in tree.items()}
    return [move_tree(v, device) for v in tree] if isinstance(tree, list) else tree


def copy_containers(tree: Any) -> Any:
    """Copy a tree of dictionaries and lists without copying the tensors in the tree."""
    if isinstance(tree, dict):
        return {k: copy_containers(v) for k, v in tree.items()}
    return [copy_containers(v) for v in tree] if isinstance(tree, list) else tree
