"""From a file, overrides or a dictionary to a checked configuration."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hetero_fl.config.mistakes import describe
from hetero_fl.config.schema import Config
from hetero_fl.config.tutorial import is_tutorial, translated
from hetero_fl.errors import UserError, beside, closest
from hetero_fl.own_code import CONTEXT, OWN, CodePermission, references

REFERENCE = re.compile(r"\$\{[^{}]*\}")
RESOLVER = re.compile(r"\$\{[^{}]*:")
SUFFIXES = (".yaml", ".yml", ".json")


Source = str | Path | Mapping[str, Any] | Config
Overrides = str | Mapping[str, Any] | Iterable[str]
"""Changes to a configuration: one or several `key.path=value`, or a dictionary of them."""
LISTED = 10  # files of a folder that an error names


@dataclass(frozen=True)
class Draft:
    """A configuration of the right form whose algorithm has not been looked up; nothing that it names is imported.

    Args:
        config: The configuration.
        raw: The same as plain values, as they were written.
        overrides: Overrides that are part of it.
        source: The file, for error messages.
        written: What the file has, without overrides.
    """

    config: Config
    raw: dict[str, Any]
    overrides: list[str]
    source: str
    written: dict[str, Any]

    @property
    def code(self) -> dict[str, str]:
        """References to code, each with the key that names it."""
        written = references(self.raw)
        return {name: written.get(name, key) for name, key in references(self.config.model_dump()).items()}

    def where(self, key: str) -> str:
        """Return where a key was set: the last override that names it, else the file."""
        where = self.source
        for override in self.overrides:
            named = override.partition("=")[0]
            where = override if key == named or key.startswith(f"{named}.") else where
        return where

    def error(self, line: str) -> UserError:
        """Return the error for a line that begins with a key, after the place where the key was set.

        If the error is one of a section as a whole, this is the last override within it without which the error is not made,
        or the last one within it if each of several makes the error.
        """
        key = line.partition(": ")[0]
        where = self.where(key)
        # The search applies other combinations of overrides, and must not import what one of them names.
        names_code = bool(references([self.raw, self.written])) or any(OWN in o for o in self.overrides)
        if where == self.source and not names_code:
            where = self._override_in(key, line) or where
        return UserError(f"{where}: {line}")

    def _override_in(self, section: str, line: str) -> str | None:
        inside = [o for o in self.overrides if section == "here" or o.startswith(f"{section}.")]
        if not inside or _mistake(self.written, []) == line:
            return None
        for override in reversed(inside):
            if _mistake(self.written, [o for o in self.overrides if o != override]) != line:
                return override
        outside = [o for o in self.overrides if o not in inside]
        return inside[-1] if _mistake(self.written, outside) != line else None


def load_config(source: Source, overrides: Overrides = (), allow_code: bool | CodePermission = False) -> Config:
    """Load and check a configuration.

    A file with the keys of the classic tutorial (see `hetero_fl.config.tutorial`) is translated. When an override names
    another algorithm than the file, the file's settings of its own algorithm are dropped.

    Args:
        source: A YAML or JSON file, a dictionary, or another configuration.
        overrides: Changes, `key.path=value`, or a dictionary of them.
        allow_code: Whether code that a file names (`python:package.module:Name`) may run. Names in a dictionary or in
            `overrides` are the caller's own and always allowed.

    Raises:
        UserError: In one line that names the place, for everything that is wrong with the configuration.
    """
    overrides = override_list(overrides)
    draft = draft_config(source, overrides)
    permission = CodePermission.of(allow_code).with_written(source, overrides)
    permission.check(draft.code, draft.where)
    config = draft.config
    if draft.code:
        try:
            config = Config.model_validate(draft.raw, context={CONTEXT: True})
        except ValidationError as error:
            raise draft.error(describe(error, draft.raw)) from None
    made = config.model_copy(update={"algorithm": _algorithm(draft, permission)})
    if "algorithm" not in config.model_fields_set:
        made.model_fields_set.discard("algorithm")  # the copy has it among the keys that were written
    return made


def override_list(overrides: Overrides) -> list[str]:
    """Return overrides as a list of `key.path=value`.

    Args:
        overrides: One such text, several, or a dictionary from keys to values.

    Raises:
        UserError: If one of several is no text.

    Example:
        >>> override_list("rounds=1")
        ['rounds=1']
        >>> override_list({"rounds": 1, "data.name": "digits"})
        ['rounds=1', 'data.name="digits"']
    """
    if isinstance(overrides, str):
        return [overrides]
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    listed = list(overrides)
    for override in listed:
        if not isinstance(override, str):
            raise UserError(f"overrides: expected texts key.path=value, got {override!r}")
    return listed


def draft_config(source: Source, overrides: Overrides = ()) -> Draft:
    """Read a configuration and check its form, without importing anything that it names. Raises UserError."""
    where = str(source) if isinstance(source, str | Path) else "configuration"
    raw = read(Path(source)) if isinstance(source, str | Path) else _plain(source)
    if not raw and isinstance(source, str | Path):
        raise UserError(f"{where}: has no keys; name at least data, clients and algorithm")
    overrides = override_list(overrides)
    if is_tutorial(raw):
        raw, overrides = translated(raw, overrides, where)
    made = _applied(raw, overrides)
    try:
        return Draft(Config.model_validate(made), made, overrides, where, raw)
    except ValidationError as error:
        unread = Draft(Config(), made, overrides, where, raw)
        raise unread.error(describe(error, made, own=_own_keys(made))) from None


def _applied(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a configuration with its overrides. Raises UserError for one that cannot be applied."""
    named = [o.split("=", 1)[1].strip("'\" ") for o in overrides if o.startswith("algorithm.name=")]
    if named and isinstance(raw.get("algorithm"), dict) and raw["algorithm"].get("name") != named[-1]:
        raw = {**raw, "algorithm": {"name": named[-1]}}
    for override in overrides:
        raw = _override(raw, override)
    return raw


