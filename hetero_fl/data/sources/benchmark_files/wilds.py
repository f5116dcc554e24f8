"""Folders of WILDS (Koh et al., ICML 2021): hospitals of Camelyon17, cameras of iWildCam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames
from hetero_fl.data.dataset import Dataset, Examples, index_names
from hetero_fl.data.labels import read_labels
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.benchmark_files.client_sets import MAX_CLASSES
from hetero_fl.data.sources.files import check_folder
from hetero_fl.data.sources.image_files import read_image_files
from hetero_fl.utils.errors import UserError, check_names, one_line, suggest_or_list
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.serialization import check_name
from hetero_fl.utils.text import format_list

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "val", "test", "id_val", "id_test")
"""Splits of WILDS. Those whose names start with `id_` have the same sites as `train`."""
OTHER_SITES = ("val", "test")
"""Splits whose sites have no training rows."""
TUMOR = Task("multiclass", 2, ("normal", "tumor"))
VALIDATION_CENTER = "1"
TEST_CENTER = "2"


@dataclass(frozen=True)
class WildsRows:
    """The rows of a WILDS folder, in the order of its metadata.

    Attributes:
        files: Image of each row, relative to the folder.
        labels: Class of each row, int64 `[N]`.
        splits: Name of the split of each row.
        group: Name of the site of each row.
        patient: Name of the patient of each row. If None, the rows do not identify patients.
        metadata: All columns of `metadata.csv` as arrays `[N]`, keyed by name.
    """

    files: Sequence[str]
    labels: Tensor
    splits: Sequence[str]
    group: Sequence[str]
    patient: Sequence[str] | None
    metadata: Mapping[str, np.ndarray]


@register_source(
    "camelyon17",
    keys=("path", "group", "patient", "size", "stream", "splits"),
    folder_files=("patches/patient_*",),
)
def camelyon17(config: SourceConfig, _root: Path) -> Dataset:
    """Load the folder of Camelyon17-WILDS, whose groups are the hospitals (`center`).

    With the official splits, the hospitals 0, 3 and 4 are the groups, 1 is the global validation
    set and 2 the global test set. The split `id_val` is the validation set of the groups. Further
    rows are held out by patient (column `patient`).
    """
    path = Path(str(config.path)).expanduser()
    place = ("patient", "node", "x_coord", "y_coord")
    group = config.group or "center"
    owner = config.patient or "patient"
    frame, columns = _read_metadata(path, (*place, "tumor", "center", "split", group, owner))
    files = [
        f"patches/patient_{patient}_node_{node}/patch_patient_{patient}_node_{node}_x_{x}_y_{y}.png"
        for patient, node, x, y in zip(*(columns[name] for name in place), strict=True)
    ]
    of_center = {VALIDATION_CENTER: "val", TEST_CENTER: "test"}
    of_number = {"0": "train", "1": "id_val"}
    where = f"path: {path / 'metadata.csv'}"
    _check_splits(columns["split"], (*of_number, *SPLITS), tuple(of_number), where)
    found = natural_order(set(columns["center"]))
    if config.splits != "pooled" and not {VALIDATION_CENTER, TEST_CENTER} <= set(found):
        raise UserError(
            f"{where}: column 'center': expected the hospitals {VALIDATION_CENTER} (validation) "
            f"and {TEST_CENTER} (test), got {format_list(map(one_line, found), 10, quote=True)}; "
            "set data.splits=pooled to use all rows"
        )
    splits = [
        of_center.get(center) or of_number.get(number, number)
        for center, number in zip(columns["center"], columns["split"], strict=True)
    ]
    labels = _labels(columns["tumor"], path / "metadata.csv", "tumor")
    rows = WildsRows(files, labels, splits, columns[group], columns[owner], _metadata_arrays(frame))
    return _make_dataset("camelyon17", TUMOR, rows, path, config)


@register_source(
    "iwildcam",
    keys=("path", "group", "patient", "size", "stream", "splits"),
    folder_files=("metadata.csv",),
)
def iwildcam(config: SourceConfig, _root: Path) -> Dataset:
    """Load the folder of iWildCam-WILDS, whose groups are the cameras.

    The column `location_remapped` or, if it does not exist, `location` identifies the cameras. With
    the official splits, the cameras of `train` are the groups, with `id_val` and `id_test` as their
    validation and test sets. Other cameras are the global validation (`val`) and test set (`test`).
    The classes have the names of `categories.csv`, if this file exists.
    """
    path = Path(str(config.path)).expanduser()
    group = config.group or "location_remapped"
    owner = () if config.patient is None else (config.patient,)
    fallback = {} if config.group else {"location_remapped": "location"}
    frame, columns = _read_metadata(path, ("filename", "y", "split", group, *owner), fallback)
    _check_splits(columns["split"], SPLITS, SPLITS, f"path: {path / 'metadata.csv'}")
    files = [f"train/{name}" for name in columns["filename"]]
    labels = _labels(columns["y"], path / "metadata.csv", "y")
    patient = None if config.patient is None else columns[config.patient]
    metadata = _metadata_arrays(frame)
    names = _read_class_names(path / "categories.csv")
    task = Task("multiclass", len(names) or MAX_CLASSES, names)
    _check_range(labels, task, path)
    notes: list[str] = []
    if not names:
        place = f"path: {path / 'metadata.csv'}: column 'y'"
        configured = ExampleNames(first_row=1, in_config=True)
        task, found, notes = read_labels(
            {place: labels}, place, task="multiclass", names=configured
        )
        labels = found[place]
    rows = WildsRows(files, labels, columns["split"], columns[group], patient, metadata)
    return replace(_make_dataset("iwildcam", task, rows, path, config), notes=tuple(notes))


def _read_class_names(file: Path) -> tuple[str, ...]:
    """Read the names of the classes from the columns `y` and `name` of `categories.csv`.

    Categories without images have the number 99999 and are left out.

    Returns:
        The names in the order of the class numbers, or no names if there is no such file.

    Raises:
        UserError: If the file cannot be read, the classes are not numbered from 0 without gaps, or
            two classes have the same name.
    """
    if not file.exists():
        return ()
    _, columns = _read_columns(file, ("y", "name"))
    numbers = _labels(columns["y"], file, "y").tolist()
    names: dict[int, str] = {}
    for row, (y, name) in enumerate(zip(numbers, columns["name"], strict=True)):
        if y >= MAX_CLASSES:
            continue
        if y in names or name in names.values():
            found = f"class {y}" if y in names else f"name '{one_line(name)}'"
            raise UserError(f"path: {file}: row {row + 1}: {found} occurs twice; remove one row")
        names[y] = name
    for y in range(max(2, len(names))):
        if y not in names:
            raise UserError(f"path: {file}: column 'y': class {y} not found")
    return tuple(names[y] for y in range(len(names)))


def _read_metadata(
    path: Path, names: Sequence[str], fallback: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Read `metadata.csv` and columns of it in a folder as text (see `_read_columns`)."""
    check_folder(path)
    return _read_columns(path / "metadata.csv", names, fallback)


