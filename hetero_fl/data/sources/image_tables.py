"""Images that a table names: any table, and folders of WILDS."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames, first_true
from hetero_fl.data.dataset import Block, Dataset, Examples
from hetero_fl.data.labels import read_labels
from hetero_fl.data.registry import Key, register_source
from hetero_fl.data.sources.files import check_folder
from hetero_fl.data.sources.image_files import read_image_files
from hetero_fl.data.sources.multimodal import choose_block_range, join_blocks
from hetero_fl.utils.arrays import index_names
from hetero_fl.utils.errors import UserError, one_line, suggest_or_list
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.serialization import allowed_root, check_name
from hetero_fl.utils.text import format_list

if TYPE_CHECKING:
    import pandas as pd

IMAGE_SPLITS = ("train", "validation", "test", "local_validation", "local_test")
"""Splits of the rows of a table. The last two are those of the groups of the first."""
IMAGE = "image"
"""Name of the block of images."""
NAMES = ExampleNames(first_row=1, in_config=True)
WILDS_KEYS: tuple[Key, ...] = ("path", "group", "patient", "size", "stream", "splits")
WILDS_SPLITS = {
    "train": "train",
    "val": "validation",
    "test": "test",
    "id_val": "local_validation",
    "id_test": "local_test",
}
"""Splits of WILDS (Koh et al., ICML 2021). Those of `id_` have the same sites as `train`."""
HOSPITAL_SPLITS = {
    "center": {"1": "validation", "2": "test"},
    "split": {"0": "train", "1": "local_validation", **WILDS_SPLITS},
}
TUMOR = Task("multiclass", 2, ("normal", "tumor"))
CAMERAS = ("location", "location_remapped")
"""Columns of the cameras of iWildCam, of which the last one that exists is used."""
UNUSED_CATEGORY = 99999
"""Number of the categories of iWildCam without images."""


@register_source(
    "image_table",
    keys=(
        *("path", "file", "label", "group", "patient", "time", "span", "blocks"),
        *("splits", "task", "read", "size", "stream"),
    ),
)
def image_table(config: SourceConfig, root: Path) -> Dataset:
    """Load the images that a CSV, TSV or Parquet file names (see `read_image_table`)."""
    return read_image_table(config, root, "image_table")


@register_source("camelyon17", keys=WILDS_KEYS, folder_files=("patches/patient_*",))
def camelyon17(config: SourceConfig, root: Path) -> Dataset:
    """Load the folder of Camelyon17-WILDS, whose groups are the hospitals (`center`).

    With the official splits, the hospitals 0, 3 and 4 are the groups, 1 is the global validation
    set and 2 the global test set. The split `id_val` is the validation set of the groups. Further
    rows are held out by patient (column `patient`).
    """
    return _read_wilds(
        config,
        root,
        TUMOR,
        file="patches/patient_{patient}_node_{node}/"
        "patch_patient_{patient}_node_{node}_x_{x_coord}_y_{y_coord}.png",
        label="tumor",
        group=config.group or "center",
        patient=config.patient or "patient",
        splits=HOSPITAL_SPLITS,
    )


@register_source("iwildcam", keys=WILDS_KEYS, folder_files=("metadata.csv",))
def iwildcam(config: SourceConfig, root: Path) -> Dataset:
    """Load the folder of iWildCam-WILDS, whose groups are the cameras.

    The column `location_remapped` or, if it does not exist, `location` identifies the cameras. With
    the official splits, the cameras of `train` are the groups, with `id_val` and `id_test` as their
    validation and test sets. Other cameras are the global validation (`val`) and test set (`test`).
    The classes have the names of `categories.csv`, if this file exists.
    """
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.columns import read_frame

    folder = Path(str(config.path)).expanduser()
    check_folder(folder)
    columns = read_frame(folder / "metadata.csv").columns
    names = _read_categories(folder / "categories.csv")
    return _read_wilds(
        config,
        root,
        Task("multiclass", len(names), names) if names else None,
        file="train/{filename}",
        label="y",
        group=config.group or max(columns.intersection(CAMERAS), default=CAMERAS[0]),
        splits={"split": WILDS_SPLITS},
        task="multiclass",
    )


def _read_wilds(config: SourceConfig, root: Path, known: Task | None, **table: Any) -> Dataset:
    """Read the table in a folder of WILDS, without splits if they are pooled.

    Args:
        config: Source configuration.
        root: Folder for decoded images.
        known: Task of the labels. If None, it is inferred.
        **table: Keys of the source `image_table`.
    """
    folder = Path(str(config.path)).expanduser()
    check_folder(folder)
    table["path"] = str(folder / "metadata.csv")
    if config.splits == "pooled":
        table["splits"] = None
    return read_image_table(config.model_copy(update=table), root, config.name, known)


def _read_categories(file: Path) -> tuple[str, ...]:
    """Read the names of classes from the columns `y` and `name`, or no names without a file."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.columns import (
        check_columns,
        parse_names,
        parse_numbers,
        read_frame,
    )

    if not file.exists():
        return ()
    where = f"path: {file}"
    frame = read_frame(file, ("name",))
    check_columns(frame, [("path", "y"), ("path", "name")], file)
    frame["name"] = parse_names(frame["name"], where)
    frame["y"] = parse_numbers(frame["y"], where)
    used = frame[frame["y"] != UNUSED_CATEGORY].sort_values("y")
    if used["y"].tolist() != list(range(max(2, len(used)))) or used["name"].duplicated().any():
        raise UserError(
            f"{where}: columns 'y' and 'name': expected the classes from 0 and a name of each, once"
        )
    return tuple(used["name"])


