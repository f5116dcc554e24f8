"""Read columns of a data set of `datasets` as arrays, images, names, metadata and labels."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hetero_fl.core.task import Task, is_integer
from hetero_fl.data.checks import first_true
from hetero_fl.data.sources.hugging_face.columns import (
    HubColumns,
    array_depth,
    feature_kind,
    list_item,
)
from hetero_fl.data.sources.image_files import image_pixels, open_image, stack_images
from hetero_fl.utils.errors import UserError, check_names, one_line

if TYPE_CHECKING:
    import pandas as pd

UNLABELED = -1
"""Value of a `ClassLabel` column in rows without labels."""
SCALARS = ("class", "string", "number", "date")
"""Kinds of columns with one value per row."""
HubSplits = Mapping[str, Any]
"""Data sets of `datasets`, keyed by "train", "validation" and "test"."""


def read_column(part: Any, name: str) -> pd.Series:
    """Return a column as a pandas series. Classes are numbers."""
    column: pd.Series = part.select_columns([name]).with_format(None).to_pandas()[name]
    return column


def check_complete(column: pd.Series, where: str) -> None:
    """Raise UserError if a column has a missing value."""
    row = first_true(column.isna().to_numpy())
    if row is not None:
        raise UserError(f"{where}: column '{column.name}': row {row + 1} has no value")


def class_names(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return the names of classes, and None for `UNLABELED`."""
    return np.array([*names, None], dtype=object)[values]


def read_class_numbers(part: Any, name: str, where: str) -> np.ndarray:
    """Return a column of classes as numbers, and missing values as `UNLABELED`."""
    values = read_column(part, name).fillna(UNLABELED).to_numpy(dtype=np.int64)
    count = part.features[name].num_classes
    row = first_true((values < UNLABELED) | (values >= count))
    if row is not None:
        raise UserError(
            f"{where}: column '{name}': row {row + 1}: expected a class number from 0 to "
            f"{count - 1}, got {values[row]}"
        )
    return values


def read_numbers(
    part: Any,
    name: str,
    where: str,
    expected: str = "expected classes, text or numbers as labels",
) -> np.ndarray:
    """Return a column of numbers without missing values."""
    if feature_kind(part.features[name]) != "number":
        raise UserError(
            f"{where}: column '{name}': {expected}, got {one_line(part.features[name], 80)}"
        )
    column = read_column(part, name)
    check_complete(column, where)
    values = column.to_numpy()
    return values.astype(np.int64) if values.dtype == bool else values


def read_multi_hot(part: Any, name: str, count: int, where: str) -> np.ndarray:
    """Return lists of classes as an indicator matrix, float32 `[N, C]`."""
    column = read_column(part, name)
    check_complete(column, where)
    targets = np.zeros((len(column), count), dtype=np.float32)
    for row, classes in enumerate(column):
        listed = np.asarray(classes, dtype=np.float64)
        if not ((listed >= 0) & (listed < count)).all():
            raise UserError(
                f"{where}: column '{name}': row {row + 1}: expected class numbers from 0 to "
                f"{count - 1}, got {one_line(list(classes), 80)}"
            )
        targets[row, listed.astype(np.int64)] = 1
    return targets


def read_stacked(part: Any, name: str, where: str) -> np.ndarray:
    """Return a column of arrays of equal shape as one array `[N, ...]`."""
    column = part.select_columns([name])
    try:
        values = column.with_format("numpy")[:][name]
    except ValueError:
        # Some versions of datasets cannot convert rows of different shapes.
        values = column.with_format(None)[:][name]
    if isinstance(values, np.ndarray) and values.dtype.kind in "buif" and values.ndim > 1:
        return values
    for row, value in enumerate(values, 1):
        place = f"{where}: column '{name}': row {row}"
        each = None if value is None else _as_array(value)
        if each is None or each.dtype.kind not in "buif":
            raise UserError(f"{place}: expected an array of numbers without missing values")
        first = _as_array(values[0]).shape
        if each.shape != first:
            raise UserError(f"{place}: expected shape {first} as in row 1, got {each.shape}")
    return np.stack([_as_array(value) for value in values])


