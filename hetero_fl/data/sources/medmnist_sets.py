"""The twelve 2-D sets of MedMNIST v2 (Yang et al., Scientific Data 2023), fetched by the `medmnist` package.

ChestMNIST is multilabel (14 findings); RetinaMNIST's five grades are taken as classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hetero_fl.config.source import SourceConfig
from hetero_fl.data.base import Dataset
from hetero_fl.data.npz import read_npz
from hetero_fl.data.registry import source
from hetero_fl.data.sources.download import downloading
from hetero_fl.errors import UserError
from hetero_fl.task import Task

# Outputs of each set. Known here too, so that a local file in its place is checked without the package.
OUTPUTS = {
    "pathmnist": 9, "chestmnist": 14, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2, "retinamnist": 5,
    "breastmnist": 2, "bloodmnist": 8, "tissuemnist": 8, "organamnist": 11, "organcmnist": 11, "organsmnist": 11,
}  # fmt: skip


def _loader(name: str, task: Task) -> Callable[[SourceConfig, Path], Dataset]:
    def load(config: SourceConfig, root: Path) -> Dataset:
        info, package = _package(name)
        with downloading(name, root) as folder:
            getattr(package, info["python_class"])(split="train", download=True, root=str(folder))
        names = tuple(info["label"][str(i)] for i in range(task.outputs))
        dataset = read_npz(root / f"{name}.npz", name, replace(task, names=names))
        dataset.about = f"{info['python_class']} (MedMNIST v2), {info['license']}"
        return dataset

    return load


def _package(name: str) -> tuple[dict[str, Any], Any]:
    try:
        import medmnist
    except ImportError as error:
        raise UserError(
            f"name: {name} is fetched by the medmnist package, which is not there; pip install 'hetero_fl[medmnist]', "
            "or give a local file in data.path"
        ) from error
    return medmnist.INFO[name], medmnist


for _name, _outputs in OUTPUTS.items():
    _task = Task("multilabel" if _name == "chestmnist" else "multiclass", _outputs)
    source(_name, task=_task)(_loader(_name, _task))
