"""Descriptions of the configuration schema, and comparison and output of configurations.

A resolved configuration contains all keys, including those with default values.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from hetero_fl.config.base import format_value
from hetero_fl.config.schema import Config
from hetero_fl.utils.objects import OBJECT_PREFIX

# Names of the types of JSON schema in the reference and in `hetero-fl methods`.
TYPE_NAMES = {
    "string": "string",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "object": "mapping",
}
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


class KeyDescription(NamedTuple):
    """Description of a key of a section, in words."""

    name: str
    values: str
    default: str
    meaning: str


class _Generator(GenerateJsonSchema):
    """A generator that describes the fields of user-defined methods, which may have any type."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {"title": error_info}


def describe_keys(
    model: type[BaseModel], links: Mapping[str, str] = MappingProxyType({})
) -> list[KeyDescription]:
    """Describe the keys of a section: valid values, default and meaning.

    The meaning of a key is the description of the field, or of the same field in a base class, or
    the first sentence of the docstring of the section that it contains.

    Args:
        model: The section.
        links: Text for each nested section, keyed by the name of its class, else "mapping".
    """
    schema = model.model_json_schema(schema_generator=_Generator)
    rows = []
    for name, key in schema.get("properties", {}).items():
        inherited = (getattr(base, "model_fields", {}).get(name) for base in model.__mro__)
        meaning = next((f.description for f in inherited if f is not None and f.description), None)
        section = section_of(model.model_fields[name].annotation)
        if meaning is None and section is not None:
            summary = re.split(r"(?<!et al)\. ", section_summary(section))[0].rstrip(".")
            meaning = summary[:1].lower() + summary[1:]
        default = _format_default(key["default"]) if "default" in key else ""
        rows.append(KeyDescription(name, _describe_values(key, links), default, meaning or ""))
    return rows


def _format_default(value: Any) -> str:
    """Format a default as in YAML. Of sections, only their names are shown."""
    sections = value if isinstance(value, list) else [value]
    if value and all(isinstance(section, dict) for section in sections):
        names = [section["name"] for section in sections if section.get("name")]
        return f"`{', '.join(names)}`" if names else ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _describe_values(schema: Mapping[str, Any], links: Mapping[str, str]) -> str:
    """Describe the values of a JSON schema in words."""
    if "$ref" in schema:
        return links.get(schema["$ref"].rpartition("/")[2], "mapping")
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice.get("type") != "null"]
        return " or ".join(_describe_values(choice, links) for choice in choices)
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_describe_values(schema.get('items', {}), links)}"
    bounds = [f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema]
    kind = TYPE_NAMES.get(schema.get("type", ""), "any value")
    return f"{kind} {' and '.join(bounds)}" if bounds else kind


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the first section (Pydantic model) in a type annotation, or None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, typing.get_args(annotation))), None)


def section_summary(model: type[BaseModel]) -> str:
    """Return the docstring of a section in one line, without example."""
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
    parts = [
        f"{key}: was {_shorten(before)}, is now {_shorten(now)}"
        for key, before, now in _differences(old, new, "")
    ]
    more = [f"and {len(parts) - MAX_SHOWN} more"] if len(parts) > MAX_SHOWN else []
    return "; ".join([*parts[:MAX_SHOWN], *more]) or None


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path and both values of each difference between two trees."""
    if _is_list_of_mappings(old) and _is_list_of_mappings(new):
        old = dict(enumerate(old))
        new = dict(enumerate(new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**new, **old}:
            place = f"{path}.{key}".lstrip(".")
            yield from _differences(old.get(key, ABSENT), new.get(key, ABSENT), place)
    elif old != new:
        yield path, old, new


def _is_list_of_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)


def _shorten(value: Any) -> str:
    return "not set" if value is ABSENT else format_value(value)
