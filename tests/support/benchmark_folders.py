"""Small folders in the layouts of PFLlib and HtFLlib, LEAF and WILDS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAMELYON_HEADER = ",patient,node,x_coord,y_coord,tumor,slide,center,split"
# Letters of the generated texts.
TEXT = "ROMEO: but soft, what light through yonder window breaks?\nIt is the east. " * 4


def write_client_file(path: Path, **rows: Any) -> Path:
    """Write the rows of a client like `save_file` of PFLlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, data=rows)
    return path


def write_client_folder(path: Path, clients: int = 3, rows: int = 24) -> Path:
    """Write a folder of PFLlib or HtFLlib with normalized images, whose class is their level.

    Client K has `rows` + K training rows and 8 + K test rows.
    """
    draws = np.random.default_rng(0)
    for client in range(clients):
        for split, count in (("train", rows + client), ("test", 8 + client)):
            y = draws.integers(0, 2, count)
            x = draws.normal(y[:, None, None, None] - 0.5, 0.2, (count, 1, 12, 12))
            write_client_file(path / split / f"{client}.npz", x=x.astype(np.float32), y=y)
    config = {"num_clients": clients, "num_classes": 2, "non_iid": True, "partition": "dir"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_leaf_file(path: Path, users: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]) -> Path:
    """Write a file of LEAF.

    Args:
        path: File to write.
        users: Inputs x and targets y of each user.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "users": list(users),
        "num_samples": [len(x) for x, _ in users.values()],
        "user_data": {user: {"x": list(x), "y": list(y)} for user, (x, y) in users.items()},
    }
    path.write_text(json.dumps(content))
    return path


def write_femnist(path: Path, users: int = 3, rows: int = 24) -> Path:
    """Write a folder of FEMNIST with two files of training rows, whose labels are 0 and 61."""
    draws = np.random.default_rng(0)
    for split, count, files in (("train", rows, (0, 1)), ("test", 8, (0,))):
        for number in files:
            content = {}
            for user in range(users):
                if user % len(files) == number:
                    y = draws.integers(0, 2, count)
                    x = (y[:, None] * 0.5 + draws.random((count, 784)) / 2).round(3)
                    content[f"f{user:04}_14"] = (x.tolist(), (y * 61).tolist())
            write_leaf_file(path / split / f"all_data_{number}_{split}_9.json", content)
    return path


def write_shakespeare(path: Path, users: int = 2, rows: int = 24) -> Path:
    """Write a folder of Shakespeare, whose texts have 80 characters."""
    for split, start, count in (("train", 0, rows), ("test", rows, 8)):
        content = {}
        for user in range(users):
            places = [start + user + row for row in range(count)]
            content[f"PLAY_ACT_{user}"] = (
                [TEXT[place : place + 80] for place in places],
                [TEXT[place + 80] for place in places],
            )
        write_leaf_file(path / split / "all_data_niid_0.json", content)
    return path


def write_camelyon17(path: Path, patches: int = 3) -> Path:
    """Write a folder of Camelyon17-WILDS with five hospitals of four patients each.

    Each patient has `patches` patches of each of the splits 0 and 1 of the metadata.
    """
    draws = np.random.default_rng(0)
    lines = [CAMELYON_HEADER]
    for patient in range(20):
        folder = path / "patches" / f"patient_{patient:03}_node_{patient % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        for patch in range(2 * patches):
            tumor = patch % 2
            pixels = draws.integers(0, 100, (12, 12, 3)) + 120 * tumor
            name = f"patch_patient_{patient:03}_node_{patient % 3}_x_{patch}_y_{32 * patch}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            lines.append(
                f"{len(lines) - 1},{patient:03},{patient % 3},{patch},{32 * patch},{tumor},"
                f"{patient},{patient // 4},{int(patch >= patches)}"
            )
    (path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return path


def write_iwildcam(path: Path, rows: int = 24) -> Path:
    """Write a folder of iWildCam-WILDS: three cameras with `rows` training rows, two others."""
    draws = np.random.default_rng(0)
    lines = ["split,location,location_remapped,y,filename"]
    (path / "train").mkdir(parents=True, exist_ok=True)
    of_camera = {camera: {"train": rows, "id_val": 3, "id_test": 4} for camera in range(3)}
    for camera, splits in {**of_camera, 3: {"val": 8}, 4: {"test": 12}}.items():
        for split, count in splits.items():
            for _ in range(count):
                y = int(draws.integers(0, 3))
                name = f"{len(lines):04}.jpg"
                size = (12 + camera, 13)
                Image.new("RGB", size, (80 * y, 10, 200 - 80 * y)).save(path / "train" / name)
                lines.append(f"{split},{100 + camera},{camera},{y},{name}")
    (path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return path
