"""Sets that need no network: the embedded chest X-rays, scikit-learn's digits, and local .npz files."""

from __future__ import annotations

from contextlib import suppress
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from hetero_fl.config.source import SourceConfig
from hetero_fl.data.base import Dataset, Examples
from hetero_fl.data.npz import read_npz
from hetero_fl.data.registry import source
from hetero_fl.task import Task

CHEST_XRAY = Task("multiclass", 2, ("normal", "pneumonia"))
DIGITS = Task("multiclass", 10)


@source("chest_xray", task=CHEST_XRAY)
def chest_xray(config: SourceConfig, root: Path) -> Dataset:
    """Paediatric chest X-rays, 28x28 grey, normal or pneumonia: 2,000 for training, 200 for validation, 624 for test.

    A part of PneumoniaMNIST (MedMNIST v2, Yang et al., Scientific Data 2023; Kermany et al., Cell 2018), CC BY 4.0.
    """
    with as_file(files("hetero_fl.data") / "embedded" / "chest_xray.npz") as path:
        dataset = read_npz(path, "chest_xray", CHEST_XRAY)
    dataset.about = "chest X-rays, a part of PneumoniaMNIST (MedMNIST v2; Kermany et al., Cell 2018), CC BY 4.0"
    return dataset


@source("digits", task=DIGITS)
def digits(config: SourceConfig, root: Path) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey (the test set of UCI's "Optical Recognition"); no splits."""
    table = _digits()
    x = torch.from_numpy(np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    return Dataset("digits", DIGITS, Examples(x, y), about="handwritten digits, 8x8 grey (scikit-learn, UCI)")


@source("npz", keys=("path", "task", "patient"))
def npz(config: SourceConfig, root: Path) -> Dataset:
    """Any local file in the MedMNIST layout; the task is read off its labels."""
    return read_npz(Path(str(config.path)).expanduser(), "npz", kind=config.task, patient=config.patient)


def _digits() -> np.ndarray:
    """Pixels 0..16 row by row, then the class, `(1797, 65)`: scikit-learn's file, without the two seconds that importing
    scikit-learn takes."""
    library = find_spec("sklearn")
    if library is not None and library.origin is not None:
        with suppress(OSError):  # a version that keeps it elsewhere
            return np.loadtxt(Path(library.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])