def read_image_table(
    config: SourceConfig, root: Path, name: str, task: Task | None = None
) -> Dataset:
    """Read a table with one row per image.

    `config.file` is the column with the image file, relative to the folder of the table, or a
    pattern with columns in braces. The columns of `config.blocks` become further blocks of numbers.
    If there are any, a row without a file is a row without an image. `config.splits` has the split
    of each row: train, validation, test, local_validation or local_test, keyed by column and value.
    The first column that has an entry for a row decides. Rows without an entry are training rows,
    unless a value of the last column stands for training. The last two splits are those of the
    groups of the training rows.

    Args:
        config: Source configuration.
        root: Folder for decoded images.
        name: Name of the data set.
        task: Task whose class numbers are in the label column. If None, the task is inferred.

    Raises:
        UserError: If a column, cell or image is missing or malformed. Rows in messages count from 1
            below the header.
    """
    path = Path(str(config.path)).expanduser()
    where = f"path: {path}"
    pattern = _pattern(config)
    frame, names = _read_frame(config, path, pattern[1::2])
    files = _image_names(names, pattern, len(frame))
    if not config.follow_links:
        _check_inside(files, path.parent, where)
    rows, task, notes = _read_rows(frame, names, config, where, task or config.task)
    splits = _rows_of_splits(names, config, len(frame), where)
    # The images of a split are consecutive, so that they can stay in their file.
    order = torch.cat(list(splits.values()))
    named = [row for row in order.tolist() if files[row]]
    if not named:
        raise UserError(f"{where}: column '{pattern[1]}': no row names an image")
    x = read_image_files(
        [path.parent / files[row] for row in named], config.size, root if config.stream else None
    )
    layout: dict[str, Any] = {}
    if config.blocks:
        image_of = torch.full((len(frame),), -1)
        image_of[named] = torch.arange(len(named))
        numbers, gap = _numbers(frame, config.blocks, where)
        if not gap and (row := first_true(image_of < 0)) is not None:
            gap = f"{where}: row {row + 1}: no image"
        pixels = choose_block_range(x, getattr(config, "range", None), "set data.range")
        notes = [*notes, *pixels.notes]
        layout = {
            "blocks": (
                Block(IMAGE, tuple(x.shape[1:])),
                *(Block(title, (len(columns),)) for title, columns in config.blocks.items()),
            ),
            "pixel_range": pixels.value,
            "first_missing": gap,
        }
        x = join_blocks(x, image_of[order], numbers[order], pixels.value)
    parts: dict[str, Examples] = {}
    begin = 0
    for split, chosen in splits.items():
        part = rows.select_rows(chosen)
        part.x = x[begin : begin + len(chosen)]
        begin += len(chosen)
        # The sites of the common sets are not clients.
        is_common = split in ("validation", "test")
        parts[split] = replace(part, group=None, group_names=()) if is_common else part
    local = {split.removeprefix("local_"): parts[split] for split in parts if "local_" in split}
    return Dataset(
        name,
        task,
        parts["train"],
        parts.get("validation"),
        parts.get("test"),
        about=f"images of {path.parent.name}",
        notes=tuple(notes),
        local_sets=local,
        span=config.span or 0,
        **layout,
    )


