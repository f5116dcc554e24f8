"""Participants: whoever carries out a plan. A client and the server are the same thing with other data and models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.population import Population
from hetero_fl.core.model_spec import Architecture, Tensors
from hetero_fl.core.task import Task
from hetero_fl.utils.caching import Recent
from hetero_fl.utils.ordering import in_order, natural
from hetero_fl.utils.seeding import Key

Columns = dict[str, Tensor]
LOOKED = 1000  # clients among whom examples are looked for
# of a model: None is all of it, else prefixes of tensor names; () is nothing
Part = tuple[str, ...] | None


def own(tensors: Mapping[str, Tensor]) -> Tensors:
    """A copy that shares no memory."""
    return {n: t.detach().clone() for n, t in tensors.items()}


def select(tensors: Mapping[str, Tensor], part: Part) -> Tensors:
    """The tensors that belong to the part."""
    return {n: t for n, t in tensors.items() if part is None or n.startswith(part)}


def without(tensors: Mapping[str, Tensor], part: Part) -> Tensors:
    """The tensors that do not belong to the part."""
    return {} if part is None else {n: t for n, t in tensors.items() if not n.startswith(part)}


def floats(tensors: Mapping[str, Tensor]) -> Tensors:
    """What may travel: integer buffers (`num_batches_tracked`) stay at home."""
    return {n: t for n, t in tensors.items() if t.is_floating_point()}


def common_part(a: Part, b: Part) -> Part:
    """What lies in both parts."""
    if a is None or b is None:
        return b if a is None else a
    shorter = (
        {p for p in a if p.startswith(b)} | {p for p in b if p.startswith(a)} if a and b else set()
    )
    return tuple(sorted(shorter))


@dataclass(frozen=True)
class Clock:
    """Where a run stands. `round` counts from 0; random streams are keyed by it, and by how often this participant trained in
    that round before (`again`: where a run is asynchronous)."""

    seed: int = 0
    round: int = 0
    rounds: int = 1
    again: int = 0


@dataclass(frozen=True)
class Card:
    """What the server knows of a client."""

    id: str
    arch: Architecture
    n: int  # training rows
    preprocess: Any  # hetero_fl.data.Preprocess: how it sees public examples
    settings: ClientSettings
    reading: bool = False  # the broadcast is for evaluation only: nothing is trained on it
    has_proxy: bool = True  # whether it sees anything of the proxy set; of no account without one


@dataclass(frozen=True)
class Kind:
    """Clients with the very same settings, and so with one architecture: how many, and the first in the configuration."""

    settings: ClientSettings
    arch: Architecture
    first: str
    count: int


class Roster(Mapping[str, Card]):
    """All clients as the server knows them. A card is made when it is asked for; whatever follows from settings alone is to
    be asked of `kinds`, which are few however many clients there are.

    Args:
        archs: of each kind in `clients.kinds`; or of each client by id, where a method gives them models one by one.
        data: hetero_fl.data.FederatedData, which knows a client's rows and view.
    """

    def __init__(
        self,
        clients: Population,
        archs: Sequence[Architecture] | Mapping[str, Architecture],
        data: Any,
    ) -> None:
        self.clients, self._data = clients, data
        # of each client in `kinds`; none: as in `clients.kinds`
        self._places: dict[str, int] | None = None
        if isinstance(archs, Mapping):
            self._places, self.kinds = _finer(clients, archs)
        else:
            self.kinds = [
                Kind(k.settings, a, k.first, k.count)
                for k, a in zip(clients.kinds, archs, strict=True)
            ]
        self._cards: Recent[Card] = Recent()

    def kind(self, id: str) -> Kind:
        """The kind that a client is of."""
        return self.kinds[
            self.clients.kind(id).number if self._places is None else self._places[id]
        ]

    @property
    def foremost(self) -> Kind:
        """The kind of the first client, as people count, among those of the most frequent architecture."""
        members = Counter[str]()
        for kind in self.kinds:
            members[kind.arch.id] += kind.count
        return min(self.kinds, key=lambda kind: (-members[kind.arch.id], natural(kind.first)))

    def named(self, kinds: Sequence[Kind], most: int = 6) -> str:
        """The clients of these kinds for a reader: the first of them by name, and how many more there are."""
        among, ids = {kind.first for kind in kinds}, self.clients.ids
        here = (id for id in islice(ids, LOOKED) if self.kind(id).first in among)
        shown = list(islice(here, most)) or in_order(among)[:most]
        more = sum(kind.count for kind in kinds) - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more else "")

    def __getitem__(self, id: str) -> Card:
        return self._cards.get(id, lambda: self._make(id))

    def _make(self, id: str) -> Card:
        kind = self.kind(id)
        data, view = self._data, self._data.preprocess(id)
        return Card(
            id,
            kind.arch,
            data.n_rows(id, "train"),
            view,
            kind.settings,
            has_proxy=data.has_proxy(view),
        )

    def __contains__(self, id: object) -> bool:
        return id in self.clients

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)


def _finer(
    clients: Population, archs: Mapping[str, Architecture]
) -> tuple[dict[str, int], list[Kind]]:
    """Kinds where clients with the same settings have several architectures: each client's place, and the kinds."""
    members: dict[tuple[int, Architecture], list[str]] = {}
    for id in in_order(archs):
        members.setdefault((clients.kind(id).number, archs[id]), []).append(id)
    settings = [kind.settings for kind in clients.kinds]
    places = {id: place for place, ids in enumerate(members.values()) for id in ids}
    return places, [
        Kind(settings[number], arch, ids[0], len(ids)) for (number, arch), ids in members.items()
    ]


