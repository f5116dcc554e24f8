"""Resolution of client groups and overrides to settings for each client id.

Clients with the same settings share a profile. A population stores each profile once and, for each
client, the number of the profile, usually in one or two bytes. A layer is a dictionary of settings
that are set explicitly, such as the settings of a group or an override. Layers are merged in order
of precedence.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import (
    REPLACED,
    ClientGroup,
    ClientsConfig,
    ClientSettings,
    check_client_id,
)
from hetero_fl.config.describe import describe_error
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import ClientIds, IdSeries
from hetero_fl.utils.text import format_list

# Settings that are set explicitly, without defaults.
Layer = dict[str, Any]

# Maximum number of clients, each of which takes a few bytes of memory.
MAX_CLIENTS = 10_000_000
# Maximum number of client ids that an error message lists.
MAX_SHOWN = 8


@dataclass(frozen=True)
class SettingsProfile:
    """Settings that are shared by one or more clients.

    Attributes:
        number: Index of the profile in `Population.profiles`.
        settings: Settings of the clients.
        first: Id of the first client with this profile, in the order of the configuration.
        count: Number of clients with this profile.
    """

    number: int
    settings: ClientSettings
    first: str
    count: int


@dataclass(frozen=True)
class GroupMembers:
    """The clients of one group.

    Attributes:
        series: Ids of the clients.
        layer: Settings of the group, merged with the defaults. The models in the list `model` are
            assigned to the clients in turn.
    """

    series: IdSeries
    layer: Layer = field(default_factory=dict)


@dataclass(frozen=True)
class OverrideLayer:
    """Settings of the clients whose ids match a pattern.

    Attributes:
        pattern: Pattern of client ids, in the syntax of `fnmatch.fnmatchcase`.
        layer: Settings that take precedence over the settings of the group.
    """

    pattern: str
    layer: Layer


class Population(Mapping[str, ClientSettings]):
    """A mapping from client ids to settings, which are stored once per profile.

    Iteration follows the configuration, group by group. `ids` contains the same clients in natural
    order.

    Args:
        groups: Groups of clients, in the order of the configuration.
        overrides: Settings for ids that match a pattern. Later overrides take precedence.

    Attributes:
        ids: Client ids in natural order.
    """

    def __init__(
        self, groups: Sequence[GroupMembers], overrides: Sequence[OverrideLayer] = ()
    ) -> None:
        self._groups = groups
        self._overrides = overrides
        self.ids = ClientIds([g.series for g in groups])
        self._by_name: dict[str, list[int]] = {}
        for number, group in enumerate(groups):
            self._by_name.setdefault(group.series.name, []).append(number)
        self._starts = [0, *accumulate(len(group.series) for group in groups)]
        self._assign_profiles()

    def _assign_profiles(self) -> None:
        """Assign a profile to each client.

        Clients have the same profile if they have the same group, the same model of the group, the
        same matching overrides, and the same model of each of these overrides. Profiles are
        numbered in the order of their first clients.
        """
        numbers = self._group_turns()
        turns = []
        for override, matches in zip(self._overrides, self._match_overrides(), strict=True):
            cycle = _num_models(override.layer)
            turns.append(np.where(matches, (np.cumsum(matches) - 1) % cycle, -1))
            _, numbers = np.unique(numbers * (cycle + 1) + turns[-1], return_inverse=True)
        counts = np.bincount(numbers)
        first = np.zeros(len(counts), dtype=int)
        # In reverse order, so that the last assignment for each number is that of its first client.
        first[numbers[::-1]] = np.arange(len(self))[::-1]
        order = np.argsort(first)
        self._profile_starts = first[order].tolist()
        self._profile_counts = counts[order].tolist()
        self._profile_turns = [column[first[order]].tolist() for column in turns]
        self._profile_numbers = np.argsort(order).astype(np.min_scalar_type(len(order)))[numbers]

    def _group_turns(self) -> NDArray[np.signedinteger[Any]]:
        """Return the number of each client's combination of group and model, int32 `[N]`."""
        parts = [np.empty(0, dtype=np.int32)]
        start = 0
        for group in self._groups:
            cycle = min(_num_models(group.layer), len(group.series))
            parts.append(np.arange(len(group.series), dtype=np.int32) % cycle + start)
            start += cycle
        return np.concatenate(parts)

    def _match_overrides(self) -> NDArray[np.bool_]:
        """Return whether each override matches each client, bool `[overrides, clients]`."""
        if not self._overrides:
            return np.empty((0, len(self)), bool)
        patterns = [re.compile(translate(override.pattern)) for override in self._overrides]
        matches = (p.match(client_id) is not None for client_id in self for p in patterns)
        count = len(self) * len(patterns)
        return np.fromiter(matches, bool, count).reshape(len(self), len(patterns)).T

    @classmethod
    def from_settings(cls, clients: Mapping[str, ClientSettings]) -> Population:
        """Create a population from the settings of each client, keyed by client id.

        Each client has a separate profile. If `clients` is a `Population`, it is returned.
        """
        if isinstance(clients, Population):
            return clients
        names = ClientSettings.model_fields.keys()
        return cls(
            [
                GroupMembers(
                    IdSeries(client_id, 1),
                    {name: getattr(own, name) for name in names & own.model_fields_set},
                )
                for client_id, own in clients.items()
            ]
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
            settings = _resolve_settings(first, group.layer, turn, overrides)
            profiles.append(SettingsProfile(number, settings, first, self._profile_counts[number]))
        return profiles

    def profile(self, client_id: str) -> SettingsProfile:
        """Return the profile of a client.

        Raises:
            KeyError: If the id is unknown.
        """
        position = self.position(client_id)
        if position is None:
            raise KeyError(client_id)
        group, place = position
        return self.profiles[self._profile_numbers[self._starts[group] + place]]

    def set_default(self, name: str, value: object) -> None:
        """Set a setting to a value for all clients whose value is None."""
        self.profiles = [
            replace(profile, settings=profile.settings.model_copy(update={name: value}))
            if getattr(profile.settings, name) is None
            else profile
            for profile in self.profiles
        ]

    def position(self, client_id: str) -> tuple[int, int] | None:
        """Return the index of a client's group, and the index of the client in the group.

        If clients are sorted by position, they have the order of the configuration. The result is
        None for an unknown id.
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
    """Return the number of models that are assigned to clients in turn, at least 1."""
    return len(layer.get("model") or [None])


# Keys of groups and overrides that determine their clients, in contrast to settings of the clients.
MEMBERSHIP_KEYS = {"name", "count", "fraction", "match"}

# Sections whose settings depend on a kind: the key of the kind, and the settings of all kinds.
KINDS = {
    "algorithm": ("name", frozenset[str]()),
    "partition": ("kind", frozenset({"min_size"})),
    "model": ("name", frozenset({"feature_dim"})),
    "optimizer": ("name", frozenset(OptimizerConfig.model_fields) - {"momentum", "nesterov"}),
}


def expand_population(config: ClientsConfig) -> Population:
    """Resolve the section `clients` to the settings of all clients.

    The clients of a group have the zero-padded ids `name_1`, `name_2`, …. If a group has a single
    client, the name of the group is the id of the client.

    Args:
        config: The section `clients` of a configuration.

    Returns:
        A mapping from client ids to settings.

    Raises:
        UserError: If the numbers of clients do not add up, ids are not unique, an override matches
            no client, or the merged settings of a client contradict each other.
    """
    groups = config.groups or [ClientGroup(name="client")]
    defaults = explicit_settings(config.defaults)
    members = [
        GroupMembers(
            IdSeries(group.name, count), merge_settings(defaults, explicit_settings(group))
        )
        for group, count in zip(groups, _counts(config, groups), strict=True)
    ]
    for index, member in enumerate(members):
        try:
            # The ids of several clients end with a number.
            check_client_id(next(iter(member.series)))
        except ValueError as error:
            raise UserError(f"clients.groups.{index}.name: {error}") from None
    overrides = [OverrideLayer(o.match, explicit_settings(o)) for o in config.overrides]
    try:
        ClientIds([IdSeries(m.series.name.lower(), len(m.series)) for m in members])
    except ValueError as error:
        raise UserError(
            f"clients.groups: two clients have the id '{error}' (some file systems ignore upper "
            "case); choose different group names"
        ) from None
    without_overrides = Population(members)
    population = Population(members, overrides)
    # Also resolve the profiles without overrides, because overrides must not hide contradictions.
    _ = without_overrides.profiles
    for override, matches in zip(overrides, population.matched_overrides(), strict=True):
        if not matches:
            known = ", ".join(islice(population, MAX_SHOWN))
            more = ", …" if len(population) > MAX_SHOWN else ""
            raise UserError(
                f"clients.overrides: '{override.pattern}' matches no client; "
                f"the clients are {known}{more}"
            )
    # Resolve all profiles now, so that errors are raised here.
    _ = population.profiles
    return population


def _resolve_settings(
    client_id: str, layer: Layer, index: int, overrides: Sequence[tuple[Layer, int]]
) -> ClientSettings:
    """Merge the layers of a client.

    Args:
        client_id: Client id, for error messages.
        layer: Layer of the client's group.
        index: Index of the client's model in `layer`.
        overrides: The layer of each matching override, with the index of the client's model in that
            layer.
    """
    settings = _select_model(layer, index)
    for override, override_index in overrides:
        settings = _select_model(merge_settings(settings, override), override_index)
    try:
        return ClientSettings.model_validate(settings)
    except ValidationError as error:
        raise UserError(
            f"clients: '{client_id}': {describe_error(error, settings, ClientSettings)}"
        ) from None


def explicit_settings(settings: ClientSettings) -> dict[str, Any]:
    """Return the layer of settings that are set explicitly."""
    return {
        k: v for k, v in settings.model_dump(exclude_unset=True).items() if k not in MEMBERSHIP_KEYS
    }


def merge_settings(base: Any, changes: Any, place: str = "", keep_former: bool = False) -> Any:
    """Return settings with changes, which take precedence.

    If the changes select another kind of a section in `KINDS`, the settings of the former kind are
    removed. `epochs` replaces `steps`, and `steps` replaces `epochs`.

    Args:
        base: A section, a list of sections or another value, which is not modified.
        changes: Changed settings. An entry of a list is changed by a mapping from its index.
        place: Path of the settings in the configuration.
        keep_former: Whether to keep the settings of a former kind, and `epochs` next to `steps`.

    Raises:
        UserError: If a list has no entry with an index.

    Example:
        >>> from hetero_fl.config.population import merge_settings
        >>> merge_settings({"kind": "dirichlet", "alpha": 0.1}, {"kind": "iid"}, "partition")
        {'kind': 'iid'}
    """
    if not isinstance(changes, Mapping):
        return changes
    changes = {str(key): change for key, change in changes.items()}
    name = place.rstrip("0123456789.").rpartition(".")[2]
    if isinstance(base, list | tuple) and (name != "model" or all(map(str.isdigit, changes))):
        entries = {str(index): entry for index, entry in enumerate(base)}
        for index, change in changes.items():
            if index not in entries:
                path = ".".join(map(str, next(_leaves({index: change}), (index,))))
                raise UserError(
                    f"{place}.{path}: expected an index from 0 to {len(base) - 1} of {place}"
                )
            entries[index] = merge_settings(entries[index], change, f"{place}.{index}", keep_former)
        return list(entries.values())
    if not isinstance(base, Mapping):
        base = {}
    kind, common = KINDS.get(name, ("", frozenset()))
    is_other_kind = isinstance(base.get(kind), str) and changes.get(kind, base[kind]) != base[kind]
    keeps_all = keep_former or not is_other_kind
    merged = {
        key: value
        for key, value in base.items()
        if (key in common or keeps_all)
        and (keep_former or changes.get(REPLACED.get(key, "")) is None)
    }
    for key, change in changes.items():
        path = f"{place}.{key}".lstrip(".")
        merged[key] = merge_settings(merged.get(key), change, path, keep_former)
    return merged


def key_without_effect(given: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    """Return the first key of some defaults that all clients replace with other values, or "".

    Args:
        given: The defaults to check.
        layers: The settings of the clients, which take precedence.
    """
    for path in _leaves(given):
        values = [_value_at(layer, path) for layer in layers]
        if values and all(value not in (None, _value_at(given, path)) for value in values):
            return ".".join(path)
    return ""


def _leaves(layer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the paths of all values that are no sections."""
    for key, value in layer.items():
        if isinstance(value, Mapping):
            yield from ((key, *path) for path in _leaves(value))
        else:
            yield (key,)


def _value_at(layer: Any, path: Sequence[str]) -> Any:
    """Return the value of a path, or None. `epochs` and `steps` replace each other."""
    for key in path:
        if not isinstance(layer, Mapping):
            return layer
        layer = layer.get(key, layer.get(REPLACED.get(key, "")))
    return layer


def _select_model(layer: Layer, index: int) -> Layer:
    """Replace the models of a layer with the model at an index, modulo the number of models."""
    models = layer.get("model")
    return {**layer, "model": [models[index % len(models)]]} if models else layer


def _counts(config: ClientsConfig, groups: list[ClientGroup]) -> list[int]:
    """Return the number of clients of each group."""
    num_clients = config.count or sum(g.count or 1 for g in groups)
    if num_clients > MAX_CLIENTS:
        key = "clients.count" if config.count else "clients.groups"
        raise UserError(f"{key}: must be <= {MAX_CLIENTS:,} clients, got {num_clients:,}")
    if config.count is None:
        if any(g.fraction for g in groups):
            raise UserError("clients.groups: fraction requires clients.count; set it")
        return [g.count or 1 for g in groups]
    counts = [g.count or (round(g.fraction * config.count) if g.fraction else 0) for g in groups]
    without_count = [i for i, g in enumerate(groups) if not g.count]
    without_size = [i for i in without_count if not groups[i].fraction]
    if len(without_size) > 1:
        names = ", ".join(groups[i].name for i in without_size)
        raise UserError(
            f"clients.groups: only one group may have neither count nor fraction, got {names}"
        )
    rest = config.count - sum(counts)
    # Rounded fractions may not add up; the last group with a fraction makes up for it.
    is_rounding_error = rest != 0 and abs(rest) <= len(groups)
    if without_size or (without_count and is_rounding_error):
        counts[(without_size or without_count)[-1]] += rest
        rest = 0
    if rest:
        raise UserError(
            f"clients.count: the groups add up to {sum(counts)} clients {counts}, "
            f"got {config.count}"
        )
    empty = [group.name for group, count in zip(groups, counts, strict=True) if count < 1]
    if empty:
        raise UserError(
            f"clients.count: leaves no clients for group {format_list(empty, quote=True)}, got "
            f"{config.count}; choose a larger number"
        )
    return counts
