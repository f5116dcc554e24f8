"""Error messages for invalid configurations, in one line.

A message contains the key, the value found, the valid values, and the nearest valid choice.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hetero_fl.config.base import format_value
from hetero_fl.config.describe import section_of
from hetero_fl.config.schema import Config
from hetero_fl.utils.errors import closest, describe_removed, suggest_or_list, suggest_similar
from hetero_fl.utils.text import format_list

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
MAX_SHOWN = 5


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
        hint = f"; its keys are {format_list(section.model_fields, MAX_SHOWN)}"
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
        >>> from hetero_fl.config.errors import nearest_key
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
        >>> from hetero_fl.config.errors import key_of
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
