"""Load and validate the configuration of a run, with the settings of its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hetero_fl.algorithms import register_algorithm
from hetero_fl.config import Config, describe_difference, resolve_config, resume_relevant
from hetero_fl.config.describe import describe_error, key_of, prefix_origin
from hetero_fl.config.load import (
    Overrides,
    Source,
    apply_overrides,
    override_list,
    plain,
    read_config_file,
)
from hetero_fl.experiment.tutorial import is_tutorial, translate_tutorial
from hetero_fl.reporting.run_loggers import make_loggers
from hetero_fl.utils.code_permission import (
    ALLOW_CODE,
    AllowCode,
    check_code,
    code_of_caller,
    find_references,
)
from hetero_fl.utils.errors import UserError, closest
from hetero_fl.utils.objects import iterate_objects


@dataclass(frozen=True)
class DraftConfig:
    """A configuration that was validated without importing code that the configuration refers to.

    Args:
        config: The configuration. The settings of the algorithm have not been validated.
        raw: The configuration as plain values, with overrides.
        overrides: The overrides, as `key.path=value`.
        source: Name of the configuration file, for error messages.
    """

    config: Config
    raw: dict[str, Any]
    overrides: list[str]
    source: str

    @property
    def code_references(self) -> dict[str, str]:
        """References to code, each mapped to the configuration key where the reference occurs."""
        written = find_references(self.raw)
        return {
            name: written.get(name, key)
            for name, key in find_references(self.config.model_dump()).items()
        }

    def key_source(self, key: str) -> str:
        """Return the origin of a key.

        The origin is the last override that sets the key, a section around it or a key in it. If
        there is none, the origin is the configuration file.
        """
        where = self.source
        for override in self.overrides:
            named = override.partition("=")[0]
            if f"{key}.".startswith(f"{named}.") or named.startswith(f"{key}."):
                where = override
        return where

    def error(self, line: str) -> UserError:
        """Create an error whose message is prefixed with the origin of the key.

        Args:
            line: Error message that begins with a key.
        """
        return UserError(prefix_origin(self.key_source(key_of(line)), line))


def load_config(source: Source, overrides: Overrides = (), allow_code: AllowCode = False) -> Config:
    """Load and check a configuration.

    If an override selects a different algorithm, kind of partition, model or optimizer than the
    file, its settings in the file are ignored. JSON files in the format of a tutorial (see
    `hetero_fl.experiment.tutorial`) are translated.

    Args:
        source: A YAML or JSON file, a dictionary, or another configuration.
        overrides: Changes to the configuration, as `key.path=value` or as a dictionary.
        allow_code: Whether code that a file refers to (`python:package.module:Name`) may be
            executed. References in a dictionary or in `overrides` are always allowed.

    Returns:
        The validated configuration, with all defaults.

    Raises:
        UserError: If the configuration is invalid. The message names the invalid key.

    Example:
        >>> import hetero_fl
        >>> config = hetero_fl.load_config({"rounds": 5}, overrides=["algorithm.name=fedprox"])
        >>> config.rounds
        5
        >>> config.algorithm["mu"]
        0.01
        >>> hetero_fl.load_config({"round": 5})
        Traceback (most recent call last):
        hetero_fl.utils.errors.UserError: configuration: round: unknown key; did you mean 'rounds'?
    """
    overrides = override_list(overrides)
    draft = draft_config(source, overrides)
    permission = code_of_caller(allow_code, source, overrides)
    check_code(draft.code_references, draft.key_source, permission)
    if isinstance(source, str | Path):
        for key, value in iterate_objects(draft.raw):
            raise draft.error(
                f"{key}: '{value}' is an object of a Python program, which a file cannot name"
            )
    config = draft.config
    if draft.code_references:
        try:
            config = Config.model_validate(draft.raw, context={ALLOW_CODE: True})
        except ValidationError as error:
            raise draft.error(describe_error(error, draft.raw)) from None
    try:
        # The settings of the loggers are valid if the loggers can be created.
        make_loggers(config)
    except UserError as error:
        raise draft.error(str(error)) from None
    loaded = config.model_copy(update={"algorithm": _load_algorithm_config(draft, permission)})
    if "algorithm" not in config.model_fields_set:
        # `model_copy` marks the updated field as set.
        loaded.model_fields_set.discard("algorithm")
    return loaded


def describe_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Describe in one line how a saved configuration differs from a current one.

    The saved configuration may be that of an earlier version. It is loaded first, so that removed
    keys without effect are ignored and new keys have their default values. Keys that do not affect
    results are ignored (see `resume_relevant`), but not `rounds`.

    Args:
        saved: The resolved configuration of an earlier run, as plain values.
        current: The resolved configuration, as plain values.

    Returns:
        The differences, or why the saved configuration is not valid. None if there are none.
    """
    before, now = (
        {"rounds": tree.get("rounds"), **resume_relevant(tree)} for tree in (saved, current)
    )
    known = find_references(now)
    # Code that only the saved configuration names must not be imported, and is a difference.
    if before != now and find_references(before).keys() <= known.keys():
        try:
            loaded = resolve_config(load_config(before, allow_code=known))
        except UserError as error:
            return f"{str(error).removeprefix('configuration: ')}; start a new run"
        before = {"rounds": loaded["rounds"], **resume_relevant(loaded)}
    return describe_difference(before, now)


