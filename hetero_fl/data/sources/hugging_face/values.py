"""Read columns of a data set of `datasets` as arrays, images, names and metadata."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hetero_fl.data.checks import first_true
from hetero_fl.data.sources.hugging_face.columns import feature_kind
from hetero_fl.data.sources.image_files import image_pixels, open_image, stack_images
from hetero_fl.utils.errors import UserError, one_line

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