def _as_array(value: Any) -> np.ndarray:
    """Convert nested lists to an array, which contains objects if the lists are ragged."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.asarray(value, dtype=object)


def read_owners(train: Any, name: str, where: str) -> list[str]:
    """Return the names of groups or patients of the training rows."""
    feature = train.features[name]
    where = f"{where}: train"
    kind = feature_kind(feature)
    if kind not in SCALARS:
        raise UserError(f"{where}: column '{name}': expected names or numbers, got {feature}")
    column = read_column(train, name)
    if kind == "class":
        numbers = read_class_numbers(train, name, where)
        column = column.where(numbers != UNLABELED)
    check_complete(column, where)
    if kind == "class":
        return [feature.names[number] for number in numbers]
    if column.dtype.kind == "f" and (column == column.round()).all() and np.isfinite(column).all():
        # Integers of a column that is saved as floats.
        return [str(int(value)) for value in column]
    return [str(value) for value in column]


def read_metadata(train: Any, excluded: Sequence[str], where: str) -> dict[str, np.ndarray]:
    """Return the columns with one value per row, such as names, numbers and dates.

    Args:
        train: Training rows.
        excluded: Columns to leave out.
        where: Name of the data in error messages.
    """
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.table_columns import metadata_array

    found = {}
    for name, feature in train.features.items():
        kind = feature_kind(feature)
        if name in excluded or kind not in SCALARS:
            continue
        if kind == "class":
            numbers = read_class_numbers(train, name, f"{where}: train")
            found[name] = class_names(numbers, feature.names)
        else:
            found[name] = metadata_array(read_column(train, name))
    return found


def read_images(splits: HubSplits, name: str, where: str, side: int | None) -> dict[str, Tensor]:
    """Return the images of each split, uint8 `[N, C, H, W]`."""
    places = [
        f"{where}: {split}: column '{name}': row {row + 1}"
        for split, part in splits.items()
        for row in range(len(part))
    ]
    images = stack_images(_decode(splits, name, places, side), places, "row 1 of train")
    sizes = [len(part) for part in splits.values()]
    return dict(zip(splits, images.split(sizes), strict=True))


def _decode(
    splits: HubSplits, name: str, places: Sequence[str], side: int | None
) -> Iterator[np.ndarray]:
    """Yield the pixels of each image (see `image_pixels`)."""
    import fsspec
    from datasets import Image

    encoded = Image(decode=False)
    columns = (part.select_columns([name]).with_format(None) for part in splits.values())
    rows = (row[name] for column in columns for row in column.cast_column(name, encoded))
    for place, image in zip(places, rows, strict=True):
        if image is None:
            raise UserError(f"{place}: not a readable image (no image)")
        # The path may be that of a file in an archive.
        is_named = image["bytes"] is None
        file = fsspec.open(image["path"]) if is_named else io.BytesIO(image["bytes"])
        with open_image(file, place) as opened:
            pixels = image_pixels(opened, side)
        yield pixels


def read_arrays(
    splits: HubSplits, name: str, where: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return images or series of each split, and the names of the channels of series."""
    x = {split: read_stacked(part, name, f"{where}: {split}") for split, part in splits.items()}
    train = x["train"]
    if train.ndim > 4:
        raise UserError(
            f"{where}: column '{name}': expected images or series, got arrays of shape "
            f"{train.shape[1:]}"
        )
    for split, values in x.items():
        if values.shape[1:] != train.shape[1:]:
            raise UserError(
                f"{where}: {split}: column '{name}': expected shape {train.shape[1:]} as in train, "
                f"got {values.shape[1:]}"
            )
    is_series = train.ndim == 3 and train.dtype.kind == "f"
    return x, tuple(f"{name}_{i}" for i in range(train.shape[2])) if is_series else ()


def read_targets(
    splits: HubSplits,
    columns: HubColumns,
    where: str,
    kind: str | None,
    *,
    labeled: bool,
    notes: list[str],
) -> tuple[dict[str, np.ndarray], Task | None]:
    """Read the labels of each split.

    The classes of all splits are matched to those of the training rows by name.

    Args:
        splits: Data sets, keyed by "train", "validation" and "test".
        columns: Columns by their use.
        where: Name of the data in error messages.
        kind: Kind of the task. If None, the kind follows from the labels.
        labeled: Whether there are labels. If False, the targets are 0.
        notes: List to which a remark is appended for each split without any labels.

    Returns:
        The labels, keyed by split, without the splits that have no labels, and the task if the
        features define it.

    Raises:
        UserError: If a label is missing or invalid, or the features define another kind of task.
    """
    if not labeled:
        return {split: np.zeros(len(part)) for split, part in splits.items()}, Task("regression", 1)
    train = splits["train"].features
    task = _task_of_classes(train, columns.labels)
    if task is not None and kind not in (None, task.kind):
        content = "classes" if task.kind == "multiclass" else "lists of classes"
        raise UserError(
            f"{where}: task: must be {task.kind} for column '{columns.labels[0]}' of {content}, "
            f"got {kind}; remove data.task"
        )
    labels = {
        split: _read_labels(part, columns.labels, train, f"{where}: {split}")
        for split, part in _labeled_splits(splits, columns.labels, where, notes).items()
    }
    return labels, task


def _task_of_classes(train: Mapping[str, Any], names: Sequence[str]) -> Task | None:
    """Return the task of a single column of classes or lists of classes, otherwise None."""
    if len(names) > 1:
        return None
    feature = train[names[0]]
    kind = feature_kind(feature)
    if kind == "class":
        return Task("multiclass", feature.num_classes, tuple(feature.names))
    if kind == "classes":
        classes = tuple(list_item(feature).names)
        return Task("multilabel", len(classes), classes)
    return None


