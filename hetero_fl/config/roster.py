"""From groups, defaults and overrides to one set of settings per client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from hetero_fl.config.clients import ClientGroup, ClientsConfig, ClientSettings
from hetero_fl.config.matching import Pattern
from hetero_fl.config.mistakes import describe
from hetero_fl.config.optimizer import OptimizerConfig
from hetero_fl.config.population import Layer, Members, Over, Population
from hetero_fl.errors import UserError
from hetero_fl.order import Series

DESCRIBES = {"name", "count", "fraction", "match"}  # of groups and overrides: not settings of a client
OF_SGD = {"momentum", "nesterov"}  # settings of one optimiser, which another does not inherit


def expand(config: ClientsConfig) -> Population:
    """Settings by client id. Ids are `name_1`, `name_2` … (zero-padded), or the group's name where it is one client.

    Raises UserError for counts that do not add up, doubled ids, overrides that match nobody, and layers that contradict
    one another.
    """
    groups = config.groups or [ClientGroup(name="client")]
    defaults = _given(config.defaults)
    members = [
        Members(Series(group.name, count), _over(defaults, _given(group)))
        for group, count in zip(groups, _counts(config, groups), strict=True)
    ]
    overrides = [Over(Pattern(o.match), _given(o)) for o in config.overrides]
    try:
        plain = Population(members, settle=_settle)
        population = Population(members, overrides, settle=_settle) if overrides else plain
    except ValueError as error:
        raise UserError(f"clients.groups: two clients are called '{error}'; give the groups different names") from None
    _ = plain.kinds  # what contradicts itself already is told of its group, and no override drops it unseen
    for override, found in zip(overrides, population.matched(), strict=True):
        if not found:
            known = ", ".join(islice(population, 8))
            raise UserError(f"clients.overrides: '{override.pattern.text}' matches none of {known} …")
    _ = population.kinds  # whoever is asked for later can be made
    return population


def _settle(id: str, layer: Layer, turn: int, overrides: Sequence[tuple[Layer, int]]) -> ClientSettings:
    """Settings of a client who is number `turn` of its group, under overrides of whose clients it has turns, too."""
    settings = _in_turn(layer, turn)
    for over, among in overrides:
        settings = _in_turn(_over(settings, over), among)
    return _checked(id, settings)


def _checked(id: str, settings: dict[str, Any]) -> ClientSettings:
    try:
        return ClientSettings.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"clients: '{id}': {describe(error, settings, ClientSettings)}") from None


def _given(settings: ClientSettings) -> dict[str, Any]:
    """What was really written, not the defaults."""
    return {k: v for k, v in settings.model_dump(exclude_unset=True).items() if k not in DESCRIBES}


def _over(base: Mapping[str, Any], over: Mapping[str, Any]) -> Layer:
    """Settings with another layer over them."""
    had, named = base.get("optimizer", {}), over.get("optimizer", {}).get("name")
    if named is not None and named != had.get("name", OptimizerConfig().name):
        base = {**base, "optimizer": {k: v for k, v in had.items() if k not in OF_SGD}}
    return _merge(base, over)


def _in_turn(layer: Layer, turn: int) -> Layer:
    """With the one model whose turn it is (from 0)."""
    models = layer.get("model")
    return {**layer, "model": [models[turn % len(models)]]} if models else layer


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