def _pattern(config: SourceConfig) -> list[str]:
    """Return text and columns of the pattern of file names in turn, with text at both ends."""
    for key in ("file", "label", *(("time",) if config.span is not None else ())):
        if getattr(config, key) is None:
            raise UserError(f"{key}: missing; name a column of the table")
    file = str(config.file)
    pattern = re.split(r"\{([^{}]+)\}", file)
    return pattern if len(pattern) > 1 else ["", file, ""]


def _read_frame(
    config: SourceConfig, path: Path, file: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, pd.Series]]:
    """Read a table, and check the names of its columns.

    Args:
        config: Source configuration.
        path: The table.
        file: Columns of the names of files.

    Returns:
        The table, and the columns of files, splits, groups and patients as text, keyed by name. If
        there are other blocks, those of files lack the rows without a value.
    """
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.columns import (
        check_columns,
        normalize_frame,
        parse_names,
        read_frame,
    )
    from hetero_fl.data.sources.tables.frames import label_columns

    where = f"path: {path}"
    others = list(filter(None, (*_splits(config), config.group, config.patient)))
    frame = normalize_frame(read_frame(path, (*file, *others), (), config.read), where)
    blocks = (config.blocks or {}).values()
    named = {
        "file": file,
        "label": label_columns(frame.columns, str(config.label)),
        "splits": _splits(config),
        "blocks": [column for columns in blocks for column in columns],
        "group": [config.group],
        "patient": [config.patient],
        "time": [config.time],
    }
    check_columns(frame, [(key, name) for key, names in named.items() for name in names], path)
    if leaked := {*named["blocks"]} & {*named["label"]}:
        raise UserError(f"blocks: column '{leaked.pop()}' is the label; remove it")
    if len(frame) == 0:
        raise UserError(f"{where}: has no rows")
    named_rows = frame.dropna(subset=list(file)) if config.blocks else frame
    names = {column: parse_names(named_rows[column], where) for column in file}
    return frame, names | {column: parse_names(frame[column], where) for column in others}


def _splits(config: SourceConfig) -> Mapping[str, Mapping[str, str]]:
    return config.splits if isinstance(config.splits, Mapping) else {}


def _image_names(names: Mapping[str, pd.Series], pattern: Sequence[str], rows: int) -> list[str]:
    """Return the image file of each row, which is empty for a row without an image."""
    found = pattern[0] + names[pattern[1]] + pattern[2]
    for column, text in zip(pattern[3::2], pattern[4::2], strict=True):
        found = found + names[column] + text
    files: list[str] = found.reindex(range(rows), fill_value="").tolist()
    return files


def _check_inside(files: Sequence[str], folder: Path, where: str) -> None:
    """Raise UserError if a file is not in a folder."""
    root = allowed_root(folder)
    for row, file in enumerate(files):
        if not file:
            continue
        check_name(file, f"{where}: row {row + 1}")
        target = os.path.realpath(folder / file)
        if not Path(target).is_relative_to(root):
            raise UserError(
                f"path: {folder / file}: leads out to {target}; set data.follow_links=true to read "
                "it"
            )


