"""Join images and a table by patient into a data set with two blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hetero_fl.config.data import DataConfig
from hetero_fl.core.images import to_floats
from hetero_fl.core.stored_rows import require_tensor
from hetero_fl.core.task import Task
from hetero_fl.data.arrays import from_arrays
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.dataset import Block, Dataset, Examples, index_names
from hetero_fl.data.pixels import choose_range
from hetero_fl.utils.errors import UserError, suggest_similar
from hetero_fl.utils.text import format_list

if TYPE_CHECKING:
    import pandas as pd


def join_images_and_table(
    images: Any,
    y: Any,
    patient: Any,
    table: Any,
    *,
    by: str = "patient",
    columns: list[str] | None = None,
    label: str | None = None,
    group: Any = None,
    table_group: str | None = None,
    blocks: tuple[str, str] = ("image", "table"),
    pixel_range: float | None = None,
    name: str = "joined",
    simulated: bool = False,
    about: str = "",
) -> Dataset:
    """Join images and the rows of a table that belong to the same patients.

    The pixels of patients without an image, and the columns of patients who are not in the table,
    are NaN. Clients that use these values need `preprocess.missing: indicate`. The blocks of a
    client are selected by `preprocess.columns`.

    Args:
        images: Images `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`, see `from_arrays`. A patient
            may have several images.
        y: Class numbers of the images, `[N]`.
        patient: Patient of each image, `[N]` numbers or strings. The rows of a patient are never
            divided between splits or clients.
        table: A file (`.csv`, `.tsv`, `.parquet`) or pandas data frame with one row per patient.
            Empty cells are missing values.
        by: Column of the table that identifies the patient.
        columns: Columns of the table for the second block. If None, all numeric columns are used.
        label: Column of the table with class numbers. If set, patients without an image also become
            examples. If None, a patient without an image is an error.
        group: Group of each image, for example a hospital, for the natural partition, `[N]`. If
            None, the rows have no groups.
        table_group: Column of the table with the group of patients without an image. Required if
            there are such patients and `group` is set.
        blocks: Names of the image block and the table block.
        pixel_range: Value of integer pixels that becomes 1, which must be equal for all data sets
            of a federation. If None, it follows from the largest pixel, as for `data.range`.
        name: Name of the data set.
        simulated: Whether the data is simulated.
        about: Short description.

    Returns:
        A data set with two blocks. Each image is a row, and the rows of patients without an image
        follow.

    Raises:
        UserError: If a patient has no image and no label, a patient occurs twice in the table or
            has no id, a column is missing or not numeric, no patient of the table has an image, or
            `pixel_range` is not positive. Rows in messages count from 1 below the header.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> from hetero_fl.data import join_images_and_table
        >>> images = np.zeros((2, 8, 8), dtype="uint8")
        >>> table = pd.DataFrame({"patient": ["p1", "p2"], "age": [54, 61]})
        >>> dataset = join_images_and_table(images, [0, 1], ["p2", "p1"], table)
        >>> dataset.blocks
        (Block(name='image', shape=(1, 8, 8)), Block(name='table', shape=(1,)))
        >>> dataset.train.x[:, -1]
        tensor([61., 54.])
    """
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.table_columns import check_columns, parse_names
    from hetero_fl.data.sources.table_files import features

    frame, where = _read_table(table, (by, table_group))
    if len(frame) == 0:
        raise UserError(f"{where}: has no rows")
    if pixel_range is not None and not 0 < pixel_range < math.inf:
        raise UserError(f"{name}: pixel_range: must be > 0 and finite, got {pixel_range:g}")
    image_set = from_arrays(images, y, patient=patient, group=group, name=name)
    if image_set.train.x.ndim != 4:
        raise UserError(
            f"{name}: images: expected shape [rows, channels, height, width], got "
            f"{tuple(image_set.train.x.shape)}"
        )
    special = {"by": by, "label": label, "table_group": table_group}
    check_columns(frame, special.items(), where)
    image_ids = [str(value) for value in image_set.train.patient_names]
    table_ids = _match_id_format(list(parse_names(frame[by], where)), image_ids)
    _check_unique(table_ids, where, by)
    with_image = set(image_ids)
    without_image = [row for row, table_id in enumerate(table_ids) if table_id not in with_image]
    _check_overlap(table_ids, image_ids, where, by)
    if without_image and label is None:
        row = without_image[0]
        raise UserError(
            f"{where}: row {row + 1}, column '{by}': patient '{table_ids[row]}' has no image"
            f"{suggest_similar(table_ids[row], image_ids)} (pass label to keep patients without "
            "images)"
        )
    rest = frame.drop(columns=[column for column in special.values() if column is not None])
    check_columns(rest, [("columns", column) for column in columns or ()], where)
    rest = rest if columns is None else rest[columns]
    values, used, left_out = features(rest, where, [])
    if columns is not None and left_out:
        column, kind = next(iter(left_out.items()))
        raise UserError(f"{where}: column '{column}': expected numbers, got {kind}")
    image_set = replace(image_set, pixel_range=pixel_range)
    pixels = choose_range(
        image_set,
        DataConfig(),
        ClientRows({}),
        {},
        "pass pixel_range=MAXIMUM",
        is_chosen=pixel_range is not None,
    )
    train = _join_rows(image_set.train, values, table_ids, without_image, pixels.value)
    if label is not None and without_image:
        labels = _table_labels(frame[label], without_image, image_set.task, where)
        groups = _table_groups(frame, without_image, table_group, image_set.train, where)
        owners = [table_ids[row] for row in without_image]
        train = _append_labels(train, image_set.train, labels, groups, owners)
    both = len(with_image & set(table_ids))
    notes = [
        *image_set.notes,
        *pixels.notes,
        f"{name}: {len(image_ids)} patients with images, {len(table_ids)} in the table, {both} "
        f"with both; columns {format_list(used)}",
    ]
    if left_out:
        notes.append(f"{where}: columns excluded because not numeric: {format_list(left_out)}")
    return Dataset(
        name,
        image_set.task,
        train,
        simulated=simulated,
        about=about,
        notes=tuple(notes),
        blocks=(
            Block(blocks[0], tuple(image_set.train.x.shape[1:])),
            Block(blocks[1], (len(used),)),
        ),
        pixel_range=pixels.value,
    )


def _check_overlap(table_ids: list[str], image_ids: list[str], where: str, by: str) -> None:
    if not set(table_ids) & set(image_ids):
        raise UserError(
            f"{where}: row 1, column '{by}': no patient of the table has an image, got "
            f"'{table_ids[0]}'; images are of {format_list(image_ids)}"
        )


def _read_table(table: Any, names: tuple[str | None, ...]) -> tuple[pd.DataFrame, str]:
    import pandas as pd

    from hetero_fl.data.sources.table_columns import normalize_frame
    from hetero_fl.data.sources.table_files import read_frame

    if isinstance(table, pd.DataFrame):
        return normalize_frame(table, "table"), "table"
    path = Path(table).expanduser()
    try:
        return normalize_frame(read_frame(path, names), str(path)), str(path)
    except UserError as error:
        raise UserError(f"table: {str(error).removeprefix('path: ')}") from error


def _match_id_format(table_ids: list[str], image_ids: list[str]) -> list[str]:
    """Write the ids of the table in the format of the image ids.

    Files with numeric ids drop leading zeros, so ids that differ only in leading zeros are equal.
    """
    written = {_normalize_id(image_id): image_id for image_id in image_ids}
    if len(written) < len(image_ids):
        return table_ids
    return [written.get(_normalize_id(table_id), table_id) for table_id in table_ids]


def _normalize_id(patient_id: str) -> str:
    if patient_id.isascii() and patient_id.isdigit():
        return patient_id.lstrip("0") or "0"
    return patient_id


def _check_unique(table_ids: list[str], where: str, by: str) -> None:
    first: dict[str, int] = {}
    for row, table_id in enumerate(table_ids):
        if table_id in first:
            raise UserError(
                f"{where}: row {row + 1}, column '{by}': duplicate patient '{table_id}', first in "
                f"row {first[table_id] + 1}; keep one row per patient"
            )
        first[table_id] = row


def _join_rows(
    images: Examples,
    values: Tensor,
    table_ids: list[str],
    without_image: list[int],
    pixel_range: float | None,
) -> Examples:
    """Return N images with the table values of their patients, then M patients without images.

    The rows have shape `[N + M, D]`. If M > 0, the rows have no labels, groups and patients yet.
    """
    assert images.patient is not None
    x = require_tensor(images.x, "a multimodal data set")
    pixels = to_floats(x.flatten(1), pixel_range).float()
    row_of = {table_id: row for row, table_id in enumerate(table_ids)}
    patient_rows = [row_of.get(image_id, len(table_ids)) for image_id in images.patient_names]
    rows = torch.tensor(patient_rows)[images.patient]
    table = torch.cat([values, values.new_full((1, values.shape[1]), torch.nan)])
    x = torch.cat([pixels, table[rows]], dim=1)
    if without_image:
        table_only = values[torch.tensor(without_image)]
        no_pixels = table_only.new_full((len(table_only), pixels.shape[1]), torch.nan)
        return Examples(torch.cat([x, torch.cat([no_pixels, table_only], dim=1)]))
    return Examples(
        x, images.y, images.group, images.group_names, images.patient, images.patient_names
    )


def _table_labels(column: pd.Series, rows: list[int], task: Task, where: str) -> list[int]:
    """Return the classes of the patients in the selected rows of the table."""
    from hetero_fl.data.sources.table_columns import parse_numbers

    labels = parse_numbers(column, where)
    if labels is None:
        raise UserError(f"{where}: column '{column.name}': expected class numbers, got text")
    try:
        classes = {float(name): index for index, name in enumerate(task.output_names)}
    except ValueError:
        raise UserError(
            f"y: expected class numbers as in column '{column.name}' of the table, got "
            f"'{task.output_names[0]}'; number the classes"
        ) from None
    for row in rows:
        if labels[row] not in classes:
            raise UserError(
                f"{where}: row {row + 1}, column '{column.name}': unknown class {labels[row]:g}; "
                f"choose from {format_list(task.output_names)}"
            )
    return [classes[labels[row]] for row in rows]


def _table_groups(
    frame: pd.DataFrame, rows: list[int], table_group: str | None, images: Examples, where: str
) -> list[str]:
    """Return the groups of patients in selected rows of the table, or [] without groups."""
    from hetero_fl.data.sources.table_columns import parse_names

    if images.group is None:
        return []
    if table_group is None:
        raise UserError(
            "table_group: missing; the images have groups, so name the column with the groups of "
            "patients without an image"
        )
    groups = list(parse_names(frame[table_group], where))
    return [groups[row] for row in rows]


def _append_labels(
    train: Examples, images: Examples, labels: list[int], groups: list[str], owners: list[str]
) -> Examples:
    """Add the labels, groups and patients to the joined rows."""
    assert images.patient is not None
    y = torch.cat([images.labels, torch.tensor(labels)])
    patient, patient_names = index_names(
        [images.patient_names[i] for i in images.patient.tolist()] + owners
    )
    if images.group is None:
        return Examples(train.x, y, None, (), patient, patient_names)
    group, group_names = index_names(
        [images.group_names[g] for g in images.group.tolist()] + groups
    )
    return Examples(train.x, y, group, group_names, patient, patient_names)
