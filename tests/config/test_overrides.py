"""Overrides that select another kind, which drop the settings of the former kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hetero_fl import load_config
from hetero_fl.config import Config
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case

FLOWER = {"kind": "flwr:DirichletPartitioner", "partition_by": "label", "alpha": 0.3, "min_size": 5}


def partition(section: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """Return the settings of the partition that are set explicitly or by overrides."""
    config = load_config({"data": {"name": "digits", "partition": section}}, overrides)
    return config.data.partition.model_dump(exclude_unset=True)


@each_case("override", ["data.partition.kind=iid", "data.partition={kind: iid}"])
def test_override_of_the_kind_of_a_file_drops_the_arguments(override: str, tmp_path: Path) -> None:
    file = tmp_path / "flower.yaml"
    file.write_text(yaml.safe_dump({"data": {"name": "digits", "partition": FLOWER}}), "utf-8")

    found = load_config(file, [override]).data.partition

    assert (found.kind, found.arguments, found.min_size) == ("iid", None, 5)


def test_other_kind_of_partition_uses_its_own_settings() -> None:
    dirichlet = {"kind": "dirichlet", "alpha": 0.1, "cap": 2.0, "min_size": 5}

    assert partition(dirichlet, "data.partition.kind=quantity") == {
        "kind": "quantity",
        "min_size": 5,
    }
    found = partition(dirichlet, "data.partition={kind: flwr:IidPartitioner}")
    assert found == {"kind": "flwr:IidPartitioner", "min_size": 5}
    found = partition(FLOWER, "data.partition.classes=3", "data.partition.kind=classes")
    assert found == {"kind": "classes", "classes": 3, "min_size": 5}


@each_case(
    "override",
    [
        "data.partition.kind=dirichlet",
        "data.partition={kind: dirichlet}",
        "data.partition.min_size=7",
        "data={partition: {kind: dirichlet}}",
    ],
)
def test_same_kind_keeps_the_settings(override: str) -> None:
    assert partition({"kind": "dirichlet", "alpha": 0.1}, override)["alpha"] == 0.1


def test_kind_that_the_file_does_not_name_keeps_the_settings() -> None:
    assert partition({"alpha": 0.1}, "data.partition.kind=dirichlet")["alpha"] == 0.1


def test_last_override_decides_about_the_kind() -> None:
    overrides = ("data.partition.kind=iid", "data.partition.kind=dirichlet")

    assert partition({"kind": "dirichlet", "alpha": 0.1}, *overrides)["alpha"] == 0.1


def with_models(model: Any, *overrides: str) -> Config:
    """Return a configuration with a group of this model, trained by SGD with momentum."""
    clients = {
        "defaults": {"optimizer": {"name": "sgd", "lr": 0.3, "momentum": 0.9}},
        "groups": [{"name": "a", "count": 2, "model": model}],
    }
    return load_config({"data": {"name": "digits"}, "clients": clients}, overrides)


@pytest.mark.parametrize("entry", ["model", "model.0"])
@each_case("value", ["={name: mlp, hidden: [8]}", ".name=mlp"])
def test_other_model_has_no_options_of_the_former_one(entry: str, value: str) -> None:
    cnn = {"name": "cnn", "width": 4, "feature_dim": 16}
    model = cnn if entry == "model" else [cnn, {"name": "mlp", "hidden": [4]}]

    models = with_models(model, f"clients.groups.0.{entry}{value}").clients.groups[0].model

    assert models is not None
    assert models[0].name == "mlp"
    assert "width" not in models[0].options
    # A list that is replaced by an index has no settings of other entries.
    assert len(models) == (1 if entry == "model" else 2)


def test_other_optimizer_has_no_momentum_of_the_former_one() -> None:
    optimizer = with_models(
        "mlp", "clients.defaults.optimizer.name=adam"
    ).clients.defaults.optimizer

    assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("adam", 0.3, 0.0)


@each_case(
    ("own", "override", "used"),
    [
        ({"epochs": 5}, "steps=3", (1, 3)),
        ({"steps": 3}, "epochs=5", (5, None)),
        ({"steps": 3}, "steps=null", (1, None)),
    ],
)
def test_epochs_and_steps_of_the_file_are_replaced(
    own: dict[str, int], override: str, used: tuple[int, int | None]
) -> None:
    source = {"clients": {"defaults": own, "groups": [{"name": "a", "count": 2}]}}

    defaults = load_config(source, [f"clients.defaults.{override}"]).clients.defaults

    assert (defaults.epochs, defaults.steps) == used


def test_setting_of_another_kind_in_an_override_is_refused() -> None:
    overrides = ["data.partition.kind=iid", "data.partition.partition_by=label"]

    with pytest.raises(UserError, match=r"^data.partition.partition_by: unknown key"):
        partition(FLOWER, *overrides)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_override_with_a_former_key_replaces_the_key_of_the_file() -> None:
    file = Path("configs/medical_private.yaml")
    malicious = {"aggregation": {"malicious": 0.1}}
    overrides = ["aggregation.liars=1"]  # style: ok (former name)

    assert load_config(file, ["algorithm.distil_epochs=1"]).algorithm["distill_epochs"] == 1
    former = {"algorithm": {"name": "hybrid", "distil_epochs": 4}}
    assert load_config(former, ["algorithm.distill_epochs=1"]).algorithm["distill_epochs"] == 1
    assert load_config(malicious, overrides).aggregation.malicious == 1
