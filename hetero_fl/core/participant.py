"""Participants: whoever carries out a plan. A client and the server are the same thing with other data and models."""

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

Columns = dict[str, Tensor]
LOOKED = 1000  # clients among whom examples are looked for
CACHED_CLIENTS = 4096
# Numbers that a client may log in a round; a report has room for a few more values.
MAX_LOGGED = 60
# of a model: None is all of it, else prefixes of tensor names; () is nothing
Part = tuple[str, ...] | None


def copy_tensors(tensors: Mapping[str, Tensor]) -> Tensors:
    """A copy that shares no memory."""
    return {n: t.detach().clone() for n, t in tensors.items()}


def select_part(tensors: Mapping[str, Tensor], part: Part) -> Tensors:
    """The tensors that belong to the part."""
    return {n: t for n, t in tensors.items() if part is None or n.startswith(part)}


def exclude_part(tensors: Mapping[str, Tensor], part: Part) -> Tensors:
    """The tensors that do not belong to the part."""
    return {} if part is None else {n: t for n, t in tensors.items() if not n.startswith(part)}


def floating_tensors(tensors: Mapping[str, Tensor]) -> Tensors:
    """What may travel: integer buffers (`num_batches_tracked`) stay at home."""
    return {n: t for n, t in tensors.items() if t.is_floating_point()}


@dataclass(frozen=True)
class RoundContext:
    """Where a run stands. `round_idx` counts from 0; random streams are keyed by it, and by how often this participant trained in
    that round before (`attempt`: where a run is asynchronous)."""

    seed: int = 0
    round_idx: int = 0
    num_rounds: int = 1
    attempt: int = 0


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client."""

    client_id: str
    arch: ModelSpec
    num_rows: int  # training rows
    preprocess: Any  # hetero_fl.data.Preprocess: how it sees public examples
    settings: ClientSettings
    # what a broadcast to it is for: nothing is trained on one for evaluation
    purpose: Literal["train", "evaluate"] = "train"
    has_proxy: bool = True  # whether it sees anything of the proxy set; of no account without one
    # every model that it has, by slot; `arch` is that of the slot "model"
    models: Mapping[str, ModelSpec] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class ClientProfile:
    """Clients with the very same settings, and so with the same models: how many, and the first in the configuration."""

    settings: ClientSettings
    models: Mapping[str, ModelSpec]  # by slot
    first: str
    count: int

    @property
    def arch(self) -> ModelSpec:
        """The architecture of the clients' own model."""
        return self.models["model"]


