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

from hetero_fl.config.base import format_value
from hetero_fl.config.describe import prefix_origin
from hetero_fl.config.population import merge_settings
from hetero_fl.config.schema import CLIENT_OPTIONS, Config
from hetero_fl.utils.code_permission import iterate_strings
from hetero_fl.utils.errors import UserError, suggest_file
from hetero_fl.utils.text import format_list

# References to other keys by their full paths. OmegaConf would also call functions.
REFERENCE = re.compile(r"\$\{([^{}:\\\s]+)\}")
# Separators of the steps of a path, such as `clients.groups[0].name` or `clients.groups.0.name`.
PATH_SEPARATORS = re.compile(r"[.\[\]]+")
INVALID_REFERENCE = "invalid reference; write ${key.path}"
# Maximum number of values by which aliases may enlarge a file, and of characters by which
# references may.
MAX_VALUES = 200_000
MAX_EXPANSION = 10_000_000
# Maximum number of characters of a value with references, which take long to parse.
MAX_REFERENCES = 10_000

SUFFIXES = (".yaml", ".yml", ".json")

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


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides to a configuration and return the result.

    If the overrides select another algorithm, or another kind of a section in `KINDS`, the settings
    of the previous kind are removed. `epochs` replaces `steps`, and `steps` replaces `epochs`.
    Client options in the section `algorithm` are moved to `clients.defaults`.

    Args:
        raw: The configuration as plain values, which is not modified.
        overrides: The overrides, as `key.path=value`. Later overrides take precedence.

    Raises:
        UserError: If an override cannot be applied.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        values = _move_client_options(override_values(override), {})
        changes = merge_settings(changes, values, keep_former=True)
    if not changes:
        return _move_client_options(raw, {})
    changed = _move_client_options(merge_settings(raw, changes), changes)
    return _replace_references(changed, "configuration")


def override_values(override: str) -> dict[str, Any]:
    """Return an override as nested dictionaries. References are not replaced.

    Raises:
        UserError: If the override is not `key.path=value`, or the value is not valid YAML.

    Example:
        >>> override_values("clients.defaults={epochs: 2}")
        {'clients': {'defaults': {'epochs': 2}}}
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, text = override.partition("=")
    if not key or not equals:
        raise UserError(f"overrides: expected key.path=value, got '{override}'")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError, RecursionError):
        raise UserError(
            prefix_origin(override, f"{key}: expected a YAML value, got {format_value(text)}")
        ) from None
    values = _add_yaml_spaces(typing.cast("dict[str, Any]", parsed)["value"])
    for step in reversed(PATH_SEPARATORS.split(key.removesuffix("]"))):
        values = {step: values}
    return typing.cast("dict[str, Any]", values)


def _add_yaml_spaces(value: Any) -> Any:
    """Convert keys without values, as YAML parses `{a:1,b:2}`, to keys with values."""
    if not isinstance(value, dict):
        return value
    tight = {k: str(k).split(":", 1) for k, v in value.items() if v is None and ":" in str(k)}
    return dict(
        (tight[k][0], yaml.safe_load(tight[k][1])) if k in tight else (k, v)
        for k, v in value.items()
    )


def _move_client_options(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Move options such as `algorithm.logit_adjustment` to `clients.defaults`.

    Args:
        raw: The configuration as plain values, possibly invalid.
        changes: Changes that have been applied to it, whose options in `clients.defaults` take
            precedence.

    Raises:
        UserError: If an option has two different values.
    """
    algorithm = raw.get("algorithm")
    defaults = _defaults(raw)
    if not isinstance(algorithm, dict) or not isinstance(defaults, dict):
        return dict(raw)
    options = {key: algorithm[key] for key in CLIENT_OPTIONS if key in algorithm}
    if not options:
        return dict(raw)
    changed = _defaults(changes)
    for key, value in options.items():
        if key not in changed and defaults.get(key, value) != value:
            raise UserError(
                f"algorithm.{key} and clients.defaults.{key} are different values of the same "
                f"setting, {format_value(value)} and {format_value(defaults[key])}; remove one "
                "of them"
            )
    algorithm = {key: value for key, value in algorithm.items() if key not in options}
    moved = {key: value for key, value in options.items() if key not in changed}
    clients = {**(raw.get("clients") or {}), "defaults": {**defaults, **moved}}
    return {**raw, "algorithm": algorithm, "clients": clients}


def _defaults(raw: Mapping[str, Any]) -> Any:
    """Return the section `clients.defaults`, or None if it cannot be a section."""
    clients = raw.get("clients") or {}
    return (clients.get("defaults") or {}) if isinstance(clients, dict) else None


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a configuration file without validation.

    References such as `${rounds}` are replaced with their values.

    Returns:
        The configuration as plain values.

    Raises:
        UserError: If the file cannot be read or is not a mapping, or if a reference is invalid.
    """
    # Imported here because worker processes import this module without using OmegaConf.
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = suggest_file(path, SUFFIXES) or _list_files(path.parent)
        raise UserError(f"{path}: file not found{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a file, got a folder{_list_files(path)}") from None
    except yaml.YAMLError as error:
        raise UserError(_describe_syntax_error(path, error)) from None
    except (OSError, ValueError, OverflowError, OmegaConfBaseException) as error:
        # For example, the file is not UTF-8 or contains a number with thousands of digits.
        raise UserError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read: nested too deeply") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {format_value(tree)}")
    return _replace_references(tree, str(path))


def _replace_references(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a configuration in which references are replaced with the values of the keys."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        _check_references(tree, where)
        return typing.cast(
            "dict[str, Any]", OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
        )
    except UserError:
        raise
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key}: {INVALID_REFERENCE}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except ValueError as error:
        # Python does not convert an integer with thousands of digits to text.
        raise UserError(f"{where}: cannot be read: {error}") from None


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
    for part in PATH_SEPARATORS.split(name.removesuffix("]")):
        if isinstance(tree, list):
            tree = dict(enumerate(tree))
        found = [key for key in tree if str(key) == part] if isinstance(tree, dict) else []
        if len(found) != 1:
            raise UserError(f"{where}: reference to unknown key '{name}'")
        tree = tree[found[0]]
    return tree


def _list_files(folder: Path) -> str:
    """List the configuration files of a folder, for the end of an error message."""
    names = [path.name for path in folder.glob("[!.]*") if path.suffix in SUFFIXES]
    return f"; the folder contains {format_list(sorted(names))}" if names else ""


def plain(source: Mapping[str, Any] | Config) -> dict[str, Any]:
    """Convert a configuration to a dictionary that contains only the keys that are set."""
    return source.model_dump(exclude_unset=True) if isinstance(source, Config) else dict(source)
