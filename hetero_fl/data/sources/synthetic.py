"""Generated images and tables, and X-rays with simulated gene profiles.

All data sets are marked as `simulated`, and are meant for tests and experiments without real data.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Block, Dataset, Examples
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import EMBEDDED
from hetero_fl.data.sources.images import CHEST_XRAY, chest_xray
from hetero_fl.data.sources.npz_files import read_columns
from hetero_fl.utils.seeding import keyed_generator

GROUPS = tuple(f"site_{i}" for i in range(1, 5))


@register_source("synthetic_images")
def synthetic_images(_config: SourceConfig, _root: Path) -> Dataset:
    """Generate 1,200 training and 400 test images (16x16 grayscale) of 4 classes."""
    return make_images()


@register_source("synthetic_table")
def synthetic_table(_config: SourceConfig, _root: Path) -> Dataset:
    """Generate 1,200 training and 400 test rows with 10 columns and 3 classes."""
    return make_table()


def make_images(
    rows: int = 1200,
    test_rows: int = 400,
    *,
    classes: int = 4,
    channels: int = 1,
    side: int = 16,
    noise: float = 1.0,
    seed: int = 0,
) -> Dataset:
    """Generate images of random patterns with noise.

    The pattern of a class is a 4x4 grid of standard normal numbers, upsampled bilinearly. Pixels
    are `0.5 + 0.12 * (pattern + noise * normal)`, clipped to 0..1 and converted to uint8. Each
    image belongs to one of four groups at random.

    Args:
        rows: Number of training images.
        test_rows: Number of test images.
        classes: Number of classes.
        channels: Number of channels.
        side: Height and width in pixels.
        noise: Standard deviation of the noise.
        seed: Random seed.

    Example:
        >>> from hetero_fl.data import make_images
        >>> make_images(rows=100, test_rows=20, classes=3, side=8)
        Dataset('synthetic_images': multiclass with 3 outputs, x uint8 [1, 8, 8]; \
rows: train 100, test 20, simulated)
    """
    generator = keyed_generator("data", "synthetic_images", seed)
    grid = torch.randn(classes, channels, 4, 4, generator=generator)
    pattern = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=True)

    def make(n: int) -> Examples:
        y = torch.randint(classes, (n,), generator=generator)
        normal = torch.randn(n, channels, side, side, generator=generator)
        pixels = 0.5 + 0.12 * (pattern[y] + noise * normal)
        x = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
        return Examples(x, y, _sample_groups(n, generator), GROUPS)

    about = "generated: class patterns under noise"
    train = make(rows)
    test = make(test_rows)
    return Dataset(
        "synthetic_images",
        Task("multiclass", classes),
        train,
        test=test,
        simulated=True,
        about=about,
    )


def make_table(
    rows: int = 1200,
    test_rows: int = 400,
    *,
    kind: Literal["multiclass", "multilabel", "regression"] = "multiclass",
    columns: int = 10,
    outputs: int = 3,
    noise: float = 0.3,
    seed: int = 0,
) -> Dataset:
    """Generate a table whose targets depend linearly on the features.

    Features x are standard normal. Scores are `x A / sqrt(columns) + noise * normal`, where A has
    standard normal entries. Targets are the argmax of the scores (multiclass), scores > 0
    (multilabel) or the scores (regression). Each row belongs to one of four groups at random.

    Args:
        rows: Number of training rows.
        test_rows: Number of test rows.
        kind: Kind of task.
        columns: Number of features.
        outputs: Number of outputs.
        noise: Standard deviation of the noise.
        seed: Random seed.

    Example:
        >>> from hetero_fl.data import make_table
        >>> dataset = make_table(rows=100, test_rows=20, kind="regression", columns=5, outputs=1)
        >>> dataset.train
        Examples(100 rows: x float32 [5], y float32 [1], group int64)
    """
    generator = keyed_generator("data", "synthetic_table", seed)
    matrix = torch.randn(columns, outputs, generator=generator) / columns**0.5

    def make(n: int) -> Examples:
        x = torch.randn(n, columns, generator=generator)
        scores = x @ matrix + noise * torch.randn(n, outputs, generator=generator)
        y: Tensor = {
            "multiclass": scores.argmax(1),
            "multilabel": (scores > 0).float(),
            "regression": scores,
        }[kind]
        return Examples(x, y, _sample_groups(n, generator), GROUPS)

    names = tuple(f"x{i + 1}" for i in range(columns))
    about = "generated: a linear rule under noise"
    train = make(rows)
    test = make(test_rows)
    return Dataset(
        "synthetic_table",
        Task(kind, outputs),
        train,
        test=test,
        simulated=True,
        about=about,
        columns=names,
    )


def _sample_groups(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(len(GROUPS), (n,), generator=generator)


BLOCKS = (Block("image", (1, 28, 28)), Block("genes", (60,)))


@register_source("xray_genes", task=CHEST_XRAY)
def xray_genes(config: SourceConfig, root: Path) -> Dataset:
    """Load the X-rays of `chest_xray` with simulated gene profiles, at seven hospitals (groups).

    Images and labels are real. Universities have images of all patients and gene profiles of 70% of
    the patients. Clinics have images only, and institutes have gene profiles only. Validation and
    test patients have an image and a gene profile from another laboratory.
    """
    images = chest_xray(config, root)
    genes = read_columns(
        EMBEDDED / "xray_genes.npz", "xray_genes", group="hospital", task=CHEST_XRAY
    )
    for split, part in genes.splits().items():
        pixels = images.splits()[split].x.flatten(1).float() / 255
        part.x = torch.cat([pixels, part.x], 1)
    train = genes.train
    assert train.group is not None
    names = torch.tensor([name.startswith("institute") for name in train.group_names])
    train.x[names[train.group], : BLOCKS[0].size] = torch.nan
    return replace(
        genes,
        simulated=True,
        about=f"{images.about}; gene profiles are simulated",
        blocks=BLOCKS,
    )