class ClientDirectory(Mapping[str, ClientInfo]):
    """All clients as the server knows them. An entry is made when it is asked for; whatever follows from settings alone is to
    be asked of `profiles`, which are few however many clients there are.

    Args:
        models: By slot, of each profile in `clients.profiles`; or of each client by id, where a method gives them models one
            by one.
        data: hetero_fl.data.FederatedData, which knows a client's rows and view.
    """

    def __init__(
        self,
        clients: Population,
        models: Sequence[Mapping[str, ModelSpec]] | Mapping[str, Mapping[str, ModelSpec]],
        data: Any,
    ) -> None:
        self.clients = clients
        self._data = data
        # of each client in `profiles`; none: as in `clients.profiles`
        self._places: dict[str, int] | None = None
        if isinstance(models, Mapping):
            self._places, self.profiles = _split_profiles(clients, models)
        else:
            self.profiles = [
                ClientProfile(k.settings, own, k.first, k.count)
                for k, own in zip(clients.profiles, models, strict=True)
            ]
        self._client_infos: BoundedCache[ClientInfo] = BoundedCache(CACHED_CLIENTS)

    def profile(self, client_id: str) -> ClientProfile:
        """The kind that a client is of."""
        return self.profiles[
            self.clients.profile(client_id).number
            if self._places is None
            else self._places[client_id]
        ]

    def set_default(self, name: str, value: object) -> None:
        """Set a setting of all clients that leave it open (None), as a method's `configure` may.

        Args:
            name: A field of `ClientSettings`.
            value: Its value for these clients.
        """
        self.clients.set_default(name, value)
        self.profiles = [replace(p, settings=self.clients[p.first]) for p in self.profiles]
        self._client_infos = BoundedCache(CACHED_CLIENTS)

    @property
    def main_profile(self) -> ClientProfile:
        """The kind of the first client, as people count, among those of the most frequent architecture."""
        members = Counter[str]()
        for kind in self.profiles:
            members[kind.arch.spec_id] += kind.count
        return min(
            self.profiles, key=lambda kind: (-members[kind.arch.spec_id], natural_key(kind.first))
        )

    def format_clients(self, kinds: Sequence[ClientProfile], most: int = 6) -> str:
        """The clients of these kinds for a reader: the first of them by name, and how many more there are."""
        among = {kind.first for kind in kinds}
        ids = self.clients.ids
        here = (id for id in islice(ids, LOOKED) if self.profile(id).first in among)
        shown = list(islice(here, most)) or natural_order(among)[:most]
        more = sum(kind.count for kind in kinds) - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more else "")

    def __getitem__(self, client_id: str) -> ClientInfo:
        info = self._client_infos.get(client_id)
        if info is None:
            info = self._make(client_id)
            self._client_infos[client_id] = info
        return info

    def _make(self, client_id: str) -> ClientInfo:
        kind = self.profile(client_id)
        data = self._data
        view = self._data.preprocess(client_id)
        return ClientInfo(
            client_id,
            kind.arch,
            data.n_rows(client_id, "train"),
            view,
            kind.settings,
            has_proxy=data.has_proxy(view),
            models=kind.models,
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
    """Split profiles whose clients have different models; return each client's place, and the profiles."""
    members: dict[tuple[int, tuple[tuple[str, ModelSpec], ...]], list[str]] = {}
    for id in natural_order(models):
        key = (clients.profile(id).number, tuple(sorted(models[id].items())))
        members.setdefault(key, []).append(id)
    settings = [kind.settings for kind in clients.profiles]
    places = {id: place for place, ids in enumerate(members.values()) for id in ids}
    return places, [
        ClientProfile(settings[number], dict(slots), ids[0], len(ids))
        for (number, slots), ids in members.items()
    ]


@dataclass
class Participant:
    """A client, or the server: named models, named data, private state.

    `models` maps slots ("model", "personal", "student", at the server a group's name …) to named tensors, `arch` the same
    slots to architectures. `data(name, through)` gives the columns of a named set, seen through this participant's own
    preprocessing unless another is named.
    """

    participant_id: str
    task: Task
    arch: dict[str, ModelSpec]
    models: dict[str, Tensors]
    data: Callable[[str, Any], Columns]
    settings: ClientSettings
    label_counts: Callable[[], Tensor]  # computed only where they are used
    num_rows: int = 0
    has_proxy: bool = False
    peers: ClientDirectory = field(
        default_factory=lambda: ClientDirectory(Population.from_settings({}), [], None)
    )  # where it is known: in simulation
    common: tuple[str, ...] = ()  # prefixes of tensors that are averaged across architectures
    state: dict[str, Any] = field(default_factory=dict)
    round_context: RoundContext = RoundContext()
    step_share: float = 1.0  # share of the steps there is time for
    stream_uses: dict[str, int] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)

    @cached_property
    def counts(self) -> Tensor:
        """Label counts of the training rows, shape `[outputs]`."""
        return self.label_counts()

    def log(self, name: str, value: float) -> None:
        """Report a number with this round's upload; the round's record has it under `logged`, by client.

        Nothing is reported where uploads are private or only summed.

        Raises:
            ValueError: For more than `MAX_LOGGED` different names.
        """
        if name not in self.logged and len(self.logged) == MAX_LOGGED:
            raise ValueError(f"log: {name!r} is one number too many; a client may log {MAX_LOGGED}")
        self.logged[name] = float(value)

    def load(self, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace the named tensors of a slot, keep its others. They are shared with whoever gave them: a participant's tensors
        are replaced, never changed in place."""
        plain = {n: t.detach() if t.requires_grad else t for n, t in tensors.items()}
        self.models[slot] = {**self.models[slot], **plain}

    def stream(self, label: str, as_id: str | None = None) -> tuple[Key, ...]:
        """The key of this round's next random stream with that label."""
        n = self.stream_uses[label] = self.stream_uses.get(label, -1) + 1
        anew = ("again", self.round_context.attempt) if self.round_context.attempt else ()
        return (
            self.round_context.seed,
            self.round_context.round_idx,
            as_id or self.participant_id,
            label,
            n,
            *anew,
        )

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer of this round, its learning rates moved along their schedule."""
        return scheduled_optimizer(self.settings.optimizer, self.round_context)


def scheduled_optimizer(config: OptimizerConfig, context: RoundContext) -> OptimizerConfig:
    """Return the optimizer of a round, its learning rates moved along their schedule."""
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
    """A tree of dictionaries, lists and tensors that may be changed without changing the original."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {k: copy_tree(v) for k, v in tree.items()}
    return [copy_tree(v) for v in tree] if isinstance(tree, list) else tree


def move_tree(tree: Any, device: torch.device) -> Any:
    """Return a tree of dictionaries, lists and tensors with its tensors on a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {k: move_tree(v, device) for k, v in tree.items()}
    return [move_tree(v, device) for v in tree] if isinstance(tree, list) else tree


def copy_containers(tree: Any) -> Any:
    """Return a tree with dictionaries and lists of its own, whose tensors are those of the original."""
    if isinstance(tree, dict):
        return {k: copy_containers(v) for k, v in tree.items()}
    return [copy_containers(v) for v in tree] if isinstance(tree, list) else tree
