"""Steering angles from camera frames of drives, which are simulated unless a file is given.

A row has three blocks: the frame of a camera, the speed and the position of the vehicle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hetero_fl.config.data import DrivingConfig, SourceConfig
from hetero_fl.core.images import as_numbers, to_floats
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import (
    Block,
    Dataset,
    Examples,
    PatientTerm,
    concatenate_examples,
)
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import EMBEDDED
from hetero_fl.data.sources.npz_columns import split_examples
from hetero_fl.data.sources.npz_files import NAMES, ArraySpec, read_arrays
from hetero_fl.data.table import convert_images
from hetero_fl.utils.errors import UserError

TASK = Task("regression", 1, ("steering angle",), "degrees")
STATE = (Block("speed", (1,)), Block("position", (2,)))
STRETCH = 50
"""Number of consecutive frames that are never divided between splits or clients."""
SEQUENCES = PatientTerm(
    "sequence", f"data.name=driving keeps sequences of {STRETCH} frames together"
)
DRIVING = EMBEDDED / "driving.npz"
"""Simulated drives."""
SPLITS = ("train", "validation", "test", "public")
"""Values of the array `split` of a `.npz` file."""
ARRAYS = {
    "frame": ArraySpec(("N 3 H W", "N H W 3")),
    "speed": ArraySpec(("N",), rows="frame", gaps=1),
    "position": ArraySpec(("N 2",), rows="frame", gaps=2),
    "angle": ArraySpec(("N",), rows="frame"),
    "vehicle": ArraySpec(("N",), NAMES, "frame"),
    "split": ArraySpec(("N",), NAMES, "frame"),
}
"""Arrays of a `.npz` file."""


@register_source(
    "driving",
    keys=("path", "driving"),
    default_path=DRIVING,
)
def driving(config: SourceConfig, _root: Path) -> Dataset:
    """Read drives from a `.npz` file (see `read_drives`).

    The simulated file has four vehicles (groups), two with a color camera by day and two with a
    gray camera by night. The validation and test sets contain other vehicles on other roads.
    """
    path = Path(str(config.path)).expanduser()
    settings = config.driving or DrivingConfig()
    if path.suffix.lower() != ".npz":
        raise UserError(
            f"path: {path}: folders of drives were removed; use image_table "
            "(docs/scenarios/driving_hetero.md), or a .npz file"
        )
    parts, frame = read_drives(path, settings)
    names = parts["train"].group_names
    group = parts["train"].group
    assert group is not None
    drives = [
        parts["train"].select_rows((group == index).nonzero().squeeze(1))
        for index in range(len(names))
    ]
    own = _split_drives(names, drives, settings)
    return Dataset(
        "driving",
        TASK,
        own["train"],
        parts.get("validation", own["validation"]),
        parts.get("test", own["test"]),
        about=f"frames of {path.name}, {len(names)} vehicles for training",
        blocks=(frame, *STATE),
        local_sets={"validation": own["validation"], "test": own["test"]},
    )


@register_source("driving_public", keys=("driving",), default_path=DRIVING)
def driving_public(config: SourceConfig, _root: Path) -> Dataset:
    """Read simulated frames of other vehicles on other roads, without speeds and positions."""
    settings = config.driving or DrivingConfig()
    parts, frame = read_drives(Path(str(config.path)), settings)
    rows = parts["public"]
    rows.x = rows.x[:, : frame.size]
    about = f"{len(rows):,} public frames"
    return Dataset("driving_public", TASK, rows, about=about, blocks=(frame,))


def read_drives(path: Path, settings: DrivingConfig) -> tuple[dict[str, Examples], Block]:
    """Read the drives of a `.npz` file.

    The file has the arrays `frame`, uint8 or floats from 0 to 1 `[N, 3, H, W]` or `[N, H, W, 3]`,
    `speed` `[N]` in m/s, `position` `[N, 2]`, latitude and longitude in degrees, `angle` `[N]` of
    the front wheels in degrees, positive to the left, `vehicle` `[N]` and `split` `[N]`, with the
    values of `SPLITS`. The frames of a vehicle are in the order of time. NaN stands for a speed or
    position that was not recorded.

    Args:
        path: File to read.
        settings: Driving settings.

    Returns:
        The rows of each split, of which those for training have groups, and the block of a frame.

    Raises:
        UserError: If the file is malformed.
    """
    where = f"path: {path}"
    arrays = read_arrays(path, ARRAYS)
    frames = convert_images({f"{where}: frame": as_numbers(arrays["frame"], where)}, "last")[0][0]
    if frames.dtype == torch.int32:
        raise UserError(
            f"{where}: frame: expected uint8 or floats from 0 to 1, got {arrays['frame'].dtype}; "
            "divide the pixels by their largest possible value"
        )
    height, width = frames.shape[2:]
    for key, size in (("height", height), ("width", width)):
        if getattr(settings, key) not in (size, DrivingConfig.model_fields[key].default):
            raise UserError(
                f"driving.{key}: the frames of {path.name} have {width}x{height} pixels, got "
                f"{getattr(settings, key)}; remove it, or set path to other drives"
            )
    state = np.column_stack([arrays["speed"], arrays["position"]])
    y = torch.from_numpy(arrays["angle"] / settings.scale).float()[:, None]
    rows = Examples(
        torch.cat([to_floats(frames, None).flatten(1), torch.from_numpy(state).float()], 1),
        y,
        unit=torch.full((len(y),), settings.scale),
        baselines={"straight": torch.zeros_like(y)},
    )
    parts = split_examples(rows, arrays, SPLITS, "vehicle", where)
    return parts, Block("frame", tuple(frames.shape[1:]))


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
