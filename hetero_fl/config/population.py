"""Resolve client groups and overrides into settings per client id.

Clients with the same settings share them: a population costs its profiles, and a byte or two per
client that say which profile is whose.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import ClientGroup, ClientsConfig, ClientSettings
from hetero_fl.config.errors import describe_error
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import ClientIds, IdSeries

# Who takes part, as a mapping from ids to settings.

Layer = dict[str, Any]  # settings as they were written


@dataclass(frozen=True)
class SettingsProfile:
    """Clients with the same settings.

    Attributes:
        number: Its index in `Population.profiles`.
        settings: What the clients share.
        first: The id of the first of them in the order of the configuration.
        count: How many there are.
    """

    number: int
    settings: ClientSettings
    first: str
    count: int


@dataclass(frozen=True)
class GroupMembers:
    """The clients of one group, with its settings over the defaults; a list of models is taken in turn."""

    series: IdSeries
    layer: Layer = field(default_factory=dict)


@dataclass(frozen=True)
class OverrideLayer:
    """Settings over those of the clients whose ids match a pattern, as `fnmatch.fnmatchcase` has it."""

    pattern: str
    layer: Layer


@dataclass(frozen=True)
class ListedSettings:
    """Settings that were listed by id."""

    clients: Mapping[str, ClientSettings]

    def __call__(self, client_id: str, *rest: object) -> ClientSettings:
        return self.clients[client_id]


class Population(Mapping[str, ClientSettings]):
    """Settings by client id, shared by all clients of a profile.

    Iteration follows the configuration, group by group; `ids` has the same clients in natural order.

    Args:
        groups: Groups of clients, in the order of the configuration.
        overrides: Settings for ids that match a pattern; the later override wins.
        settle: Function that makes the settings of a profile from the id of its first client, the
            layer of its group, its turn among the group's models, and pairs of a matching
            override's layer and its turn among that override's models.
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
        self._starts = [0, *accumulate(len(group.series) for group in groups)]
        self._assign_profiles()

    def _assign_profiles(self) -> None:
        """Number the profiles in the order of their first clients.

        A client's profile follows from its group, its turn among the group's models, and for every
        override from whether it matches and the client's turn among those that it matches.
        """
        numbers = self._group_turns()
        turns = []
        for override, matches in zip(self._overrides, self._match_overrides(), strict=True):
            cycle = _num_models(override.layer)
            turns.append(np.where(matches, (np.cumsum(matches) - 1) % cycle, -1))
            _, numbers = np.unique(numbers * (cycle + 1) + turns[-1], return_inverse=True)
        counts = np.bincount(numbers)
        first = np.zeros(len(counts), dtype=int)
        first[numbers[::-1]] = np.arange(len(self))[::-1]  # the last assignment counts
        order = np.argsort(first)
        self._profile_starts = first[order].tolist()
        self._profile_counts = counts[order].tolist()
        self._profile_turns = [column[first[order]].tolist() for column in turns]
        self._profile_numbers = np.argsort(order).astype(np.min_scalar_type(len(order)))[numbers]

    def _group_turns(self) -> NDArray[np.signedinteger[Any]]:
        """Number the combinations of a group and a turn in it, shape `[clients]`."""
        parts = [np.empty(0, dtype=np.int32)]
        start = 0
        for group in self._groups:
            cycle = min(_num_models(group.layer), len(group.series))
            parts.append(np.arange(len(group.series), dtype=np.int32) % cycle + start)
            start += cycle
        return np.concatenate(parts)

    def _match_overrides(self) -> NDArray[np.bool_]:
        """Return whether each override matches each client, shape `[overrides, clients]`."""
        if not self._overrides:
            return np.empty((0, len(self)), bool)
        patterns = [re.compile(translate(override.pattern)) for override in self._overrides]
        matches = (p.match(client_id) is not None for client_id in self for p in patterns)
        count = len(self) * len(patterns)
        return np.fromiter(matches, bool, count).reshape(len(self), len(patterns)).T

    @classmethod
    def from_settings(cls, clients: Mapping[str, ClientSettings]) -> Population:
        """Return clients that were listed one by one as a population, each with its own profile."""
        if isinstance(clients, Population):
            return clients
        return cls(
            [GroupMembers(IdSeries(id, 1)) for id in clients], settle=ListedSettings(clients)
        )

    @cached_property
    def profiles(self) -> list[SettingsProfile]:
        """All profiles, in the order of their first clients in the configuration."""
        profiles = []
        for number, index in enumerate(self._profile_starts):
            position = bisect_right(self._starts, index) - 1
            group = self._groups[position]
            place = index - self._starts[position]
            overrides = [
                (override.layer, turns[number])
                for override, turns in zip(self._overrides, self._profile_turns, strict=True)
                if turns[number] >= 0
            ]
            first = group.series[place]
            turn = place % _num_models(group.layer)
            settings = self._settle(first, group.layer, turn, overrides)
            profiles.append(SettingsProfile(number, settings, first, self._profile_counts[number]))
        return profiles

    def profile(self, client_id: str) -> SettingsProfile:
        """Return the profile of a client. Raises KeyError for an unknown id."""
        position = self.position(client_id)
        if position is None:
            raise KeyError(client_id)
        group, place = position
        return self.profiles[self._profile_numbers[self._starts[group] + place]]

    def set_default(self, name: str, value: object) -> None:
        """Set a setting of all clients that leave it open (None)."""
        self.profiles = [
            replace(profile, settings=profile.settings.model_copy(update={name: value}))
            if getattr(profile.settings, name) is None
            else profile
            for profile in self.profiles
        ]

    def position(self, client_id: str) -> tuple[int, int] | None:
        """Return the number of a client's group and its place there; None for an unknown id.

        Positions sort as the configuration does.
        """
        for name in (client_id, client_id.rpartition("_")[0]):
            for number in self._by_name.get(name, ()):
                place = self._groups[number].series.position(client_id)
                if place is not None:
                    return number, place
        return None

    def matched_overrides(self) -> list[bool]:
        """Return whether each override matches any client."""
        return [max(turns, default=-1) >= 0 for turns in self._profile_turns]

    def __getitem__(self, client_id: str) -> ClientSettings:
        return self.profile(client_id).settings

    def __contains__(self, client_id: object) -> bool:
        return isinstance(client_id, str) and self.position(client_id) is not None

    def __iter__(self) -> Iterator[str]:
        for group in self._groups:
            yield from group.series

    def __len__(self) -> int:
        return len(self.ids)


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
    overrides = [OverrideLayer(o.match, _explicit_settings(o)) for o in config.overrides]
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
            raise UserError(f"clients.overrides: '{override.pattern}' matches none of {known} …")
    _ = population.profiles  # whoever is asked for later can be made
    return population


def _resolve_settings(
    client_id: str, layer: Layer, index: int, overrides: Sequence[tuple[Layer, int]]
) -> ClientSettings:
    """Settings of a client who is number `index` of its group, under overrides of whose clients it has turns, too."""
    settings = _select_model(layer, index)
    for over, among in overrides:
        settings = _select_model(_apply_layer(settings, over), among)
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
