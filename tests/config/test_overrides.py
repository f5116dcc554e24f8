"""Overrides that select another kind, which drop the settings of the former kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hetero_fl import load_config
from hetero_fl.config import Config
from tests.support.cases import each_case

OWN = {"kind": "python:own:by_label", "column": "label", "alpha": 0.3, "min_size": 5}


DIRICHLET = {"kind": "dirichlet", "alpha": 0.1}
CAPPED = {**DIRICHLET, "cap": 2.0, "min_size": 5}


@each_case(
    ("section", "overrides", "expected"),
    [
        (CAPPED, ["data.partition.kind=quantity"], {"kind": "quantity", "min_size": 5}),
        (
            CAPPED,
            ["data.partition={kind: python:own:iid}"],
            {"kind": "python:own:iid", "min_size": 5},
        ),
        (OWN, ["data.partition.kind=iid"], {"kind": "iid", "min_size": 5}),
        (OWN, ["data.partition={kind: iid}"], {"kind": "iid", "min_size": 5}),
        (
            OWN,
            ["data.partition.classes=3", "data.partition.kind=classes"],
            {"kind": "classes", "classes": 3, "min_size": 5},
        ),
        # The same kind keeps the settings.
        (DIRICHLET, ["data.partition.kind=dirichlet"], DIRICHLET),
        (DIRICHLET, ["data.partition={kind: dirichlet}"], DIRICHLET),
        (DIRICHLET, ["data.partition.min_size=7"], {**DIRICHLET, "min_size": 7}),
        (DIRICHLET, ["data={partition: {kind: dirichlet}}"], DIRICHLET),
        (DIRICHLET, ["data.partition.kind=iid", "data.partition.kind=dirichlet"], DIRICHLET),
        ({"alpha": 0.1}, ["data.partition.kind=dirichlet"], DIRICHLET),
    ],
)
def test_other_kind_of_partition_uses_its_own_settings(
    section: dict[str, Any], overrides: list[str], expected: dict[str, Any]
) -> None:
    config = load_config({"data": {"name": "digits", "partition": section}}, overrides)

    assert config.data.partition.model_dump(exclude_unset=True) == expected


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


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_override_with_a_former_key_replaces_the_key_of_the_file() -> None:
    file = Path("configs/medical_private.yaml")
    malicious = {"aggregation": {"malicious": 0.1}}
    overrides = ["aggregation.liars=1"]  # style: ok (former name)

    assert load_config(file, ["algorithm.distil_epochs=1"]).algorithm["distill_epochs"] == 1
    former = {"algorithm": {"name": "hybrid", "distil_epochs": 4}}
    assert load_config(former, ["algorithm.distill_epochs=1"]).algorithm["distill_epochs"] == 1
    assert load_config(malicious, overrides).aggregation.malicious == 1
