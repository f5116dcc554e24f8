"""Arrays of users as plain NumPy arrays, in which missing entries are NaN or None."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
