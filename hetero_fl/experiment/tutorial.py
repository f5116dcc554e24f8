"""Translation of JSON files in the format of *Practicing Federated Learning*, chapter 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from hetero_fl.config.base import ConfigSection, choice_type
from hetero_fl.config.describe import describe_error, prefix_origin
from hetero_fl.config.load import apply_overrides
from hetero_fl.config.schema import Config
from hetero_fl.utils.errors import UserError, suggest_or_list, suggest_similar

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
