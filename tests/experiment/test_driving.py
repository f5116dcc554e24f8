"""Federations of vehicles: a file of drives, a public file, uploads, predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hetero_fl
from hetero_fl.config.data import DrivingConfig
from hetero_fl.data.sources.driving import read_drives
from hetero_fl.experiment import prepare
from tests.support.payload_search import Found, search_run

FRAME = 3 * 12 * 20
DRIVING = {"height": 12, "width": 20, "gap": 1}
IMAGES = {"ann": "cnn", "bob": "cnn", "cid": "resnet", "dora": "vit"}
PRIVATE = ("backbone.speed.", "backbone.fusion.", "head.")


def write_drives(path: Path, names: tuple[str, ...], frames: int) -> Path:
    """Write a file of drives, in which the vehicle `zoe` is for the test."""
    draws = np.random.default_rng(len(names))
    vehicle = np.repeat(names, frames)
    angle = draws.uniform(-3, 3, len(vehicle))
    frame = draws.uniform(0, 0.4, (len(vehicle), 3, 12, 20)).astype(np.float32)
    # The brighter side is that of the angle.
    frame[..., :10] += 0.1 * (3 + angle[:, None, None, None])
    np.savez(
        path,
        frame=frame,
        speed=draws.uniform(5, 15, len(vehicle)),
        position=draws.normal(40, 1, (len(vehicle), 2)),
        angle=angle,
        vehicle=vehicle,
        split=np.where(vehicle == "zoe", "test", "train"),
    )
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a file of five vehicles, and a public file of one vehicle."""
    root = tmp_path_factory.mktemp("vehicles")
    drives = write_drives(root / "drives.npz", ("ann", "bob", "cid", "dora", "zoe"), 40)
    return drives, write_drives(root / "public.npz", ("eve",), 60)


def federation(files: tuple[Path, Path], method: str, **defaults: Any) -> dict[str, Any]:
    small = {"width": 8, "hidden": 4, "image_width": 8}
    source = {"name": "driving", "path": str(files[1])}
    return {
        "rounds": 2,
        "data": {
            "name": "driving",
            "path": str(files[0]),
            "driving": DRIVING,
            "partition": {"kind": "natural", "min_size": 8},
            "proxy": {"size": 20, "columns": ["frame"], "source": source},
        },
        "clients": {
            "defaults": {
                "preprocess": {
                    "columns": ["frame", "speed"],
                    "normalize": "own",
                    "missing": "indicate",
                },
                "shares": ["backbone.frame.", "predictions"],
                **defaults,
            },
            "groups": [
                {"name": name, "model": {"name": "multimodal", "image": image, **small}}
                for name, image in IMAGES.items()
            ],
        },
        "algorithm": {"name": method},
        "runtime": {"threads": 1, "executor": "serial"},
        "output": {"plots": False, "report": False},
    }


def test_vehicles_train_three_kinds_of_networks(files: tuple[Path, Path], tmp_path: Path) -> None:
    run = hetero_fl.run(federation(files, "fedmd"), out=tmp_path / "run", quiet=True)

    data = run.summary["data"]
    assert (data["n_test"], data["n_proxy"], data["simulated"]) == (40, 20, False)
    assert [client["id"] for client in run.summary["clients"]] == list(IMAGES)
    assert next(iter(run.summary["global"]["last"])) == "mae"
    x = read_drives(files[1], DrivingConfig()).train.x[:2]
    assert run.predict("cid", x).shape == (2, 1)
    # Another file is read with the settings of the run.
    scores = hetero_fl.evaluate(run, str(files[1]))
    assert set(scores) == set(IMAGES) and scores["ann"]["mae"] is not None


def private_rows(prepared: Any) -> list[np.ndarray]:
    """Return all speeds and positions."""
    rows = [
        share.examples.x[:, FRAME:] for _, share in prepared.data.client_rows.rows_by_location()
    ]
    found = [np.ascontiguousarray(row.numpy()) for row in rows]
    return found + [np.ascontiguousarray(row[:, :1].numpy()) for row in rows]


def search(config: dict[str, Any]) -> Found:
    torch.set_num_threads(1)
    prepared = prepare(config, [])
    return search_run(prepared, lambda name: name.startswith(PRIVATE), private_rows(prepared))


@pytest.mark.parametrize("method", ["fedavg", "fedmd", "feddf", "hybrid"])
def test_payloads_contain_no_speed_position_or_private_tensor(
    files: tuple[Path, Path], method: str
) -> None:
    # The first step of Adam changes all zero biases by the learning rate, so that they are equal.
    sgd = {"name": "sgd", "lr": 0.01}
    found = search(federation(files, method, optimizer=sgd))
    assert (found.rows, found.tensors) == (0, 0) and found.payloads
    assert not any(found.names(name) for name in PRIVATE)


def test_search_finds_private_tensors_that_are_shared(files: tuple[Path, Path]) -> None:
    shares = ["parameters", "predictions"]
    found = search(federation(files, "fedavg", shares=shares))
    assert found.tensors > 100 and all(found.names(name) for name in PRIVATE)