def _mistake(raw: dict[str, Any], overrides: Sequence[str]) -> str | None:
    """Return what is wrong with a configuration that names no code, None if nothing is."""
    try:
        made = _applied(raw, overrides)
        _settings(Config.model_validate(made).algorithm)
    except ValidationError as error:
        return describe(error, made, own=_own_keys(made))
    except UserError as error:
        return str(error)
    return None


def _algorithm(draft: Draft, permission: CodePermission) -> dict[str, Any]:
    """Return the algorithm's settings, complete with its defaults. Raises UserError with the key's place."""
    try:
        settings = _settings(draft.config.algorithm)
    except UserError as error:
        raise draft.error(str(error)) from None
    found = {name: f"algorithm.{key}" for name, key in references(settings).items()}
    permission.check(found, draft.where)
    try:
        return _settings(draft.config.algorithm, {CONTEXT: True}) if found else settings
    except UserError as error:
        raise draft.error(str(error)) from None


def _settings(given: Mapping[str, Any], context: Mapping[str, bool] | None = None) -> dict[str, Any]:
    from hetero_fl.algorithms import algorithm

    if "name" not in given and (meant := closest("name", given)) is not None:
        raise UserError(f"algorithm.{meant}: unknown key; did you mean 'name'?")
    if not isinstance(given.get("name"), str):
        raise UserError(f"algorithm.name: found {given.get('name')!r}; choose from {', '.join(algorithm)}")
    try:
        kind = algorithm[given["name"]]
    except UserError as error:
        raise UserError(f"algorithm.name: {error}") from None
    own = {k: v for k, v in given.items() if k != "name"}
    try:
        return {"name": given["name"], **kind.model_validate(own, context=context).model_dump()}
    except ValidationError as error:
        raise UserError(f"{describe(error, own, kind, ['algorithm'])} (of {given['name']})") from None


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
        _check_references(OmegaConf.to_container(loaded), str(path))
        raw = OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{beside(path, SUFFIXES) or _files(path.parent)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file{_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        json = " (or JSON; a comma between its entries?)" if path.suffix == ".json" else ""
        raise UserError(f"{path}{line}: not YAML{json}: {getattr(error, 'problem', None) or error}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    except ValueError as error:  # an integer with thousands of digits
        raise UserError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read: nested too deeply") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found a {type(raw).__name__} where a table of keys was expected")
    return typing.cast("dict[str, Any]", raw)


def _check_references(tree: Any, where: str) -> None:
    """Raise UserError for a `${resolver:…}` in a string of the tree: it could tell others what is in the environment."""
    if isinstance(tree, dict | list):
        for each in tree.values() if isinstance(tree, dict) else tree:
            _check_references(each, where)
    elif isinstance(tree, str):
        text, rest = "", tree
        while rest != text and "${" in rest:
            if RESOLVER.search(rest):
                raise UserError(
                    f"{where}: found {tree[:60]!r}; ${{…}} refers to another key of the file, and to nothing else"
                )
            text, rest = rest, REFERENCE.sub("key", rest)


def _files(folder: Path) -> str:
    """Return the configuration files of a folder, for an error; empty if there are none."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
    except OSError:
        return ""
    more = ", …" if len(names) > LISTED else ""
    return f"; found {', '.join(names[:LISTED])}{more} there" if names else ""


def _plain(source: Mapping[str, Any] | Config) -> dict[str, Any]:
    return source.model_dump(exclude_unset=True) if isinstance(source, Config) else dict(source)


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"overrides: found '{override}'; an override is written key.path=value")
    try:
        config = OmegaConf.create(raw)
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
        _check_references([raw, parsed], override)
        OmegaConf.update(config, key, _spaced(typing.cast("dict[str, Any]", parsed)["value"]), merge=True)
        return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, IndexError, AssertionError,
            RecursionError) as error:  # fmt: skip
        why = _beyond(raw, key) or str(error).splitlines()[0]
        raise UserError(f"{override}: {key} cannot be set: {why}") from None


def _beyond(value: Any, key: str) -> str:
    """Return what is wrong with a path that leads out of a list, or into it by another word than a number; else nothing."""
    steps = key.split(".")
    for at, step in enumerate(steps):
        if isinstance(value, list) and step.isdigit() and int(step) >= len(value):
            return f"found {step}, but {'.'.join(steps[:at])} has {len(value)}, and the first is 0"
        if isinstance(value, list) and not step.isdigit():
            place = ".".join(steps[:at])
            names = {
                str(entry["name"]): i for i, entry in enumerate(value) if isinstance(entry, dict) and "name" in entry
            }
            if (meant := step if step in names else closest(step, names)) is None:
                known = "; ".join(f"{place}.{i} is '{name}'" for name, i in names.items())
                return f"entries of {place} are numbered from 0" + (f", and {known}" if known else "")
            written = ".".join([place, str(names[meant]), *steps[at + 1 :]])
            return f"entries of {place} are numbered from 0, and '{meant}' is number {names[meant]}; write {written}"
        value = value.get(step) if isinstance(value, dict) else value[int(step)] if step.isdigit() else None
    return ""


def _spaced(value: Any) -> Any:
    """`{a:1,b:2}` as if written `{a: 1, b: 2}`: to YAML it has two keys without a value."""
    if not isinstance(value, dict):
        return value
    tight = {k: str(k).split(":", 1) for k, v in value.items() if v is None and ":" in str(k)}
    return dict((tight[k][0], yaml.safe_load(tight[k][1])) if k in tight else (k, v) for k, v in value.items())
