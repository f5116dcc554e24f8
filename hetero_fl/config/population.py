"""Who takes part, as a function from id to settings: a million clients cost what their kinds cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.matching import Blocks, Key, Pattern, Turns
from hetero_fl.order import Ids, Series

Layer = dict[str, Any]  # settings as they were written


@dataclass(frozen=True)
class Kind:
    """Clients with the very same settings: how many, and the first of them in the order of the configuration."""

    number: int  # its place in `Population.kinds`
    settings: ClientSettings
    first: str
    count: int


@dataclass(frozen=True)
class Members:
    """One group's clients, with its settings over the defaults; a list of models is taken in turn."""

    series: Series
    layer: Layer = field(default_factory=dict)


@dataclass(frozen=True)
class Over:
    """Settings over those of the clients whose ids match."""

    pattern: Pattern
    layer: Layer


@dataclass(frozen=True)
class Listed:
    """Settings that were listed by id."""

    clients: Mapping[str, ClientSettings]

    def __call__(self, id: str, *rest: object) -> ClientSettings:
        return self.clients[id]


class Population(Mapping[str, ClientSettings]):
    """Settings by client id, shared by all of a kind.

    Iteration follows the configuration, group by group; `ids` has the same clients as people count.

    Args:
        groups: in their order.
        overrides: in their order; the later wins.
        settle: makes the settings of a kind, from the id of its first client, its group's layer, its turn in the group, and
            pairs of an override's layer and its turn among those whom that matches.
    """

    def __init__(
        self,
        groups: Sequence[Members],
        overrides: Sequence[Over] = (),
        *,
        settle: Callable[[str, Layer, int, Sequence[tuple[Layer, int]]], ClientSettings],
    ) -> None:
        self._groups, self._overrides, self._settle = groups, overrides, settle
        self.ids = Ids([g.series for g in groups])
        self._by_name: dict[str, list[int]] = {}
        for number, group in enumerate(groups):
            self._by_name.setdefault(group.series.name, []).append(number)
        self._cycles = tuple(_cycle(o.layer) for o in overrides)
        self._blocks: list[Blocks] = []
        turns: Turns = (0,) * len(overrides)  # an override's turns run on from group to group
        patterns = [o.pattern for o in overrides]
        for group in groups:
            cycles = (_cycle(group.layer), *self._cycles)
            self._blocks.append(Blocks(group.series, patterns, cycles, (0, *turns)))
            if any(c > 1 for c in self._cycles):
                turns = self._blocks[-1].turns(len(group.series))[1:]
        self._kinds: dict[tuple[int, Key], Kind] | None = None

    @classmethod
    def of(cls, clients: Mapping[str, ClientSettings]) -> Population:
        """Clients that were listed one by one, each of a kind of its own; a population stays what it is."""
        if isinstance(clients, Population):
            return clients
        return cls([Members(Series(id, 1)) for id in clients], settle=Listed(clients))

    @property
    def kinds(self) -> list[Kind]:
        """All kinds, in the order of their first clients in the configuration."""
        return list(self._by_key().values())

    def kind(self, id: str) -> Kind:
        """The kind of a client. Raises KeyError for a stranger."""
        found = self.place(id)
        if found is None:
            raise KeyError(id)
        number, place = found
        hits = [o.pattern.accepts(o.pattern.read(o.pattern.start, id)) for o in self._overrides]
        if any(hit and cycle > 1 for hit, cycle in zip(hits, self._cycles, strict=True)):
            turns = self._blocks[number].turns(place)
        else:
            turns = (place % _cycle(self._groups[number].layer), *(0 for _ in hits))
        key = (turns[0], *(turn if hit else -1 for turn, hit in zip(turns[1:], hits, strict=True)))
        return self._by_key()[number, key]

    def place(self, id: str) -> tuple[int, int] | None:
        """The number of a client's group and its place there; None for a stranger. Sorts as the configuration does."""
        for name in (id, id.rpartition("_")[0]):
            for number in self._by_name.get(name, ()):
                place = self._groups[number].series.find(id)
                if place is not None:
                    return number, place
        return None

    def matched(self) -> list[bool]:
        """Whether each override matches anybody."""
        keys = [key for blocks in self._blocks for key in blocks.kinds()]
        return [any(key[i + 1] >= 0 for key in keys) for i in range(len(self._overrides))]

    def __getitem__(self, id: str) -> ClientSettings:
        return self.kind(id).settings

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self.place(id) is not None

    def __iter__(self) -> Iterator[str]:
        for group in self._groups:
            yield from group.series

    def __len__(self) -> int:
        return len(self.ids)

    def _by_key(self) -> dict[tuple[int, Key], Kind]:
        if self._kinds is None:
            kinds: dict[tuple[int, Key], Kind] = {}
            for number, (group, blocks) in enumerate(zip(self._groups, self._blocks, strict=True)):
                for key, (count, first) in sorted(blocks.kinds().items(), key=lambda entry: entry[1][1]):
                    over = [(o.layer, turn) for o, turn in zip(self._overrides, key[1:], strict=True) if turn >= 0]
                    settings = self._settle(group.series[first], group.layer, key[0], over)
                    kinds[number, key] = Kind(len(kinds), settings, group.series[first], count)
            self._kinds = kinds
        return self._kinds


def _cycle(layer: Layer) -> int:
    """How many models a layer hands out in turn."""
    return len(layer.get("model") or [None])
