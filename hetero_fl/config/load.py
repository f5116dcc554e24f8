"""From a file, overrides or a dictionary to a checked configuration."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hetero_fl.config.mistakes import describe
from hetero_fl.config.schema import Config
from hetero_fl.config.tutorial import is_tutorial, translated
from hetero_fl.errors import UserError, nearest

SUFFIXES = (".yaml", ".yml", ".json")


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Iterable[str] = ()) -> Config:
    """A checked configuration from a YAML or JSON file, a dictionary, or another configuration, with `key.path=value` overrides.

    A file with the keys of the classic tutorial (see `hetero_fl.config.tutorial`) is translated. When an override names
    another algorithm than the file, the file's settings of its own algorithm are dropped. Raises UserError, in one line that
    names the place, for everything that is wrong with it.
    """
    where = str(source) if isinstance(source, str | Path) else "configuration"
    raw = read(Path(source)) if isinstance(source, str | Path) else _plain(source)
    overrides = list(overrides)
    if is_tutorial(raw):
        raw, overrides = translated(raw, overrides, where)
    named = [o.split("=", 1)[1].strip("'\" ") for o in overrides if o.startswith("algorithm.name=")]
    if named and isinstance(raw.get("algorithm"), dict) and raw["algorithm"].get("name") != named[-1]:
        raw = {**raw, "algorithm": {"name": named[-1]}}
    for override in overrides:
        raw = _override(raw, override)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise _placed(describe(error, raw, own=_own_keys(raw)), overrides, where) from None
    try:
        return config.model_copy(update={"algorithm": _algorithm(config.algorithm)})
    except UserError as error:
        raise _placed(str(error), overrides, where) from None


def _placed(line: str, overrides: Iterable[str], where: str) -> UserError:
    """A mistake at a key, with where that key was set: by an override, if one names it, else in the source `where`."""
    key = line.partition(": ")[0]
    for override in overrides:
        named = override.partition("=")[0]
        where = override if key == named or key.startswith(f"{named}.") else where
    return UserError(f"{where}: {line}")


def _algorithm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The algorithm's settings, complete with its defaults. Raises UserError with the key's place."""
    from hetero_fl.algorithms import Algorithm, algorithm

    if "name" not in settings and (close := get_close_matches("name", settings, n=1)):
        raise UserError(f"algorithm.{close[0]}: unknown key; did you mean 'name'?")
    if not isinstance(settings.get("name"), str):
        raise UserError(f"algorithm.name: found {settings.get('name')!r}; choose from {', '.join(algorithm)}")
    try:
        kind = algorithm[settings["name"]]
    except UserError as error:
        raise UserError(f"algorithm.name: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
        raise UserError(f"algorithm.name: '{settings['name']}' is no subclass of hetero_fl.algorithms.Algorithm")
    own = {k: v for k, v in settings.items() if k != "name"}
    try:
        return {"name": settings["name"], **kind.model_validate(own).model_dump()}
    except ValidationError as error:
        raise UserError(f"{describe(error, own, kind, ['algorithm'])} (of {settings['name']})") from None


def written_algorithm(source: str | Path | Mapping[str, Any] | Config) -> dict[str, Any]:
    """Return the `algorithm` section as the source writes it, without defaults."""
    raw = read(Path(source)) if isinstance(source, str | Path) else _plain(source)
    if is_tutorial(raw):
        raw, _ = translated(raw, [], str(source))
    section = raw.get("algorithm")
    return dict(section) if isinstance(section, Mapping) else {}


def _own_keys(raw: Mapping[str, Any]) -> list[str]:
    """The settings of the algorithm that a configuration names, whatever else is wrong with it."""
    from hetero_fl.algorithms import algorithm

    named = raw.get("algorithm")
    name = named.get("name") if isinstance(named, dict) else None
    return list(algorithm[name].model_fields) if isinstance(name, str) and name in algorithm else []


def read(path: Path) -> dict[str, Any]:
    """A configuration file as plain values, unchecked. Raises UserError if it cannot be read."""
    from omegaconf import OmegaConf  # only whoever reads a configuration needs it; worker processes do not
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.load(path)
        raw = OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.*") if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file{nearest(path.name, beside) if beside else ''}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        json = " (or JSON; a comma between its entries?)" if path.suffix == ".json" else ""
        raise UserError(f"{path}{line}: not YAML{json}: {getattr(error, 'problem', None) or error}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found a {type(raw).__name__} where a table of keys was expected")
    return typing.cast("dict[str, Any]", raw)


def _plain(source: Mapping[str, Any] | Config) -> dict[str, Any]:
    return source.model_dump(exclude_unset=True) if isinstance(source, Config) else dict(source)


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override}: an override is written key.path=value")
    try:
        config = OmegaConf.create(raw)
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
        OmegaConf.update(config, key, _spaced(typing.cast("dict[str, Any]", parsed)["value"]), merge=True)
        return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, IndexError, AssertionError) as error:
        why = _beyond(raw, key) or str(error).splitlines()[0]
        raise UserError(f"{override}: {key} cannot be set: {why}") from None


def _beyond(value: Any, key: str) -> str:
    """How many entries the list has that a path leads out of; empty where there is none."""
    steps = key.split(".")
    for at, step in enumerate(steps):
        if isinstance(value, list) and step.isdigit() and int(step) >= len(value):
            return f"found {step}, but {'.'.join(steps[:at])} has {len(value)}, and the first is 0"
        value = value.get(step) if isinstance(value, dict) else value[int(step)] if step.isdigit() else None
    return ""


def _spaced(value: Any) -> Any:
    """`{a:1,b:2}` as if written `{a: 1, b: 2}`: to YAML it has two keys without a value."""
    if not isinstance(value, dict):
        return value
    tight = {k: str(k).split(":", 1) for k, v in value.items() if v is None and ":" in str(k)}
    return dict((tight[k][0], yaml.safe_load(tight[k][1])) if k in tight else (k, v) for k, v in value.items())
