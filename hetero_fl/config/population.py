"""Resolve client groups and overrides into settings per client id.

Settings are shared per group, so a population costs no more than its groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from pydantic import ValidationError

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import ClientGroup, ClientsConfig, ClientSettings
from hetero_fl.config.errors import describe_error
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import ClientIds, IdSeries

# Which kinds of clients a group has under patterns of ids, counted digit by digit instead of id by
# id.
#
# A client's settings depend on its turn in its group and on which overrides match its id, each with
# a turn of its own where it names several models. Ids of a group differ in their digits only. So a
# block of ids, 10^k with the first digits in common, is known by what the patterns have read so far
# and by the turns at its beginning, and blocks alike are counted once.

PatternState = frozenset[int]  # places in a pattern that the text so far may have come to
Turns = tuple[int, ...]  # of the group, then of each override
# the same for one client, -1 where an override does not match: what its settings follow from
Key = tuple[int, ...]
CountByKey = dict[Key, tuple[int, int]]  # how many such clients, and where the first is


class Pattern:
    """A shell-style pattern, as `fnmatch.fnmatchcase` understands it, that reads a text bit by bit."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._parts = list(_pattern_parts(text))
        self._known: dict[tuple[PatternState, str], PatternState] = {}
        self.start = self._skip_stars({0})

    def advance(self, state: PatternState, text: str) -> PatternState:
        """Where it stands after more of the text."""
        for char in text:
            if (state, char) not in self._known:
                on = {
                    p + 1
                    for p in state
                    if p < len(self._parts) and fnmatchcase(char, self._parts[p])
                }
                stay = {p for p in state if p < len(self._parts) and self._parts[p] == "*"}
                self._known[state, char] = self._skip_stars(on | stay)
            state = self._known[state, char]
        return state

    def accepts(self, state: PatternState) -> bool:
        """Whether the text so far matches."""
        return len(self._parts) in state

    def _skip_stars(self, places: set[int]) -> PatternState:
        for place in sorted(places):
            while place < len(self._parts) and self._parts[place] == "*":
                place += 1
                places.add(place)
        return frozenset(places)


def _pattern_parts(text: str) -> Iterator[str]:
    """A pattern's parts, each for one character, but for stars."""
    at = 0
    while at < len(text):
        end = at + 1
        if text[at] == "[":
            close = text.find("]", at + 2 + (text[at + 1 : at + 2] == "!"))
            end = close + 1 if close >= 0 else end
        yield text[at:end]
        at = end


