"""Files of frames of drives, which are divided by vehicle and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.data import Dataset, federate, load_source
from hetero_fl.data.external import inherit_keys
from tests.support.federated_data import read_source
from tests.support.mistakes import refusal

CLIENT = ClientSettings(preprocess=PreprocessConfig(missing="indicate"))


def load(path: Path | None = None, name: str = "driving", **keys: Any) -> Dataset:
    return read_source(name, path, driving=keys or None)


VEHICLES = np.repeat(["b", "a", "c"], [40, 40, 6])


def drives(vehicle: np.ndarray = VEHICLES, **changes: Any) -> dict[str, Any]:
    """Return the arrays of a file with frames of vehicles, the last of which is for the test."""
    count = len(vehicle)
    arrays = {
        "frame": np.random.default_rng(0).integers(0, 256, (count, 3, 8, 12), np.uint8),
        "speed": np.arange(float(count)),
        "position": np.ones((count, 2)),
        "angle": np.arange(float(count)) / 10,
        "vehicle": vehicle,
        "split": np.where(vehicle == vehicle[-1], "test", "train"),
    }
    return arrays | changes


def test_file_of_frames_is_divided_by_vehicle_and_time(tmp_path: Path) -> None:
    arrays = drives()
    np.savez(tmp_path / "drives.npz", **arrays)

    found = load(tmp_path / "drives.npz", gap=2, height=8, width=12, scale=2.0)

    train, test = found.train, found.test
    assert found.blocks[0].shape == (3, 8, 12) and not found.simulated
    assert train.group is not None and train.group_names == ("a", "b")
    # Of 40 frames, 10 are for the test, 6 for validation, and 2 are left out before each.
    assert train.group.tolist() == [0] * 22 + [1] * 22
    assert torch.as_tensor(train.x)[:, 288].tolist() == [*range(40, 62), *range(22)]
    assert torch.allclose(train.labels[:, 0], torch.as_tensor(train.x)[:, 288] / 20)
    pixels = torch.from_numpy(arrays["frame"][40].reshape(-1) / 255).float()
    assert torch.equal(torch.as_tensor(train.x)[0, :288], pixels)
    assert test is not None and torch.as_tensor(test.x)[:, 288].tolist() == [*range(80, 86)]
    assert len(found.local_sets["test"]) == 20 and found.validation is not None
    assert len(found.validation) == 8
    # Neighboring frames stay together, and vehicles have no stretch in common.
    assert train.patient is not None and train.patient.tolist() == [0] * 22 + [1] * 22


def test_public_frames_are_those_of_no_client(tmp_path: Path) -> None:
    split = np.repeat(["public", "train", "test"], [40, 40, 6])
    np.savez(tmp_path / "drives.npz", **drives(split=split))

    train = load(tmp_path / "drives.npz", gap=2, height=8, width=12).train

    assert train.group_names == ("a",)
    assert torch.as_tensor(train.x)[:, 288].tolist() == [*range(40, 62)]
    assert train.locate(0, "train").endswith("drives.npz: row 40")


SMALL = {"height": 8, "width": 12, "gap": 2}

IMPOSSIBLE: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "car truck",
        {"proxy": {"size": 60}},
        ["group 'car'", "sequences of 50 frames together); choose a smaller number than data.pr"],
    ),
    (
        "a b c",
        {},
        [
            "got 2 groups for 3 clients",
            "no client for group 'car', 'truck'; have one client per gr",
        ],
    ),
    ("a b c", {}, ["or set data.partition.kind to iid, in_order, dirichlet, classes, quantity"]),
    (
        "a b",
        {"partition": {"kind": "iid"}},
        ["sequences of 50 frames together: client 'a' has 1 sequence, too few to split"],
    ),
    (
        "a b c",
        {"partition": {"kind": "iid"}},
        ["expected at least one sequence per client, got 2 sequences for 3 clients"],
    ),
    (
        "a b",
        {"partition": {"kind": "drawn", "rows": 20}},
        ["kind=drawn divides sequences, but data.name=driving keeps ", "choose another kind"],
    ),
]


def test_division_that_is_not_possible_names_the_settings_to_change(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    path = tmp_path / "drives.npz"
    np.savez(path, **drives(np.repeat(["car", "truck", "van"], [60, 60, 6])))
    plain = {
        "name": "driving",
        "path": str(path),
        "driving": SMALL,
        "partition": {"kind": "natural"},
    }
    for names, keys, words in IMPOSSIBLE:
        config = DataConfig.model_validate({**plain, "path": str(path), **keys})
        clients = dict.fromkeys(names.split(), CLIENT)
        with subtests.test(words=words):
            caught = refusal(
                federate, load_source(config, tmp_path, missing=True), config, clients, 0
            )
            assert [part for part in words if part not in caught] == []
            assert "patient" not in caught


BROKEN_FILES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"speed": np.zeros(3)}, {}, "path: FILE: speed: expected 86 rows as in frame, got 3"),
    (
        {"frame": np.zeros((86, 8, 12))},
        {},
        "path: FILE: frame: expected shape (N, 3, H, W) or (N, H, W, 3), got",
    ),
    (
        {"position": np.zeros((86, 3))},
        {},
        "path: FILE: position: expected shape (N, 2), got (86, 3)",
    ),
    ({"split": np.full(86, "trian")}, {}, "path: FILE: split: unknown value 'trian'; did you mean"),
    ({"split": np.full(86, "public")}, {}, "path: FILE: split: expected rows of 'train', got none"),
    ({}, {"height": 16}, "driving.height: the frames of drives.npz have 12x8 pixels, got 16; rem"),
    ({}, {"gap": 10}, "driving.gap: leaves no frames for validation of vehicle 'a', which has 40"),
]


def test_malformed_file_of_frames_raises_one_line(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for changes, keys, words in BROKEN_FILES:
        np.savez(tmp_path / "drives.npz", **drives(**changes))
        with subtests.test(words=words):
            expected = words.replace("FILE", str(tmp_path / "drives.npz"))
            assert expected in refusal(load, tmp_path / "drives.npz", **keys)
    content = {name: array for name, array in drives().items() if name != "angle"}
    np.savez(tmp_path / "drives.npz", **content)
    assert "array 'angle' not found" in refusal(load, tmp_path / "drives.npz")


def test_public_frames_do_not_inherit_the_settings_of_own_drives() -> None:
    main = SourceConfig(name="driving", path="drives.npz", driving={"gap": 3})
    public = inherit_keys(SourceConfig(name="driving_public"), main)

    dataset = load_source(public, Path())

    assert torch.equal(dataset.train.x, read_source("driving_public").train.x)
    # The file has speeds, which are not part of the rows.
    assert dataset.train.locate(5, "the proxy set") == "row 5 of the proxy set"


def test_bundled_data_inherit_no_names_of_files() -> None:
    main = SourceConfig(
        name="traffic", path="own.csv", series={"time": "When", "window": 12}, task="regression"
    )

    bundled = inherit_keys(SourceConfig(name="traffic"), main)
    own = inherit_keys(SourceConfig(name="traffic", path="other.csv"), main)

    assert bundled.series is not None and own.series is not None
    assert (bundled.series.time, own.series.time) == ("DateTime", "When")
    assert bundled.series.window == own.series.window == 12
    assert (bundled.task, own.task) == (None, "regression")
