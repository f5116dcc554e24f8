"""Images and numbers as two blocks of one row, from arrays and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hetero_fl.config.data import DataConfig
from hetero_fl.core.images import to_floats
from hetero_fl.core.mapped_tensors import mapped_file, store_rows
from hetero_fl.core.task import Task
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.dataset import Block, Dataset, Examples
from hetero_fl.data.pixels import PixelRange, choose_range
from hetero_fl.data.table import from_arrays
from hetero_fl.utils.arrays import index_names
from hetero_fl.utils.errors import UserError, suggest_similar
from hetero_fl.utils.text import format_list

if TYPE_CHECKING:
    import pandas as pd

JOINED_ROWS = 256
"""Number of rows whose blocks are joined at a time."""


def choose_block_range(images: Tensor, chosen: float | None, advice: str) -> PixelRange:
    """Return the value of integer pixels of a block that becomes 1 (see `choose_range`).

    Args:
        images: All images of the data set.
        chosen: The value, if it is given.
        advice: How to change the value, for messages.
    """
    rows = Examples(images, torch.zeros(len(images)))
    dataset = Dataset("images", Task("regression", 1), rows, pixel_range=chosen)
    is_chosen = chosen is not None
    return choose_range(dataset, DataConfig(), ClientRows({}), {}, advice, is_chosen=is_chosen)


def join_blocks(
    images: Tensor, image_of: Tensor, numbers: Tensor, pixel_range: float | None
) -> Tensor:
    """Return rows of the pixels of an image and of numbers.

    Args:
        images: Images `[M, C, H, W]`.
        image_of: Index of the image of each row, or -1, of which the pixels are NaN, int64 `[N]`.
        numbers: Numbers of each row, float32 `[N, F]`.
        pixel_range: Value of integer pixels that becomes 1.

    Returns:
        Rows, float32 `[N, C * H * W + F]`.
    """

    def join(rows: Tensor) -> Tensor:
        pixels = to_floats(images[image_of[rows]].flatten(1), pixel_range).float()
        pixels[image_of[rows] < 0] = torch.nan
        return torch.cat([pixels, numbers[rows]], 1)

    parts = map(join, torch.arange(len(numbers)).split(JOINED_ROWS))
    file = mapped_file(images)
    return torch.cat(list(parts)) if file is None else store_rows(parts, file.scratch)


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
    from hetero_fl.data.sources.tables.columns import check_columns, parse_names
    from hetero_fl.data.sources.tables.frames import features

    frame, where = _read_table(table, (by, table_group))
    if len(frame) == 0:
        raise UserError(f"{where}: has no rows")
    if pixel_range is not None and not 0 < pixel_range < math.inf:
        raise UserError(f"{name}: pixel_range: must be > 0 and finite, got {pixel_range:g}")
    image_set = from_arrays(images, y, patient=patient, group=group, name=name)
    pictures = image_set.train
    if pictures.x.ndim != 4:
        raise UserError(
            f"{name}: images: expected shape [rows, channels, height, width], got "
            f"{tuple(pictures.x.shape)}"
        )
    special = {"by": by, "label": label, "table_group": table_group}
    check_columns(frame, special.items(), where)
    image_ids = list(pictures.patient_names)
    table_ids = _match_id_format(parse_names(frame[by], where).tolist(), image_ids)
    without_image = _check_ids(table_ids, image_ids, where, by, is_left_join=label is None)
    rest = frame.drop(columns=[column for column in special.values() if column is not None])
    check_columns(rest, [("columns", column) for column in columns or ()], where)
    rest = rest if columns is None else rest[columns]
    values, used, left_out = features(rest, where, [])
    if columns is not None and left_out:
        column, kind = next(iter(left_out.items()))
        raise UserError(f"{where}: column '{column}': expected numbers, got {kind}")
    pixels = choose_block_range(pictures.x, pixel_range, "pass pixel_range=MAXIMUM")
    owners = [image_ids[owner] for owner in pictures.patient.tolist()]  # type: ignore[union-attr]
    owners += [table_ids[row] for row in without_image]
    row_of = {table_id: row for row, table_id in enumerate(table_ids)}
    # Patients who are not in the table have the last row, which is NaN.
    table_rows = torch.tensor([row_of.get(owner, len(table_ids)) for owner in owners])
    numbers = torch.cat([values, values.new_full((1, values.shape[1]), torch.nan)])[table_rows]
    image_of = torch.cat([torch.arange(len(pictures)), torch.full((len(without_image),), -1)])
    train = Examples(
        join_blocks(pictures.x, image_of, numbers, pixels.value),
        torch.cat(
            [pictures.labels, _labels_of(frame, label, without_image, image_set.task, where)]
        ),
    )
    train.patient, train.patient_names = index_names(owners)
    if pictures.group is not None:
        groups = [pictures.group_names[group] for group in pictures.group.tolist()]
        groups += _groups_of(frame, table_group, without_image, where)
        train.group, train.group_names = index_names(groups)
    both = len(set(image_ids) & set(table_ids))
    notes = [
        *image_set.notes,
        *pixels.notes,
        f"{name}: {len(image_ids)} patients with images, {len(table_ids)} in the table, {both} "
        f"with both; columns {format_list(used)}",
    ]
    if left_out:
        notes.append(f"{where}: columns excluded because not numeric: {format_list(left_out)}")
    shapes = tuple(pictures.x.shape[1:]), (len(used),)
    return Dataset(
        name,
        image_set.task,
        train,
        simulated=simulated,
        about=about,
        notes=tuple(notes),
        blocks=tuple(map(Block, blocks, shapes)),
        pixel_range=pixels.value,
    )


def _read_table(table: Any, names: tuple[str | None, ...]) -> tuple[pd.DataFrame, str]:
    import pandas as pd

    from hetero_fl.data.sources.tables.columns import normalize_frame, read_frame

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


def _check_ids(
    table_ids: Sequence[str], image_ids: Sequence[str], where: str, by: str, *, is_left_join: bool
) -> list[int]:
    """Return the rows of the patients without an image.

    Raises:
        UserError: If a patient occurs twice or no patient has an image, or if a patient has none in
            a left join.
    """
    first: dict[str, int] = {}
    for row, table_id in enumerate(table_ids):
        if table_id in first:
            raise UserError(
                f"{where}: row {row + 1}, column '{by}': duplicate patient '{table_id}', first in "
                f"row {first[table_id] + 1}; keep one row per patient"
            )
        first[table_id] = row
    with_image = set(image_ids)
    missing = [row for row, table_id in enumerate(table_ids) if table_id not in with_image]
    if len(missing) == len(table_ids):
        raise UserError(
            f"{where}: row 1, column '{by}': no patient of the table has an image, got "
            f"'{table_ids[0]}'; images are of {format_list(image_ids)}"
        )
    if missing and is_left_join:
        row = missing[0]
        raise UserError(
            f"{where}: row {row + 1}, column '{by}': patient '{table_ids[row]}' has no image"
            f"{suggest_similar(table_ids[row], image_ids)} (pass label to keep patients without "
            "images)"
        )
    return missing


def _labels_of(
    frame: pd.DataFrame, label: str | None, rows: Sequence[int], task: Task, where: str
) -> Tensor:
    """Return the classes of the patients in the selected rows of the table."""
    from hetero_fl.data.sources.tables.columns import parse_numbers

    if label is None or not rows:
        return torch.empty(0, dtype=torch.int64)
    labels = parse_numbers(frame[label], where)
    if labels is None:
        raise UserError(f"{where}: column '{label}': expected class numbers, got text")
    try:
        classes = {float(name): index for index, name in enumerate(task.output_names)}
    except ValueError:
        raise UserError(
            f"y: expected class numbers as in column '{label}' of the table, got "
            f"'{task.output_names[0]}'; number the classes"
        ) from None
    for row in rows:
        if labels[row] not in classes:
            raise UserError(
                f"{where}: row {row + 1}, column '{label}': unknown class {labels[row]:g}; "
                f"choose from {format_list(task.output_names)}"
            )
    return torch.tensor([classes[labels[row]] for row in rows])


def _groups_of(
    frame: pd.DataFrame, column: str | None, rows: Sequence[int], where: str
) -> list[str]:
    """Return the groups of patients in selected rows of the table, or [] without groups."""
    from hetero_fl.data.sources.tables.columns import parse_names

    if not rows:
        return []
    if column is None:
        raise UserError(
            "table_group: missing; the images have groups, so name the column with the groups of "
            "patients without an image"
        )
    return parse_names(frame[column], where).iloc[list(rows)].tolist()