def _labeled_splits(
    splits: HubSplits, names: Sequence[str], where: str, notes: list[str]
) -> dict[str, Any]:
    """Return the splits without the validation and test sets in which no row has a label."""
    kept = {}
    for split, part in splits.items():
        has_classes = len(names) == 1 and feature_kind(part.features[names[0]]) == "class"
        if split != "train" and has_classes:
            numbers = read_class_numbers(part, names[0], f"{where}: {split}")
            if bool((numbers == UNLABELED).all()):
                title = where.removeprefix("name: ")
                notes.append(f"{title}: split '{split}' has no labels, not used")
                continue
        kept[split] = part
    return kept


def _read_labels(
    part: Any, names: tuple[str, ...], train: Mapping[str, Any], where: str
) -> np.ndarray:
    """Return the labels of a split, `[N]` or `[N, L]`.

    Args:
        part: Rows of the split.
        names: Columns of the labels.
        train: Features of the training rows, to whose classes the labels are matched.
        where: Name of the data and the split in error messages.
    """
    if len(names) > 1:
        columns = [_read_one_of_several(part, name, train[name], where) for name in names]
        return np.stack(columns, axis=1)
    name = names[0]
    feature = part.features[name]
    kind = feature_kind(feature)
    kinds = (kind, feature_kind(train[name]))
    if "class" in kinds:
        return _read_classes(part, name, train[name], where)
    if "classes" in kinds:
        return _read_lists_of_classes(part, name, train[name], where)
    if kind == "array" and array_depth(feature) == 1:
        return read_stacked(part, name, where)
    if kind == "string":
        column = read_column(part, name)
        check_complete(column, where)
        return column.to_numpy(dtype=object)
    return read_numbers(part, name, where)


def _read_one_of_several(part: Any, name: str, train: Any, where: str) -> np.ndarray:
    """Return one of several label columns: numbers, or two classes as 0 and 1."""
    features = (part.features[name], train)
    sizes = {each.num_classes for each in features if feature_kind(each) == "class"}
    if sizes == {2}:
        return _read_classes(part, name, train, where)
    return read_numbers(part, name, where, "with several label columns, expected numbers")


def _read_classes(part: Any, name: str, train: Any, where: str) -> np.ndarray:
    """Return a column of classes, text or numbers that are matched to the feature `train` by name.

    Returns:
        Class numbers of `train` if it is a feature of classes, otherwise text or integers.

    Raises:
        UserError: If a value is missing or does not exist in `train`.
    """
    place = f"{where}: column '{name}'"
    codes, names = _encode_names(part, name, where)
    used = np.unique(codes)
    occurring = [names[code] for code in used]
    kind = feature_kind(train)
    values: list[Any]
    if kind == "class":
        check_names(occurring, train.names, f"{place}: unknown class")
        values = [train.names.index(each) for each in occurring]
    elif kind == "string":
        values = occurring
    elif kind == "number" and all(map(is_integer, occurring)):
        values = [int(each) for each in occurring]
    else:
        raise _other_feature(part, name, train, where)
    dtype = object if kind == "string" else np.int64
    return np.array(values, dtype=dtype)[np.searchsorted(used, codes)]


def _encode_names(part: Any, name: str, where: str) -> tuple[np.ndarray, Sequence[str]]:
    """Return the labels of a column as indices into names, and the names."""
    kind = feature_kind(part.features[name])
    if kind == "class":
        numbers = read_class_numbers(part, name, where)
        if (row := first_true(numbers == UNLABELED)) is not None:
            raise UserError(f"{where}: column '{name}': row {row + 1} has no label")
        return numbers, part.features[name].names
    column = read_column(part, name)
    if kind == "string":
        check_complete(column, where)
    else:
        read_numbers(part, name, where)
    codes, values = column.factorize()
    return codes, [str(value) for value in values]


def _other_feature(part: Any, name: str, train: Any, where: str) -> UserError:
    """Return the error for labels that cannot be matched to those of the training rows."""
    return UserError(
        f"{where}: column '{name}': expected {one_line(train, 80)} as in train, got "
        f"{one_line(part.features[name], 80)}"
    )


def _read_lists_of_classes(part: Any, name: str, train: Any, where: str) -> np.ndarray:
    """Return lists of classes as an indicator matrix of the classes of the feature `train`."""
    feature = part.features[name]
    if feature_kind(feature) != feature_kind(train):
        raise _other_feature(part, name, train, where)
    names = list_item(feature).names
    known = list_item(train).names
    targets = read_multi_hot(part, name, len(names), where)
    used = np.flatnonzero(targets.any(axis=0))
    occurring = [names[number] for number in used]
    check_names(occurring, known, f"{where}: column '{name}': unknown class")
    matched = np.zeros((len(targets), len(known)), dtype=np.float32)
    matched[:, [known.index(each) for each in occurring]] = targets[:, used]
    return matched
