"""Generated sets, for tests and trials without data. They say so: `simulated` is true.

*Images*: each class has a pattern, a smooth random surface (a 4x4 grid of standard normals, scaled up bilinearly); an
image is grey 0.5 + 0.12 · (its class's pattern + noise · standard normals), cut to 0..1, as uint8.

*Tables*: x is standard normal; a matrix A with standard normal entries, divided by √columns, gives scores
s = A x + noise · standard normals; the target is argmax s (multiclass), s > 0 (multilabel) or s itself (regression).

In both, a row belongs to one of four groups at random, and the test set is made as the training set is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.source import SourceConfig
from hetero_fl.data.base import Dataset, Examples
from hetero_fl.data.registry import source
from hetero_fl.seeding import generator
from hetero_fl.task import Task

GROUPS = tuple(f"site_{i}" for i in range(1, 5))


@source("synthetic_images")
def synthetic_images(config: SourceConfig, root: Path) -> Dataset:
    """1,200 training and 400 test images, 16x16 grey, 4 classes."""
    return make_images()


@source("synthetic_table")
def synthetic_table(config: SourceConfig, root: Path) -> Dataset:
    """1,200 training and 400 test rows of 10 columns, 3 classes."""
    return make_table()


def make_images(
    rows: int = 1200, test_rows: int = 400, *, classes: int = 4, channels: int = 1, side: int = 16, noise: float = 1.0,
    seed: int = 0,
) -> Dataset:  # fmt: skip
    """Generated images: uint8 `[rows, channels, side, side]`."""
    draws = generator("data", "synthetic_images", seed)
    grid = torch.randn(classes, channels, 4, 4, generator=draws)
    pattern = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=True)

    def make(n: int) -> Examples:
        y = torch.randint(classes, (n,), generator=draws)
        grey = 0.5 + 0.12 * (pattern[y] + noise * torch.randn(n, channels, side, side, generator=draws))
        return Examples((grey.clamp(0, 1) * 255).round().to(torch.uint8), y, _groups(n, draws), GROUPS)

    about = "generated: class patterns under noise"
    train, test = make(rows), make(test_rows)
    return Dataset("synthetic_images", Task("multiclass", classes), train, test=test, simulated=True, about=about)


def make_table(
    rows: int = 1200, test_rows: int = 400, *, kind: Literal["multiclass", "multilabel", "regression"] = "multiclass",
    columns: int = 10, outputs: int = 3, noise: float = 0.3, seed: int = 0,
) -> Dataset:  # fmt: skip
    """A generated table: float32 `[rows, columns]`."""
    draws = generator("data", "synthetic_table", seed)
    matrix = torch.randn(columns, outputs, generator=draws) / columns**0.5

    def make(n: int) -> Examples:
        x = torch.randn(n, columns, generator=draws)
        scores = x @ matrix + noise * torch.randn(n, outputs, generator=draws)
        y: Tensor = {"multiclass": scores.argmax(1), "multilabel": (scores > 0).float(), "regression": scores}[kind]
        return Examples(x, y, _groups(n, draws), GROUPS)

    names = tuple(f"x{i + 1}" for i in range(columns))
    about = "generated: a linear rule under noise"
    train, test = make(rows), make(test_rows)
    return Dataset("synthetic_table", Task(kind, outputs), train, test=test, simulated=True, about=about, columns=names)


def _groups(n: int, draws: torch.Generator) -> Tensor:
    return torch.randint(len(GROUPS), (n,), generator=draws)
