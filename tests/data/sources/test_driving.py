"""Drives: folders in the layouts of Udacity, and the geometry of generated roads and frames."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import DataConfig, DrivingConfig, SourceConfig
from hetero_fl.data import Dataset, federate, load_source
from hetero_fl.data.sources.driving import read_frames
from hetero_fl.data.sources.driving.cameras import LANE, Camera, Scene, render
from hetero_fl.data.sources.driving.roads import (
    LOOK_AHEAD,
    Drive,
    Road,
    RoadKind,
    Vehicle,
    make_drive,
    make_road,
    steering_angle,
)
from tests.support.cases import each_case
from tests.support.driving_folders import (
    SIMULATOR_HEADER,
    write_driving_folder,
    write_export,
    write_frame,
    write_simulator,
)
from tests.support.federated_data import read_source
from tests.support.mistakes import check_broken_folders, check_refused, refusal

CLIENT = ClientSettings(preprocess=PreprocessConfig(missing="indicate"))
BENDS = RoadKind(bend=0.02, straight=0.2, left=0.5, limit=14.0)


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
        {"path": None},
        ["for group 'day_1', ", "; data.path is not set, so driving generates its rows; have"],
    ),
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


def test_generated_global_sets_of_clients_with_files_are_noted(tmp_path: Path) -> None:
    config = DataConfig(name="driving", driving=DrivingConfig(**SMALL))
    source = SourceConfig(name="driving", path=str(write_export(tmp_path / "car", 60)))
    client = CLIENT.model_copy(update={"data": source})

    data = federate(load_source(config, tmp_path), config, {"car": client}, 0)

    assert (
        "data.path is not set: driving generates the global test and validation sets, but these "
        "clients read files: 'car'"
    ) in data.notes


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


def test_seed_selects_other_roads(tmp_path: Path) -> None:
    for name in ("driving", "driving_public"):
        first, again, other = (load(name=name, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first.train.y, again.train.y)
        assert not torch.equal(first.train.y, other.train.y)
    check_refused(r"driving\.seed: applies to generated drives", load, tmp_path, seed=1)


def straight_at(offset: float, yaw: float, curvature: float = 0.0) -> Drive:
    """Return a drive of one frame on a road of constant curvature."""
    road = Road.from_curvature(np.full(LOOK_AHEAD + 20, curvature))
    one = np.ones(1)
    return Drive(road, 5 * one, 10 * one, offset * one, yaw * one, curvature * one)


def follow(drive: Drive, vehicle: Vehicle) -> np.ndarray:
    """Integrate the kinematic bicycle model with the angles of a drive, in steps of 1 cm.

    This is an independent reference: x' = cos(h), y' = sin(h), h' = tan(angle) / wheelbase.
    """
    angle = np.radians(steering_angle(drive.curvature, 0.0, vehicle))
    along = np.arange(drive.distance[0], drive.distance[-1], 0.01)
    tangent = np.tan(np.interp(along, drive.distance, angle))
    start = drive.road.at(drive.road.heading, drive.distance[:1])[0] + drive.yaw[0]
    # A vehicle on the inner side of a bend drives a shorter path.
    curvature = drive.road.at(drive.road.curvature, along)
    shorter = 1 - curvature * np.interp(along, drive.distance, drive.offset)
    heading = start + np.cumsum(tangent / vehicle.wheelbase * shorter) * 0.01
    steps = 0.01 * shorter[:, None] * np.stack([np.cos(heading), np.sin(heading)], 1)
    path = drive.position()[0] + np.cumsum(steps, 0)
    return path[np.searchsorted(along, drive.distance[1:-1])]


@each_case("seed", range(4))
def test_bicycle_model_with_the_angles_follows_the_road(seed: Any) -> None:
    rng = np.random.default_rng(seed)
    drive = make_drive(rng, BENDS, 80, interval=0.1)
    vehicle = Vehicle(wheelbase=2.7)

    path = follow(drive, vehicle)

    away = np.linalg.norm(path - drive.position()[1:-1], axis=1)
    assert drive.distance[-1] > 60 and np.abs(drive.curvature).max() > 0.005
    # To first order: the deviation is much smaller than the lane over the whole drive.
    assert away.max() < 0.25
    # Without the steering, the vehicle leaves the road.
    straight = follow(replace(drive, curvature=0 * drive.curvature), vehicle)
    assert np.linalg.norm(straight - drive.position()[1:-1], axis=1).max() > 3


def test_steering_angle_adds_understeer_to_the_bicycle_model() -> None:
    curvature = np.array([0.02, -0.01])

    slow = steering_angle(curvature, 0.0, Vehicle(2.5, 0.003))
    fast = steering_angle(curvature, 10.0, Vehicle(2.5, 0.003))

    assert np.radians(slow) == pytest.approx([math.atan(2.5 * 0.02), -math.atan(2.5 * 0.01)])
    # 0.003 rad per m/s² of lateral acceleration, which is 0.02 * 10**2 = 2 m/s².
    assert np.radians(fast - slow) == pytest.approx([0.006, -0.003])


def test_road_of_constant_curvature_is_a_circle() -> None:
    road = Road.from_curvature(np.full(101, 0.02))
    center = np.array([0.0, 50.0])
    assert np.linalg.norm(road.position - center, axis=1) == pytest.approx(
        np.full(101, 50), abs=0.02
    )
    assert road.heading[-1] == pytest.approx(2.0) and road.length == 100


def test_curvature_changes_gradually_and_is_limited() -> None:
    road = make_road(np.random.default_rng(0), BENDS, 2000.0)
    assert np.abs(road.curvature).max() <= 1 / 20
    assert np.abs(np.diff(road.curvature)).max() <= 2 / 20 / 24 + 1e-12
    assert (road.curvature > 0.005).any() and (road.curvature < -0.005).any()


@each_case("curvature", (0.0, 0.02, -0.012))
def test_rendered_curvature_gives_the_angle_of_the_bicycle_model(curvature: Any) -> None:
    camera = Camera(view=60, height=1.4, tilt=8, noise=0.0)
    scene = Scene(lanes=0, asphalt=0.1, ground=(0.1, 0.1, 0.1))
    drive = straight_at(0.0, 0.0, curvature)

    frame = render(drive, camera, scene, (240, 480), np.random.default_rng(0))[0, 0].astype(float)

    # Independent reference: rays of the pixels, rotated by the tilt, meet the ground.
    focal = 240 / math.tan(math.radians(30))
    tilt = math.radians(8)
    ahead, middle = [], []
    for row in range(150, 240, 10):
        below = (row + 0.5 - 120) / focal
        depth = 1.4 / (math.sin(tilt) + below * math.cos(tilt))
        weight = (frame[row] - np.median(frame[row])).clip(40) - 40
        half = len(weight) // 2
        sides = [
            float((part * (np.arange(240) + 0.5 + begin)).sum() / part.sum())
            for begin, part in ((0, weight[:half]), (240, weight[half:]))
            if part.sum() > 0
        ]
        if len(sides) == 2:
            ahead.append(depth * (math.cos(tilt) - below * math.sin(tilt)))
            middle.append(-depth * (sum(sides) / 2 - 240) / focal)
    square = np.square(ahead)
    found = 2 * float(square @ np.array(middle) / (square @ square))
    assert len(ahead) >= 4
    assert math.degrees(math.atan(2.7 * found)) == pytest.approx(
        float(steering_angle(np.array([curvature]), 0.0, Vehicle(2.7))[0]), abs=0.25
    )


def test_offset_and_direction_move_the_lane_in_the_frame() -> None:
    camera = Camera()
    ahead, left, direction = straight_at(0.5, 0.1).lane_ahead(20)
    # The lane is 0.5 m to the right, and the road turns away to the right of a vehicle that
    # points to the left.
    assert left[0, 0] == pytest.approx(-0.5 * math.cos(0.1)) and left[0, -1] < -2
    assert direction == pytest.approx(np.full((1, 20), -0.1))
    assert ahead[0, 10] - ahead[0, 0] == pytest.approx(10 * math.cos(0.1))
    rows, points = camera.ground(24, 48)
    assert np.isinf(rows[0]) and (np.diff(rows[10:]) < 0).all()
    assert points[-1, 0] > 0 > points[-1, -1] and abs(points[-1, 0]) < LANE


def test_night_is_dark_beyond_the_headlights_and_gray_cameras_have_equal_channels() -> None:
    drive = make_drive(np.random.default_rng(0), BENDS, 4)
    size = (24, 48)

    day = render(drive, Camera(), Scene(), size, np.random.default_rng(1))
    night = render(drive, Camera(color=False), Scene(night=True), size, np.random.default_rng(1))

    assert day.shape == night.shape == (4, 3, 24, 48) and day.dtype == np.uint8
    assert night[:, :, :6].mean() < 40 < day[:, :, :6].mean()
    assert night[:, :, -3:].mean() > 2 * night[:, :, :6].mean()
    assert (night[:, 0] == night[:, 2]).all() and not (day[:, 0] == day[:, 2]).all()


@pytest.mark.slow
def test_generated_drives_are_those_of_two_fleets() -> None:
    dataset = load()

    train = dataset.train
    assert dataset.simulated and train.group_names is not None
    assert [name for name in train.group_names if name.endswith("_1")] == [
        "day_1",
        "night_1",
    ]
    assert train.group is not None and len(train.group.unique()) == 4
    assert not bool(torch.as_tensor(train.x).isnan().any())
    brightness = [
        float(torch.as_tensor(train.x)[train.group == index, :96].mean()) for index in range(4)
    ]
    assert max(brightness[2:4]) < 0.2 < min(brightness[:2])
    public = load(name="driving_public")
    assert [block.name for block in public.blocks] == ["frame"]
    again = load(name="driving_public")
    assert torch.equal(torch.as_tensor(public.train.x), torch.as_tensor(again.train.x))
