"""What is wrong with a configuration, in one line: the place, what was found, what was probably meant."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from hetero_fl.config.schema import Config
from hetero_fl.errors import abbreviated, closest, misspelled, nearest

TABLE = {"model_type", "model_attributes_type", "dict_type"}  # pydantic's names for: a table was meant


def describe(
    error: ValidationError, raw: Any, model: type[BaseModel] = Config, at: Sequence[str] = (), own: Iterable[str] = ()
) -> str:
    """The first thing wrong, in one line: place, what was found, what is allowed.

    `raw` is what was validated as a `model`, which stands at the place `at` of the whole configuration; `own`: keys of the
    algorithm that is named there.
    """
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda e: (e["type"] not in ("extra_forbidden",), -len(_place(e["loc"], raw))))
    kind, place = first["type"], _place(first["loc"], raw)
    where = ".".join([*at, *place]) or "here"
    if kind == "extra_forbidden":
        *parent, last = first["loc"]
        place, key = _place(tuple(parent), raw), str(last)
        meant = _meant(key, _fields(model, place), [*at, *place], own)
        return f"{'.'.join([*at, *place, key])}: unknown key{meant}"
    if kind == "missing":
        return f"{'.'.join([*at, *place, str(first['loc'][-1])])}: missing"
    if kind in TABLE:
        return f"{where}: found {_found(first['input'])}; {_table(where, _section_at(model, place), first['input'])}"
    if kind == "list_type" and isinstance(first["input"], dict):
        return f"{where}: found a table; a list was meant, each entry of which begins with a dash"
    if kind == "list_type" and isinstance(first["input"], int | float | str):
        return f"{where}: found {_found(first['input'])}; a list was meant: [{first['input']}]"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("Input should", "should")
    section = isinstance(first["input"], dict) and set(first["input"]) != {"name"}
    if message.startswith("found") or (section and kind == "value_error"):
        return f"{where}: {message}"  # of a whole section it says itself which keys it means
    return f"{where}: found {_found(first['input'])}; {message}"


def _found(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"name"}:
        value = value["name"]  # as it was written
    text = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) < 60 else text[:57] + "…"


def _table(where: str, section: Any, found: Any) -> str:
    """What to say where a table of keys was meant and a list or a plain value stands."""
    fields = section.model_fields if section else {"name": None}
    listed = [k for k, f in fields.items() if f and _entries(f.annotation) is not None]
    if isinstance(found, list) and listed:
        return f"a table was meant; did you mean '{where}.{listed[0]}'?"
    if isinstance(found, list):
        return "a table was meant: write its keys without dashes"
    key = next((k for k in ("name", "kind") if k in fields), None)
    if key is None and "file" in fields and isinstance(found, str) and "." in found:
        key = "file"
    if isinstance(found, str) and key:
        return f"a table was meant; did you mean '{where}.{key}'?"
    if found is True and section and _complete(section):
        return f"a table was meant: {{}} takes all defaults, its keys are {', '.join(fields)}"
    return f"a table was meant, with keys such as {', '.join(list(fields)[:5])}"


def _complete(section: type[BaseModel]) -> bool:
    """Whether a section may be left empty."""
    try:
        section()
    except ValidationError:
        return False
    return True


def _meant(key: str, here: list[str], place: list[str], own: Iterable[str]) -> str:
    """The key of this place that is nearest, and one of the same name elsewhere, with its full path."""
    known = list(dict.fromkeys([*_paths(Config), *(("algorithm", k) for k in own)]))
    there = [p for p in known if p[-1] == key]
    near = misspelled(key, here)
    joined = [p for p in known if _joined(p).endswith(_joined([key]))]
    if near is None and not there and joined:
        there = joined  # data_path is data.path, not data
    elif near is None:
        near = abbreviated(key, here)
    of_method = place[:1] == ["algorithm"]  # a method's settings have little to do with other sections
    if near is None and not there and not of_method:
        alike = closest(key, [p[-1] for p in known])
        there = [p for p in known if p[-1] == alike]
    close = [] if near is None else [near]
    if there:
        path = max(there, key=lambda p: _common(p, place))  # of several the first, as the schema lists them
        i = _common(path, place)
        close.append(".".join([*place[:i], *path[i:]]))
    if not close:
        return nearest(key, here)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?"


def _joined(path: Sequence[str]) -> str:
    """A path without the difference between `proxy_size` and `proxy.size`; the dot in front marks where a key begins."""
    return "." + ".".join(path).replace("_", ".").replace("-", ".").lower().lstrip(".")


def _common(path: Sequence[str], place: Sequence[str]) -> int:
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
        if (part := _section(field.annotation)) is not None:
            parts.append(((*prefix, name, *(["0"] if entries is not None else [])), part))
    for path, part in parts:
        yield from _paths(part, path)


def _place(loc: tuple[int | str, ...], raw: Any) -> list[str]:
    """The part of a location that is really in the data: pydantic adds names of types within unions."""
    place = []
    for part in loc:
        inside = part in raw if isinstance(raw, dict) else isinstance(raw, list) and part in range(len(raw))
        if inside:
            raw = raw[part]
            place.append(str(part))
    return place


def _fields(model: type[BaseModel], place: Iterable[str]) -> list[str]:
    """The keys that are known at a place."""
    section = _section_at(model, place)
    return list(section.model_fields) if section else []


def _section_at(model: type[BaseModel], place: Iterable[str]) -> type[BaseModel] | None:
    current: Any = model
    for part in place:
        if not part.isdigit() and current is not None:
            current = _section(current.model_fields[part].annotation) if part in current.model_fields else None
    return typing.cast("type[BaseModel] | None", current)


def _section(annotation: Any) -> Any:
    """The part of the schema that an annotation holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, tuple, typing.Union, types.UnionType, typing.Annotated):
        return next(filter(None, map(_section, typing.get_args(annotation))), None)
    return None


def _entries(annotation: Any) -> Any:
    """The part of the schema that the entries of a list are, if it is one of these."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _entries(typing.get_args(annotation)[0])
    return _section(annotation) if typing.get_origin(annotation) in (list, tuple) else None
