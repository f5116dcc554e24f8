"""From a file, overrides or a dictionary to a checked configuration; and back to the YAML that a run directory keeps."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from hetero_fl.config.schema import Config
from hetero_fl.errors import UserError, nearest


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Iterable[str] = ()) -> Config:
    """A checked configuration from a YAML or JSON file, a dictionary, or another configuration, with `key.path=value` overrides.

    When an override names another algorithm than the file, the file's settings of its own algorithm are dropped. Raises
    UserError, in one line that names the place, for everything that is wrong with it.
    """
    where = str(source) if isinstance(source, str | Path) else "configuration"
    raw = read(Path(source)) if isinstance(source, str | Path) else _plain(source)
    overrides = list(overrides)
    named = [o.split("=", 1)[1].strip("'\" ") for o in overrides if o.startswith("algorithm.name=")]
    if named and isinstance(raw.get("algorithm"), dict) and raw["algorithm"].get("name") != named[-1]:
        raw = {**raw, "algorithm": {"name": named[-1]}}
    for override in overrides:
        raw = _override(raw, override)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {describe(error, raw, Config)}") from None
    return config.model_copy(update={"algorithm": _algorithm(config.algorithm, where)})


def _algorithm(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The algorithm's settings, complete with its defaults."""
    from hetero_fl.algorithms import Algorithm, algorithm

    if "name" not in settings and (close := get_close_matches("name", settings, n=1)):
        raise UserError(f"{where}: algorithm.{close[0]}: unknown key; did you mean 'name'?")
    if not isinstance(settings.get("name"), str):
        raise UserError(f"{where}: algorithm.name: found {settings.get('name')!r}; choose from {', '.join(algorithm)}")
    try:
        kind = algorithm[settings["name"]]
    except UserError as error:
        raise UserError(f"{where}: algorithm.name: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
        raise UserError(
            f"{where}: algorithm.name: '{settings['name']}' is no subclass of hetero_fl.algorithms.Algorithm"
        )
    own = {k: v for k, v in settings.items() if k != "name"}
    try:
        return {"name": settings["name"], **kind.model_validate(own).model_dump()}
    except ValidationError as error:
        raise UserError(f"{where}: algorithm.{describe(error, own, kind)} (of {settings['name']})") from None


def read(path: Path) -> dict[str, Any]:
    """A configuration file as plain values, unchecked. Raises UserError if it cannot be read."""
    try:
        loaded = OmegaConf.load(path)
        raw = OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.*")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file{nearest(path.name, beside) if beside else ''}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found a {type(raw).__name__} where a table of keys was expected")
    return typing.cast("dict[str, Any]", raw)


def _plain(source: Mapping[str, Any] | Config) -> dict[str, Any]:
    return source.model_dump(exclude_unset=True) if isinstance(source, Config) else dict(source)


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override}: an override is written key.path=value")
    try:
        config = OmegaConf.create(raw)
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
        OmegaConf.update(config, key, typing.cast("dict[str, Any]", parsed)["value"], merge=True)
        return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, IndexError, AssertionError) as error:
        raise UserError(f"{override}: {key} cannot be set: {str(error).splitlines()[0]}") from None


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


def dump(config: Config) -> str:
    """The whole configuration as YAML, defaults included, as a run directory keeps it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first key in which two plain configurations differ, with both values; None if they are equal."""
    for key in [*new, *(k for k in old if k not in new)]:
        a, b, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if found := first_difference(a, b, path + "."):
                return found
        elif a != b:
            return f"{path} was {a!r} and is now {b!r}"
    return None