class PatternBlocks:
    """The clients of one series, under patterns.

    Args:
        cycles: after how many clients the turns begin anew: of the group, then of each pattern's override.
        begin: the turns of the series' first client.
    """

    def __init__(
        self, series: IdSeries, patterns: Sequence[Pattern], cycles: Turns, begin: Turns
    ) -> None:
        self._series = series
        self._patterns = patterns
        self._cycles = cycles
        self._begin = begin
        self._known: dict[
            tuple[int, tuple[PatternState, ...], Turns], tuple[CountByKey, Turns]
        ] = {}

    def model_turns(self, place: int) -> Turns:
        """The turns of the client at that place; at the end of the series: those of the next one's first."""
        turns = self._begin
        for _, digits, states in self._blocks(place):
            turns = self._block(digits, states, turns)[1]
        return turns

    def count_keys(self) -> CountByKey:
        """The keys that occur, with the number of their clients and the place of the first."""
        found: CountByKey = {}
        turns = self._begin
        for place, digits, states in self._blocks(len(self._series)):
            inside, turns = self._block(digits, states, turns)
            _add(found, inside, place)
        return found

    def _blocks(self, stop: int) -> Iterator[tuple[int, int, tuple[PatternState, ...]]]:
        """The places below `stop` in blocks: where one begins, its free digits, what the patterns have read before them."""
        if len(self._series) == 1:
            if stop:
                yield 0, 0, self._read(self._series.name)
            return
        number = 1
        while number <= stop:
            digits = 0
            while number % 10 ** (digits + 1) == 0 and number + 10 ** (digits + 1) <= stop + 1:
                digits += 1
            id = self._series[number - 1]
            yield number - 1, digits, self._read(id[: len(id) - digits])
            number += 10**digits

    def _read(self, text: str) -> tuple[PatternState, ...]:
        return tuple(p.advance(p.start, text) for p in self._patterns)

    def _block(
        self, digits: int, states: tuple[PatternState, ...], turns: Turns
    ) -> tuple[CountByKey, Turns]:
        known = (digits, states, turns)
        if known not in self._known:
            self._known[known] = self._count(digits, states, turns)
        return self._known[known]

    def _count(
        self, digits: int, states: tuple[PatternState, ...], turns: Turns
    ) -> tuple[CountByKey, Turns]:
        if digits == 0:
            hits = [True, *(p.accepts(s) for p, s in zip(self._patterns, states, strict=True))]
            key = tuple(t if hit else -1 for t, hit in zip(turns, hits, strict=True))
            after = tuple(
                (t + hit) % c for t, hit, c in zip(turns, hits, self._cycles, strict=True)
            )
            return {key: (1, 0)}, after
        found: CountByKey = {}
        for digit in range(10):
            deeper = tuple(
                p.advance(s, str(digit)) for p, s in zip(self._patterns, states, strict=True)
            )
            inside, turns = self._block(digits - 1, deeper, turns)
            _add(found, inside, digit * 10 ** (digits - 1))
        return found, turns


def _add(found: CountByKey, more: CountByKey, place: int) -> None:
    for key, (count, first) in more.items():
        had = found.get(key)
        found[key] = (count, place + first) if had is None else (had[0] + count, had[1])


# Who takes part, as a function from id to settings: a million clients cost what their kinds cost.

Layer = dict[str, Any]  # settings as they were written


@dataclass(frozen=True)
class SettingsProfile:
    """Clients with the very same settings: how many, and the first of them in the order of the configuration."""

    number: int  # its place in `Population.profiles`
    settings: ClientSettings
    first: str
    count: int


@dataclass(frozen=True)
class GroupMembers:
    """One group's clients, with its settings over the defaults; a list of models is taken in turn."""

    series: IdSeries
    layer: Layer = field(default_factory=dict)


@dataclass(frozen=True)
class OverrideLayer:
    """Settings over those of the clients whose ids match."""

    pattern: Pattern
    layer: Layer