def draft_config(source: Source, overrides: Overrides = ()) -> DraftConfig:
    """Read and validate a configuration without importing code that the configuration refers to.

    The settings of the algorithm are not validated.

    Args:
        source: A YAML or JSON file, a dictionary, or another configuration.
        overrides: Changes to the configuration, as `key.path=value` or as a dictionary.

    Raises:
        UserError: If the configuration is invalid.
    """
    where = str(source) if isinstance(source, str | Path) else "configuration"
    raw = read_config_file(Path(source)) if isinstance(source, str | Path) else plain(source)
    if not raw and isinstance(source, str | Path):
        raise UserError(f"{where}: has no keys; expected at least data, clients and algorithm")
    overrides = override_list(overrides)
    if is_tutorial(raw):
        raw, overrides = translate_tutorial(raw, overrides, where)
    values = apply_overrides(raw, overrides)
    try:
        return DraftConfig(Config.model_validate(values), values, overrides, where)
    except ValidationError as error:
        draft = DraftConfig(Config(), values, overrides, where)
        raise draft.error(describe_error(error, values, own=_method_keys(values))) from None


def _load_algorithm_config(draft: DraftConfig, permission: AllowCode) -> dict[str, Any]:
    """Return the settings of the algorithm with all defaults.

    Raises:
        UserError: If a setting is invalid. The message contains the origin of the setting.
    """
    try:
        settings = _validate_algorithm(draft.config.algorithm)
    except UserError as error:
        raise draft.error(str(error)) from None
    found = {name: f"algorithm.{key}" for name, key in find_references(settings).items()}
    check_code(found, draft.key_source, permission)
    if not found:
        return settings
    try:
        return _validate_algorithm(draft.config.algorithm, {ALLOW_CODE: True})
    except UserError as error:
        raise draft.error(str(error)) from None


def _validate_algorithm(
    section: Mapping[str, Any], context: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    if "name" not in section and (misspelled := closest("name", section)) is not None:
        raise UserError(f"algorithm.{misspelled}: unknown key; did you mean 'name'?")
    name = section.get("name")
    if not isinstance(name, str):
        raise UserError(
            f"algorithm.name: expected the name of a method, got {name!r}; "
            f"choose from {', '.join(register_algorithm)}"
        )
    try:
        algorithm_type = register_algorithm[name]
    except UserError as error:
        raise UserError(f"algorithm.name: {str(error).removeprefix('algorithm: ')}") from None
    settings = {key: value for key, value in section.items() if key != "name"}
    try:
        validated = algorithm_type.model_validate(settings, context=context)
    except ValidationError as error:
        problem = describe_error(error, settings, algorithm_type, ["algorithm"])
        raise UserError(f"{problem} (algorithm.name={name})") from None
    return {"name": name, **validated.model_dump()}


def _method_keys(raw: Mapping[str, Any]) -> list[str]:
    """Return the names of the algorithm's settings, or no names if the algorithm is unknown."""
    section = raw.get("algorithm")
    name = section.get("name") if isinstance(section, dict) else None
    return (
        list(register_algorithm[name].model_fields)
        if isinstance(name, str) and name in register_algorithm
        else []
    )
