"""Label columns of many types, and the ways to pass them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, from_arrays, load_source
from hetero_fl.data.sources.objects import to_dataset
from hetero_fl.utils.text import Caution

ROWS = 120
X = np.random.default_rng(0).random((ROWS, 3), dtype=np.float32)
VALUES: dict[str, list[int]] = {
    "from 0": [0, 1, 2],
    "from 1": [1, 2, 3],
    "gap": [0, 2],
    "two": [0, 1],
    "signs": [-1, 1],
    "ratings": [1, 2, 3, 4, 5],
    "tens": [10, 20, 30],
    "thirty": list(range(30)),
    "sixty": list(range(0, 180, 3)),
}
TYPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "integers": lambda y: y,
    "floats": lambda y: y.astype(float),
    "numerals": lambda y: y.astype(str),
    "words": lambda y: np.array([f"class {value}" for value in y]),
}
BOOLEANS = {"False": "0", "True": "1"}


def label_columns() -> dict[str, np.ndarray]:
    """Return labels `[N]` or `[N, L]` of many types, values, orders and with missing entries."""
    found: dict[str, np.ndarray] = {}
    for kind, convert in TYPES.items():
        for name, values in VALUES.items():
            found[f"{kind} {name}"] = convert(np.resize(values, ROWS))
            if name in ("from 1", "gap", "thirty"):
                found[f"{kind} {name}, reversed"] = convert(np.resize(values[::-1], ROWS))
        missing = convert(np.resize([1, 2, 3], ROWS)).astype(object)
        missing[7] = None
        found[f"{kind} with a gap"] = missing
    rng = np.random.default_rng(1)
    found["booleans"] = np.resize([True, False], ROWS)
    booleans: Any = [True, False, True, None]
    found["booleans with a gap"] = np.resize(np.array(booleans, dtype=object), ROWS)
    found["fractions"] = rng.random(ROWS)
    found["halves"] = np.resize([0.5, 1.0, 1.5], ROWS)
    found["infinite"] = np.where(np.arange(ROWS) == 3, np.inf, rng.random(ROWS))
    found["one value"] = np.ones(ROWS)
    for dtype in (int, float, bool):
        found[f"one-hot {dtype.__name__}"] = np.eye(3, dtype=dtype)[np.resize([2, 0, 1], ROWS)]
        found[f"indicators {dtype.__name__}"] = (rng.random((ROWS, 3)) > 0.5).astype(dtype)
    found["two numbers"] = rng.random((ROWS, 2))
    return found


def frame_of(y: np.ndarray) -> tuple[pd.DataFrame, str]:
    """Return a table and its label columns."""
    frame = pd.DataFrame(X, columns=list("abc"))
    columns = y.reshape(ROWS, -1)
    names = [f"y{index}" for index in range(columns.shape[1])]
    for name, column in zip(names, columns.T, strict=True):
        frame[name] = column
    return frame, ",".join(names)


def read_file(folder: Path, name: str, write: Callable[[str], Any], **keys: Any) -> Dataset:
    path = str(folder / name)
    write(path)
    source = "npz" if name.endswith(".npz") else "table"
    return load_source(SourceConfig(name=source, path=path, **keys), folder)


def read_csv(folder: Path, y: np.ndarray) -> Dataset:
    frame, label = frame_of(y)
    return read_file(folder, "t.csv", lambda path: frame.to_csv(path, index=False), label=label)


def read_parquet(folder: Path, y: np.ndarray) -> Dataset:
    frame, label = frame_of(y)
    return read_file(folder, "t.parquet", frame.to_parquet, label=label)


def read_npz(folder: Path, y: np.ndarray) -> Dataset:
    return read_file(folder, "t.npz", lambda path: np.savez(path, train_images=X, train_labels=y))


def read_frame(_folder: Path, y: np.ndarray) -> Dataset:
    frame, label = frame_of(y)
    return to_dataset(frame, "data", label)


def read_hub(_folder: Path, y: np.ndarray) -> Dataset:
    datasets = pytest.importorskip("datasets")
    frame, label = frame_of(y)
    return to_dataset(datasets.Dataset.from_pandas(frame, preserve_index=False), "data", label)


def read_images(folder: Path, y: np.ndarray) -> Dataset:
    """Read a folder of images, whose rows are put back in the order of the labels."""
    for row, label in enumerate(y):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(np.full((2, 2), row, np.uint8)).save(folder / str(label) / f"{row}.png")
    dataset = load_source(SourceConfig(name="image_folder", path=str(folder)), folder)
    order = torch.as_tensor(dataset.train.x)[:, 0, 0, 0].long().argsort()
    dataset.train = dataset.train.select_rows(order)
    return dataset


def read_image_table(folder: Path, y: np.ndarray) -> Dataset:
    """Read a table that names an image for each label."""
    frame, label = frame_of(y)
    frame["file"] = [f"{row}.png" for row in range(ROWS)]
    frame.to_csv(folder / "images.csv", index=False)
    for row, file in enumerate(frame["file"]):
        Image.fromarray(np.full((2, 2), row, np.uint8)).save(folder / file)
    keys = {"name": "image_table", "path": str(folder / "images.csv"), "file": "{file}"}
    return load_source(SourceConfig.model_validate({**keys, "label": label}), folder)


WAYS: dict[str, Callable[[Path, np.ndarray], Dataset]] = {
    "arrays": lambda _folder, y: from_arrays(X, y),
    "tensors": lambda _folder, y: to_dataset((torch.tensor(X), torch.tensor(y)), "data"),
    "data frame": read_frame,
    "CSV": read_csv,
    "Parquet": read_parquet,
    ".npz": read_npz,
    "Hugging Face": read_hub,
    "image folder": read_images,
    "image table": read_image_table,
}


def applies(way: str, y: np.ndarray) -> bool:
    """Return whether labels can be passed in a way."""
    if way == "tensors":
        return y.dtype.kind in "bif"
    if way == "image folder":
        # Folders have the names of classes, and the values of a few integers or words.
        return y.ndim == 1 and y.dtype.kind in "iUb" and len(np.unique(y)) <= 30
    return True


def outcome(dataset: Dataset) -> tuple[str, list[Any]]:
    """Return the kind of the task, and the label of each row: a class by its name, or numbers."""
    task = dataset.task
    y = dataset.train.labels
    if task.kind != "multiclass":
        return task.kind, y.tolist()
    # Columns of one-hot rows have names in tables.
    names = [BOOLEANS.get(name, name.removeprefix("y")) for name in task.output_names]
    return task.kind, [sorted(names), [names[number] for number in y.tolist()]]


def read_one(
    read: Callable[[Path, np.ndarray], Dataset], folder: Path, y: np.ndarray
) -> tuple[Any, list[str]]:
    """Return the outcome or the error message, and the cautions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = read(folder, y)
        except ValueError as error:
            return str(error), []
    return outcome(dataset), [note for note in dataset.notes if isinstance(note, Caution)]
