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
from tests.support.payload_search import floats_in, number_in_common, tapped, triples

FRAME = 3 * 12 * 20
DRIVING = {"height": 12, "width": 20, "gap": 1, "test_vehicles": ["zoe"]}
IMAGES = {"ann": "pilotnet", "bob": "pilotnet", "cid": "resnet", "dora": "vit"}
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


def private_tensors(rounds: Any, prepared: Any) -> list[np.ndarray]:
    """Return all current tensors that must not leave a vehicle."""
    found = []
    for client_id, info in prepared.federation.client_infos.items():
        models = [dict(prepared.federation.initial_tensors(info.arch))]
        models += [dict(tensors) for tensors in rounds.store.get(client_id).models.values()]
        found += [
            tensor.numpy()
            for tensors in models
            for name, tensor in tensors.items()
            if name.startswith(PRIVATE) and tensor.numel() > 2
        ]
    return found


def search(config: dict[str, Any]) -> tuple[int, int, list[str], int]:
    """Search the payloads of a run.

    Returns:
        Matching triples of speeds and positions, and of private tensors; private names; and bytes.
    """
    torch.set_num_threads(1)
    prepared = prepare(config, [])
    with tapped() as payloads:
        rounds = prepared.make_trainer()
        tensors = private_tensors(rounds, prepared)
        for _ in range(prepared.config.rounds):
            rounds.run_round()
            tensors += private_tensors(rounds, prepared)
    sent = triples(array for payload in payloads for array in floats_in(payload))
    named = [name for name in PRIVATE if any(name.encode() in payload for payload in payloads)]
    of_rows = number_in_common(triples(private_rows(prepared)), sent)
    of_tensors = number_in_common(triples(tensors), sent)
    return of_rows, of_tensors, named, sum(map(len, payloads))


@pytest.mark.parametrize("method", ["fedavg", "fedmd", "feddf", "hybrid"])
def test_payloads_contain_no_speed_position_or_private_name(
    folders: tuple[Path, Path], method: str
) -> None:
    of_rows, _, named, total = search(federation(folders, method))
    assert of_rows == 0 and named == [] and total > 0


def test_payloads_contain_no_numbers_of_private_tensors(folders: tuple[Path, Path]) -> None:
    # The first step of Adam changes all zero biases by the learning rate, so that they are equal.
    sgd = {"name": "sgd", "lr": 0.01}
    _, of_tensors, _, _ = search(federation(folders, "fedavg", optimizer=sgd))
    assert of_tensors == 0


def test_search_finds_private_tensors_that_are_shared(folders: tuple[Path, Path]) -> None:
    shares = ["parameters", "predictions"]
    _, of_tensors, named, _ = search(federation(folders, "fedavg", shares=shares))
    assert of_tensors > 100 and named == list(PRIVATE)
