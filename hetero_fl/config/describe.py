"""Descriptions of the configuration schema, of differences and of errors, and YAML output.

A resolved configuration contains all keys, including those with default values. An error message
has one line with the key, the value found, the valid values, and the nearest valid choice.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import ErrorDetails

from hetero_fl.config.base import format_value
from hetero_fl.config.schema import Config
from hetero_fl.utils.errors import closest, describe_removed, suggest_or_list, suggest_similar
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.text import format_list

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
MAX_DIFFERENCES = 3

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
    more = [f"and {len(parts) - MAX_DIFFERENCES} more"] if len(parts) > MAX_DIFFERENCES else []
    return "; ".join([*parts[:MAX_DIFFERENCES], *more]) or None


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


# Types of pydantic errors where a mapping or a list was expected.
MAPPING_TYPES = {"model_type", "model_attributes_type", "dict_type"}
LIST_TYPES = {"list_type", "tuple_type"}

# Expected values, keyed by type of pydantic error.
EXPECTED = {
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "an integer"
    ),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    **dict.fromkeys(("string_type", "string_unicode", "path_type"), "a string"),
    **dict.fromkeys(LIST_TYPES, "a list"),
    **dict.fromkeys(MAPPING_TYPES, "a mapping"),
    "none_required": "null",
}

# Format strings of limits, keyed by type of pydantic error.
LIMITS = {
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_too_short": "expected at least {min_length} characters",
    "string_too_long": "expected at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "expected at least {min_length} entries",
    "too_long": "expected at most {max_length} entries",
    "is_instance_of": "expected {class}",
}

# Types of errors that are raised by validators of this package and have complete messages.
CUSTOM_ERROR_TYPES = {"value_error", "assertion_error"}

# Maximum number of keys of a section that a message lists.
MAX_KEYS = 5


def describe_error(
    error: ValidationError,
    raw: Any,
    model: type[BaseModel] = Config,
    at: Sequence[str] = (),
    own: Iterable[str] = (),
) -> str:
    """Describe the most relevant error of a validation in one line.

    Unknown keys take precedence over other errors.

    Args:
        error: The pydantic error.
        raw: The value that was validated.
        model: The pydantic model of the value.
        at: Path of the value in the whole configuration.
        own: Keys of the configured algorithm, which are suggested for unknown keys.

    Returns:
        A line with the key, the value found and the valid values.
    """
    problems = error.errors(include_url=False)
    first = min(
        problems,
        key=lambda p: (p["type"] != "extra_forbidden", -len(_data_location(p["loc"], raw))),
    )
    place = _data_location(first["loc"], raw)
    where = ".".join([*at, *place])
    if first["type"] == "extra_forbidden":
        section = section_at(model, place[:-1])
        if removed := describe_removed(place[-1], getattr(section, "_removed", {})):
            return ".".join([*at, *place[:-1], removed])
        known = list(section.model_fields) if section else []
        return f"{where}: unknown key{_suggest_key(where, known, own)}"
    if first["type"] == "missing":
        return f"{'.'.join([*at, *place, str(first['loc'][-1])])}: missing"
    problems_there = [p for p in problems if _data_location(p["loc"], raw) == place]
    description = _describe_problem(problems_there, section_at(model, place))
    return f"{where}: {description}" if where else description


def _describe_problem(problems: Sequence[ErrorDetails], section: type[BaseModel] | None) -> str:
    """Describe what is wrong with a value.

    Args:
        problems: All errors of the value. There are several if several types are allowed.
        section: Section of the schema that the value should be, or None.
    """
    of_type = {*EXPECTED, "literal_error"}
    first = next((p for p in problems if p["type"] not in of_type), problems[0])
    found = format_value(first["input"])
    if first["type"] in CUSTOM_ERROR_TYPES:
        return _describe_own_error(first)
    if first["type"] == "invalid_key" or first["loc"][-1:] == ("[key]",):
        key = [part for part in first["loc"] if part != "[key]"][-1]
        return f"expected {EXPECTED.get(first['type'], 'a string')} as key, got {format_value(key)}"
    if first["type"] in LIMITS:
        return f"{_format_limit(first)}, got {found}"
    if first["type"] not in of_type:
        # Only user-defined methods have fields of other types.
        return f"{first['msg']}, got {found}"
    words = [EXPECTED.get(p["type"]) or str(p["ctx"]["expected"]) for p in problems]
    expected = " or ".join(dict.fromkeys(words))
    if section is not None and first["type"] in MAPPING_TYPES:
        hint = f"; its keys are {format_list(section.model_fields, MAX_KEYS)}"
    else:
        hint = suggest_similar(first["input"], re.findall(r"'([^']*)'", expected))
    return f"expected {expected}, got {found}{hint}"


def _describe_own_error(problem: ErrorDetails) -> str:
    """Return the message of a validator of this package.

    The value is appended unless it is a section or the message already describes it.
    """
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    is_section = isinstance(problem["input"], dict)
    if is_section or re.search(r"\b(got|unknown|found|was removed)\b", message):
        return message
    return f"{message}, got {format_value(problem['input'])}"


def _format_limit(problem: ErrorDetails) -> str:
    limits = {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in problem.get("ctx", {}).items()
    }
    text = LIMITS[problem["type"]].format(**limits)
    return text.replace(" 1 characters", " 1 character").replace(" 1 entries", " 1 entry")


def _suggest_key(unknown: str, known_here: list[str], own: Iterable[str]) -> str:
    """Suggest a key of the section, or a key of a similar name in another section.

    Args:
        unknown: Path of the unknown key.
        known_here: Keys of the section that contains the unknown key.
        own: Keys of the configured algorithm.
    """
    place, _, key = unknown.rpartition(".")
    nearest = closest(key, known_here)
    # The settings of methods and loggers are not those of other sections.
    if nearest is None and not place.startswith(("algorithm", "output.loggers")):
        nearest = nearest_key(key, place, own)
    return suggest_or_list(key, known_here) if nearest is None else f"; did you mean '{nearest}'?"


def nearest_key(name: str, place: str = "", own: Iterable[str] = ()) -> str | None:
    """Return the path of the configuration key with the most similar name, if one is similar.

    Of several keys, those in a place come first, whose paths begin there. For a section, the path
    of the key that selects its kind is returned, such as `algorithm.name`.

    Args:
        name: Path of the key, or the last part of the path, possibly misspelled.
        place: Path of a section.
        own: Keys of the configured algorithm.

    Example:
        >>> from hetero_fl.config.describe import nearest_key
        >>> nearest_key("round"), nearest_key("batch-size"), nearest_key("no-such-key-at-all")
        ('rounds', 'clients.defaults.batch_size', None)
        >>> nearest_key("lr", "clients.groups.1")
        'clients.groups.1.optimizer.lr'
    """
    paths = [*_paths(Config), *(f"algorithm.{key}" for key in ("name", *own))]
    names = paths if "." in name else {path.rpartition(".")[2] for path in paths}
    similar = closest(name, names) or closest(name, paths)
    found = [path for path in paths if similar in (path, path.rpartition(".")[2])]
    if not found:
        return None
    # Entries of lists have the index 0.
    inside = f"{re.sub('[0-9]+', '0', place)}."
    section = f"{place.partition('.')[0]}."
    nearest = max(found, key=lambda path: (path.startswith(inside), path.startswith(section)))
    kinds = (f"{nearest}.{kind}" for kind in ("name", "kind"))
    key = next((kind for kind in kinds if kind in paths), nearest)
    return f"{place}.{key.removeprefix(inside)}" if key.startswith(inside) else key


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the paths of all keys of a section and, after these, of its subsections.

    In the paths, entries of lists have the index 0.
    """
    sections = {}
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        section = section_of(field.annotation)
        if section is not None:
            is_list = typing.get_origin(field.annotation) is list
            sections[f"{prefix}{name}.0." if is_list else f"{prefix}{name}."] = section
    for path, section in sections.items():
        yield from _paths(section, path)


