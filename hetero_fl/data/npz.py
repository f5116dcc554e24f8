"""Local .npz files in the MedMNIST layout: `{train,val,test}_images` and `{train,val,test}_labels`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor

from hetero_fl.data.base import Dataset, Examples, check_examples, places
from hetero_fl.errors import UserError, beside, nearest
from hetero_fl.images import COLOURS, MOST_CHANNELS, as_bytes, as_numbers, channels_first, in_range
from hetero_fl.task import Task

SPLITS = {"train": "train", "validation": "val", "test": "test"}
"""Our name of a split: its name in the file."""
PATIENT = "patient"
TABLES = (".csv", ".tsv", ".parquet")
"""Files that the source `table` reads."""


def read_npz(
    path: Path, name: str, task: Task | None = None, kind: str | None = None, patient: str | None = None
) -> Dataset:
    """Read a file whose images are `(N, H, W)`, `(N, H, W, C)` or plainly `(N, C, H, W)`, in 0..1 or 0..255, and whose
    labels are `(N,)`, `(N, 1)` or `(N, L)`.

    Whole-number labels in one column are classes, several columns of 0 and 1 are multilabel, fractions are regression
    targets. Floats `(N, F)` in place of images are the rows of a table. `train` is required, the others are optional.

    Args:
        name: the data set's name.
        task: what is learned, if known: the file then has to hold images. Else it is read off the labels, classes being
            numbered from 0.
        kind: multiclass, multilabel or regression in place of what the labels look like.
        patient: the array that says of whom each training row is; none: "patient", if there is one.

    Raises:
        UserError: what is wrong, with the file, the array and the row.
    """
    where = f"path: {path}"
    wanted = [f"{split}_{part}" for split in SPLITS.values() for part in ("images", "labels")] + [patient or PATIENT]
    arrays, names = _read(path, wanted, where)
    raw = {ours: _pair(arrays, theirs, where) for ours, theirs in SPLITS.items() if f"{theirs}_images" in arrays}
    if "train" not in raw:
        raise UserError(f"{where}: no array 'train_images'; found {', '.join(names) or 'no arrays'}")
    known = task is not None
    task = task or _task([y for _, y in raw.values()], where, kind)
    notes = () if known or kind is not None else _doubts([y for _, y in raw.values()], task, f"{where}: train_labels")
    read = _images({f"{where}: {SPLITS[s]}_images": x for s, (x, _) in raw.items()}, table=not known)
    splits = {}
    for (split, (x, y)), pixels in zip(raw.items(), read, strict=True):
        images, labels = f"{SPLITS[split]}_images", f"{SPLITS[split]}_labels"
        splits[split] = Examples(pixels, _targets(y, task, f"{where}: {labels}"))
        check_examples(splits[split], task, where, (images, labels))
        if splits[split].x.shape[1:] != splits["train"].x.shape[1:]:
            raise UserError(f"{where}: {images}: shape {x.shape}, but train_images has {raw['train'][0].shape}")
    if (found := arrays.get(patient or PATIENT)) is not None:
        if found.shape not in ((len(raw["train"][0]),), (len(raw["train"][0]), 1)):
            wanted_shape = (len(raw["train"][0]),)
            raise UserError(
                f"{where}: {patient or PATIENT}: found shape {found.shape}; want {wanted_shape}, as train_images"
            )
        column, patients = places(found.reshape(-1).tolist())
        splits["train"] = replace(splits["train"], patient=column, patient_names=patients)
    elif patient is not None:
        raise UserError(f"patient: {path} has no array '{patient}'{nearest(patient, names)}")
    about = f"local file {path.name}"
    return Dataset(name, task, splits["train"], splits.get("validation"), splits.get("test"), about=about, notes=notes)


def read_images(path: Path) -> Tensor:
    """The training images of such a file alone; its labels, if it has any, are not even read."""
    where = f"path: {path}"
    arrays, names = _read(path, ["train_images"], where)
    if not arrays:
        raise UserError(f"{where}: no array 'train_images'; found {', '.join(names) or 'no arrays'}")
    if arrays["train_images"].shape[:1] in ((), (0,)):
        raise UserError(f"{where}: train_images: found no rows")
    return _images({f"{where}: train_images": arrays["train_images"]}, table=True)[0]


def _read(path: Path, wanted: list[str], where: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The wanted arrays as far as they are there, and the names of all arrays. Nothing else is unpacked."""
    if not path.is_file():
        raise UserError(f"{where}: no such file{beside(path)}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in wanted if name in archive.files}, list(archive.files)
    except Exception as error:  # a damaged file makes zipfile, zlib and numpy raise a dozen kinds of errors
        raise UserError(f"{where}: not a readable .npz file{unreadable(path, error)}") from error


def unreadable(path: Path, error: Exception) -> str:
    """Why a file is no .npz; numpy's own words would advise to unpickle whatever it is."""
    if not is_zipfile(path):
        return ": it is no whole archive of arrays, as numpy.savez writes it"
    if "pickle" in str(error):
        return ": it has an array of Python objects; save numbers"
    return f" ({type(error).__name__}: {error})"


def _pair(arrays: dict[str, np.ndarray], split: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = f"{split}_images", f"{split}_labels"
    if labels not in arrays:
        raise UserError(f"{where}: no array '{labels}' beside '{images}'")
    x, y = arrays[images], arrays[labels]
    if y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise UserError(f"{where}: {labels}: found shape {y.shape}; want (N,), (N, 1) or (N, L)")
    if x.ndim == 0 or len(x) != len(y):
        raise UserError(f"{where}: {images} has {len(x) if x.ndim else 0} rows, {labels} has {len(y)}")
    if y.dtype.kind not in "buif":
        raise UserError(f"{where}: {labels}: found {y.dtype}; labels are numbers")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        row = np.argwhere(~np.isfinite(y))[0][0]
        raise UserError(f"{where}: {labels}: NaN or infinity in row {row}")
    return x, y[:, None] if y.ndim == 1 else y


def _task(labels: list[np.ndarray], where: str, kind: str | None) -> Task:
    """What is learned, read off the labels of all splits, unless the kind is known."""
    widths = {y.shape[1] for y in labels}
    if len(widths) > 1:
        raise UserError(f"{where}: labels: found {sorted(widths)} columns; want as many in every split")
    y = np.concatenate(labels)
    if len(y) == 0:
        raise UserError(f"{where}: train_images: found no rows")
    if kind is None and y.dtype.kind == "f" and (y != np.floor(y)).any():
        kind = "regression"
    if kind == "regression":
        return Task("regression", y.shape[1])
    if kind == "multilabel" or (kind is None and y.shape[1] > 1):
        return Task("multilabel", y.shape[1])
    values = np.unique(y)
    # A stray 255 in a file of two classes would make 256 classes of it: more than half of the numbers must occur.
    if values[0] >= 0 and int(values[-1]) + 1 > 2 * len(values):
        raise UserError(
            f"{where}: labels: label {int(values[-1])} is out of range, as only {len(values)} different ones occur; "
            "number the classes from 0"
        )
    return Task("multiclass", int(max(values[-1], 0)) + 1)


def _doubts(labels: list[np.ndarray], task: Task, where: str) -> tuple[str, ...]:
    """Return a line if the labels of all splits could mean something else."""
    y = np.concatenate(labels)
    if task.kind == "multiclass" and (absent := sorted(set(range(task.outputs)) - set(y[:, 0].astype(int).tolist()))):
        listed = ", ".join(map(str, absent))
        return (f"{where}: {task.outputs} classes, numbered from 0, of which {listed} do not occur",)
    if task.kind == "multilabel" and bool((y.sum(1) == 1).all()):
        remedy = "if they are classes, save one column of class numbers"
        return (f"{where}: every row has exactly one 1: read as multilabel; {remedy}",)
    return ()


def _targets(y: np.ndarray, task: Task, where: str) -> Tensor:
    if task.kind != "multiclass":
        return torch.from_numpy(y.astype(np.float32))
    if y.shape[1] != 1:
        raise UserError(f"{where}: found {y.shape[1]} columns of labels; this set has one")
    if (fractions := y[:, 0] != np.floor(y[:, 0])).any():
        row = int(fractions.argmax())
        raise UserError(f"{where}: label {y[row, 0]:g} in row {row} is not a class number")
    return torch.from_numpy(y[:, 0].astype(np.int64))


def _images(raw: Mapping[str, np.ndarray], table: bool) -> list[Tensor]:
    """`[N, C, H, W]` in uint8 or float32; if a table will do as well, also `[N, F]` in float32. By name in messages."""
    read = {}
    for where, x in raw.items():
        if x.dtype.kind not in "buif":
            raise UserError(f"{where}: found {x.dtype}; images are uint8 or floats")
        images = as_numbers(x, where)
        images = as_bytes(images, where) if x.ndim > 2 else images.float()
        if x.ndim == 3:
            images = images[:, None]
        elif x.ndim == 4 and (x.shape[-1] <= MOST_CHANNELS or x.shape[1] in COLOURS):
            images = channels_first(images, where, documented="last")
        elif x.ndim != 2 or not table:
            raise UserError(f"{where}: found shape {x.shape}; want (N, H, W) or (N, H, W, C)")
        read[where] = images.float() if images.is_floating_point() else images
    pictures, _ = in_range({where: x for where, x in read.items() if x.ndim == 4})
    return list((read | pictures).values())
