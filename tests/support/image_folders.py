"""Folders, tables and arrays of small images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

CLASSES = ("blue", "green", "red")


def colored_image(rng: np.random.Generator, label: int, side: int) -> np.ndarray:
    """Return a noisy image, uint8 `[side, side, 3]`, whose dominant channel shows its class."""
    pixels = rng.integers(0, 130, (side, side, 3), dtype=np.uint8)
    pixels[..., 2 - label] += 100
    return pixels


def make_image_folder(path: Path, rows: int, side: int = 8, suffix: str = "png") -> Path:
    """Write a folder of color images in three class folders, and return its path."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (path / name).mkdir(parents=True)
    for row in range(rows):
        label = row % len(CLASSES)
        image = Image.fromarray(colored_image(rng, label, side))
        # PNG compresses little and fast, JPEG ignores it.
        image.save(path / CLASSES[label] / f"{row:06d}.{suffix}", compress_level=1)
    return path


def make_arrays(rows: int, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Return color images, uint8 `[rows, side, side, 3]`, and labels, int64 `[rows]`."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % len(CLASSES)
    return np.stack([colored_image(rng, int(label), side) for label in labels]), labels


def write_image_table(path: Path, rows: int = 24, suffix: str = "csv") -> Path:
    """Write color images of two sites and a table that names them, and return the table."""
    rng = np.random.default_rng(0)
    lines = []
    for row in range(rows):
        label = row % len(CLASSES)
        site = ("north", "south")[row // 2 % 2]
        (path / site).mkdir(parents=True, exist_ok=True)
        Image.fromarray(colored_image(rng, label, 8)).save(path / site / f"{row:02}.png")
        lines.append(
            {
                "file": f"{site}/{row:02}.png",
                "site": site,
                "number": f"{row:02}",
                "y": CLASSES[label],
                "patient": f"p{row // 3}",
                "day": f"2024-01-{1 + row:02}",
                "fold": ("train", "val", "test")[max(0, row - rows + 3)],
                "age": 20.5 + row,
                "pulse": 60 + row,
            }
        )
    frame = pd.DataFrame(lines)
    table = path / f"rows.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(table)
    else:
        frame.to_csv(table, sep="\t" if suffix == "tsv" else ",", index=False)
    return table
