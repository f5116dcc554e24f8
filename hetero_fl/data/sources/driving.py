"""Steering angles from camera frames of drives, which are simulated unless a file is given.

A row has three blocks: the frame of a camera, the speed and the position of the vehicle.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import DrivingConfig, SourceConfig
from hetero_fl.core.images import as_numbers, to_floats
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames
from hetero_fl.data.dataset import Block, Dataset, Examples, PatientTerm
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import EMBEDDED
from hetero_fl.data.sources.npz_files import NAMES, ArraySpec, read_arrays
from hetero_fl.data.table import Table, build, convert_images
from hetero_fl.utils.errors import UserError, check_names

TASK = Task("regression", 1, ("steering angle",), "degrees")
STATE = (Block("speed", (1,)), Block("position", (2,)))
STRETCH = 50
"""Number of consecutive frames that are never divided between splits or clients."""
SEQUENCES = PatientTerm(
    "sequence", f"data.name=driving keeps sequences of {STRETCH} frames together"
)
DRIVING = EMBEDDED / "driving.npz"
"""Simulated drives."""
PUBLIC = "public"
"""Split of the rows of a proxy set."""
SPLITS = ("train", "validation", "test", PUBLIC)
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
    drives = read_drives(path, settings)
    own = _split_drives(drives.train, settings)
    return replace(
        drives,
        name="driving",
        source="driving",
        train=own["train"],
        validation=drives.validation or own["validation"],
        test=drives.test or own["test"],
        about=f"frames of {path.name}, {len(drives.train.group_names)} vehicles for training",
        local_sets={"validation": own["validation"], "test": own["test"]},
    )


@register_source("driving_public", keys=("driving",), default_path=DRIVING)
def driving_public(config: SourceConfig, _root: Path) -> Dataset:
    """Read simulated frames of other vehicles on other roads, without speeds and positions."""
    settings = config.driving or DrivingConfig()
    drives = read_drives(Path(str(config.path)), settings, public=True)
    rows = drives.train
    frame = drives.blocks[0]
    rows.x = rows.x[:, : frame.size]
    # Rows of the file have a speed and a position.
    rows.row = None
    about = f"{len(rows):,} public frames"
    return Dataset("driving_public", TASK, rows, about=about, blocks=(frame,))


def read_drives(path: Path, settings: DrivingConfig, *, public: bool = False) -> Dataset:
    """Read the drives of a `.npz` file.

    The file has the arrays `frame`, uint8 or floats from 0 to 1 `[N, 3, H, W]` or `[N, H, W, 3]`,
    `speed` `[N]` in m/s, `position` `[N, 2]`, latitude and longitude in degrees, `angle` `[N]` of
    the front wheels in degrees, positive to the left, `vehicle` `[N]` and `split` `[N]`, with the
    values of `SPLITS`. The frames of a vehicle are in the order of time. NaN stands for a speed or
    position that was not recorded.

    Args:
        path: File to read.
        settings: Driving settings.
        public: Whether to read the rows of the split `public`, as training rows without groups,
            instead of those of the other splits.

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
    x = torch.cat([to_floats(frames, None).flatten(1), torch.from_numpy(state).float()], 1)
    split = arrays["split"].astype(str)
    check_names(np.unique(split).tolist(), SPLITS, f"{where}: split: unknown value")
    chosen = (split == PUBLIC) == public
    if not chosen.any():
        raise UserError(
            f"{where}: split: expected rows of '{PUBLIC if public else SPLITS[0]}', got none"
        )
    table = Table(
        x[torch.from_numpy(chosen)],
        arrays["angle"][chosen] / settings.scale,
        "train" if public else split[chosen],
        where,
        ExampleNames("frame", "angle", in_config=True),
        group=None if public else arrays["vehicle"][chosen],
        unit=np.full(chosen.sum(), settings.scale),
    )
    frame = Block("frame", tuple(frames.shape[1:]))
    dataset = build([table], TASK, where, blocks=(frame, *STATE))
    places = torch.from_numpy(np.flatnonzero(chosen))
    for part in dataset.splits().values():
        part.row = places[part.row]
        part.baselines = {"straight": torch.zeros_like(part.labels)}
    return dataset


def _split_drives(drives: Examples, settings: DrivingConfig) -> dict[str, Examples]:
    """Split each drive by time.

    Neighboring frames are similar, so a random split would put nearly equal frames into training
    and test. `settings.gap` frames are left out between two splits.

    Args:
        drives: Rows of all drives. Those of a vehicle (group) are in the order of time.
        settings: Driving settings.

    Returns:
        Rows of all vehicles, keyed by "train", "validation" and "test".
    """
    assert drives.group is not None
    rows: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    stretches: list[Tensor] = []
    first_stretch = 0
    for index, name in enumerate(drives.group_names):
        frames = (drives.group == index).nonzero().squeeze(1)
        count = len(frames)
        test = count - round(settings.test * count)
        validation = test - round(settings.validation * count)
        ranges = {
            "train": range(validation - settings.gap),
            "validation": range(validation, test - settings.gap),
            "test": range(test, count),
        }
        for part, chosen in ranges.items():
            if not chosen:
                raise UserError(
                    f"driving.gap: leaves no frames for {part} of vehicle '{name}', which has "
                    f"{count} frames, got {settings.gap}; choose a smaller gap"
                )
            rows[part].append(frames[chosen.start : chosen.stop])
        # Other partitions than `natural` divide stretches of frames instead of single frames.
        stretches.append(first_stretch + torch.arange(len(ranges["train"])) // STRETCH)
        first_stretch = int(stretches[-1][-1]) + 1
    parts = {part: drives.select_rows(torch.cat(chosen)) for part, chosen in rows.items()}
    parts["train"].patient = torch.cat(stretches)
    parts["train"].patient_term = SEQUENCES
    return parts
