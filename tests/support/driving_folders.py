"""Folders of drives in the layouts of the Udacity challenge 2 and of the Udacity simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

EXPORT_HEADER = "index,timestamp,width,height,frame_id,filename,angle,torque,speed,lat,long,alt"
SIMULATOR_HEADER = "center,left,right,steering,throttle,brake,speed"


def write_frame(
    path: Path, angle: float, size: tuple[int, int] = (32, 24), mode: str = "RGB"
) -> None:
    """Write a frame whose bright half is on the side of the angle.

    Args:
        path: File to write.
        angle: Steering angle, positive to the left.
        size: Width and height in pixels.
        mode: Pillow mode of the image.
    """
    width, height = size
    pixels = np.full((height, width, 3), 60, np.uint8)
    pixels[:, : width // 2] += np.uint8(np.clip(60 + 200 * angle, 0, 150))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def write_export(
    folder: Path,
    frames: int = 40,
    size: tuple[int, int] = (32, 24),
    seed: int = 0,
    mode: str = "RGB",
) -> Path:
    """Write a drive as `interpolated.csv`, with a frame of a side camera after each frame."""
    draws = np.random.default_rng(seed)
    lines = [EXPORT_HEADER]
    for index in range(frames):
        time = 1_479_424_215_877_284_179 + 50_000_000 * index
        angle = draws.uniform(-0.5, 0.5)
        speed = draws.uniform(5, 15)
        position = f"{37.4 + 1e-4 * index:.6f},{-122.1:.6f},10.0"
        write_frame(folder / "center" / f"{time}.png", angle, size, mode)
        numbers = f"{angle:.6f},0.1,{speed:.6f},{position}"
        for camera in ("center", "left"):
            frame = f"{size[0]},{size[1]},{camera}_camera,{camera}/{time}.png"
            lines.append(f"{2 * index},{time},{frame},{numbers}")
    (folder / "interpolated.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_simulator(
    folder: Path,
    frames: int = 40,
    *,
    header: bool = False,
    size: tuple[int, int] = (40, 20),
    recorded_in: str = "C:\\Users\\me\\data\\IMG\\",
) -> Path:
    """Write a drive as `driving_log.csv` with the paths of the machine that recorded it."""
    draws = np.random.default_rng(1)
    lines = [SIMULATOR_HEADER] if header else []
    for index in range(frames):
        name = f"center_2016_12_01_13_30_{index // 10:02d}_{index % 10}00.jpg"
        steering = draws.uniform(-0.4, 0.4)
        write_frame(folder / "IMG" / name, -steering, size)
        cameras = [recorded_in + name.replace("center", c) for c in ("center", "left", "right")]
        numbers = f"{steering:.6f}, 0.5, 0, {draws.uniform(5, 30):.4f}"
        lines.append(", ".join([*cameras, numbers]))
    (folder / "driving_log.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_driving_folder(
    folder: Path, exports: Mapping[str, int] | None = None, simulators: Sequence[str] = ("sim",)
) -> Path:
    """Write a folder of vehicles.

    Args:
        folder: Folder to write.
        exports: Number of frames of each vehicle with `interpolated.csv`. Default: 40 of `car` and
            `truck`.
        simulators: Vehicles with `driving_log.csv`.
    """
    counts = {"car": 40, "truck": 40} if exports is None else exports
    for seed, (name, frames) in enumerate(counts.items()):
        write_export(folder / name, frames, seed=seed)
    for name in simulators:
        write_simulator(folder / name)
    return folder
