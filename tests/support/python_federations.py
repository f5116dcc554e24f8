"""Data, models and comparisons for tests of federations from Python objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import hetero_fl as hfl

QUIET = [
    "runtime.executor=serial",
    "runtime.threads=1",
    # They take longer than the rounds of a test.
    "output.plots=false",
    "output.report=false",
]


def images(rows: int, seed: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    x = rng.random((rows, 8, 8)) * 80 + y[:, None, None] * 60
    return x.astype(np.uint8), y


def rows(
    count: int, seed: int = 0, *, classes: int = 2, width: int = 4, gap: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of a table, whose classes differ by a gap in each column, and the classes."""
    y = np.arange(count) % classes
    x = np.random.default_rng(seed).normal(size=(count, width)) + gap * y[:, None]
    return x.astype(np.float32), y


def tensors(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = images(rows, seed)
    return torch.from_numpy(x)[:, None], torch.from_numpy(y)


def table(rows: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % 2
    return pd.DataFrame({"age": rng.normal(size=rows) + y, "dose": rng.random(rows), "ill": y})


class Net(nn.Module):
    """A network in the style of the PyTorch tutorials."""

    def __init__(self, width: int = 4, num_classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.out = nn.Linear(36 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).relu().flatten(1))  # type: ignore[no-any-return]


class Computing(nn.Module):
    """A module whose outputs a function computes from its layer and the inputs."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.compute = compute

    def forward(self, *inputs: Tensor) -> Any:
        return self.compute(self.out, *inputs)


class Digits(nn.Module):
    """A class that a configuration can name."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]


DIGITS = f"python:{__name__}:Digits"


def without_seconds(run: hfl.Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in run.metrics]


def same_models(first: hfl.Run, second: hfl.Run) -> bool:
    return set(first.models) == set(second.models) and all(
        torch.equal(tensor, second.models[client].tensors[name])
        for client, model in first.models.items()
        for name, tensor in model.tensors.items()
    )