def _read_columns(
    file: Path, names: Sequence[str], fallback: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Read a `.csv` file and columns of it as text.

    Args:
        file: The file.
        names: Names of the columns.
        fallback: Columns to read instead of columns that do not exist, keyed by the latter.

    Returns:
        The table, and the values of each column, keyed by the entries of `names`.

    Raises:
        UserError: If the file cannot be read, a column is missing or a cell is empty.
    """
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.table_columns import parse_names
    from hetero_fl.data.sources.table_files import read_frame

    other = fallback or {}
    frame = read_frame(file, (*names, *other.values()))
    present = {name: name if name in frame else other.get(name, name) for name in names}
    check_names(present.values(), frame.columns, f"path: {file}: column", " not found")
    if len(frame) == 0:
        raise UserError(f"path: {file}: has no rows")
    columns = {
        name: parse_names(frame[column], f"path: {file}").tolist()
        for name, column in present.items()
    }
    return frame, columns


def _metadata_arrays(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the columns of a table as arrays, keyed by name."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.table_columns import metadata_array

    return {name: metadata_array(frame[name]) for name in frame.columns}


def _labels(values: Sequence[str], file: Path, column: str) -> Tensor:
    """Convert a column of class numbers to int64."""
    for row, value in enumerate(values):
        if not value.isascii() or not value.isdigit():
            raise UserError(
                f"path: {file}: row {row + 1}, column '{column}': expected a "
                f"class number >= 0, got '{one_line(value)}'"
            )
    return torch.tensor([_class_number(value) for value in values], dtype=torch.int64)


def _class_number(digits: str) -> int:
    """Return a class number, at most `MAX_CLASSES`."""
    # Python does not convert more than 4,300 digits.
    if len(digits.lstrip("0")) > len(str(MAX_CLASSES)):
        return MAX_CLASSES
    return min(int(digits), MAX_CLASSES)


def _check_splits(
    values: Sequence[str], known: Sequence[str], listed: Sequence[str], where: str
) -> None:
    """Check a column of splits.

    Args:
        values: Split of each row.
        known: Valid values.
        listed: Values to list in the error message.
        where: Name of the file in the error message.

    Raises:
        UserError: If a value is not valid.
    """
    for row, value in enumerate(values):
        if value not in known:
            raise UserError(
                f"{where}: row {row + 1}, column 'split': unknown split '{one_line(value)}'"
                f"{suggest_or_list(value, listed)}"
            )


def _check_range(labels: Tensor, task: Task, path: Path) -> None:
    """Raise UserError if a label is not a class number of the task."""
    row = int(labels.argmax())
    if int(labels[row]) >= task.outputs:
        raise UserError(
            f"path: {path / 'metadata.csv'}: row {row + 1}: label {int(labels[row])} is out of "
            f"range 0 to {task.outputs - 1}"
        )


def _make_dataset(
    name: str, task: Task, rows: WildsRows, path: Path, config: SourceConfig
) -> Dataset:
    """Read the images and return the data set, with official splits unless they are pooled.

    Raises:
        UserError: If a split is unknown, a label is out of range, there are no training rows, or an
            image cannot be read.
    """
    where = f"path: {path / 'metadata.csv'}"
    _check_range(rows.labels, task, path)
    selected = _rows_of_splits(rows.splits, config.splits == "pooled", where)
    files = [path / rows.files[row] for chosen in selected.values() for row in chosen.tolist()]
    for row, file in enumerate([] if config.follow_links else rows.files):
        check_name(file, f"{where}: row {row + 1}")
    images = read_image_files(files, config.size, config.stream)
    group, group_names = index_names(rows.group)
    patient, patient_names = (None, ()) if rows.patient is None else index_names(rows.patient)
    parts: dict[str, Examples] = {}
    begin = 0
    for split, chosen in selected.items():
        x = images[begin : begin + len(chosen)]
        begin += len(chosen)
        metadata = {name: values[chosen.numpy()] for name, values in rows.metadata.items()}
        part = Examples(x, rows.labels[chosen], group[chosen], group_names, metadata=metadata)
        if patient is not None:
            part = replace(part, patient=patient[chosen], patient_names=patient_names)
        # The sites of the common sets are not clients.
        parts[split] = (
            part if split not in OTHER_SITES else replace(part, group=None, group_names=())
        )
    local = {"validation": parts.get("id_val"), "test": parts.get("id_test")}
    return Dataset(
        name,
        task,
        parts["train"],
        parts.get("val"),
        parts.get("test"),
        about=f"images of {path.name}",
        local_sets={key: part for key, part in local.items() if part is not None},
    )


def _rows_of_splits(splits: Sequence[str], pooled: bool, where: str) -> dict[str, Tensor]:
    """Return the rows of each split that occurs, int64, keyed by split."""
    selected: dict[str, list[int]] = {split: [] for split in SPLITS}
    for row, split in enumerate(splits):
        selected["train" if pooled else split].append(row)
    if not selected["train"]:
        raise UserError(
            f"{where}: no row belongs to the split 'train'; set data.splits=pooled to use all rows"
        )
    return {split: torch.tensor(rows) for split, rows in selected.items() if rows}
