"""Loading of configurations from YAML, JSON or dictionaries, and application of overrides."""

from __future__ import annotations

import io
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hetero_fl.config.base import OptimizerConfig, format_value
from hetero_fl.config.clients import REPLACED
from hetero_fl.config.errors import prefix_origin
from hetero_fl.config.population import SGD_SETTINGS
from hetero_fl.config.schema import CLIENT_OPTIONS, Config
from hetero_fl.utils.code_permission import iterate_strings
from hetero_fl.utils.errors import UserError, closest, suggest_file

# References to other keys by their full paths. OmegaConf would also call functions.
REFERENCE = re.compile(r"\$\{([^{}:\\\s]+)\}")
INVALID_REFERENCE = "invalid reference; write ${key.path}"
# Maximum number of values by which aliases may enlarge a file, and of characters by which
# references may.
MAX_VALUES = 200_000
MAX_EXPANSION = 10_000_000
# Maximum number of characters of a value with references, which take long to parse.
MAX_REFERENCES = 10_000

SUFFIXES = (".yaml", ".yml", ".json")

# Maximum number of files that an error message lists.
LISTED = 10

# Sections whose settings depend on a kind: the key of the kind, and the settings of all kinds.
KINDS = {
    "algorithm": ("name", frozenset()),
    "partition": ("kind", frozenset({"min_size"})),
    "model": ("name", frozenset({"feature_dim"})),
    "optimizer": ("name", frozenset(OptimizerConfig.model_fields) - SGD_SETTINGS - {"name"}),
}

Source = str | Path | Mapping[str, Any] | Config
Overrides = str | Mapping[str, Any] | Iterable[str]
"""Changes to a configuration: `key.path=value` strings, or a dictionary keyed by key path."""


def override_list(overrides: Overrides) -> list[str]:
    """Convert overrides to a list of `key.path=value`.

    Args:
        overrides: A string, several strings, or a dictionary of values keyed by key path.

    Raises:
        UserError: If an override is not a string.

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
            raise UserError(f"overrides: expected strings key.path=value, got {override!r}")
    return listed


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides to a configuration and return the result.

    If the overrides select another algorithm, or another kind of a section in `KINDS`, the settings
    of the previous kind are removed. `epochs` replaces `steps`, and `steps` replaces `epochs`.

    Args:
        raw: The configuration as plain values, which is not modified.
        overrides: The overrides, as `key.path=value`. Later overrides take precedence.

    Raises:
        UserError: If an override cannot be applied.
    """
    changed = _apply_in_order(raw, overrides)
    kept = _drop_former_settings(raw, changed)
    return changed if kept == raw else _apply_in_order(kept, overrides)


