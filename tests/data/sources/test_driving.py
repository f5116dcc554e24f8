"""Drives: folders in the layouts of Udacity, and files of frames."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import DataConfig, DrivingConfig, SourceConfig
from hetero_fl.data import Dataset, federate, load_source
from hetero_fl.data.external import inherit_keys
from hetero_fl.data.sources.driving import read_frames
from tests.support.driving_folders import (
    SIMULATOR_HEADER,
    write_driving_folder,
    write_export,
    write_frame,
    write_simulator,
)
from tests.support.federated_data import read_source
from tests.support.mistakes import check_broken_folders, refusal

CLIENT = ClientSettings(preprocess=PreprocessConfig(missing="indicate"))


def load(path: Path | None = None, name: str = "driving", **keys: Any) -> Dataset:
    return read_source(name, path, driving=keys or None)


def test_folder_of_both_layouts_is_read_by_vehicle(tmp_path: Path) -> None:
    dataset = load(write_driving_folder(tmp_path), gap=2)

    train = dataset.train
    assert dataset.task.kind == "regression" and dataset.task.unit == "degrees"
    assert [tuple(block) for block in dataset.blocks] == [
        ("frame", (3, 24, 48)),
        ("speed", (1,)),
        ("position", (2,)),
    ]
    assert train.group is not None and train.group_names == ("car", "sim", "truck")
    # Of 40 frames, 10 are for the test, 6 for validation, and 2 are left out before each.
    assert train.group.bincount().tolist() == [22, 22, 22]
    assert len(dataset.local_sets["validation"]) == 12 and len(dataset.local_sets["test"]) == 30
    assert dataset.test is not None and len(dataset.test) == 30 and not dataset.simulated
    # The brighter side is the side of the angle.
    frames = torch.as_tensor(train.x)[:, :3456].reshape(-1, 3, 24, 48)
    left = frames[..., :24].mean((1, 2, 3))
    for vehicle in range(3):
        own = train.group == vehicle
        assert torch.corrcoef(torch.stack([left[own], train.labels[own, 0]]))[0, 1] > 0.8
    # Angles, speeds and positions have one unit.
    wheel, speed, lat = (
        float((tmp_path / "car" / "interpolated.csv").read_text().splitlines()[1].split(",")[i])
        for i in (6, 8, 9)
    )
    cells = (tmp_path / "sim" / "driving_log.csv").read_text().splitlines()[0].split(",")

    x, y = torch.as_tensor(train.x), train.labels
    assert float(y[0] * 5) == pytest.approx(math.degrees(wheel) / 14.8, rel=1e-5)
    assert x[0, 3456:3458].tolist() == pytest.approx([speed, lat], rel=1e-6)
    first = train.group.tolist().index(1)
    assert float(y[first] * 5) == pytest.approx(-25 * float(cells[3]), rel=1e-5)
    assert float(x[first, 3456]) == pytest.approx(float(cells[6]) * 0.44704, rel=1e-5)
    assert bool(x[first, 3457:].isnan().all())
    assert dataset.train.unit is not None and set(dataset.train.unit.tolist()) == {5.0}


def test_simulator_log_with_header_and_relative_paths(tmp_path: Path) -> None:
    plain = load(write_simulator(tmp_path / "a"), gap=2)
    with_header = load(write_simulator(tmp_path / "b", header=True, recorded_in="IMG/"), gap=2)

    assert plain.train.group_names == ("a",) and len(plain.train) == len(with_header.train)
    assert torch.equal(plain.train.labels, with_header.train.labels)
    x = torch.as_tensor(plain.train.x)
    assert torch.equal(x[:, :3457], torch.as_tensor(with_header.train.x)[:, :3457])


def test_frames_are_cut_resized_and_colored(tmp_path: Path) -> None:
    pixels = np.zeros((100, 60), np.uint8)
    pixels[50:75] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")

    frames = read_frames([tmp_path / "a.png"], DrivingConfig(height=8, width=10, crop=(0.5, 0.25)))

    assert frames.shape == (1, 3, 8, 10) and set(frames.ravel().tolist()) == {200}


def test_steps_sizes_and_test_vehicles_are_configurable(tmp_path: Path) -> None:
    write_driving_folder(tmp_path)

    found = load(tmp_path, step=2, height=8, width=16, test_vehicles=("sim",), gap=0)

    assert found.train.group_names == ("car", "truck")
    assert found.test is not None and len(found.test) == 20 and found.test.group is None
    assert found.blocks[0].shape == (3, 8, 16) and len(found.train) == 24


def test_splits_of_a_drive_are_contiguous_and_apart(tmp_path: Path) -> None:
    dataset = read_source("driving", write_driving_folder(tmp_path, {"car": 200, "truck": 200}, ()))
    config = DataConfig(name="driving", partition={"kind": "natural"})

    data = federate(dataset, config, {"car": CLIENT, "truck": CLIENT}, 0)

    # The latitude increases by 1e-4 degrees from frame to frame.
    places = {
        part: torch.as_tensor(dataset.local_sets[part].x)[:, 3457]
        for part in ("validation", "test")
    }
    assert [data.n_rows("car", part) for part in ("train", "validation", "test")] == [110, 20, 50]
    assert places["test"].min() - places["validation"].max() > 9e-4


def test_vehicles_with_drives_of_any_length_have_no_stretch_in_common(tmp_path: Path) -> None:
    train = load(write_driving_folder(tmp_path, {"a": 60, "b": 120, "c": 60}, ()), gap=2).train

    assert train.patient is not None and train.group is not None
    owners = {
        (int(stretch), int(vehicle))
        for stretch, vehicle in zip(train.patient, train.group, strict=True)
    }
    assert len(owners) == len({stretch for stretch, _ in owners}) == 4
    # Neighboring frames stay together.
    assert len(train.patient.unique_consecutive()) == 4


SMALL = {"height": 8, "width": 12, "gap": 2}


IMPOSSIBLE: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "car truck",
        {"proxy": {"size": 60}},
        ["group 'car'", "sequences of 50 frames together); choose a smaller number than data.pr"],
    ),
    (
        "car truck",
        {"proxy": {"size": 20}, "driving": {**SMALL, "test_vehicles": ["truck"]}},
        ["data.proxy.size=20: ", "expected more than 1 sequence to hold out", "data.proxy.source"],
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
    path = str(write_driving_folder(tmp_path, {"car": 60, "truck": 60}, ()))
    plain = {"name": "driving", "path": path, "driving": SMALL, "partition": {"kind": "natural"}}
    for names, keys, words in IMPOSSIBLE:
        config = DataConfig.model_validate({**plain, **keys})
        clients = dict.fromkeys(names.split(), CLIENT)
        with subtests.test(words=words):
            caught = refusal(
                federate, load_source(config, tmp_path, missing=True), config, clients, 0
            )
            assert [part for part in words if part not in caught] == []
            assert "patient" not in caught


def test_position_of_zeros_is_missing(tmp_path: Path) -> None:
    log = write_export(tmp_path / "car", 40) / "interpolated.csv"
    log.write_text(log.read_text().replace(",37.400000,-122.100000,", ",0.0,0.0,"))

    x = torch.as_tensor(load(tmp_path, gap=2).train.x)

    assert bool(x[0, 3457:].isnan().all()) and not bool(x[1, 3457:].isnan().any())


def edit(
    line: int, column: int, value: str, log: str = "car/interpolated.csv"
) -> Callable[[Path], None]:
    """Return a function that replaces a cell of a log. The header is line 1."""

    def change(folder: Path) -> None:
        lines = (folder / log).read_text().splitlines()
        cells = lines[line - 1].split(",")
        cells[column] = value
        lines[line - 1] = ",".join(cells)
        (folder / log).write_text("\n".join(lines))

    return change


def keep(lines: int, log: str = "car/interpolated.csv") -> Callable[[Path], None]:
    """Return a function that removes all lines of a log but the first ones."""

    def change(folder: Path) -> None:
        content = (folder / log).read_text().splitlines()[:lines]
        (folder / log).write_text("\n".join(content))

    return change


def damage(image: str, content: bytes | tuple[int, int] | None) -> Callable[[Path], None]:
    """Return a function that replaces an image by bytes or another size, or removes it."""

    def change(folder: Path) -> None:
        file = sorted((folder / image).iterdir())[3]
        if content is None:
            file.unlink()
        elif isinstance(content, bytes):
            file.write_bytes(content)
        else:
            Image.new("RGB", content).save(file)

    return change


def rewrite(log: Path, change: Callable[[list[str]], list[str]]) -> None:
    log.write_text("\n".join(change(log.read_text().splitlines())))


def write_simulator_without_times(folder: Path) -> None:
    """Write a log whose files are numbered, with the first frame again at the end."""
    lines = (folder / "driving_log.csv").read_text().splitlines()
    for number, line in enumerate(lines):
        (folder / "IMG" / Path(line.split(",")[0].replace("\\", "/")).name).rename(
            folder / "IMG" / f"{number}.jpg"
        )
    numbered = [f"{i}.jpg,{line.partition(',')[2]}" for i, line in enumerate(lines)]
    (folder / "driving_log.csv").write_text("\n".join([*numbered, numbered[0]]))


LOG = "path: DIR/car/interpolated.csv: "
SIM = "path: DIR/sim/driving_log.csv: "
IN_SIM = "sim/driving_log.csv"
BOTH = "path: DIR/car: expected interpolated.csv or driving_log.csv, got "
BROKEN: list[tuple[str, Callable[[Path], object], dict[str, Any], str]] = [
    ("empty", keep(0), {}, LOG + "the file is empty"),
    (
        "column",
        edit(1, 6, "angel"),
        {},
        LOG + "header: column 'angle' not found; did you mean 'angel'?",
    ),
    ("column twice", edit(1, 7, "angle"), {}, LOG + "header: column 'angle' occurs 2 times"),
    ("cells", edit(4, 6, "0.1,0.2"), {}, LOG + "line 4: expected 12 cells, got 13"),
    ("text", edit(4, 6, "left"), {}, LOG + "line 4, column 'angle': expected a number, got 'left'"),
    ("nan", edit(4, 8, "nan"), {}, LOG + "line 4, column 'speed': expected a number, got 'nan'"),
    ("absent", edit(4, 6, ""), {}, LOG + "line 4, column 'angle': expected a number, got ''"),
    (
        "degrees",
        edit(4, 6, "-90"),
        {},
        LOG + "line 4, column 'angle': expected radians from -12.6 to",
    ),
    ("speed", edit(4, 8, "-3"), {}, LOG + "line 4, column 'speed': expected 0 to 300, got -3"),
    (
        "fast",
        edit(4, 8, "1e300"),
        {},
        LOG + "line 4, column 'speed': expected 0 to 300, got 1e+300",
    ),
    (
        "place",
        edit(4, 9, "374"),
        {},
        LOG + "line 4, column 'lat': expected degrees from -90 to 90, got",
    ),
    (
        "order",
        edit(4, 1, "17"),
        {},
        LOG + "line 4, column 'timestamp': must be later than in the frame",
    ),
    (
        "outside",
        edit(4, 5, "../a.png"),
        {},
        LOG + "line 4, column 'filename': expected a file in the",
    ),
    (
        "camera",
        edit(1, 4, "side"),
        {},
        LOG + "header: column 'frame_id' not found; the columns are index, timestamp, width",
    ),
    (
        "no center",
        keep(1),
        {},
        LOG + "expected frames of center_camera in column 'frame_id', got no rows",
    ),
    ("short", keep(9), {}, LOG + "expected at least 10 frames, got 4"),
    (
        "step",
        lambda d: None,
        {"step": 10},
        LOG + "expected at least 10 frames, got 4 with driving.step=10",
    ),
    (
        "share",
        edit(4, 3, "1.5", IN_SIM),
        {},
        SIM + "line 4, column 'steering': expected -1 to 1, got 1.5",
    ),
    ("sim cells", edit(4, 3, "0.1,2", IN_SIM), {}, SIM + "line 4: expected 7 cells, got 8"),
    (
        "encoding",
        lambda d: (d / IN_SIM).write_bytes(b"a\nb\xeb,1"),
        {},
        SIM + "line 2: not encoded in UTF",
    ),
    ("no image", damage("sim/IMG", None), {}, SIM + "line 4: image 'IMG/center_2016_12_01"),
    (
        "long name",
        edit(4, 0, "a" * 300, IN_SIM),
        {},
        SIM + f"line 4: image 'IMG/{'a' * 75}…' not found",
    ),
    ("long file", edit(4, 5, "a" * 300), {}, LOG + f"line 4: image '{'a' * 79}…' not found"),
    (
        "quote",
        edit(4, 6, '"0.1'),
        {},
        LOG + "line 4: expected CSV with closed quotes, got '2,147942421592",
    ),
    (
        "long cell",
        edit(4, 0, "a" * 200_000, IN_SIM),
        {},
        SIM + "line 4: expected CSV with closed quotes, got",
    ),
    (
        "case",
        lambda d: rewrite(d / IN_SIM, lambda lines: [SIMULATOR_HEADER.title(), *lines]),
        {},
        SIM + "header: column 'center' not found; did you mean 'Center'?",
    ),
    (
        "reversed",
        lambda d: rewrite(d / IN_SIM, lambda lines: lines[::-1]),
        {},
        SIM + "line 2, column 'center': must be later than in the frame before, got 'center_2016",
    ),
    (
        "sim twice",
        lambda d: rewrite(d / IN_SIM, lambda lines: [lines[0], *lines]),
        {"step": 2},
        SIM + "line 2, column 'center': must be later than in the frame before, got 'center_2016",
    ),
    (
        "image twice",
        edit(6, 5, "./center/1479424215877284179.png"),
        {"step": 3},
        LOG + "line 6: image 'center/1479424215877284179.png' occurs twice; remove the line",
    ),
    (
        "image twice without times",
        lambda d: write_simulator_without_times(d / "sim"),
        {},
        SIM + "line 41: image 'IMG/0.jpg' occurs twice; remove the line",
    ),
    (
        "bytes",
        damage("car/center", b"no"),
        {},
        "6027284179.png: not a readable image (unknown format or",
    ),
    (
        "size",
        damage("car/center", (9, 8)),
        {},
        "6027284179.png: expected 32x24 pixels as in 147942421587",
    ),
    (
        "gap",
        lambda d: None,
        {},
        "gap: leaves no frames for validation of vehicle 'car', which has 40 frames, got 10",
    ),
    (
        "no vehicles",
        lambda d: (shutil.rmtree(d), write_frame(d / "a.png", 0.0)),
        {},
        "path: DIR: expected a folder for each vehicle",
    ),
    ("both", lambda d: write_simulator(d / "car"), {}, BOTH + "both"),
    ("no log", lambda d: (d / "car/interpolated.csv").unlink(), {}, BOTH + "center"),
    (
        "vehicle",
        lambda d: None,
        {"test_vehicles": ("cars",)},
        "driving.test_vehicles: DIR has no folder 'cars'; did you mean 'car'?",
    ),
    (
        "all",
        lambda d: None,
        {"test_vehicles": ("car", "sim", "truck")},
        "driving.test_vehicles: DIR has no further vehicle, none is left",
    ),
]


def test_malformed_folder_raises_one_line(subtests: pytest.Subtests) -> None:
    check_broken_folders(subtests, BROKEN, write_driving_folder, load)


def drives(**changes: Any) -> dict[str, Any]:
    """Return the arrays of a file with 40 frames of two vehicles each and 6 of another one."""
    vehicle = np.repeat(["b", "a", "c"], [40, 40, 6])
    arrays = {
        "frame": np.random.default_rng(0).integers(0, 256, (86, 3, 8, 12), np.uint8),
        "speed": np.arange(86.0),
        "position": np.ones((86, 2)),
        "angle": np.arange(86.0) / 10,
        "vehicle": vehicle,
        "split": np.where(vehicle == "c", "test", "train"),
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
    ({}, {"height": 16}, "driving.height: the frames of drives.npz have 12x8 pixels, got 16; rem"),
    ({}, {"step": 2}, "driving.step: does not apply to .npz files such as drives.npz; remove"),
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
    main = SourceConfig(name="driving", path="drives", driving={"crop": [0.2, 0.1]})
    public = inherit_keys(SourceConfig(name="driving_public"), main)

    dataset = load_source(public, Path())

    assert torch.equal(dataset.train.x, read_source("driving_public").train.x)


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