@dataclass(frozen=True)
class ListedSettings:
    """Settings that were listed by id."""

    clients: Mapping[str, ClientSettings]

    def __call__(self, client_id: str, *rest: object) -> ClientSettings:
        return self.clients[client_id]


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
        groups: Sequence[GroupMembers],
        overrides: Sequence[OverrideLayer] = (),
        *,
        settle: Callable[[str, Layer, int, Sequence[tuple[Layer, int]]], ClientSettings],
    ) -> None:
        self._groups = groups
        self._overrides = overrides
        self._settle = settle
        self.ids = ClientIds([g.series for g in groups])
        self._by_name: dict[str, list[int]] = {}
        for number, group in enumerate(groups):
            self._by_name.setdefault(group.series.name, []).append(number)
        self._cycles = tuple(_num_models(o.layer) for o in overrides)
        self._blocks: list[PatternBlocks] = []
        turns: Turns = (0,) * len(overrides)  # an override's turns run on from group to group
        patterns = [o.pattern for o in overrides]
        for group in groups:
            cycles = (_num_models(group.layer), *self._cycles)
            self._blocks.append(PatternBlocks(group.series, patterns, cycles, (0, *turns)))
            if any(c > 1 for c in self._cycles):
                turns = self._blocks[-1].model_turns(len(group.series))[1:]
        self._kinds: dict[tuple[int, Key], SettingsProfile] | None = None

    @classmethod
    def from_settings(cls, clients: Mapping[str, ClientSettings]) -> Population:
        """Clients that were listed one by one, each of a kind of its own; a population stays what it is."""
        if isinstance(clients, Population):
            return clients
        return cls(
            [GroupMembers(IdSeries(id, 1)) for id in clients], settle=ListedSettings(clients)
        )

    @property
    def profiles(self) -> list[SettingsProfile]:
        """All kinds, in the order of their first clients in the configuration."""
        return list(self._profiles_by_key().values())

    def profile(self, client_id: str) -> SettingsProfile:
        """The kind of a client. Raises KeyError for a stranger."""
        found = self.position(client_id)
        if found is None:
            raise KeyError(client_id)
        number, place = found
        hits = [
            o.pattern.accepts(o.pattern.advance(o.pattern.start, client_id))
            for o in self._overrides
        ]
        if any(hit and cycle > 1 for hit, cycle in zip(hits, self._cycles, strict=True)):
            turns = self._blocks[number].model_turns(place)
        else:
            turns = (place % _num_models(self._groups[number].layer), *(0 for _ in hits))
        key = (turns[0], *(turn if hit else -1 for turn, hit in zip(turns[1:], hits, strict=True)))
        return self._profiles_by_key()[number, key]

    def set_default(self, name: str, value: object) -> None:
        """Set a setting of all clients that leave it open (None)."""
        kinds = self._profiles_by_key()
        for key, kind in kinds.items():
            if getattr(kind.settings, name) is None:
                settings = kind.settings.model_copy(update={name: value})
                kinds[key] = replace(kind, settings=settings)

    def position(self, client_id: str) -> tuple[int, int] | None:
        """The number of a client's group and its place there; None for a stranger. Sorts as the configuration does."""
        for name in (client_id, client_id.rpartition("_")[0]):
            for number in self._by_name.get(name, ()):
                place = self._groups[number].series.position(client_id)
                if place is not None:
                    return number, place
        return None

    def matched_overrides(self) -> list[bool]:
        """Whether each override matches anybody."""
        keys = [key for blocks in self._blocks for key in blocks.count_keys()]
        return [any(key[i + 1] >= 0 for key in keys) for i in range(len(self._overrides))]

    def __getitem__(self, client_id: str) -> ClientSettings:
        return self.profile(client_id).settings

    def __contains__(self, client_id: object) -> bool:
        return isinstance(client_id, str) and self.position(client_id) is not None

    def __iter__(self) -> Iterator[str]:
        for group in self._groups:
            yield from group.series

    def __len__(self) -> int:
        return len(self.ids)

    def _profiles_by_key(self) -> dict[tuple[int, Key], SettingsProfile]:
        if self._kinds is None:
            kinds: dict[tuple[int, Key], SettingsProfile] = {}
            for number, (group, blocks) in enumerate(zip(self._groups, self._blocks, strict=True)):
                for key, (count, first) in sorted(
                    blocks.count_keys().items(), key=lambda entry: entry[1][1]
                ):
                    over = [
                        (o.layer, turn)
                        for o, turn in zip(self._overrides, key[1:], strict=True)
                        if turn >= 0
                    ]
                    settings = self._settle(group.series[first], group.layer, key[0], over)
                    kinds[number, key] = SettingsProfile(
                        len(kinds), settings, group.series[first], count
                    )
            self._kinds = kinds
        return self._kinds


def _num_models(layer: Layer) -> int:
    """How many models a layer hands out in turn."""
    return len(layer.get("model") or [None])


# From groups, defaults and overrides to one set of settings per client.

# of groups and overrides: not settings of a client
DESCRIBES = {"name", "count", "fraction", "match"}
OF_SGD = {"momentum", "nesterov"}  # settings of one optimizer, which another does not inherit


