"""Describe the schema for the generated reference, and write resolved configurations as text."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from hetero_fl.config.schema import Config

# What a key of the schema takes and means, in words: for `docs/configuration.md` and for `hetero-fl
# methods`.

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "table"}


def describe_key(model: type[BaseModel], name: str) -> str:
    """What a key means: its description, or that of the key it takes over, or what the part that it holds says of itself."""
    for kind in model.__mro__:
        fields = getattr(kind, "model_fields", {})
        if name in fields and (told := fields[name].description):
            return str(told)
    part = section_of(model.model_fields[name].annotation)
    return "" if part is None else re.split(r"(?<!et al)\. ", section_summary(part))[0].rstrip(".")


def format_default(field: FieldInfo) -> str:
    """A key's default as one writes it in a configuration; of a part of the schema its name, if it has one."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f"`{value.name}`" if hasattr(value, "name") else ""
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return f"`{', '.join(str(getattr(v, 'name', v)) for v in value)}`"
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else _plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    return (
        "[" + ", ".join(map(_plain, value)) + "]" if isinstance(value, list | tuple) else str(value)
    )


def describe_values(
    annotation: Any,
    metadata: typing.Iterable[Any] = (),
    link: Callable[[type[BaseModel]], str] = lambda part: "table",
) -> str:
    """The values that a field takes, in words; `link`: what stands for a part of the schema."""
    metadata = list(metadata)
    for validator in metadata:
        # hetero_fl.config.base.choice_type keeps its names in a closure
        if isinstance(validator, BeforeValidator):
            known = inspect.getclosurevars(validator.func).nonlocals
            if "names" in known:
                own = [f"{known['prefix']}…"] if known.get("prefix") else []
                return ", ".join(f"`{n}`" for n in [*known["names"], *own])
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe_values(arguments[0], [*arguments[1:], *metadata], link)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            describe_values(a, metadata, link) for a in arguments if a is not type(None)
        )
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (list, tuple):
        return f"list of {describe_values(arguments[0], [], link)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return link(annotation)
    name = getattr(annotation, "__name__", str(annotation))  # of an own method any type may be met
    return WORDS.get(origin or annotation, name) + _bounds(metadata)


def _bounds(metadata: typing.Iterable[Any]) -> str:
    told = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}
    constraints = [
        part for m in metadata for part in (m.metadata if isinstance(m, FieldInfo) else [m])
    ]
    found = [
        text.format(v)
        for m in constraints
        for k, text in told.items()
        if (v := getattr(m, k, None)) is not None
    ]
    return f", {' and '.join(found)}" if found else ""


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The part of the schema that a field holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, typing.get_args(annotation))), None)


def section_summary(model: type[BaseModel]) -> str:
    """Its docstring in one line."""
    return " ".join(inspect.cleandoc(model.__doc__ or "").split())


# The resolved configuration, as a run directory keeps it, and in what two of them differ.

SHOWN = 3  # differences told one by one
FREE = ("store_memory", "workers", "address")  # keys of `runtime` that change no result
ABSENT = object()


def resolve_config(config: Config) -> dict[str, Any]:
    """The whole configuration as plain values, defaults included; loading it gives the same clients again.

    Groups and overrides hold only what was written in them: a default filled in there would hide `clients.defaults`.
    """
    plain = config.model_dump(mode="json")
    written = config.clients.model_dump(mode="json", exclude_unset=True)
    layers = {key: written.get(key, []) for key in ("groups", "overrides")}
    return {**plain, "clients": {**plain["clients"], **layers}}


def dump(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(resolve_config(config), sort_keys=False, allow_unicode=True, width=120)


def resume_relevant(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plain configuration without what may change when a run is resumed.

    That is what changes no result (memory, workers, cluster), and `rounds`, which may grow.
    """
    kept = {key: value for key, value in plain.items() if key != "rounds"}
    if isinstance(runtime := plain.get("runtime"), Mapping):
        kept["runtime"] = {key: value for key, value in runtime.items() if key not in FREE}
    return kept


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The leaves in which two plain configurations differ, the first three with both values; None if they are equal."""
    found = list(_differing_leaves(old, new, ""))
    told = [f"{path}: was {_shorten(a)}, is now {_shorten(b)}" for path, a, b in found[:SHOWN]]
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "; ".join([*told, *more]) or None


def _differing_leaves(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(k for k in old if k not in new)]:
            yield from _differing_leaves(
                old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else str(key)
            )
    elif _to_flow_tables(old) and _to_flow_tables(new):
        for i in range(max(len(old), len(new))):
            a, b = (side[i] if i < len(side) else ABSENT for side in (old, new))
            yield from _differing_leaves(a, b, f"{path}.{i}")
    elif old != new:
        yield path, old, new


def _to_flow_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, Mapping) for v in value)


def _shorten(value: Any) -> str:
    if value is ABSENT:
        return "not given"
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
