"""What is wrong with a configuration, in one line: the place, what was found, what was probably meant."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hetero_fl.config.describe import section_of
from hetero_fl.config.schema import Config
from hetero_fl.utils.errors import (
    closest,
    closest_abbreviation,
    closest_misspelling,
    suggest_or_list,
    suggest_similar,
)

# pydantic's errors where a table was expected
TABLE = {"model_type", "model_attributes_type", "dict_type"}
LIST = {"list_type", "tuple_type"}
EXPECTED = {  # by pydantic's error; those of one value under several types are joined with "or"
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "an integer"
    ),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    **dict.fromkeys(("string_type", "string_unicode", "path_type"), "text"),
    **dict.fromkeys(LIST, "a list"),
    **dict.fromkeys(TABLE, "a table"),
    "none_required": "nothing",
}
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
OWN = {"value_error", "assertion_error"}  # raised by this project's validators, in its own words


def describe_error(
    error: ValidationError,
    raw: Any,
    model: type[BaseModel] = Config,
    at: Sequence[str] = (),
    own: Iterable[str] = (),
) -> str:
    """The first thing wrong, in one line: place, what was found, what is allowed.

    `raw` is what was validated as a `model`, which stands at the place `at` of the whole configuration; `own`: keys of the
    algorithm that is named there.
    """
    problems = error.errors(include_url=False)
    first = min(
        problems,
        key=lambda e: (e["type"] not in ("extra_forbidden",), -len(_data_location(e["loc"], raw))),
    )
    kind = first["type"]
    place = _data_location(first["loc"], raw)
    where = ".".join([*at, *place]) or "here"
    if kind == "extra_forbidden":
        *parent, last = first["loc"]
        place = _data_location(tuple(parent), raw)
        key = str(last)
        section = _section_at(model, place)
        known = list(section.model_fields) if section else []
        meant = _suggest_key(key, known, [*at, *place], own)
        return f"{'.'.join([*at, *place, key])}: unknown key{meant}"
    if kind == "missing":
        return f"{'.'.join([*at, *place, str(first['loc'][-1])])}: missing"
    same = [problem for problem in problems if _data_location(problem["loc"], raw) == place]
    return f"{where}: {_describe_problem(same, where, _section_at(model, place))}"


def _describe_problem(
    problems: Sequence[ErrorDetails], where: str, section: type[BaseModel] | None
) -> str:
    """What is wrong with a value, from all problems that pydantic has with it: several if it may be of several types."""
    beyond_type = [
        p for p in problems if p["type"] not in EXPECTED and p["type"] != "literal_error"
    ]
    first = (beyond_type or problems)[0]
    kind = first["type"]
    value = first["input"]
    context = first.get("ctx", {})
    if kind in OWN:
        message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        # it says itself which keys it means
        of_section = isinstance(value, dict) and set(value) != {"name"}
        return (
            message
            if message.startswith("found") or of_section
            else f"found {_format_found(value)}; {message}"
        )
    if kind == "invalid_key" or first["loc"][-1:] == ("[key]",):
        key = [part for part in first["loc"] if part != "[key]"][-1]
        return f"expected text as a key, got {_format_found(key)}"
    if kind in LIMITS:
        plain = {
            k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in context.items()
        }
        return f"{_to_singular(LIMITS[kind].format(**plain))}, got {_format_found(value)}"
    if beyond_type:
        return f"found {_format_found(value)}; {first['msg']}"  # a type that only a user's own method has
    kinds = {p["type"] for p in problems}
    words = [EXPECTED.get(p["type"]) or str(p["ctx"]["expected"]) for p in problems]
    expected = " or ".join(dict.fromkeys(words))
    line = f"expected {expected}, got {'a table' if kinds <= LIST and isinstance(value, dict) else _format_found(value)}"
    if kinds <= TABLE:
        return f"{line}; {_suggest_table(where, section, value)}"
    if kinds <= LIST and isinstance(value, dict):
        return f"{line}; each entry of a list begins with a dash"
    if kinds <= LIST and isinstance(value, int | float | str):
        return f"{line}; write [{value}]"
    if where == "seed" and isinstance(value, str | list):
        return f"{line}; several seeds are for `hetero-fl compare --seeds 0,1`"
    if "literal_error" in kinds:
        return line + suggest_similar(value, re.findall(r"'([^']*)'", expected))
    return line


def _to_singular(text: str) -> str:
    return text.replace(" 1 characters", " 1 character").replace(" 1 entries", " 1 entry")


def _format_found(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"name"}:
        value = value["name"]  # as it was written
    if value is None:
        return "nothing"
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # Python refuses to write out an integer with thousands of digits
        return "a very large integer"
    return text if len(text) < 60 else text[:57] + "…"


def _suggest_table(where: str, section: Any, found: Any) -> str:
    """How to write a table of keys where a list or a plain value stands."""
    fields = section.model_fields if section else {"name": None}
    listed = [k for k, f in fields.items() if f and _entries(f.annotation) is not None]
    if isinstance(found, list) and listed:
        return f"did you mean '{where}.{listed[0]}'?"
    if isinstance(found, list):
        return "write its keys without dashes"
    key = next((k for k in ("name", "kind") if k in fields), None)
    if key is None and "file" in fields and isinstance(found, str) and "." in found:
        key = "file"
    if isinstance(found, str) and key:
        return f"did you mean '{where}.{key}'?"
    if found is True and section and _may_be_empty(section):
        return f"{{}} takes all defaults, its keys are {', '.join(fields)}"
    return f"its keys are {', '.join(list(fields)[:5])}" + (", …" if len(fields) > 5 else "")


def _may_be_empty(section: type[BaseModel]) -> bool:
    """Whether a section may be left empty."""
    try:
        section()
    except ValidationError:
        return False
    return True


def _suggest_key(key: str, known_here: list[str], place: list[str], own: Iterable[str]) -> str:
    """The key of this place that is nearest, and one of the same name elsewhere, with its full path."""
    known = list(dict.fromkeys([*_paths(Config), *(("algorithm", k) for k in own)]))
    there = [p for p in known if p[-1] == key]
    near = closest_misspelling(key, known_here)
    joined = [p for p in known if _normalized_path(p).endswith(_normalized_path([key]))]
    if near is None and not there and joined:
        there = joined  # data_path is data.path, not data
    elif near is None:
        near = closest_abbreviation(key, known_here)
    # a method's settings have little to do with other sections
    of_method = place[:1] == ["algorithm"]
    if near is None and not there and not of_method:
        alike = closest(key, [p[-1] for p in known])
        there = [p for p in known if p[-1] == alike]
    close = [] if near is None else [near]
    if there:
        # of several the first, as the schema lists them
        path = max(there, key=lambda p: _common_prefix_length(p, place))
        i = _common_prefix_length(path, place)
        close.append(".".join([*place[:i], *path[i:]]))
    if not close:
        return suggest_or_list(key, known_here)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?"


def full_key(name: str) -> str | None:
    """Return the full path of a configuration key, None if there is no such key; of a section the key that names its kind.

    Args:
        name: A path, or its last part. Of several keys of that name it is the one nearest to the root. `-` counts as `_`.

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
    alike = [key for key, path in known.items() if path[-1] == wanted and "0" not in path]
    key = wanted if wanted in known else min(alike, key=lambda key: key.count("."), default=None)
    return next((f"{key}.{kind}" for kind in ("name", "kind") if f"{key}.{kind}" in known), key)


