"""Folders of small images and arrays for tests of images that are read in batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hetero_fl.core.stored_rows import StoredRows, read_all
from hetero_fl.data import Dataset, make_images

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


class TensorReader:
    """Reader of the rows of a tensor, as if they were in files."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.shape = tuple(x.shape[1:])
        self.dtype = x.dtype

    def __len__(self) -> int:
        return len(self.x)

    def read(self, rows: np.ndarray) -> Tensor:
        return self.x[torch.from_numpy(rows)]


def stored_dataset() -> Dataset:
    """Return a small data set whose training images are read in batches."""
    dataset = make_images(400, 60)
    train = replace(dataset.train, x=StoredRows(TensorReader(read_all(dataset.train.x))))
    return replace(dataset, train=train)
