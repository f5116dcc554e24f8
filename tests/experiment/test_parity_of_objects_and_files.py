"""The same federation from objects and from files gives identical bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hetero_fl as hfl
from tests.support.python_federations import (
    DIGITS,
    QUIET,
    Digits,
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


def test_arrays_of_each_client_equal_npz_files_of_each_client(tmp_path: Path) -> None:
    train, test = images(60, 3), images(30, 9)
    parts = {"a": images(50, 1), "b": images(70, 2)}
    clients = [hfl.Client(name, "mlp", part) for name, part in parts.items()]
    objects = hfl.Federation([*clients, hfl.Client("c", "mlp")], data=train, test=test, seed=5)
    groups = [
        {"name": name, "model": "mlp", "data": save_npz(tmp_path / f"{name}.npz", train=part)}
        for name, part in parts.items()
    ]
    file = file_of(
        {"name": "fedavg"},
        [*groups, {"name": "c", "model": "mlp"}],
        data=save_npz(tmp_path / "common.npz", train=train, test=test),
        seed=5,
    )

    first = objects.train("fedavg", rounds=2, overrides=QUIET)
    second = hfl.run(file, out=tmp_path / "run", overrides=QUIET)

    assert_identical(first, second)


# Models


@pytest.mark.parametrize(
    ("method", "executor"), [("local", "batched"), ("fedavg", "serial"), ("fedmd", "batched")]
)
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
