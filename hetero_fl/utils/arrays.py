"""Arrays of users as plain NumPy arrays, in which missing entries are NaN or None, and names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_order

MISSING_TYPES = ("NoneType", "NAType", "NaTType", "MaskedConstant")
"""Names of the types of missing entries. pandas is not imported only to compare with `pd.NA`."""


def plain_array(values: Any) -> Any:
    """Return values without masks and without the null values of pandas and pyarrow.

    Missing entries become NaN in numbers and None in other arrays. Integers and booleans with
    missing entries become float64. Lists of tensors are stacked without their gradients. Values
    without missing entries, tensors and data frames are returned unchanged.

    Args:
        values: Any array-like object, for example a masked array, a Series of pandas, an array of
            pyarrow, or a list with None.

    Example:
        >>> import numpy as np
        >>> from hetero_fl.utils.arrays import plain_array
        >>> plain_array(np.ma.masked_array([1, 2, 3], mask=[0, 1, 0]))
        array([ 1., nan,  3.])
    """
    if isinstance(values, list | tuple):
        values = _stacked(values)
    if type(values).__module__.partition(".")[0] == "pyarrow":
        values = values.to_pandas()
    if np.ma.isMaskedArray(values):
        return _fill(values.data, np.ma.getmaskarray(values))
    if isinstance(values, list | tuple):
        try:
            found = np.asarray(values)
        except (ValueError, RuntimeError):
            return values
    elif isinstance(values, np.ndarray):
        found = values
    elif hasattr(values, "to_numpy") and not hasattr(values, "columns"):
        found = np.asarray(values)
    else:
        return values
    if found.dtype != object:
        return found if hasattr(values, "to_numpy") else values
    missing = missing_entries(found)
    return _fill(found, missing) if missing.any() else values


def missing_entries(values: np.ndarray) -> np.ndarray:
    """Return whether each entry of an array without a mask is missing, a bool array."""
    if values.dtype.kind == "M":
        return np.isnat(values)
    if values.dtype.kind in "biu":
        return np.zeros(values.shape, dtype=bool)
    missing = [
        type(value).__name__ in MISSING_TYPES or (isinstance(value, float) and math.isnan(value))
        for value in values.flat
    ]
    return np.array(missing, dtype=bool).reshape(values.shape)


def _stacked(rows: Sequence[Any]) -> Any:
    """Return a list of tensors or of masked arrays as one of these, and other lists unchanged."""
    if rows and all(isinstance(row, Tensor) for row in rows):
        with suppress(RuntimeError):
            return torch.stack([row.detach() for row in rows])
    if any(np.ma.isMaskedArray(row) for row in rows):
        return np.ma.stack([np.ma.asanyarray(row) for row in rows])
    return rows


def _fill(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Return the values with NaN or, unless all others are numbers, None in missing places."""
    if not missing.any():
        return values
    present = values[~missing]
    if values.dtype == object:
        are_numbers = all(isinstance(value, int | float | np.number) for value in present)
    else:
        are_numbers = values.dtype.kind in "buif"
    filled = np.full(
        values.shape, np.nan if are_numbers else None, float if are_numbers else object
    )
    filled[~missing] = present
    return filled.astype(values.dtype) if values.dtype.kind == "f" else filled


def index_names(values: Iterable[object]) -> tuple[Tensor, tuple[str, ...]]:
    """Convert values to indices into their distinct names.

    Args:
        values: Values of any type. Each value is converted to a string, and surrounding spaces are
            removed.

    Returns:
        Indices, int64 `[N]`, and the distinct names in natural order.
    """
    texts = [str(value).strip() for value in values]
    names = tuple(natural_order(set(texts)))
    indices = {name: i for i, name in enumerate(names)}
    return torch.tensor([indices[name] for name in texts], dtype=torch.int64), names


def owner_list(values: Any, rows: int, where: str) -> list[Any]:
    """Return the groups or patients of rows as a list.

    Args:
        values: Group or patient of each row, `[N]` or `[N, 1]` numbers or strings.
        rows: Number of rows.
        where: Name of the values, for error messages.

    Raises:
        UserError: If there is not one value for each row, or a value is missing.
    """
    plain = plain_array(values)
    found = np.asarray(plain.tolist() if hasattr(plain, "tolist") else plain, dtype=object)
    if found.shape not in ((rows,), (rows, 1)):
        raise UserError(f"{where}: expected shape ({rows},), one entry per row, got {found.shape}")
    missing = missing_entries(found.reshape(-1))
    if missing.any():
        row = int(missing.argmax())
        raise UserError(f"{where}: row {row}: missing value; fill or remove missing values")
    # Names of integers are equal in integer arrays and in float arrays.
    return [
        int(value) if isinstance(value, float) and value % 1 == 0 else value for value in found.flat
    ]
