"""The same federation from objects and from files gives identical bits, also when resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hetero_fl as hfl
from tests.support.python_federations import (
    DIGITS,
    QUIET,
    Digits,
    Net,
    images,
    same_models,
    without_seconds,
)


def assert_identical(first: hfl.Run, second: hfl.Run) -> None:
    assert without_seconds(first) == without_seconds(second)
    assert same_models(first, second)


def file_of(method: dict[str, Any], groups: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    return {
        "name": "federation",
        "clients": {"groups": groups},
        "algorithm": method,
        "rounds": 2,
        **other,
    }


def save_npz(path: Path, **splits: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Write a file in the MedMNIST layout and return the source that reads it."""
    arrays = {}
    for split, (x, y) in splits.items():
        arrays |= {f"{split}_images": x, f"{split}_labels": y[:, None]}
    np.savez(path, **arrays)
    return {"name": "npz", "path": str(path)}


# Data


@pytest.mark.parametrize("method", ["local", "fedavg", "fedmd"])
def test_divided_arrays_equal_the_same_npz_file(method: str, tmp_path: Path) -> None:
    train, test = images(120, 1), images(30, 9)
    names = ["a", "b", "c"]
    objects = hfl.Federation(
        [hfl.Client(name, "mlp") for name in names],
        data=train,
        test=test,
        partition=hfl.Dirichlet(alpha=1.0),
        proxy=20,
        seed=5,
    )
    source = save_npz(tmp_path / "all.npz", train=train, test=test)
    partition = {"kind": "dirichlet", "alpha": 1.0}
    data = {**source, "partition": partition, "proxy": {"size": 20}}
    groups = [{"name": name, "model": "mlp"} for name in names]
    file = file_of({"name": method}, groups, data=data, seed=5)

    first = objects.train(method, rounds=2, overrides=QUIET)
    second = hfl.run(file, out=tmp_path / "run", overrides=QUIET)

    assert_identical(first, second)


@pytest.mark.parametrize("method", ["local", "fedavg"])
def test_arrays_of_each_client_equal_npz_files_of_each_client(method: str, tmp_path: Path) -> None:
    train, test = images(60, 3), images(30, 9)
    parts = {"a": images(50, 1), "b": images(70, 2)}
    clients = [hfl.Client(name, "mlp", part) for name, part in parts.items()]
    objects = hfl.Federation([*clients, hfl.Client("c", "mlp")], data=train, test=test, seed=5)
    groups = [
        {"name": name, "model": "mlp", "data": save_npz(tmp_path / f"{name}.npz", train=part)}
        for name, part in parts.items()
    ]
    file = file_of(
        {"name": method},
        [*groups, {"name": "c", "model": "mlp"}],
        data=save_npz(tmp_path / "common.npz", train=train, test=test),
        seed=5,
    )

    first = objects.train(method, rounds=2, overrides=QUIET)
    second = hfl.run(file, out=tmp_path / "run", overrides=QUIET)

    assert_identical(first, second)


# Models


@pytest.mark.parametrize("executor", ["serial", "batched"])
@pytest.mark.parametrize("method", ["local", "fedavg", "fedmd"])
def test_given_modules_equal_a_file_with_init_from(
    method: str, executor: str, tmp_path: Path
) -> None:
    names = ["a", "b"]
    data = {"name": "digits", "train_limit": 150, "test_limit": 30}
    groups = [{"name": name, "model": DIGITS} for name in names]
    file = {"data": {**data, "proxy": {"size": 30}}, "seed": 2}
    # All clients end with the average, so the server starts with the same weights in both forms.
    start = hfl.run(
        file_of({"name": "fedavg"}, groups, **file), out=tmp_path / "start", overrides=QUIET
    )
    modules = {name: start.model(name) for name in names}
    assert all(type(module) is Digits for module in modules.values())
    objects = hfl.Federation(
        [hfl.Client(name, modules[name]) for name in names], data=data, proxy=30, seed=2
    )
    overrides = [*QUIET, f"runtime.executor={executor}"]

    first = objects.train(method, rounds=2, overrides=overrides)
    second = hfl.run(
        file_of({"name": method}, groups, **file, init_from=str(tmp_path / "start")),
        out=tmp_path / "run",
        overrides=overrides,
    )

    assert_identical(first, second)
    assert not same_models(first, start)


# Resuming


def objects_with_modules() -> hfl.Federation:
    torch.manual_seed(4)
    models = [Net(), Net(), Net(6)]
    clients = [
        hfl.Client(f"site_{i}", model, images(40 + 10 * i, i)) for i, model in enumerate(models, 1)
    ]
    return hfl.Federation(clients, test=images(30, 9), proxy=images(40, 8)[0])


def by_name() -> hfl.Federation:
    data = {"name": "digits", "train_limit": 150, "test_limit": 30, "proxy": {"size": 30}}
    clients = {"groups": [{"name": "site", "count": 3, "model": ["cnn_bn_small", "linear"]}]}
    return hfl.Federation.from_config({"data": data, "clients": clients})


SOURCES = {"objects": objects_with_modules, "file": by_name}
MODES = {
    "async": ["runtime.mode=async", "runtime.buffer=2"],
    "batched": ["runtime.executor=batched"],
    "async and batched": ["runtime.mode=async", "runtime.buffer=2", "runtime.executor=batched"],
    "processes": ["runtime.executor=processes"],
}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [hfl.FedMD(digest_epochs=2), hfl.Hybrid()], ids=["md", "hybrid"])
def test_stopped_and_resumed_training_equals_training_without_a_stop(
    method: Any, mode: str, source: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"rounds": 4, "overrides": [*QUIET, *MODES[mode]]}
    whole = SOURCES[source]().train(method, out=tmp_path / "whole", **settings)

    with hfl.Trainer(SOURCES[source](), method, out=tmp_path / "run", **settings) as first:
        for record in first:
            if record["round"] == 2:
                break
    # The federation is created again, as in a new process.
    with hfl.Trainer(
        SOURCES[source](), method, out=tmp_path / "run", resume=True, **settings
    ) as rest:
        assert rest.completed == 2
        assert len(list(rest)) == len(whole.metrics) - 2

    assert_identical(rest.run, whole)
