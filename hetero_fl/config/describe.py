"""Descriptions of the configuration schema, and comparison and output of configurations.

A resolved configuration contains all keys, including those with default values.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from hetero_fl.config.base import Choice, Reference, format_value
from hetero_fl.config.schema import Config
from hetero_fl.utils.objects import OBJECT_PREFIX

# Names of types in the reference and in `hetero-fl methods`.
TYPE_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "true or false",
    dict: "mapping",
}

BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def describe_key(model: type[BaseModel], name: str) -> str:
    """Return the description of a configuration key.

    The description is that of the field, or of the same field in a base class. If there is none and
    the field contains a section, the first sentence of the section's docstring is returned. In all
    other cases, the result is empty.

    Args:
        model: The section that contains the key.
        name: Name of the key.
    """
    for kind in model.__mro__:
        fields = getattr(kind, "model_fields", {})
        if name in fields and fields[name].description:
            return str(fields[name].description)
    section = section_of(model.model_fields[name].annotation)
    if section is None:
        return ""
    summary = re.split(r"(?<!et al)\. ", section_summary(section))[0].rstrip(".")
    return summary[:1].lower() + summary[1:]


def format_default(field: FieldInfo) -> str:
    """Format the default of a key as in YAML.

    If the default is a section, its `name` is returned, or an empty string if it has no name. For a
    list of sections, the names are returned.
    """
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f"`{value.name}`" if hasattr(value, "name") else ""
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return f"`{', '.join(str(getattr(v, 'name', v)) for v in value)}`"
    if value is None or isinstance(value, bool):
        return f"`{format_value(value)}`"
    return f"`{value if isinstance(value, str) else _to_flow_style(value)}`"


def _to_flow_style(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_to_flow_style(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_to_flow_style, value)) + "]"
    return str(value)


def _name_section(_section: type[BaseModel]) -> str:
    return TYPE_NAMES[dict]


def describe_values(
    annotation: Any,
    metadata: Iterable[Any] = (),
    link: Callable[[type[BaseModel]], str] = _name_section,
) -> str:
    """Describe the valid values of a field in words.

    Args:
        annotation: Type of the field.
        metadata: Metadata of the field, such as bounds.
        link: Function that returns the text for a section of the schema. By default, the text is
            "mapping".
    """
    metadata = list(metadata)
    for validator in metadata:
        if isinstance(validator, BeforeValidator) and (
            isinstance(validator.func, Choice) or validator in typing.get_args(Reference)
        ):
            return _describe_validator(validator)
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe_values(arguments[0], [*arguments[1:], *metadata], link)
    if origin in (typing.Union, types.UnionType):
        choices = [a for a in arguments if a is not type(None)]
        return " or ".join(describe_values(a, metadata, link) for a in choices)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (list, tuple):
        return f"list of {describe_values(arguments[0], [], link)}"
    return _describe_type(annotation, metadata, link)


def _describe_validator(validator: BeforeValidator) -> str:
    choice = validator.func
    if not isinstance(choice, Choice):
        return "`python:module:name`"
    names = [*choice.names, *(f"{prefix}…" for prefix in choice.prefixes)]
    return ", ".join(f"`{name}`" for name in names)


def _describe_type(
    annotation: Any, metadata: list[Any], link: Callable[[type[BaseModel]], str]
) -> str:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return link(annotation)
    # User-defined methods may have fields of any type.
    name = getattr(annotation, "__name__", str(annotation))
    return TYPE_NAMES.get(typing.get_origin(annotation) or annotation, name) + _bounds(metadata)


def _bounds(metadata: Iterable[Any]) -> str:
    constraints: list[Any] = []
    for entry in metadata:
        constraints += entry.metadata if isinstance(entry, FieldInfo) else [entry]
    bounds = [
        f"{sign} {getattr(constraint, key)}"
        for constraint in constraints
        for key, sign in BOUNDS.items()
        if getattr(constraint, key, None) is not None
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the first section (Pydantic model) in a type annotation, or None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, typing.get_args(annotation))), None)


def section_summary(model: type[BaseModel]) -> str:
    """Return the docstring of a section in one line, without arguments and example."""
    text = re.split(r"\n\n(?:Args|Example):\n", inspect.cleandoc(model.__doc__ or ""))[0]
    return " ".join(text.split())


# Maximum number of differences that `describe_difference` lists.
MAX_SHOWN = 3

# Keys of the section `runtime` that do not affect results.
NEUTRAL_RUNTIME_KEYS = ("store_memory", "workers", "address")

ABSENT = object()


def resolve_config(config: Config) -> dict[str, Any]:
    """Convert a configuration to plain values, including defaults.

    Loading the result yields the same settings. Groups and overrides contain only the keys that are
    set, because default values in groups and overrides would take precedence over
    `clients.defaults`.
    """
    plain = config.model_dump(mode="json")
    written = config.clients.model_dump(mode="json", exclude_unset=True)
    layers = {key: written.get(key, []) for key in ("groups", "overrides")}
    return {**plain, "clients": {**plain["clients"], **layers}}


class _Dumper(yaml.SafeDumper):
    """A writer that quotes text such as `1e5`, which OmegaConf reads as a number."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"), list("-+0123456789")
)


