"""What is wrong with a configuration, in one line: the place, what was found, what is allowed."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from hetero_fl.errors import nearest


def describe(error: ValidationError, raw: Any, model: type[BaseModel]) -> str:
    """The first thing wrong, in one line: place, what was found, what is allowed."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda e: (e["type"] not in ("extra_forbidden",), -len(_place(e["loc"], raw))))
    place = _place(first["loc"], raw)
    if first["type"] == "extra_forbidden":
        *parent, key = first["loc"]
        place = _place(tuple(parent), raw)
        return f"{'.'.join([*place, str(key)])}: unknown key{nearest(key, _fields(model, place))}"
    where = ".".join(place) or "here"
    if first["type"] == "missing":
        return f"{'.'.join([*place, str(first['loc'][-1])])}: missing"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("Input should", "should")
    if message.startswith("found"):
        return f"{where}: {message}"
    found = repr(first["input"])
    return f"{where}: found {found if len(found) < 60 else found[:57] + '…'}; {message}"


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
    current: Any = model
    for part in place:
        if not part.isdigit() and isinstance(current, type) and issubclass(current, BaseModel):
            current = _section(current.model_fields[part].annotation) if part in current.model_fields else None
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _section(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, typing.Annotated):
        return next(filter(None, map(_section, typing.get_args(annotation))), None)
    return None
