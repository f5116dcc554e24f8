"""Error messages for invalid configurations, in one line.

A message contains the key, the value found, the valid values, and the nearest valid choice.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hetero_fl.config.base import format_value
from hetero_fl.config.describe import section_of
from hetero_fl.config.schema import Config
from hetero_fl.utils.errors import (
    closest,
    closest_abbreviation,
    closest_misspelling,
    describe_removed,
    suggest_or_list,
    suggest_similar,
)

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

# Section of the loggers, whose settings depend on their kind.
LOGGERS = ["output", "loggers"]

# Sections of `data` that apply to some sources only. Some have the name of their source.
SOURCE_SECTIONS = ("driving", "movies", "series", "speech", "text", "windows")

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
        key=lambda e: (e["type"] != "extra_forbidden", -len(_data_location(e["loc"], raw))),
    )
    if first["type"] == "extra_forbidden":
        *parent, key = first["loc"]
        place = _data_location(tuple(parent), raw)
        section = section_at(model, place)
        if removed := describe_removed(key, getattr(section, "_removed", {})):
            return ".".join([*at, *place, removed])
        known = list(section.model_fields) if section else []
        ignored = _sections_of_other_sources(raw) if place == ["data"] else set()
        known = [name for name in known if name not in ignored]
        is_path = place == ["data"] and _is_path(first["input"])
        if is_path and closest_misspelling(str(key), known) is None:
            hint = "; set the file or folder for all clients in data.path"
        else:
            hint = _suggest_key(str(key), known, [*at, *place], own, ignored)
        return f"{'.'.join([*at, *place, str(key)])}: unknown key{hint}"
    place = _data_location(first["loc"], raw)
    if first["type"] == "missing":
        return f"{'.'.join([*at, *place, str(first['loc'][-1])])}: missing"
    where = ".".join([*at, *place])
    problems_there = [p for p in problems if _data_location(p["loc"], raw) == place]
    description = _describe_problem(problems_there, where, section_at(model, place))
    return f"{where}: {description}" if where else description


def _describe_problem(
    problems: Sequence[ErrorDetails], where: str, section: type[BaseModel] | None
) -> str:
    """Describe what is wrong with a value.

    Args:
        problems: All errors of the value. There are several if several types are allowed.
        where: Path of the value.
        section: Section of the schema at this path, or None if the value is not a section.
    """
    beyond_type = [
        p for p in problems if p["type"] not in EXPECTED and p["type"] != "literal_error"
    ]
    first = (beyond_type or problems)[0]
    value = first["input"]
    if first["type"] in CUSTOM_ERROR_TYPES:
        return _describe_own_error(first)
    if first["type"] == "invalid_key" or first["loc"][-1:] == ("[key]",):
        key = [part for part in first["loc"] if part != "[key]"][-1]
        expected = EXPECTED.get(first["type"], "a string")
        return f"expected {expected} as key, got {format_value(key)}"
    if first["type"] in LIMITS:
        limit = _format_limit(first)
        return f"{limit}, got {format_value(value)}"
    if beyond_type:
        # Only user-defined methods have fields of other types.
        return f"{first['msg']}, got {format_value(value)}"
    return _describe_wrong_type(problems, where, section)


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


def _describe_wrong_type(
    problems: Sequence[ErrorDetails], where: str, section: type[BaseModel] | None
) -> str:
    value = problems[0]["input"]
    types = {p["type"] for p in problems}
    words = [EXPECTED.get(p["type"]) or str(p["ctx"]["expected"]) for p in problems]
    expected = " or ".join(dict.fromkeys(words))
    is_mapping_for_list = types <= LIST_TYPES and isinstance(value, dict)
    found = "a mapping" if is_mapping_for_list else format_value(value)
    hint = ""
    if types <= MAPPING_TYPES:
        hint = f"; {_suggest_mapping(where, section, value)}"
    elif is_mapping_for_list:
        hint = "; begin each entry of the list with a dash"
    elif types <= LIST_TYPES and isinstance(value, int | float | str):
        hint = f"; write [{value}]"
    elif where == "seed" and isinstance(value, str | list):
        hint = "; for several seeds use `hetero-fl compare --seeds 0,1`"
    elif "literal_error" in types:
        hint = suggest_similar(value, re.findall(r"'([^']*)'", expected))
    return f"expected {expected}, got {found}{hint}"


def _suggest_mapping(where: str, section: Any, found: Any) -> str:
    """Return advice on how to write a mapping instead of a list or a plain value."""
    fields = section.model_fields if section else {"name": None}
    listed = [k for k, f in fields.items() if f and _entries(f.annotation) is not None]
    if isinstance(found, list):
        return f"did you mean '{where}.{listed[0]}'?" if listed else "write its keys without dashes"
    key = next((k for k in ("name", "kind") if k in fields), None)
    if isinstance(found, str) and key:
        return f"did you mean '{where}.{key}'?"
    if found is True and section and _may_be_empty(section):
        return f"write {{}} for the defaults, or set {', '.join(fields)}"
    more = ", …" if len(fields) > MAX_SHOWN else ""
    return f"its keys are {', '.join(list(fields)[:MAX_SHOWN])}{more}"


def _may_be_empty(section: type[BaseModel]) -> bool:
    try:
        section.model_validate({})
    except ValidationError:
        return False
    return True


def _sections_of_other_sources(raw: Any) -> set[str]:
    """Return the sections of `data` that do not apply, if the source has a section of its name."""
    name = raw["data"].get("name")
    return set(SOURCE_SECTIONS) - {name} if name in SOURCE_SECTIONS else set()


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def _suggest_key(
    key: str,
    known_here: list[str],
    place: list[str],
    own: Iterable[str],
    ignored: Set[str] = frozenset(),
) -> str:
    """Suggest the nearest key of the section, or a key with this name in another section.

    Args:
        key: Unknown key.
        known_here: Keys of the section that contains the unknown key.
        place: Path of the section.
        own: Keys of the configured algorithm.
        ignored: Sections of `data` whose keys are not suggested.
    """
    if place[: len(LOGGERS)] == LOGGERS:
        # Keys of other sections are not settings of a logger.
        return suggest_or_list(key, known_here) or "; this logger has no settings"
    known = list(dict.fromkeys([*_paths(Config), *(("algorithm", k) for k in own)]))
    known = [path for path in known if ignored.isdisjoint(path)]
    elsewhere = [p for p in known if p[-1] == key]
    nearest = closest_misspelling(key, known_here)
    # `data_path` means `data.path`, not `data`.
    joined = [p for p in known if _normalized_path(p).endswith(_normalized_path([key]))]
    if nearest is None and not elsewhere and joined:
        elsewhere = joined
    elif nearest is None:
        nearest = closest_abbreviation(key, known_here)
    # For unknown settings of a method, do not suggest similar keys of other sections.
    is_of_method = place[:1] == ["algorithm"]
    if nearest is None and not elsewhere and not is_of_method:
        similar = closest(key, [p[-1] for p in known])
        elsewhere = [p for p in known if p[-1] == similar]
    suggestions = [] if nearest is None else [nearest]
    if elsewhere:
        # If several keys are equally near, choose the first one in the schema.
        path = max(elsewhere, key=lambda p: _common_prefix_length(p, place))
        i = _common_prefix_length(path, place)
        suggestions.append(".".join([*place[:i], *path[i:]]))
    if not suggestions:
        return suggest_or_list(key, known_here)
    return f"; did you mean {' or '.join(map(repr, suggestions))}?"


def full_key(name: str) -> str | None:
    """Return the full path of a configuration key, or None if the key does not exist.

    For a section, the path of the key that selects its kind is returned, such as `algorithm.name`.

    Args:
        name: Path of the key, or the last part of the path. If several keys have this name, the key
            nearest to the root is returned. `-` is equivalent to `_`.

    Example:
        >>> full_key("rounds"), full_key("algorithm"), full_key("batch-size")
        ('rounds', 'algorithm.name', 'clients.defaults.batch_size')
    """
    wanted = name.replace("-", "_")
    if wanted.startswith("algorithm."):
        return wanted
    known = {".".join(path): path for path in _paths(Config)} | {
        "algorithm.name": ("algorithm", "name")
    }
    same_name = [key for key, path in known.items() if path[-1] == wanted and "0" not in path]
    nearest = min(same_name, key=lambda key: key.count("."), default=None)
    key = wanted if wanted in known else nearest
    return next((f"{key}.{kind}" for kind in ("name", "kind") if f"{key}.{kind}" in known), key)


def nearest_key(name: str) -> str | None:
    """Return the full path of a configuration key, or of the most similar key.

    The result is None if no key is similar.

    Args:
        name: Path of the key, or the last part of the path, possibly misspelled.

    Example:
        >>> from hetero_fl.config.errors import nearest_key
        >>> nearest_key("round"), nearest_key("no-such-key-at-all")
        ('rounds', None)
    """
    wanted = name.replace("-", "_")
    similar = closest(wanted, Config.model_fields) or closest(
        wanted, [path[-1] for path in _paths(Config)]
    )
    return full_key(name) or (similar and full_key(similar))


def _normalized_path(path: Sequence[str]) -> str:
    """Normalize a path for comparison: in lower case, with dots for `_` and a leading dot."""
    return "." + ".".join(path).replace("_", ".").replace("-", ".").lower().lstrip(".")


def _common_prefix_length(path: Sequence[str], place: Sequence[str]) -> int:
    """Return the number of equal leading parts of two paths. List indices count as equal."""
    count = 0
    for a, b in zip(path, place, strict=False):
        if a != b and not (a.isdigit() and b.isdigit()):
            break
        count += 1
    return count


def _paths(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of all keys of a section and, after these, of its subsections.

    In the paths, entries of lists have the index 0.
    """
    sections = []
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        section = section_of(field.annotation)
        if section is not None:
            index = [] if _entries(field.annotation) is None else ["0"]
            sections.append(((*prefix, name, *index), section))
    for path, section in sections:
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
            exists = isinstance(raw, list) and part in range(len(raw))
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


def _entries(annotation: Any) -> type[BaseModel] | None:
    """Return the section type of the entries of a list, or None for other fields."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _entries(typing.get_args(annotation)[0])
    return section_of(annotation) if typing.get_origin(annotation) in (list, tuple) else None


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
