"""JSON files of the tutorial: translation and error messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hetero_fl
from hetero_fl.config import Config
from hetero_fl.config.population import expand_population
from hetero_fl.experiment.configuration import load_config
from tests.support.configurations import FILE, tutorial

KEYS = tutorial()


def conf(tmp_path: Path, **changes: Any) -> Path:
    """Write the tutorial file with changes; None removes a key."""
    path = tmp_path / "conf.json"
    path.write_text(json.dumps(tutorial(**changes)))
    return path


def test_tutorial_file_becomes_a_configuration() -> None:
    assert KEYS == {
        "model_name": "resnet18",
        "no_models": 10,
        "type": "cifar",
        "global_epochs": 20,
        "local_epochs": 3,
        "k": 6,
        "batch_size": 32,
        "lr": 0.001,
        "momentum": 0.0001,
        "lambda": 0.1,
    }
    config = load_config(FILE)
    clients = expand_population(config.clients)
    assert len(clients) == 10 and config.clients.per_round == 6 and config.rounds == 20
    one = clients["client_01"]
    assert one.model[0].name == "torchvision:resnet18" and (one.epochs, one.batch_size) == (3, 32)
    assert (one.optimizer.name, one.optimizer.lr, one.optimizer.momentum) == ("sgd", 0.001, 0.0001)
    assert one.augment.crop == 4 and one.augment.flip
    assert (config.data.name, config.data.partition.kind) == ("cifar10", "in_order")
    assert config.data.split.test == config.data.split.validation == config.data.validation == 0
    assert config.algorithm == {
        "name": "fedavg",
        "weighting": "sum",
        "server_lr": 0.1,
    }


def test_overrides_of_tutorial_and_configuration_keys() -> None:
    config = load_config(
        FILE,
        ["rounds=1", "k=3", "lambda=0.2", "data.train_limit=3000", "clients.defaults.epochs=2"],
    )
    assert (config.rounds, config.clients.per_round, config.data.train_limit) == (1, 3, 3000)
    assert config.algorithm["server_lr"] == 0.2 and config.clients.defaults.epochs == 2
    assert load_config(json.loads(FILE.read_text())) == load_config(FILE)
    assert load_config(FILE, ["algorithm.name=fedmd"]).algorithm["name"] == "fedmd"


def test_json_configuration_is_not_translated(tmp_path: Path) -> None:
    path = tmp_path / "ours.json"
    path.write_text(json.dumps({"rounds": 3, "data": {"name": "digits"}}))
    assert load_config(path) == Config.model_validate(
        {"rounds": 3, "data": {"name": "digits"}}
    ).model_copy(update={"algorithm": load_config({}).algorithm})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shape"), [("cifar", (32, 32, 3)), ("mnist", (28, 28))])
def test_translated_tutorial_runs(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    draws = np.random.default_rng(0)
    x, y = draws.integers(0, 256, (70, *shape), dtype=np.uint8), np.arange(70) % 10
    np.savez(
        tmp_path / "set.npz",
        train_images=x[:50],
        train_labels=y[:50],
        test_images=x[50:],
        test_labels=y[50:],
    )
    path = conf(
        tmp_path,
        type=kind,
        model_name="cnn_bn_small",
        no_models=5,
        k=2,
        global_epochs=2,
        local_epochs=1,
    )
    quick = [
        "output.plots=false",
        f"data.path={tmp_path / 'set.npz'}",
        "runtime.executor=serial",
        "runtime.threads=1",
    ]
    run = hetero_fl.run(path, out=tmp_path / "run", overrides=quick)
    assert (
        len(run.summary["clients"]) == 5 and run.summary["server"]["last"]["accuracy"] is not None
    )
    assert [c["n_train"] for c in run.summary["clients"]] == [10] * 5 and run.summary[
        "personal"
    ] is None
    assert [len(record["cohort"]) for record in run.metrics] == [2, 2]
    assert "Global test" in (run.path / "report.html").read_text()
