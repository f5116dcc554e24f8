"""Merging of defaults, groups and overrides."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from hetero_fl.config import expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.experiment.configuration import load_config
from tests.support.cases import each_case

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True}


def expand(**clients: Any) -> dict[str, ClientSettings]:
    return expand_population(load_config({"clients": clients}).clients)


def own_settings(layer: str, own: dict[str, Any]) -> dict[str, Any]:
    """Return groups and overrides of which a layer has settings for the first of two clients."""
    if layer == "group":
        return {"groups": [{"name": "a", **own}, {"name": "b"}]}
    return {"groups": [{"name": "a"}, {"name": "b"}], "overrides": [{"match": "a", **own}]}


@each_case(
    ("groups", "members"),
    [
        ([{"name": n, "fraction": 1 / 3} for n in "abc"], {"a": 3, "b": 3, "c": 4}),
        (
            [{"name": "a", "count": 4}, {"name": "b"}, {"name": "c", "count": 1}],
            {"a": 4, "b": 5, "c": 1},
        ),
    ],
)
def test_group_without_count_gets_remaining_clients(
    groups: list[dict[str, Any]], members: dict[str, int]
) -> None:
    clients = expand(count=10, groups=groups)

    assert Counter(client_id[0] for client_id in clients) == members


@pytest.mark.parametrize("layer", ["group", "override"])
@each_case(
    ("own", "used"),
    [
        ({"name": "adam"}, ("adam", 0.05, 0.0, False)),
        ({"name": "sgd", "lr": 0.1}, ("sgd", 0.1, 0.9, True)),
        ({"momentum": 0.5, "nesterov": False}, ("sgd", 0.05, 0.5, False)),
    ],
)
def test_only_the_same_optimizer_inherits_momentum(
    own: dict[str, Any], used: tuple[object, ...], layer: str
) -> None:
    clients = expand(defaults={"optimizer": SGD}, **own_settings(layer, {"optimizer": own}))

    changed, kept = clients["a"].optimizer, clients["b"].optimizer
    assert (changed.name, changed.lr, changed.momentum, changed.nesterov) == used
    assert (kept.name, kept.lr, kept.momentum, kept.nesterov) == ("sgd", 0.05, 0.9, True)


@pytest.mark.parametrize("layer", ["group", "override"])
@each_case(
    ("defaults", "own", "used"),
    [
        ({"steps": 3}, {"epochs": 1}, (1, None)),
        ({"steps": 3}, {"epochs": 4}, (4, None)),
        ({"epochs": 4}, {"steps": 3}, (1, 3)),
        ({"epochs": 4}, {"steps": None}, (4, None)),
        ({"steps": 3}, {"batch_size": 8}, (1, 3)),
    ],
)
def test_epochs_and_steps_replace_each_other(
    defaults: dict[str, Any], own: dict[str, Any], used: tuple[int, int | None], layer: str
) -> None:
    clients = expand(defaults=defaults, **own_settings(layer, own))

    assert (clients["a"].epochs, clients["a"].steps) == used
    assert clients["b"] == ClientSettings(**defaults)


def test_clients_use_the_models_of_an_override_in_turn() -> None:
    clients = expand(
        groups=[
            {"name": "x", "count": 1, "model": "linear"},
            {"name": "a", "count": 5, "model": "linear"},
        ],
        overrides=[{"match": "a_[1-4]", "model": ["cnn", "mlp"]}],
    )
    assert [c.model[0].name for c in clients.values()] == [
        "linear",
        "cnn",
        "mlp",
        "cnn",
        "mlp",
        "linear",
    ]
    assert all(len(c.model) == 1 for c in clients.values())


@each_case("name", ["0a7c2a8d", "12345678", "1e5"])
def test_group_name_may_start_with_a_digit(name: str) -> None:
    assert list(expand(groups=[{"name": name}])) == [name]
    assert list(expand(groups=[{"name": name, "count": 2}])) == [f"{name}_1", f"{name}_2"]