def _data_location(loc: tuple[int | str, ...], raw: Any) -> list[str]:
    """Return the parts of an error location that exist in the data.

    Locations of pydantic also contain other parts, such as names of types.
    """
    place = []
    for part in loc:
        if isinstance(raw, dict):
            exists = part in raw
        else:
            exists = isinstance(raw, list | tuple) and part in range(len(raw))
        if exists:
            raw = raw[part]
            place.append(str(part))
    return place


def section_at(model: type[BaseModel], place: Iterable[str]) -> type[BaseModel] | None:
    """Return the section of the schema at a path, or None if the path is not a section."""
    current: type[BaseModel] | None = model
    for part in place:
        if part.isdigit() or current is None:
            continue
        field = current.model_fields.get(part)
        current = None if field is None else section_of(field.annotation)
    return current


def key_of(line: str) -> str:
    """Return the key with which an error message begins.

    Example:
        >>> from hetero_fl.config.describe import key_of
        >>> key_of("rounds: expected an integer"), key_of("channel.entropy was removed; use topk")
        ('rounds', 'channel.entropy')
    """
    return re.split(": | was removed; ", line, maxsplit=1)[0]


def prefix_origin(origin: str, line: str) -> str:
    """Prefix an error message with the origin of its key, unless the key names the origin.

    The key names an override of the key itself, but not an override of a section.

    Args:
        origin: The configuration file, or an override `key.path=value`.
        line: Error message that begins with a key.

    Example:
        >>> prefix_origin("rounds=ten", "rounds: expected an integer, got 'ten'")
        "rounds: expected an integer, got 'ten'"
        >>> prefix_origin("run.yaml", "rounds: expected an integer, got 'ten'")
        "run.yaml: rounds: expected an integer, got 'ten'"
    """
    key = key_of(line)
    return line if origin.startswith(f"{key}=") else f"{origin}: {line}"
