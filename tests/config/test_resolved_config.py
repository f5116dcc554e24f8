"""Resolved configurations and descriptions of their differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hetero_fl.config import describe_difference, dump, expand_population, resolve_config
from hetero_fl.experiment.configuration import load_config
from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
LAYERS: list[dict[str, Any]] = [
    {
        "defaults": {"optimizer": SGD, "epochs": 3},
        "groups": [{"name": "a", "count": 3, "model": ["mlp", "cnn"]}],
    },
    {
        "defaults": {"optimizer": SGD, "preprocess": {"normalize": {"mean": 0.3}}},
        "groups": [{"name": "a", "count": 2}, {"name": "b", "optimizer": {"lr": 0.1}, "steps": 4}],
        "overrides": [
            {
                "match": "a_*",
                "optimizer": {"name": "adam"},
                "preprocess": {"normalize": {"std": 0.1}},
            }
        ],
    },
    {
        "defaults": {"optimizer": {"lr": 0.2}},
        "groups": [{"name": "a", "optimizer": {"weight_decay": 0.1}}],
        "overrides": [
            {"match": "a", "optimizer": SGD},
            {"match": "a", "optimizer": {"momentum": 0.5}},
        ],
    },
    {"groups": [{"name": "a", "optimizer": SGD}, {"name": "b", "fraction": 0.5}], "count": 2},
    {},
]


# Studies and benchmarks refer to other configurations.
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name not in ("benchmark", "studies")
)


@each_case("source", [*CONFIGS, *[{"clients": c} for c in LAYERS]])
def test_resolved_configuration_loads_to_the_same_clients(source: Path | dict[str, Any]) -> None:
    config = load_config(source, allow_code=True)
    again = load_config(yaml.safe_load(dump(config)))
    assert describe_difference(resolve_config(config), resolve_config(again)) is None
    expected, got = expand_population(config.clients), expand_population(again.clients)
    assert {client_id: s.model_dump() for client_id, s in got.items()} == {
        client_id: s.model_dump() for client_id, s in expected.items()
    }
    assert again.model_dump(exclude={"clients"}) == config.model_dump(exclude={"clients"})


def differences(changes: dict[str, Any], **more: Any) -> str | None:
    groups = [{"name": "a", "model": "mlp"}, {"name": "b", "model": "cnn"}]
    old = load_config({"clients": {"groups": groups}})
    return describe_difference(
        resolve_config(old),
        resolve_config(
            load_config({"clients": {"groups": [{**groups[0], **changes}, groups[1]]}, **more})
        ),
    )


@each_case("name", ["1e5", "12e45678", "12345678", "1_2", "0x1f", "0a7c2a8d"])
def test_written_configuration_keeps_names_that_look_like_numbers(
    name: str, tmp_path: Path
) -> None:
    config = load_config({"clients": {"groups": [{"name": name}]}})
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))

    assert list(expand_population(load_config(path).clients)) == [name]


def test_difference_names_keys() -> None:
    assert differences({}) is None
    assert differences({}, rounds=3) == "rounds: was 10, is now 3"
    for changes, line in (
        ({"objective": "python:own:Loss"}, "objective: was not set, is now 'python:own:Loss'"),
        ({"model": "linear"}, "model.0.name: was 'mlp', is now 'linear'"),
    ):
        assert differences(changes) == f"clients.groups.0.{line}"
    # Of many, three are listed.
    many = {"rounds": 3, "seed": 4, "evaluation": {"every": 2}}
    assert differences({"epochs": 2, "batch_size": 5}, **many) == (
        "seed: was 0, is now 4; rounds: was 10, is now 3; "
        "clients.groups.0.epochs: was not set, is now 2; and 2 more"
    )


def test_difference_of_plain_values() -> None:
    for old, new, line in (
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {}}, "b.c: was 2, is now not set"),
        ({"a": [{"b": 1}]}, {"a": []}, "a.0: was {'b': 1}, is now not set"),
        ({"a": [1, 2]}, {"a": [1]}, "a: was [1, 2], is now [1]"),
    ):
        assert describe_difference(old, new) == line
    line_of_texts = describe_difference({"a": "x" * 5000}, {"a": "y" * 5000})
    assert line_of_texts is not None and len(line_of_texts) < 150
