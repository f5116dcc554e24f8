"""From groups, defaults and overrides to one set of settings per client."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from hetero_fl.config.clients import ClientGroup, ClientsConfig, ClientSettings, OptimizerConfig
from hetero_fl.config.mistakes import describe
from hetero_fl.errors import UserError

DESCRIBES = {"name", "count", "fraction", "match"}  # of groups and overrides: not settings of a client
OF_SGD = {"momentum", "nesterov"}  # settings of one optimiser, which another does not inherit


def expand(config: ClientsConfig) -> dict[str, ClientSettings]:
    """Settings by client id. Ids are `name_1`, `name_2` … (zero-padded), or the group's name where it is one client.

    Raises UserError for counts that do not add up, doubled ids, overrides that match nobody, and layers that contradict
    one another.
    """
    groups = config.groups or [ClientGroup(name="client")]
    defaults = _given(config.defaults)
    clients: dict[str, dict[str, Any]] = {}
    for group, count in zip(groups, _counts(config, groups), strict=True):
        width = len(str(count))
        for i in range(count):
            id = group.name if count == 1 else f"{group.name}_{i + 1:0{width}}"
            if id in clients:
                raise UserError(f"clients.groups: two clients are called '{id}'; give the groups different names")
            clients[id] = _layer(defaults, _given(group), i)
    if config.overrides:  # what contradicts itself already is told of its group, and no override drops it unseen
        for id, settings in clients.items():
            _checked(id, settings)
    for override in config.overrides:
        matched = [id for id in clients if fnmatchcase(id, override.match)]
        if not matched:
            raise UserError(f"clients.overrides: '{override.match}' matches none of {', '.join(list(clients)[:8])} …")
        for i, id in enumerate(matched):
            clients[id] = _layer(clients[id], _given(override), i)
    return {id: _checked(id, settings) for id, settings in clients.items()}


def _checked(id: str, settings: dict[str, Any]) -> ClientSettings:
    try:
        return ClientSettings.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"clients: '{id}': {describe(error, settings, ClientSettings)}") from None


def _given(settings: ClientSettings) -> dict[str, Any]:
    """What was really written, not the defaults."""
    return {k: v for k, v in settings.model_dump(exclude_unset=True).items() if k not in DESCRIBES}


def _layer(base: Mapping[str, Any], over: Mapping[str, Any], turn: int) -> dict[str, Any]:
    """One client's settings under another layer, of whose clients it is number `turn` (from 0)."""
    had, named = base.get("optimizer", {}), over.get("optimizer", {}).get("name")
    if named is not None and named != had.get("name", OptimizerConfig().name):
        base = {**base, "optimizer": {k: v for k, v in had.items() if k not in OF_SGD}}
    merged = _merge(base, over)
    if models := merged.get("model"):
        merged["model"] = [models[turn % len(models)]]
    return merged


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _counts(config: ClientsConfig, groups: list[ClientGroup]) -> list[int]:
    """How many clients each group has."""
    if config.count is None:
        if any(g.fraction for g in groups):
            raise UserError("clients.groups: a group has a fraction, but clients.count is not given")
        return [g.count or 1 for g in groups]
    counts = [g.count or (round(g.fraction * config.count) if g.fraction else 0) for g in groups]
    open_ = [i for i, g in enumerate(groups) if not g.count]
    rest = config.count - sum(counts)
    free = [i for i in open_ if not groups[i].fraction]
    if len(free) > 1:
        raise UserError(f"clients.groups: {', '.join(groups[i].name for i in free)} have neither count nor fraction")
    full = abs(sum(g.fraction or 0 for g in groups) - 1) < 1e-9
    if free or (rest and open_ and (full or not free) and abs(rest) <= len(groups)):
        counts[(free or open_)[-1]] += rest  # rounding, or what is left
        rest = 0
    if rest or min(counts) < 1:
        raise UserError(f"clients.count: found {config.count}, but the groups add up to {sum(counts)} ({counts})")
    return counts
