"""Load and validate the configuration of a run, with the settings of its method.

JSON files in the format of *Practicing Federated Learning*, chapter 3, are translated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from hetero_fl.algorithms import register_algorithm
from hetero_fl.config import Config, describe_difference, resolve_config, resume_relevant
from hetero_fl.config.base import ConfigSection, choice_type
from hetero_fl.config.describe import describe_error, key_of, prefix_origin
from hetero_fl.config.load import (
    Overrides,
    Source,
    apply_overrides,
    override_list,
    plain,
    read_config_file,
)
from hetero_fl.reporting.run_loggers import make_loggers
from hetero_fl.utils.code_permission import (
    ALLOW_CODE,
    AllowCode,
    check_code,
    code_of_caller,
    find_references,
)
from hetero_fl.utils.errors import UserError, closest, suggest_or_list, suggest_similar
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
    file, its settings in the file are ignored. JSON files in the format of the book *Practicing
    Federated Learning* are translated.

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
    # Settings that name code are validated again when the code may be imported.
    for is_allowed in (False, True):
        try:
            settings = _validate_algorithm(draft.config.algorithm, {ALLOW_CODE: is_allowed})
        except UserError as error:
            raise draft.error(str(error)) from None
        found = {name: f"algorithm.{key}" for name, key in find_references(settings).items()}
        check_code(found, draft.key_source, permission)
        if not found:
            break
    return settings


def _validate_algorithm(section: Mapping[str, Any], context: dict[str, bool]) -> dict[str, Any]:
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


# Yang et al., *Practicing Federated Learning*, chapter 3, is a tutorial on horizontal federated
# learning. It configures a run by a JSON file such as:
#
#     {"model_name": "resnet18", "no_models": 10, "type": "cifar", "global_epochs": 20,
#      "local_epochs": 3, "k": 6, "batch_size": 32, "lr": 0.001, "momentum": 0.0001, "lambda": 0.1}
#
# The training rows are divided in order among `no_models` clients, `k` of which train with SGD in
# each round, and the server computes G + λ·Σ(L − G). CIFAR-10 images are cropped and flipped at
# random and normalized per channel; MNIST images are not changed.

SETS: dict[str, dict[str, Any]] = {
    "cifar": {
        "data": "cifar10",
        "preprocess": {
            "normalize": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
        },
        "augment": {"crop": 4, "flip": True},
    },
    "mnist": {"data": "mnist", "preprocess": {}, "augment": {}},
}


class Tutorial(ConfigSection):
    """The settings in a configuration file of the tutorial."""

    model_name: str
    no_models: PositiveInt
    type: choice_type(*SETS)  # type: ignore[valid-type]
    global_epochs: PositiveInt
    local_epochs: PositiveInt
    k: PositiveInt
    batch_size: PositiveInt
    lr: PositiveFloat
    momentum: float = Field(ge=0, lt=1)
    factor: PositiveFloat = Field(alias="lambda")

    @property
    def model(self) -> str:
        """Name of the model, with the prefix `torchvision:` if torchvision has such a model."""
        from model_zoo import list_models

        published = f"torchvision:{self.model_name}"
        return published if published in list_models(published) else self.model_name


KEYS = tuple(field.alias or name for name, field in Tutorial.model_fields.items())


def is_tutorial(raw: Mapping[str, Any]) -> bool:
    """Return whether a mapping has the format of the tutorial.

    A mapping has this format if it contains more than half of the tutorial's keys, and more of
    these than keys of a configuration.
    """
    count = len(set(raw) & set(KEYS))
    return 2 * count > len(KEYS) and count > len(set(raw) & set(Config.model_fields))


def translate_tutorial(
    raw: dict[str, Any], overrides: Sequence[str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Translate a file in the tutorial's format to a configuration.

    Args:
        raw: Content of the file.
        overrides: Overrides. Overrides of the tutorial's keys, such as `k=3`, are applied to the
            file.
        where: Name of the file, for error messages.

    Returns:
        The configuration, and the remaining overrides to apply to the configuration.

    Raises:
        UserError: If a key is missing or unknown, or a value is invalid.
    """
    own = [override for override in overrides if override.partition("=")[0] in KEYS]
    remaining = [override for override in overrides if override not in own]
    raw = apply_overrides(raw, own)
    origins = {override.partition("=")[0]: override for override in own}
    for override in remaining:
        key = override.partition("=")[0]
        if (
            "." not in key
            and key not in Config.model_fields
            and (hint := suggest_similar(key, KEYS))
        ):
            raise UserError(prefix_origin(override, f"{key}: unknown key{hint}"))
    for key in raw.keys() - KEYS:
        raise UserError(
            f"{where}: {key}: unknown key of the tutorial's format{suggest_or_list(key, KEYS)} "
            "(other settings can be given on the command line as key.path=value)"
        )
    try:
        settings = Tutorial.model_validate(raw)
    except ValidationError as error:
        line = describe_error(error, raw, Tutorial)
        origin = origins.get(line.partition(": ")[0], where)
        raise UserError(prefix_origin(origin, line)) from None
    if settings.k > settings.no_models:
        origin = origins.get("k") or origins.get("no_models", where)
        line = f"k: must be <= no_models, which is {settings.no_models}, got {settings.k}"
        raise UserError(prefix_origin(origin, line))
    return _to_configuration(settings), remaining


def _to_configuration(tutorial: Tutorial) -> dict[str, Any]:
    dataset = SETS[tutorial.type]
    return {
        "name": f"{dataset['data']}_conf",
        "rounds": tutorial.global_epochs,
        "data": {
            "name": dataset["data"],
            "partition": {"kind": "in_order", "min_size": 2},
            "split": {"validation": 0, "test": 0},
            "validation": 0,
        },
        "clients": {
            "per_round": tutorial.k,
            "defaults": {
                "model": tutorial.model,
                "optimizer": {"name": "sgd", "lr": tutorial.lr, "momentum": tutorial.momentum},
                "epochs": tutorial.local_epochs,
                "batch_size": tutorial.batch_size,
                "preprocess": dataset["preprocess"],
                "augment": dataset["augment"],
            },
            "groups": [{"name": "client", "count": tutorial.no_models}],
        },
        "algorithm": {"name": "fedavg", "weighting": "sum", "server_lr": tutorial.factor},
    }
