"""Merging of defaults, groups and overrides."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from hetero_fl.config import expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import UserError

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True}


def expand(**clients: Any) -> dict[str, ClientSettings]:
    return expand_population(load_config({"clients": clients}).clients)


@pytest.mark.parametrize(
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


@pytest.mark.parametrize("first", [{"count": 10}, {"count": 12}, {"fraction": 1.0}])
def test_group_without_clients_is_named(first: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="count: leaves no clients for group 'b', got 10"):
        expand(count=10, groups=[{"name": "a", **first}, {"name": "b"}])


@pytest.mark.parametrize("layer", ["group", "override"])
def test_other_optimizer_does_not_inherit_momentum(layer: str) -> None:
    adam: dict[str, Any] = {"optimizer": {"name": "adam"}}
    groups = [{"name": "a", **(adam if layer == "group" else {})}, {"name": "b"}]
    overrides = [{"match": "a", **adam}] if layer == "override" else []
    clients = expand(defaults={"optimizer": SGD}, groups=groups, overrides=overrides)
    changed, kept = clients["a"].optimizer, clients["b"].optimizer
    assert (changed.name, changed.lr, changed.momentum, changed.nesterov) == (
        "adam",
        0.05,
        0.0,
        False,
    )
    assert (kept.name, kept.lr, kept.momentum, kept.nesterov) == ("sgd", 0.05, 0.9, True)


@pytest.mark.parametrize("layer", ["group", "override"])
@pytest.mark.parametrize(
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
    groups = [{"name": "a", **(own if layer == "group" else {})}, {"name": "b"}]
    overrides = [{"match": "a", **own}] if layer == "override" else []

    clients = expand(defaults=defaults, groups=groups, overrides=overrides)

    assert (clients["a"].epochs, clients["a"].steps) == used
    assert clients["b"] == ClientSettings(**defaults)


@pytest.mark.parametrize("layer", ["defaults", "groups", "overrides"])
def test_epochs_beside_steps_are_refused(layer: str) -> None:
    both: dict[str, Any] = {"epochs": 5, "steps": 3}
    clients = {
        "defaults": both,
        "groups": [{"name": "a", **both}],
        "overrides": [{"match": "a", **both}],
    }

    with pytest.raises(UserError, match="epochs cannot be combined with steps, got epochs=5 and"):
        expand(**{"groups": [{"name": "a"}], layer: clients[layer]})


def test_same_optimizer_inherits_momentum() -> None:
    again = expand(
        defaults={"optimizer": SGD}, groups=[{"name": "a", "optimizer": {"name": "sgd", "lr": 0.1}}]
    )
    assert (again["a"].optimizer.lr, again["a"].optimizer.momentum) == (0.1, 0.9)


def test_contradicting_layers_raise_one_line() -> None:
    with pytest.raises(
        UserError,
        match=r"^clients: 'a': optimizer: .*nesterov requires momentum > 0, got momentum=0",
    ) as error:
        expand(defaults={"optimizer": SGD}, groups=[{"name": "a", "optimizer": {"momentum": 0.0}}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layer", ["group", "override"])
def test_layer_without_optimizer_name_changes_the_inherited_one(layer: str) -> None:
    changed: dict[str, Any] = {"optimizer": {"momentum": 0.5, "nesterov": True}}
    groups = [{"name": "a", **(changed if layer == "group" else {})}, {"name": "b"}]
    overrides = [{"match": "a", **changed}] if layer == "override" else []
    clients = expand(
        defaults={"optimizer": {"name": "sgd", "lr": 0.05}}, groups=groups, overrides=overrides
    )
    got = clients["a"].optimizer
    assert (got.name, got.lr, got.momentum, got.nesterov) == ("sgd", 0.05, 0.5, True)
    assert clients["b"].optimizer.momentum == 0.0


def test_momentum_for_an_inherited_adam_raises_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^clients: 'a': optimizer: .*momentum requires name=sgd, got name=adam$"
    ):
        expand(groups=[{"name": "a", "optimizer": {"momentum": 0.5}}])
    with pytest.raises(
        UserError, match=r"^clients: 'a': optimizer: .*momentum requires name=sgd, got name=adam$"
    ):
        group = {"name": "a", "optimizer": {"momentum": 0.5}}
        expand(groups=[group], overrides=[{"match": "a", "optimizer": {"name": "sgd"}}])
    with pytest.raises(
        UserError,
        match=r"clients\.groups\.0\.optimizer: .*momentum requires name=sgd, got name=adam$",
    ):
        expand(groups=[{"name": "a", "optimizer": {"name": "adam", "momentum": 0.5}}])


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


@pytest.mark.parametrize("name", ["server", "Server"])
def test_group_cannot_have_the_name_of_the_server(name: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"groups\.0\.name: must differ from the reserved id of the server, got '{name}'",
    ):
        expand(groups=[{"name": name}])


@pytest.mark.parametrize("name", ["0a7c2a8d", "12345678", "1e5"])
def test_group_name_may_start_with_a_digit(name: str) -> None:
    assert list(expand(groups=[{"name": name}])) == [name]
    assert list(expand(groups=[{"name": name, "count": 2}])) == [f"{name}_1", f"{name}_2"]


@pytest.mark.parametrize("name", ["-a", "_a", ".a", "a/b", "../a", "a b"])
def test_group_name_must_be_a_safe_file_name(name: str) -> None:
    with pytest.raises(UserError, match=r"groups\.0\.name: must match"):
        expand(groups=[{"name": name}])


@pytest.mark.parametrize("name", [12345678, 1e5, True])
def test_group_name_without_quotes_that_yaml_reads_as_another_type_is_refused(name: object) -> None:
    with pytest.raises(UserError, match=r"groups\.0\.name: expected a string, .* with quotes"):
        expand(groups=[{"name": name}])
