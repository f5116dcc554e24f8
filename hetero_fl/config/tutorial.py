"""The ten keys of the JSON file with which the classic tutorial of horizontal federated learning begins, read as a configuration.

    {"model_name": "resnet18", "no_models": 10, "type": "cifar", "global_epochs": 20, "local_epochs": 3, "k": 6,
     "batch_size": 32, "lr": 0.001, "momentum": 0.0001, "lambda": 0.1}

Training rows are cut in order among `no_models` clients, `k` of them train in a round with SGD, and the server takes
G + λ·Σ(L − G). Images of CIFAR-10 are cropped and mirrored at random and normalised by channel, those of MNIST come as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from hetero_fl.config.base import Section, choice
from hetero_fl.config.mistakes import describe
from hetero_fl.config.schema import Config
from hetero_fl.errors import UserError, nearest, similar

SETS: dict[str, dict[str, Any]] = {
    "cifar": {
        "data": "cifar10",
        "preprocess": {"normalize": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}},
        "augment": {"crop": 4, "flip": True},
    },
    "mnist": {"data": "mnist", "preprocess": {}, "augment": {}},
}


class Tutorial(Section):
    """The tutorial's keys."""

    model_name: str
    no_models: PositiveInt
    type: choice(*SETS)  # type: ignore[valid-type]
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


def translated(raw: Mapping[str, Any], overrides: Iterable[str], where: str) -> tuple[dict[str, Any], list[str]]:
    """The configuration that the tutorial's keys stand for, and the overrides that are left for it: those of the tutorial's
    own keys (`k=3`) are taken first.

    Raises UserError, in one line, for a key that is missing or unknown and a value that none can have.
    """
    raw, left = dict(raw), []
    given: dict[str, str] = {}  # the overrides of the tutorial's keys
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key in KEYS:
            raw[key] = _value(override, value)
            given[key] = override
        elif "." not in key and key not in Config.model_fields and (hint := similar(key, KEYS)):
            raise UserError(f"{override}: {key}: unknown key{hint}")
        else:
            left.append(override)
    for key in raw:
        if key not in KEYS:
            known = " (what else a configuration has is set on the command line, key.path=value)"
            raise UserError(f"{where}: {key}: unknown key among the tutorial's{nearest(key, KEYS)}{known}")
    for key in KEYS:
        if key not in raw:
            raise UserError(f"{where}: {key}: missing; the tutorial's keys are {', '.join(KEYS)}")
    try:
        read = Tutorial.model_validate(raw)
    except ValidationError as error:
        line = describe(error, raw, Tutorial)
        raise UserError(f"{given.get(line.partition(': ')[0], where)}: {line}") from None
    if read.k > read.no_models:
        raise UserError(
            f"{given.get('k') or given.get('no_models', where)}: k: found {read.k}, but no_models is {read.no_models}"
        )
    return _configuration(read), left


def _value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{override}: found {text!r}, which is no value") from None


def _configuration(t: Tutorial) -> dict[str, Any]:
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
