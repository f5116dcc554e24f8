"""The resolved configuration, as a run directory keeps it, and in what two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from hetero_fl.config.schema import Config

SHOWN = 3  # differences told one by one
FREE = ("store_memory", "workers", "address")  # keys of `runtime` that change no result
ABSENT = object()


def resolved(config: Config) -> dict[str, Any]:
    """The whole configuration as plain values, defaults included; loading it gives the same clients again.

    Groups and overrides hold only what was written in them: a default filled in there would hide `clients.defaults`.
    """
    plain = config.model_dump(mode="json")
    written = config.clients.model_dump(mode="json", exclude_unset=True)
    layers = {key: written.get(key, []) for key in ("groups", "overrides")}
    return {**plain, "clients": {**plain["clients"], **layers}}


def dump(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True, width=120)


def deciding(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plain configuration without what may change when a run is resumed.

    That is what changes no result (memory, workers, cluster), and `rounds`, which may grow.
    """
    kept = {key: value for key, value in plain.items() if key != "rounds"}
    if isinstance(runtime := plain.get("runtime"), Mapping):
        kept["runtime"] = {key: value for key, value in runtime.items() if key not in FREE}
    return kept


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The leaves in which two plain configurations differ, the first three with both values; None if they are equal."""
    found = list(_leaves(old, new, ""))
    told = [f"{path}: was {_short(a)}, is now {_short(b)}" for path, a, b in found[:SHOWN]]
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "; ".join([*told, *more]) or None


def _leaves(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(k for k in old if k not in new)]:
            yield from _leaves(old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else str(key))
    elif _tables(old) and _tables(new):
        for i in range(max(len(old), len(new))):
            a, b = (side[i] if i < len(side) else ABSENT for side in (old, new))
            yield from _leaves(a, b, f"{path}.{i}")
    elif old != new:
        yield path, old, new


def _tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, Mapping) for v in value)


def _short(value: Any) -> str:
    if value is ABSENT:
        return "not given"
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
