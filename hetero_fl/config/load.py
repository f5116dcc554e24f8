"""Load a configuration from YAML, JSON or a dictionary and apply overrides.

The keys of the tutorial's JSON are translated to the schema.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from hetero_fl.config.base import ConfigSection, choice_type
from hetero_fl.config.errors import describe_error
from hetero_fl.config.schema import Config
from hetero_fl.utils.code_permission import iterate_strings
from hetero_fl.utils.errors import (
    UserError,
    closest,
    suggest_file,
    suggest_or_list,
    suggest_similar,
)

# From a file, overrides or a dictionary to a checked configuration.

REFERENCE = re.compile(r"\$\{[^{}]*\}")
RESOLVER = re.compile(r"\$\{[^{}]*:")
SUFFIXES = (".yaml", ".yml", ".json")


Source = str | Path | Mapping[str, Any] | Config
Overrides = str | Mapping[str, Any] | Iterable[str]
"""Changes to a configuration: one or several `key.path=value`, or a dictionary of them."""
LISTED = 10  # files of a folder that an error names


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


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a configuration with its overrides. Raises UserError for one that cannot be applied."""
    named = [o.split("=", 1)[1].strip("'\" ") for o in overrides if o.startswith("algorithm.name=")]
    if (
        named
        and isinstance(raw.get("algorithm"), dict)
        and raw["algorithm"].get("name") != named[-1]
    ):
        raw = {**raw, "algorithm": {"name": named[-1]}}
    for override in overrides:
        raw = _override(raw, override)
    return raw


def raw_algorithm_section(source: str | Path | Mapping[str, Any] | Config) -> dict[str, Any]:
    """Return the `algorithm` section as the source writes it, without defaults."""
    raw = read_config_file(Path(source)) if isinstance(source, str | Path) else plain(source)
    if is_tutorial(raw):
        raw, _ = translate_tutorial(raw, [], str(source))
    section = raw.get("algorithm")
    return dict(section) if isinstance(section, Mapping) else {}


def read_config_file(path: Path) -> dict[str, Any]:
    """A configuration file as plain values, unchecked. Raises UserError if it cannot be read."""
    # only whoever reads a configuration needs it; worker processes do not
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.load(path)
        _check_references(OmegaConf.to_container(loaded), str(path))
        raw = OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file{suggest_file(path, SUFFIXES) or _files(path.parent)}"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file{_files(path)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        json = " (or JSON; a comma between its entries?)" if path.suffix == ".json" else ""
        raise UserError(
            f"{path}{line}: not YAML{json}: {getattr(error, 'problem', None) or error}"
        ) from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    except (OSError, ValueError) as error:
        # Not in UTF-8, or an integer with thousands of digits.
        raise UserError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read: nested too deeply") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found a {type(raw).__name__} where a table of keys was expected")
    return typing.cast("dict[str, Any]", raw)


def _check_references(tree: Any, where: str) -> None:
    """Refuse a `${resolver:…}` in a tree: it could reveal what is in the environment.

    References may contain references, so the innermost ones are replaced until none is left.
    """
    for _, text in iterate_strings(tree):
        rest = text
        count = 1
        while count:
            if RESOLVER.search(rest):
                raise UserError(
                    f"{where}: found {text[:60]!r}; ${{…}} refers to another key of the file, "
                    "and to nothing else"
                )
            rest, count = REFERENCE.subn("key", rest)