def expand_population(config: ClientsConfig) -> Population:
    """Settings by client id. Ids are `name_1`, `name_2` … (zero-padded), or the group's name where it is one client.

    Raises UserError for counts that do not add up, doubled ids, overrides that match nobody, and layers that contradict
    one another.
    """
    groups = config.groups or [ClientGroup(name="client")]
    defaults = _explicit_settings(config.defaults)
    members = [
        GroupMembers(IdSeries(group.name, count), _apply_layer(defaults, _explicit_settings(group)))
        for group, count in zip(groups, _counts(config, groups), strict=True)
    ]
    overrides = [OverrideLayer(Pattern(o.match), _explicit_settings(o)) for o in config.overrides]
    try:
        plain = Population(members, settle=_resolve_settings)
        population = (
            Population(members, overrides, settle=_resolve_settings) if overrides else plain
        )
    except ValueError as error:
        raise UserError(
            f"clients.groups: two clients are called '{error}'; give the groups different names"
        ) from None
    # what contradicts itself already is told of its group, and no override drops it unseen
    _ = plain.profiles
    for override, found in zip(overrides, population.matched_overrides(), strict=True):
        if not found:
            known = ", ".join(islice(population, 8))
            raise UserError(
                f"clients.overrides: '{override.pattern.text}' matches none of {known} …"
            )
    _ = population.profiles  # whoever is asked for later can be made
    return population


def _resolve_settings(
    client_id: str, layer: Layer, index: int, overrides: Sequence[tuple[Layer, int]]
) -> ClientSettings:
    """Settings of a client who is number `index` of its group, under overrides of whose clients it has turns, too."""
    settings = _select_model(layer, index)
    for over, among in overrides:
        settings = _select_model(_apply_layer(settings, over), among)
    return _check_settings(client_id, settings)


def _check_settings(client_id: str, settings: dict[str, Any]) -> ClientSettings:
    try:
        return ClientSettings.model_validate(settings)
    except ValidationError as error:
        raise UserError(
            f"clients: '{client_id}': {describe_error(error, settings, ClientSettings)}"
        ) from None


def _explicit_settings(settings: ClientSettings) -> dict[str, Any]:
    """What was really written, not the defaults."""
    return {k: v for k, v in settings.model_dump(exclude_unset=True).items() if k not in DESCRIBES}


def _apply_layer(base: Mapping[str, Any], over: Mapping[str, Any]) -> Layer:
    """Settings with another layer over them."""
    had = base.get("optimizer", {})
    named = over.get("optimizer", {}).get("name")
    if named is not None and named != had.get("name", OptimizerConfig().name):
        base = {**base, "optimizer": {k: v for k, v in had.items() if k not in OF_SGD}}
    return _merge(base, over)


def _select_model(layer: Layer, index: int) -> Layer:
    """With the one model whose turn it is (from 0)."""
    models = layer.get("model")
    return {**layer, "model": [models[index % len(models)]]} if models else layer


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Layer:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _counts(config: ClientsConfig, groups: list[ClientGroup]) -> list[int]:
    """How many clients each group has."""
    if config.count is None:
        if any(g.fraction for g in groups):
            raise UserError(
                "clients.groups: a group has a fraction, but clients.count is not given"
            )
        return [g.count or 1 for g in groups]
    counts = [g.count or (round(g.fraction * config.count) if g.fraction else 0) for g in groups]
    open_ = [i for i, g in enumerate(groups) if not g.count]
    rest = config.count - sum(counts)
    free = [i for i in open_ if not groups[i].fraction]
    if len(free) > 1:
        raise UserError(
            f"clients.groups: {', '.join(groups[i].name for i in free)} have neither count nor fraction"
        )
    full = abs(sum(g.fraction or 0 for g in groups) - 1) < 1e-9
    if free or (rest and open_ and (full or not free) and abs(rest) <= len(groups)):
        counts[(free or open_)[-1]] += rest  # rounding, or what is left
        rest = 0
    if rest or min(counts) < 1:
        raise UserError(
            f"clients.count: found {config.count}, but the groups add up to {sum(counts)} ({counts})"
        )
    return counts
