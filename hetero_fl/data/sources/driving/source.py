"""Steering angles from camera frames: drives in the layouts of Udacity, or generated roads.

A row has three blocks: the frame of a camera, the speed and the position of the vehicle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hetero_fl.config.data import DrivingConfig, SourceConfig
from hetero_fl.core.stored_rows import require_tensor
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Block, Dataset, Examples, PatientTerm, concatenate_examples
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.driving.cameras import Camera, Scene, render
from hetero_fl.data.sources.driving.drive_files import (
    LOGS,
    read_drive,
    read_frames,
)
from hetero_fl.data.sources.driving.roads import RoadKind, Vehicle, make_drive, steering_angle
from hetero_fl.data.sources.files import check_folder
from hetero_fl.utils.errors import UserError, check_names
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.seeding import keyed_numpy_generator

TASK = Task("regression", 1, ("steering angle",), "degrees")
STRETCH = 50
"""Number of consecutive frames that are never divided between splits or clients."""
SEQUENCES = PatientTerm(
    "sequence", f"data.name=driving keeps sequences of {STRETCH} frames together"
)
FILE_KEYS = ("crop", "step", "steering_ratio", "max_angle", "test_vehicles")
"""Settings that apply to files only."""

DRIVES = 24
"""Number of drives of each vehicle."""
FRAMES = 30
"""Number of frames of each drive."""
OTHER_FRAMES = 12
"""Number of frames of each drive in the global validation and test sets."""
PUBLIC_FRAMES = 10
"""Number of frames of each public drive."""
VALIDATION_DRIVES = 24
TEST_DRIVES = 48
PUBLIC_DRIVES = 24
KINDS = {
    "suburb": RoadKind(bend=0.018, straight=0.2, left=0.5, limit=12.0),
    "country": RoadKind(bend=0.01, straight=0.2, left=0.5, limit=16.0),
    "hills": RoadKind(bend=0.028, straight=0.2, left=0.5, limit=10.0),
}
VEHICLES = {
    "day": Vehicle(wheelbase=2.7),
    "night": Vehicle(wheelbase=2.8),
}
"""Steering geometry of each fleet."""
VEHICLES_PER_FLEET = 2
CAMERAS = {
    "day": Camera(view=60, height=1.3, tilt=6),
    "night": Camera(view=58, height=1.2, tilt=5.5, color=False, noise=0.02),
}
"""Camera of each fleet, before the differences between vehicles."""
GROUNDS = ((0.3, 0.45, 0.2), (0.6, 0.5, 0.35), (0.75, 0.75, 0.78), (0.45, 0.42, 0.38))
"""Colors of the ground next to a road: grass, sand, snow and stone."""
ANGLE_ERROR = 0.1
"""Standard deviation of the error of a measured steering angle in degrees."""
ORIGIN = (37.4, -122.1)
"""Latitude and longitude of the region of all roads, in degrees."""
REGION = 10_000.0
"""Side of the region in m."""
METERS_PER_DEGREE = 111_320.0
"""Length of a degree of latitude."""
ABOUT = "generated: frames of vehicles with color cameras by day and gray cameras by night"


@register_source(
    "driving",
    keys=("path", "driving"),
    generates=True,
    folder_files=("*/interpolated.csv", "*/driving_log.csv"),
)
def driving(config: SourceConfig, _root: Path) -> Dataset:
    """Generate the drives of four vehicles (groups), or read a folder (see `read_driving_folder`).

    Two vehicles drive by day with a color camera, and two by night with a gray camera. Each drive
    is on another road, with its own surroundings and weather. The validation and test sets contain
    other vehicles of both fleets on other roads.
    """
    settings = config.driving or DrivingConfig()
    if config.path is not None:
        if settings.seed:
            raise UserError("driving.seed: applies to generated drives; remove it or path")
        return read_driving_folder(Path(config.path).expanduser(), settings)
    _check_generated(settings)
    names = tuple(f"{fleet}_{i + 1}" for fleet in VEHICLES for i in range(VEHICLES_PER_FLEET))
    drives = [
        _generate(name, name.rpartition("_")[0], settings, drives=DRIVES, frames=FRAMES)
        for name in names
    ]
    parts = _split_drives(names, drives, settings)
    return Dataset(
        "driving",
        TASK,
        parts["train"],
        _other_drives("validation", VALIDATION_DRIVES, OTHER_FRAMES, settings),
        _other_drives("test", TEST_DRIVES, OTHER_FRAMES, settings),
        simulated=True,
        about=ABOUT,
        blocks=_blocks(settings),
        local_sets={"validation": parts["validation"], "test": parts["test"]},
    )


@register_source("driving_public", keys=("driving",))
def driving_public(config: SourceConfig, _root: Path) -> Dataset:
    """Generate frames of other vehicles on other roads, without speeds and positions."""
    settings = config.driving or DrivingConfig()
    _check_generated(settings)
    frame = _blocks(settings)[0]
    rows = _other_drives("public", PUBLIC_DRIVES, PUBLIC_FRAMES, settings)
    rows.x = require_tensor(rows.x, "a public set")[:, : frame.size]
    return Dataset("driving_public", TASK, rows, simulated=True, about=ABOUT, blocks=(frame,))


def read_driving_folder(path: Path, settings: DrivingConfig) -> Dataset:
    """Read a folder with a folder for each vehicle.

    The folder of a vehicle contains the log and the images of one drive (see
    `hetero_fl.data.sources.driving.drive_files.read_drive`). A folder that contains a log itself is
    that of a single vehicle. The last frames of each drive are the local validation and test rows.
    The global validation set consists of all local validation rows, and the global test set of the
    frames of `settings.test_vehicles`, or of all local test rows.

    Args:
        path: Folder to read.
        settings: Driving settings.

    Returns:
        A data set whose groups are the vehicles.

    Raises:
        UserError: If a folder, a log or an image is missing or malformed.
    """
    check_folder(path)
    folders = _vehicle_folders(path)
    held_out = settings.test_vehicles or ()
    check_names(held_out, folders, f"driving.test_vehicles: {path} has no folder")
    names = tuple(name for name in folders if name not in held_out)
    if not names:
        raise UserError(
            f"driving.test_vehicles: {path} has no further vehicle, none is left for training"
        )
    drives = {name: _read(folder, settings) for name, folder in folders.items()}
    parts = _split_drives(names, [drives[name] for name in names], settings)
    others = [drives[name] for name in held_out]
    count = sum(map(len, drives.values()))
    return Dataset(
        "driving",
        TASK,
        parts["train"],
        parts["validation"],
        concatenate_examples(others) if others else parts["test"],
        about=f"{count:,} frames of {path.name}, {len(names)} vehicles for training",
        blocks=_blocks(settings),
        local_sets={"validation": parts["validation"], "test": parts["test"]},
    )


def _vehicle_folders(path: Path) -> dict[str, Path]:
    """Return the folders of the vehicles in natural order, keyed by name."""
    if any((path / log).is_file() for log in LOGS):
        return {path.resolve().name: path}
    names = natural_order(
        entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    if not names:
        files = ", ".join(sorted(entry.name for entry in path.iterdir())) or "an empty folder"
        raise UserError(
            f"path: {path}: expected a folder for each vehicle, with {' or '.join(LOGS)}, got "
            f"{files}"
        )
    return {name: path / name for name in names}


def _read(folder: Path, settings: DrivingConfig) -> Examples:
    """Return the rows of the drive in a folder."""
    frames = read_drive(folder, settings)
    pixels = read_frames([folder / frame.name for frame in frames], settings)
    angles = np.array([frame.angle for frame in frames])
    return _rows(pixels, np.array([frame.state for frame in frames]), angles, settings)


def _rows(
    pixels: np.ndarray, state: np.ndarray, angles: np.ndarray, settings: DrivingConfig
) -> Examples:
    """Return rows of three blocks, with the angles in units of `settings.scale`.

    Args:
        pixels: Frames, uint8 `[N, 3, H, W]`.
        state: Speed, latitude and longitude, `[N, 3]`.
        angles: Steering angles in degrees, `[N]`.
        settings: Driving settings.
    """
    frames = torch.from_numpy(pixels).flatten(1).float() / 255
    y = torch.from_numpy(angles / settings.scale).float()[:, None]
    return Examples(
        torch.cat([frames, torch.from_numpy(state).float()], 1),
        y,
        unit=torch.full((len(y),), settings.scale),
        baselines={"straight": torch.zeros_like(y)},
    )


def _blocks(settings: DrivingConfig) -> tuple[Block, Block, Block]:
    size = (3, settings.height, settings.width)
    return Block("frame", size), Block("speed", (1,)), Block("position", (2,))


def _split_drives(
    names: Sequence[str], drives: Sequence[Examples], settings: DrivingConfig
) -> dict[str, Examples]:
    """Split each drive by time.

    Neighboring frames are similar, so a random split would put nearly equal frames into training
    and test. `settings.gap` frames are left out between two splits.

    Args:
        names: Names of the vehicles, which become groups.
        drives: Rows of the drive of each vehicle, in the order of time.
        settings: Driving settings.

    Returns:
        Rows of all vehicles, keyed by "train", "validation" and "test".
    """
    parts: dict[str, list[Examples]] = {"train": [], "validation": [], "test": []}
    first_stretch = 0
    for index, drive in enumerate(drives):
        count = len(drive)
        test = count - round(settings.test * count)
        validation = test - round(settings.validation * count)
        ranges = {
            "train": range(validation - settings.gap),
            "validation": range(validation, test - settings.gap),
            "test": range(test, count),
        }
        for part, frames in ranges.items():
            if not frames:
                raise UserError(
                    f"driving.gap: leaves no frames for {part} of vehicle '{names[index]}', which "
                    f"has {count} frames, got {settings.gap}; choose a smaller gap"
                )
        for part, chosen in ranges.items():
            own = drive.select_rows(torch.tensor(chosen))
            own.group = torch.full((len(own),), index)
            own.group_names = tuple(names)
            parts[part].append(own)
        # Other partitions than `natural` divide stretches of frames instead of single frames.
        stretches = torch.arange(len(ranges["train"])) // STRETCH
        parts["train"][-1].patient = first_stretch + stretches
        parts["train"][-1].patient_term = SEQUENCES
        first_stretch += int(stretches[-1]) + 1
    return {part: concatenate_examples(found) for part, found in parts.items()}


def _check_generated(settings: DrivingConfig) -> None:
    """Check that the settings apply to generated drives."""
    for key in FILE_KEYS:
        if getattr(settings, key) != DrivingConfig.model_fields[key].default:
            raise UserError(
                f"driving.{key}: needs path, as it applies to files; set path or remove it"
            )


def _generate(
    name: str, fleet: str, settings: DrivingConfig, *, drives: int, frames: int
) -> Examples:
    """Generate the drives of the vehicle `name` of a fleet, each on another road.

    The angles have a measurement error with a standard deviation of `ANGLE_ERROR`.
    """
    rng = keyed_numpy_generator("data", "driving", settings.seed, name)
    camera = _mount(CAMERAS[fleet], rng)
    parts = []
    for _ in range(drives):
        kind = KINDS[str(rng.choice(tuple(KINDS)))]
        drive = make_drive(rng, kind, frames)
        scene = _make_scene(rng, night=fleet == "night")
        pixels = render(drive, camera, scene, (settings.height, settings.width), rng)
        angles = steering_angle(drive.curvature, drive.speed, VEHICLES[fleet])
        angles += rng.normal(0, ANGLE_ERROR, frames)
        east, north = (rng.uniform(-REGION / 2, REGION / 2, (1, 2)) + drive.position()).T
        latitude = ORIGIN[0] + north / METERS_PER_DEGREE
        longitude = ORIGIN[1] + east / (METERS_PER_DEGREE * np.cos(np.radians(ORIGIN[0])))
        state = np.stack([drive.speed, latitude, longitude], 1)
        parts.append(_rows(pixels, state, angles, settings))
    return concatenate_examples(parts)


def _mount(camera: Camera, rng: np.random.Generator) -> Camera:
    """Return a camera whose position, lens and colors differ from those of its fleet."""
    red, green, blue = rng.uniform(0.9, 1.1, 3)
    return replace(
        camera,
        view=camera.view * rng.uniform(0.95, 1.05),
        height=camera.height * rng.uniform(0.92, 1.08),
        tilt=camera.tilt + rng.uniform(-1.0, 1.0),
        side=rng.uniform(-0.15, 0.15),
        tint=(red, green, blue),
    )


def _make_scene(rng: np.random.Generator, *, night: bool) -> Scene:
    """Generate the surroundings, the light and the weather of a drive."""
    ground = np.array(GROUNDS[rng.integers(len(GROUNDS))]) * rng.uniform(0.8, 1.2)
    red, green, blue = ground
    return Scene(
        ground=(red, green, blue),
        asphalt=rng.uniform(0.2, 0.45),
        contrast=rng.uniform(0.6, 1.0),
        lanes=int(rng.integers(0, 3)),
        yellow=bool(rng.random() < 0.4),
        dashed=bool(rng.random() < 0.7),
        night=night,
        lamps=rng.choice([0.0, 0.1, 0.2]),
        shadows=rng.choice([0.0, 0.2, 0.4]),
        visibility=rng.uniform(60, 600),
    )


def _other_drives(name: str, count: int, frames: int, settings: DrivingConfig) -> Examples:
    """Generate the drives of vehicles that are not clients, of each fleet in turn."""
    fleets = tuple(VEHICLES)
    parts = [
        _generate(
            f"{name}_{number}", fleets[number % len(fleets)], settings, drives=1, frames=frames
        )
        for number in range(count)
    ]
    return concatenate_examples(parts)
