"""Images joined with a user's own table by the patient's number: a data set of two blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hetero_fl.data.arrays import from_arrays
from hetero_fl.data.dataset import Block, Dataset, Examples, index_names
from hetero_fl.utils.errors import UserError, suggest_similar
from hetero_fl.utils.text import format_list

if TYPE_CHECKING:
    import pandas as pd


def join_images_and_table(
    images: Any, y: Any, patient: Any, table: Any, *, by: str = "patient", columns: list[str] | None = None,
    label: str | None = None, group: Any = None, table_group: str | None = None, blocks: tuple[str, str] = ("image", "table"),
    name: str = "joined", simulated: bool = False, about: str = "",
) -> Dataset:  # fmt: skip
    """Images and the rows of a table that belong to the same patients, side by side. What a patient lacks is missing (NaN):
    a client whose view sees it needs `preprocess.missing: indicate`, and names its blocks in `preprocess.columns`.

    Args:
        images: `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` as `from_arrays` takes them; a patient may have several.
        y: class numbers of the images, `[N]`.
        patient: whose image it is, `[N]` of numbers or strings; patients stay whole when rows are set apart.
        table: a file (`.csv`, `.tsv`, `.parquet`) or a pandas frame, a row a patient. An empty cell is a missing value.
        by: the table's column of patients.
        columns: its columns that make the second block; none: all columns of numbers.
        label: its column of class numbers. Patients without an image are then examples, too; without it they are refused.
        group: whose row each image is (a hospital, say), for the natural partition; `table_group`: the table's column of it,
            for patients without an image.
        blocks: what the images and the columns are called, in views and in the names of a model's tensors.

    Raises:
        UserError: one line with file, row and column (rows count from 1 below the header): a patient who has no image, is
            there twice, or has no number; text in a number; a column that is not there; nobody in both.
    """
    # loads pandas, which takes half a second
    from hetero_fl.data.sources.table_files import (
        check_columns,
        decimal_commas,
        features,
        parse_names,
    )

    frame, where = _frame(table, (by, table_group))
    pictures = from_arrays(images, y, patient=patient, group=group, name=name)
    if pictures.train.x.ndim != 4:
        raise UserError(
            f"{name}: images: found shape {tuple(pictures.train.x.shape)}; want rows x channels x height x width"
        )
    special = {"by": by, "label": label, "table_group": table_group}
    check_columns(frame, special.items(), where)
    whose = list(parse_names(frame[by], where))
    ids = [str(value) for value in pictures.train.patient_names]
    whose = _match_id_format(whose, ids)
    _check_unique(whose, where, by)
    imaged = set(ids)
    strangers = [i for i, id in enumerate(whose) if id not in imaged]
    if len(strangers) == len(whose):
        raise UserError(
            f"{where}: row 1, column '{by}': found '{whose[0]}', and no patient of the table has an image; "
            f"images are of {format_list(ids)}"
        )
    if strangers and label is None:
        row = strangers[0]
        raise UserError(
            f"{where}: row {row + 1}, column '{by}': found '{whose[row]}', of whom there is no image"
            f"{suggest_similar(whose[row], ids)} (name their labels in `label` to keep such patients: {len(strangers)} rows)"
        )
    rest = frame.drop(columns=[column for column in special.values() if column is not None])
    check_columns(rest, [("columns", column) for column in columns or ()], where)
    rest, _ = decimal_commas(rest if columns is None else rest[columns], where)
    values, used, left_out = features(rest, where, [])
    if columns is not None and left_out:
        column, kind = next(iter(left_out.items()))
        raise UserError(f"{where}: column '{column}' is {kind}; numbers are needed")
    train = _side_by_side(pictures.train, values, whose, strangers)
    if strangers:
        train = _with_labels(train, pictures, frame, strangers, whose, label, table_group, where)
    made = (Block(blocks[0], tuple(pictures.train.x.shape[1:])), Block(blocks[1], (len(used),)))
    both = len(imaged & set(whose))
    note = f"{name}: {len(ids)} patients with images, {len(whose)} in the table, {both} with both; columns {format_list(used)}"
    left = tuple(
        f"{where}: left out: {format_list(left_out)} (no numbers)" for _ in range(bool(left_out))
    )
    return Dataset(
        name,
        pictures.task,
        train,
        None,
        None,
        simulated,
        about,
        (),
        (*pictures.notes, note, *left),
        made,
    )


def _frame(table: Any, names: tuple[str | None, ...]) -> tuple[pd.DataFrame, str]:
    import pandas as pd

    from hetero_fl.data.sources.table_files import read_frame

    if isinstance(table, pd.DataFrame):
        return table.reset_index(drop=True), "table"
    path = Path(table).expanduser()
    try:
        return read_frame(path, names), str(path)
    except UserError as error:
        raise UserError(f"table: {str(error).removeprefix('path: ')}") from error


def _match_id_format(whose: list[str], ids: list[str]) -> list[str]:
    """The table's patients as the images' numbers are written: a file of numbers has lost the zeros of 0001."""
    written = {_normalize_id(id): id for id in ids}
    return (
        [written.get(_normalize_id(id), id) for id in whose] if len(written) == len(ids) else whose
    )


def _normalize_id(patient_id: str) -> str:
    return str(int(patient_id)) if patient_id.isascii() and patient_id.isdigit() else patient_id


def _check_unique(whose: list[str], where: str, by: str) -> None:
    first: dict[str, int] = {}
    for row, id in enumerate(whose):
        if id in first:
            raise UserError(
                f"{where}: row {row + 1}, column '{by}': found '{id}' a second time (row {first[id] + 1} is the first); "
                "a patient has one row"
            )
        first[id] = row


def _side_by_side(
    pictures: Examples, values: Tensor, whose: list[str], strangers: list[int]
) -> Examples:
    """Rows `[N + M, D]`: every image with its patient's values, then patients without an image. Labels and groups of these
    are not there yet."""
    assert pictures.patient is not None
    pixels = pictures.x.flatten(1).float()
    pixels = pixels / 255 if pictures.x.dtype == torch.uint8 else pixels
    row_of = {id: row for row, id in enumerate(whose)}
    rows = torch.tensor([row_of.get(id, len(whose)) for id in pictures.patient_names])[
        pictures.patient
    ]
    table = torch.cat([values, values.new_full((1, values.shape[1]), torch.nan)])
    x = torch.cat([pixels, table[rows]], dim=1)
    if strangers:
        alone = values[torch.tensor(strangers)]
        x = torch.cat(
            [x, torch.cat([alone.new_full((len(alone), pixels.shape[1]), torch.nan), alone], dim=1)]
        )
        return Examples(x)
    return Examples(
        x,
        pictures.y,
        pictures.group,
        pictures.group_names,
        pictures.patient,
        pictures.patient_names,
    )


def _with_labels(
    train: Examples, pictures: Dataset, frame: pd.DataFrame, strangers: list[int], whose: list[str], label: str | None,
    table_group: str | None, where: str,
) -> Examples:  # fmt: skip
    """The rows with label, group and patient of those who have no image, too."""
    from hetero_fl.data.sources.table_files import parse_names, parse_numbers

    given = parse_numbers(frame[label], where)
    old = pictures.train
    assert old.patient is not None
    if given is None:
        raise UserError(f"{where}: column '{label}' is text; class numbers are needed")
    classes = {float(name): place for place, name in enumerate(pictures.task.output_names)}
    for row in strangers:
        if given[row] not in classes:
            found = f"found {given[row]:g}; classes of the images are {format_list(pictures.task.output_names)}"
            raise UserError(f"{where}: row {row + 1}, column '{label}': {found}")
    y = torch.cat([old.labels, torch.tensor([classes[given[row]] for row in strangers])])
    owners = [old.patient_names[i] for i in old.patient.tolist()] + [
        whose[row] for row in strangers
    ]
    patient, patient_names = index_names(owners)
    if old.group is None:
        return Examples(train.x, y, None, (), patient, patient_names)
    if table_group is None:
        raise UserError(
            "table_group: missing; images have groups, so name the table's column of those without an image"
        )
    sites = list(parse_names(frame[table_group], where))
    group, group_names = index_names(
        [old.group_names[g] for g in old.group.tolist()] + [sites[row] for row in strangers]
    )
    return Examples(train.x, y, group, group_names, patient, patient_names)