def _read_rows(
    frame: pd.DataFrame,
    names: Mapping[str, pd.Series],
    config: SourceConfig,
    where: str,
    task: Task | str | None,
) -> tuple[Examples, Task, list[str]]:
    """Return all columns of the rows but x, the task, and notes on the labels."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.columns import metadata_array
    from hetero_fl.data.sources.tables.frames import label_columns, label_values

    labels = label_columns(frame.columns, str(config.label))
    kind = task.kind if isinstance(task, Task) else task
    found, targets, notes = read_labels(
        {where: label_values(frame[labels], where, kind)},
        f"{where}: label {', '.join(labels)}",
        task=task,
        names=NAMES,
    )
    y = targets[where]
    if isinstance(task, Task):
        if (row := first_true((y < 0) | (y >= task.outputs))) is not None:
            raise UserError(
                f"{where}: row {row + 1}: label {int(y[row])} is out of range 0 to "
                f"{task.outputs - 1}"
            )
        found = task
    elif found.kind != "multiclass":
        found = replace(found, names=tuple(labels))
    rows = Examples(
        torch.empty(len(frame), 0),
        y,
        metadata={name: metadata_array(frame[name]) for name in frame.columns},
        row=torch.arange(1, len(frame) + 1),
        files=(where,),
    )
    if config.group is not None:
        rows.group, rows.group_names = index_names(names[config.group])
    if config.patient is not None:
        rows.patient, rows.patient_names = index_names(names[config.patient])
    if config.time is not None:
        rows.time = _times(frame[config.time], where)
    return rows, found, notes


def _times(column: pd.Series, where: str) -> Tensor:
    """Return numbers, rounded down, or dates in seconds since 1970, int64 `[N]`."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.columns import parse_numbers, require_no_missing
    from hetero_fl.data.sources.tables.recordings import read_dates

    require_no_missing(column, where)
    values = parse_numbers(column, where)
    if values is None:
        values = read_dates(column, None, where).to_numpy("datetime64[s]").astype(np.int64)
    return torch.from_numpy(np.floor(values).astype(np.int64))


def _rows_of_splits(
    names: Mapping[str, pd.Series], config: SourceConfig, count: int, where: str
) -> dict[str, Tensor]:
    """Return the rows of each split that occurs, int64, keyed by split.

    Raises:
        UserError: If a value of the configuration does not occur, a value of the last column is
            unknown and the others include training, or there are no training rows.
    """
    found: list[str | None] = [None] * count
    for column, split_of in _splits(config).items():
        values = names[column].tolist()
        is_complete = "train" in split_of.values()
        for value in () if is_complete else split_of:
            if value not in values:
                known = natural_order(set(values))
                listed = format_list(map(one_line, known), 10, quote=True)
                raise UserError(
                    f"{where}: column '{column}': expected the value '{value}' of data.splits, got "
                    f"{listed}; set data.splits=pooled to use all rows for training"
                )
        for row, value in enumerate(values):
            found[row] = found[row] or split_of.get(value)
            if found[row] is None and is_complete:
                raise UserError(
                    f"{where}: row {row + 1}, column '{column}': unknown split '{one_line(value)}'"
                    f"{suggest_or_list(value, split_of)}"
                )
    rows: dict[str, list[int]] = {split: [] for split in IMAGE_SPLITS}
    for row, split in enumerate(found):
        rows[split or "train"].append(row)
    if not rows["train"]:
        raise UserError(
            f"{where}: no row belongs to the split 'train'; set data.splits=pooled to use all rows"
        )
    return {split: torch.tensor(chosen) for split, chosen in rows.items() if chosen}


def _numbers(
    frame: pd.DataFrame, blocks: Mapping[str, Sequence[str]], where: str
) -> tuple[Tensor, str]:
    """Return the columns of blocks, float32 `[N, F]`, and the place of the first missing value."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.recordings import read_numbers

    gaps: list[str] = []
    found = []
    for column in (column for columns in blocks.values() for column in columns):
        values = read_numbers(frame[column], where, gaps).astype(np.float32)
        found.append(torch.from_numpy(values))
    return torch.stack(found, 1), gaps[0] if gaps else ""