def _normalized_path(path: Sequence[str]) -> str:
    """A path without the difference between `proxy_size` and `proxy.size`; the dot in front marks where a key begins."""
    return "." + ".".join(path).replace("_", ".").replace("-", ".").lower().lstrip(".")


def _common_prefix_length(path: Sequence[str], place: Sequence[str]) -> int:
    """How many steps two paths have in common from the root; one entry of a list is as good as another."""
    count = 0
    for a, b in zip(path, place, strict=False):
        if a != b and not (a.isdigit() and b.isdigit()):
            break
        count += 1
    return count


def _paths(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys, those of a section before those of its parts; 0 stands for any entry of a list."""
    parts = []
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        entries = _entries(field.annotation)
        if (part := section_of(field.annotation)) is not None:
            parts.append(((*prefix, name, *(["0"] if entries is not None else [])), part))
    for path, part in parts:
        yield from _paths(part, path)


def _data_location(loc: tuple[int | str, ...], raw: Any) -> list[str]:
    """The part of a location that is really in the data: pydantic adds names of types within unions."""
    place = []
    for part in loc:
        inside = (
            part in raw
            if isinstance(raw, dict)
            else isinstance(raw, list) and part in range(len(raw))
        )
        if inside:
            raw = raw[part]
            place.append(str(part))
    return place


def _section_at(model: type[BaseModel], place: Iterable[str]) -> type[BaseModel] | None:
    current: Any = model
    for part in place:
        if not part.isdigit() and current is not None:
            current = (
                section_of(current.model_fields[part].annotation)
                if part in current.model_fields
                else None
            )
    return typing.cast("type[BaseModel] | None", current)


def _entries(annotation: Any) -> Any:
    """The part of the schema that the entries of a list are, if it is one of these."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _entries(typing.get_args(annotation)[0])
    return section_of(annotation) if typing.get_origin(annotation) in (list, tuple) else None