def _files(folder: Path) -> str:
    """Return the configuration files of a folder, for an error; empty if there are none."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
    except OSError:
        return ""
    more = ", …" if len(names) > LISTED else ""
    return f"; found {', '.join(names[:LISTED])}{more} there" if names else ""


def plain(source: Mapping[str, Any] | Config) -> dict[str, Any]:
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
        OmegaConf.update(
            config,
            key,
            _add_yaml_spaces(typing.cast("dict[str, Any]", parsed)["value"]),
            merge=True,
        )
        return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, IndexError, AssertionError,
            RecursionError) as error:  # fmt: skip
        why = _invalid_path_reason(raw, key) or str(error).splitlines()[0]
        raise UserError(f"{override}: {key} cannot be set: {why}") from None


def _invalid_path_reason(value: Any, key: str) -> str:
    """Return what is wrong with a path that leads out of a list, or into it by another word than a number; else nothing."""
    steps = key.split(".")
    for at, step in enumerate(steps):
        if isinstance(value, list) and step.isdigit() and int(step) >= len(value):
            return f"found {step}, but {'.'.join(steps[:at])} has {len(value)}, and the first is 0"
        if isinstance(value, list) and not step.isdigit():
            place = ".".join(steps[:at])
            names = {
                str(entry["name"]): i
                for i, entry in enumerate(value)
                if isinstance(entry, dict) and "name" in entry
            }
            if (meant := step if step in names else closest(step, names)) is None:
                known = "; ".join(f"{place}.{i} is '{name}'" for name, i in names.items())
                return f"entries of {place} are numbered from 0" + (
                    f", and {known}" if known else ""
                )
            written = ".".join([place, str(names[meant]), *steps[at + 1 :]])
            return f"entries of {place} are numbered from 0, and '{meant}' is number {names[meant]}; write {written}"
        value = (
            value.get(step)
            if isinstance(value, dict)
            else value[int(step)]
            if step.isdigit()
            else None
        )
    return ""


def _add_yaml_spaces(value: Any) -> Any:
    """`{a:1,b:2}` as if written `{a: 1, b: 2}`: to YAML it has two keys without a value."""
    if not isinstance(value, dict):
        return value
    tight = {k: str(k).split(":", 1) for k, v in value.items() if v is None and ":" in str(k)}
    return dict(
        (tight[k][0], yaml.safe_load(tight[k][1])) if k in tight else (k, v)
        for k, v in value.items()
    )


# The ten keys of the JSON file with which the classic tutorial of horizontal federated learning
# begins, read as a configuration.
#
#     {"model_name": "resnet18", "no_models": 10, "type": "cifar", "global_epochs": 20, "local_epochs": 3, "k": 6,
#      "batch_size": 32, "lr": 0.001, "momentum": 0.0001, "lambda": 0.1}
#
# Training rows are cut in order among `no_models` clients, `k` of them train in a round with SGD,
# and the server takes G + λ·Σ(L − G). Images of CIFAR-10 are cropped and mirrored at random and
# normalised by channel, those of MNIST come as they are.

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
    """The tutorial's keys."""

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
        """The name of the model here: torchvision's, as in the tutorial, where it has one of that name."""
        from model_zoo import list_models

        published = f"torchvision:{self.model_name}"
        return published if published in list_models(published) else self.model_name


KEYS = tuple(field.alias or name for name, field in Tutorial.model_fields.items())


def is_tutorial(raw: Mapping[str, Any]) -> bool:
    """Whether a file has the tutorial's keys and not ours: most of them, and more than of a configuration."""
    theirs = len(set(raw) & set(KEYS))
    return 2 * theirs > len(KEYS) and theirs > len(set(raw) & set(Config.model_fields))


def translate_tutorial(
    raw: Mapping[str, Any], overrides: Iterable[str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """The configuration that the tutorial's keys stand for, and the overrides that are left for it: those of the tutorial's
    own keys (`k=3`) are taken first.

    Raises UserError, in one line, for a key that is missing or unknown and a value that none can have.
    """
    raw = dict(raw)
    left = []
    given: dict[str, str] = {}  # the overrides of the tutorial's keys
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key in KEYS:
            raw[key] = _value(override, value)
            given[key] = override
        elif (
            "." not in key
            and key not in Config.model_fields
            and (hint := suggest_similar(key, KEYS))
        ):
            raise UserError(f"{override}: {key}: unknown key{hint}")
        else:
            left.append(override)
    for key in raw:
        if key not in KEYS:
            known = " (what else a configuration has is set on the command line, key.path=value)"
            raise UserError(
                f"{where}: {key}: unknown key among the tutorial's{suggest_or_list(key, KEYS)}{known}"
            )
    for key in KEYS:
        if key not in raw:
            raise UserError(f"{where}: {key}: missing; the tutorial's keys are {', '.join(KEYS)}")
    try:
        read = Tutorial.model_validate(raw)
    except ValidationError as error:
        line = describe_error(error, raw, Tutorial)
        raise UserError(f"{given.get(line.partition(': ')[0], where)}: {line}") from None
    if read.k > read.no_models:
        raise UserError(
            f"{given.get('k') or given.get('no_models', where)}: k: found {read.k}, but no_models is {read.no_models}"
        )
    return _to_configuration(read), left


def _value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{override}: found {text!r}, which is no value") from None


def _to_configuration(t: Tutorial) -> dict[str, Any]:
    chosen = SETS[t.type]
    return {
        "name": f"{chosen['data']}_conf",
        "rounds": t.global_epochs,
        "data": {
            "name": chosen["data"],
            "partition": {"kind": "in_order", "min_size": 2},
            "split": {"validation": 0, "test": 0},
            "validation": 0,
        },
        "clients": {
            "per_round": t.k,
            "defaults": {
                "model": t.model,
                "optimizer": {"name": "sgd", "lr": t.lr, "momentum": t.momentum},
                "epochs": t.local_epochs,
                "batch_size": t.batch_size,
                "preprocess": chosen["preprocess"],
                "augment": chosen["augment"],
            },
            "groups": [{"name": "client", "count": t.no_models}],
        },
        "algorithm": {"name": "fedavg", "weighting": "sum", "server_lr": t.factor},
    }