def to_yaml(plain: Mapping[str, Any], width: int = 120) -> str:
    """Return plain values as YAML, from which a configuration is read with the same values.

    Args:
        plain: Configuration as plain values.
        width: Number of characters after which long lines are broken.

    Example:
        >>> from hetero_fl.config.describe import to_yaml
        >>> print(to_yaml({"name": "1e5", "rounds": 3}), end="")
        name: '1e5'
        rounds: 3
    """
    return yaml.dump(dict(plain), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return to_yaml(resolve_config(config))


def result_relevant(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration without the keys that do not affect results.

    These are the section `output` and the keys `runtime.store_memory`, `runtime.workers` and
    `runtime.address`.
    """
    kept = {key: value for key, value in plain.items() if key != "output"}
    if isinstance(runtime := plain.get("runtime"), Mapping):
        kept["runtime"] = {k: v for k, v in runtime.items() if k not in NEUTRAL_RUNTIME_KEYS}
    return kept


def resume_relevant(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration without the keys that may change when a run is resumed.

    The keys that may change are `rounds`, which may be increased, `version`, and the keys that do
    not affect results (see `result_relevant`).
    """
    return {
        key: _without_object_numbers(value)
        for key, value in result_relevant(plain).items()
        if key not in ("rounds", "version")
    }


def _without_object_numbers(value: Any) -> Any:
    """Remove the numbers from object names in a tree, such as `~2` from `object:NAME~2`."""
    if isinstance(value, Mapping):
        return {k: _without_object_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_object_numbers(v) for v in value]
    if isinstance(value, str) and value.startswith(OBJECT_PREFIX):
        return value.partition("~")[0]
    return value


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Describe the differences between two resolved configurations in one line.

    At most three differences are listed, followed by the number of further differences. The result
    is None if the configurations are equal.
    """
    differing = list(_differing_leaves(old, new, ""))
    parts = [
        f"{key}: was {_shorten(a)}, is now {_shorten(b)}" for key, a, b in differing[:MAX_SHOWN]
    ]
    if len(differing) > MAX_SHOWN:
        parts.append(f"and {len(differing) - MAX_SHOWN} more")
    return "; ".join(parts) or None


def _differing_leaves(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(k for k in old if k not in new)]:
            yield from _differing_leaves(
                old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else str(key)
            )
    elif _is_list_of_mappings(old) and _is_list_of_mappings(new):
        for i in range(max(len(old), len(new))):
            a, b = (side[i] if i < len(side) else ABSENT for side in (old, new))
            yield from _differing_leaves(a, b, f"{path}.{i}")
    elif old != new:
        yield path, old, new


def _is_list_of_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, Mapping) for v in value)


def _shorten(value: Any) -> str:
    return "not set" if value is ABSENT else format_value(value)