def _apply_in_order(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for position, override in enumerate(overrides):
        if "=" not in override:
            following = overrides[position + 1 : position + 2]
            hint = f"; did you mean '{override}={following[0]}'?" if following else ""
            raise UserError(f"overrides: expected key.path=value, got '{override}'{hint}")
        raw = _override(_without_other_key(raw, override.partition("=")[0]), override)
    return raw


def _drop_former_settings(before: Any, after: Any, name: str = "") -> Any:
    """Return a value without the settings of each kind that the overrides replace.

    Args:
        before: A section, a list of sections or another value, without the overrides.
        after: The same with the overrides.
        name: Key of the section.
    """
    if isinstance(before, list) and isinstance(after, list):
        pairs = zip(before, after, strict=False)
        kept = [_drop_former_settings(old, new, name) for old, new in pairs]
        return kept + before[len(kept) :]
    if not isinstance(before, dict) or not isinstance(after, dict):
        return before
    kind, kept_keys = KINDS.get(name, ("", frozenset()))
    # A kind that is not a name is invalid, and its section stays as written for the error message.
    if isinstance(before.get(kind), str) and before[kind] != after.get(kind):
        before = {key: value for key, value in before.items() if key in kept_keys}
    for key, other in REPLACED.items():
        if after.get(key) not in (None, before.get(key)):
            before = {k: value for k, value in before.items() if k != other}
    return {
        key: _drop_former_settings(old, after.get(key), str(key)) for key, old in before.items()
    }


def _without_other_key(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """Remove the alias of the client option that an override sets.

    A client option can be set in the section `algorithm` and in `clients.defaults`.
    """
    section, _, option = key.rpartition(".")
    if option not in CLIENT_OPTIONS:
        return raw
    if section == "algorithm" and isinstance(clients := raw.get("clients"), dict):
        defaults = clients.get("defaults")
        if isinstance(defaults, dict) and option in defaults:
            rest = {name: value for name, value in defaults.items() if name != option}
            return {**raw, "clients": {**clients, "defaults": rest}}
    if section == "clients.defaults" and isinstance(algorithm := raw.get("algorithm"), dict):
        rest = {name: value for name, value in algorithm.items() if name != option}
        return {**raw, "algorithm": rest}
    return raw


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a configuration file without validation.

    References such as `${rounds}` are replaced with their values.

    Returns:
        The configuration as plain values.

    Raises:
        UserError: If the file cannot be read or is not a mapping, or if a reference is invalid.
    """
    # Imported here because worker processes import this module without using OmegaConf.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
        _check_references(tree, str(path))
        raw = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except UserError:
        raise
    except FileNotFoundError:
        hint = suggest_file(path, SUFFIXES) or _list_files(path.parent)
        raise UserError(f"{path}: file not found{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a file, got a folder{_list_files(path)}") from None
    except yaml.YAMLError as error:
        raise UserError(_describe_syntax_error(path, error)) from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {INVALID_REFERENCE}") from None
    except (OSError, ValueError, OverflowError) as error:
        # For example, the file is not UTF-8 or contains a number with thousands of digits.
        raise UserError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read: nested too deeply") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {format_value(raw)}")
    return typing.cast("dict[str, Any]", raw)


def parse_yaml(text: str) -> Any:
    """Parse the YAML of a configuration, in which references are not replaced.

    Raises:
        YAMLError: If the text is not valid, or aliases or references expand to too many values.
        OmegaConfBaseException: If a reference is not valid.
        ValueError: If a number has too many digits.
        RecursionError: If the text is nested too deeply.
    """
    from omegaconf import OmegaConf

    tokens = yaml.scan(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    values = (token.value for token in tokens if isinstance(token, yaml.ScalarToken))
    if any(len(value) > MAX_REFERENCES and "${" in value for value in values):
        raise yaml.YAMLError(f"expected references in at most {MAX_REFERENCES:,} characters")
    # Without aliases, a file has fewer values than characters.
    limit = len(text) + MAX_VALUES
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text), max_yaml_expanded_nodes=limit))


def _describe_syntax_error(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark else ""
    # OmegaConf advises on limits of its own.
    problem = str(getattr(error, "problem", None) or error).partition(". See")[0]
    is_json = path.suffix == ".json"
    remedy = "; is a comma missing?" if is_json else ""
    # A message of PyYAML or libyaml about a backslash in double quotes.
    if re.search("escape|hexd?ecimal", problem):
        remedy = r"; write / or \\ instead of \ in a path"
    return f"{path}{line}: invalid {'JSON' if is_json else 'YAML'}: {problem}{remedy}"


def _check_references(tree: Any, where: str) -> None:
    """Reject references that reveal environment variables or expand to huge values.

    A reference names another key of the tree.
    """
    # Number of characters of each value to which a reference leads.
    sizes: dict[str, int | None] = {}

    def expanded_size(place: str, value: Any) -> int:
        size = len(str(value))
        for key, text in iterate_strings(value, place):
            if "${" in REFERENCE.sub("", text):
                raise UserError(
                    f"{where}: ${{…}} may only refer to another key of the file, got {text[:60]!r}"
                )
            for name in REFERENCE.findall(text):
                if name not in sizes:
                    sizes[name] = None
                    sizes[name] = expanded_size(name, _find_value(tree, name, f"{where}: {key}"))
                if (added := sizes[name]) is None:
                    raise UserError(f"{where}: {key}: circular reference to '{name}'")
                size += added
        return size

    if expanded_size("", tree) > len(str(tree)) + MAX_EXPANSION:
        raise UserError(f"{where}: references expand to too many values; write the values")


def _find_value(tree: Any, name: str, where: str) -> Any:
    """Return the value at a path of keys, such as `clients.groups[0].name`."""
    for part in re.split(r"[.\[\]]+", name.removesuffix("]")):
        if isinstance(tree, list):
            tree = dict(enumerate(tree))
        found = [key for key in tree if str(key) == part] if isinstance(tree, dict) else []
        if len(found) != 1:
            raise UserError(f"{where}: reference to unknown key '{name}'")
        tree = tree[found[0]]
    return tree


def _list_files(folder: Path) -> str:
    """List the configuration files of a folder, for the end of an error message."""
    try:
        names = sorted(
            path.name
            for path in folder.iterdir()
            if path.suffix in SUFFIXES and not path.name.startswith(".")
        )
    except OSError:
        return ""
    more = ", …" if len(names) > LISTED else ""
    return f"; the folder contains {', '.join(names[:LISTED])}{more}" if names else ""


def plain(source: Mapping[str, Any] | Config) -> dict[str, Any]:
    """Convert a configuration to a dictionary that contains only the keys that are set."""
    return source.model_dump(exclude_unset=True) if isinstance(source, Config) else dict(source)


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, _, value = override.partition("=")
    if not key:
        raise UserError(f"overrides: expected key.path=value, got '{override}'")
    try:
        config = OmegaConf.create(raw)
        parsed = _parse_value(value)
        _check_references({**raw, key: parsed}, override)
        OmegaConf.update(config, key, parsed, merge=True)
        return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    except yaml.YAMLError:
        reason = f"expected a YAML value, got {format_value(value)}"
    except OmegaConfBaseException:
        reason = _invalid_path_reason(raw, key) or INVALID_REFERENCE
    except (TypeError, ValueError, OverflowError, IndexError, AssertionError) as error:
        reason = _invalid_path_reason(raw, key) or f"cannot be set: {str(error).splitlines()[0]}"
    except RecursionError:
        reason = "nested too deeply"
    raise UserError(prefix_origin(override, f"{key}: {reason}"))


def _parse_value(text: str) -> Any:
    """Parse the value of an override. References are not resolved."""
    from omegaconf import OmegaConf

    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    return _add_yaml_spaces(typing.cast("dict[str, Any]", parsed)["value"])


def override_values(override: str) -> dict[str, Any]:
    """Return a valid override as nested dictionaries.

    Example:
        >>> override_values("clients.defaults={epochs: 2}")
        {'clients': {'defaults': {'epochs': 2}}}
    """
    key, _, text = override.partition("=")
    values = _parse_value(text)
    for step in reversed(key.split(".")):
        values = {step: values}
    return typing.cast("dict[str, Any]", values)


def _invalid_path_reason(value: Any, key: str) -> str:
    """Return why a path does not lead to an entry of a list.

    The result is empty if the path cannot be applied for another reason.
    """
    steps = key.split(".")
    for position, step in enumerate(steps):
        if isinstance(value, list):
            where = ".".join(steps[:position])
            if not step.isdigit():
                return _suggest_entry(value, where, step, steps[position + 1 :])
            if int(step) >= len(value):
                return f"index {step} is out of range, {where} has length {len(value)}"
            value = value[int(step)]
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return ""


def _suggest_entry(entries: list[Any], where: str, step: str, rest: list[str]) -> str:
    """Return an error message that explains how to refer to an entry of a list by index.

    Args:
        entries: Entries of the list.
        where: Path of the list.
        step: Part of the path that should be an index.
        rest: Parts of the path after `step`.
    """
    index = {
        str(entry["name"]): i
        for i, entry in enumerate(entries)
        if isinstance(entry, dict) and "name" in entry
    }
    meant = step if step in index else closest(step, index)
    message = f"entries of {where} are counted from 0"
    if meant is not None:
        return f"{message}; for '{meant}' write {'.'.join([where, str(index[meant]), *rest])}"
    known = ", ".join(f"{where}.{i} is '{name}'" for name, i in index.items())
    return f"{message}; {known}" if known else message


def _add_yaml_spaces(value: Any) -> Any:
    """Convert keys without values, as YAML parses `{a:1,b:2}`, to keys with values."""
    if not isinstance(value, dict):
        return value
    tight = {k: str(k).split(":", 1) for k, v in value.items() if v is None and ":" in str(k)}
    return dict(
        (tight[k][0], yaml.safe_load(tight[k][1])) if k in tight else (k, v)
        for k, v in value.items()
    )
