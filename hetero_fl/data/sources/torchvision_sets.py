"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 as torchvision downloads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.source import SourceConfig
from hetero_fl.data.base import Dataset, Examples
from hetero_fl.data.registry import source
from hetero_fl.data.sources.download import downloading
from hetero_fl.task import Task

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# name: torchvision's class, the task, what it is
SETS = {
    "mnist": ("MNIST", Task("multiclass", 10), "handwritten digits, 28x28 grey (LeCun et al., 1998)"),
    "fashion_mnist": ("FashionMNIST", Task("multiclass", 10, FASHION), "clothes, 28x28 grey (Xiao et al., 2017)"),
    "cifar10": ("CIFAR10", Task("multiclass", 10, CIFAR10), "photographs, 32x32 RGB (Krizhevsky, 2009)"),
    "cifar100": ("CIFAR100", Task("multiclass", 100), "photographs, 32x32 RGB (Krizhevsky, 2009)"),
}


def _loader(name: str, class_name: str, task: Task, about: str) -> Callable[[SourceConfig, Path], Dataset]:
    def load(config: SourceConfig, root: Path) -> Dataset:
        import torchvision

        with downloading(name, root) as folder:
            make = getattr(torchvision.datasets, class_name)
            train, test = (_examples(make(folder, train=part, download=True)) for part in (True, False))
        return Dataset(name, task, train, test=test, about=about)

    return load


def _examples(dataset: Any) -> Examples:
    """From torchvision's arrays: `(N, H, W)` tensors (MNIST) or `(N, H, W, C)` numpy arrays (CIFAR)."""
    x: Tensor = torch.as_tensor(dataset.data)
    x = x[:, None] if x.ndim == 3 else x.movedim(-1, 1)
    return Examples(x.contiguous(), torch.as_tensor(dataset.targets, dtype=torch.int64))


for _name, (_class_name, _task, _about) in SETS.items():
    source(_name, task=_task)(_loader(_name, _class_name, _task, _about))