@dataclass
class Participant:
    """A client, or the server: named models, named data, private state.

    `models` maps slots ("model", "personal", "student", at the server a group's name …) to named tensors, `arch` the same
    slots to architectures. `data(name, through)` gives the columns of a named set, seen through this participant's own
    preprocessing unless another is named. `counts` are label counts of its training rows, `[outputs]`.
    """

    id: str
    task: Task
    arch: dict[str, Architecture]
    models: dict[str, Tensors]
    data: Callable[[str, Any], Columns]
    settings: ClientSettings
    counts: Tensor
    n: int = 0
    has_proxy: bool = False
    peers: Roster = field(
        default_factory=lambda: Roster(Population.of({}), [], None)
    )  # where it is known: in simulation
    common: tuple[str, ...] = ()  # prefixes of tensors that are averaged across architectures
    state: dict[str, Any] = field(default_factory=dict)
    clock: Clock = Clock()
    work: float = 1.0  # share of the steps there is time for
    uses: dict[str, int] = field(default_factory=dict)

    def load(self, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace the named tensors of a slot, keep its others. They are shared with whoever gave them: a participant's tensors
        are replaced, never changed in place."""
        self.models[slot] = {**self.models[slot], **{n: t.detach() for n, t in tensors.items()}}

    def stream(self, label: str, as_id: str | None = None) -> tuple[Key, ...]:
        """The key of this round's next random stream with that label."""
        n = self.uses[label] = self.uses.get(label, -1) + 1
        anew = ("again", self.clock.again) if self.clock.again else ()
        return (self.clock.seed, self.clock.round, as_id or self.id, label, n, *anew)

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimiser of this round, its learning rates moved along their schedule."""
        return self.settings.optimizer.at(self.clock.round, self.clock.rounds)


def copied(tree: Any) -> Any:
    """A tree of dictionaries, lists and tensors that may be changed without changing the original."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {k: copied(v) for k, v in tree.items()}
    return [copied(v) for v in tree] if isinstance(tree, list) else tree


def contained(tree: Any) -> Any:
    """Return a tree with dictionaries and lists of its own, whose tensors are those of the original."""
    if isinstance(tree, dict):
        return {k: contained(v) for k, v in tree.items()}
    return [contained(v) for v in tree] if isinstance(tree, list) else tree
