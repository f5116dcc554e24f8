"""Federations of vehicles: a folder of drives, a public folder, uploads, predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hetero_fl
from hetero_fl.config.data import DrivingConfig
from hetero_fl.data.sources.driving import read_driving_folder
from hetero_fl.experiment import prepare
from tests.support.driving_folders import write_driving_folder
from tests.support.payload_search import Found, search_run

FRAME = 3 * 12 * 20
DRIVING = {"height": 12, "width": 20, "gap": 1, "test_vehicles": ["zoe"]}
IMAGES = {"ann": "cnn", "bob": "cnn", "cid": "resnet", "dora": "vit"}
PRIVATE = ("backbone.speed.", "backbone.fusion.", "head.")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a folder of five vehicles, and a public folder of one vehicle."""
    root = tmp_path_factory.mktemp("vehicles")
    counts = dict.fromkeys(("ann", "bob", "cid", "zoe"), 40)
    drives = write_driving_folder(root / "drives", counts, ("dora",))
    return drives, write_driving_folder(root / "public", {"eve": 60}, ())


def federation(folders: tuple[Path, Path], method: str, **defaults: Any) -> dict[str, Any]:
    small = {"width": 8, "hidden": 4, "image_width": 8}
    source = {"name": "driving", "path": str(folders[1])}
    return {
        "rounds": 2,
        "data": {
            "name": "driving",
            "path": str(folders[0]),
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


def test_vehicles_train_three_kinds_of_networks(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run = hetero_fl.run(federation(folders, "fedmd"), out=tmp_path / "run", quiet=True)

    data = run.summary["data"]
    assert (data["n_test"], data["n_proxy"], data["simulated"]) == (40, 20, False)
    assert [client["id"] for client in run.summary["clients"]] == list(IMAGES)
    assert next(iter(run.summary["global"]["last"])) == "mae"
    x = read_driving_folder(folders[1], DrivingConfig(height=12, width=20, gap=2)).train.x[:2]
    assert run.predict("cid", x).shape == (2, 1)
    # Another folder is read with the settings of the run, except the test vehicles.
    scores = hetero_fl.evaluate(run, str(folders[1]))
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
    folders: tuple[Path, Path], method: str
) -> None:
    # The first step of Adam changes all zero biases by the learning rate, so that they are equal.
    sgd = {"name": "sgd", "lr": 0.01}
    found = search(federation(folders, method, optimizer=sgd))
    assert (found.rows, found.tensors) == (0, 0) and found.payloads
    assert not any(found.names(name) for name in PRIVATE)


def test_search_finds_private_tensors_that_are_shared(folders: tuple[Path, Path]) -> None:
    shares = ["parameters", "predictions"]
    found = search(federation(folders, "fedavg", shares=shares))
    assert found.tensors > 100 and all(found.names(name) for name in PRIVATE)
