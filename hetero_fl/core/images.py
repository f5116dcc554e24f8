"""Convert users' arrays to images `[N, C, H, W]`, uint8 or floats in [0, 1], and resize examples.

Arrays that can be interpreted in more than one way are rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.core.stored_rows import Column, map_rows
from hetero_fl.utils.errors import UserError

# Usual numbers of channels: gray and RGB.
USUAL_CHANNELS = (1, 3)
# Maximum number of channels. A longer axis is not the axis of channels if another axis is shorter.
MAX_CHANNELS = 16
# Tolerance for rounding errors of images scaled to [0, 1].
SCALE_TOLERANCE = 1e-3
# Floats with a maximum between this value and 255 are interpreted as bytes.
MIN_BYTE_MAXIMUM = 128


def as_numbers(values: Any, where: str) -> Tensor:
    """Convert an array to a CPU tensor of type uint8, int64 or floating point.

    Args:
        values: Any array-like object.
        where: Prefix of error messages.

    Raises:
        UserError: If `values` is not an array of numbers.
    """
    if isinstance(values, Tensor):
        if values.is_complex():
            raise UserError(f"{where}: expected real numbers, got {dtype_name(values)}")
        x = values.detach().cpu()
        return (
            x
            if x.dtype in (torch.uint8, torch.int64) or x.is_floating_point()
            else x.to(torch.int64)
        )
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: expected an array of numbers ({error})") from error
    if array.dtype.kind not in "buif":
        message = f"{where}: expected an array of numbers, got {array.dtype}"
        if hasattr(values, "columns"):
            raise UserError(
                f"{message}; save the data frame to a file and load it with data.name=table"
            )
        raise UserError(message)
    if array.dtype.kind in "bui" and array.dtype != np.uint8:
        array = array.astype(np.int64)
    elif array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def as_bytes(x: Tensor, where: str) -> Tensor:
    """Convert integers to uint8 and return floats unchanged.

    Args:
        x: Images, shape `[N, …]`.
        where: Prefix of error messages.

    Raises:
        UserError: If integers are outside 0..255.
    """
    if x.is_floating_point() or x.dtype == torch.uint8 or x.numel() == 0:
        return x
    low = int(x.min())
    high = int(x.max())
    if low < 0 or high > 255:
        raise UserError(
            f"{where}: expected uint8 or floats from 0 to 1, got {dtype_name(x)} from {low} "
            f"to {high}"
        )
    return x.to(torch.uint8)


def channels_first(x: Tensor, where: str, documented: str = "first") -> Tensor:
    """Convert images `[N, C, H, W]` or `[N, H, W, C]` to `[N, C, H, W]`.

    The position of the channels is inferred from the lengths of the axes: an axis of length 1 or 3
    contains the channels, otherwise the only axis with at most 16 elements.
    The result is a view of `x`.

    Args:
        x: The images.
        where: Prefix of error messages.
        documented: Position of the channels, `first` or `last`, according to the documentation of
            the data source. This position is used only if the lengths of the axes are inconclusive.

    Raises:
        UserError: If both positions result in one or three channels, and the images are square for
            neither or for both.
    """
    _, first, middle, last = x.shape
    if {first, last} <= set(USUAL_CHANNELS) and first * middle * last > 1:
        is_square = middle == last
        if is_square == (first == middle):
            raise UserError(
                f"{where}: ambiguous shape {tuple(x.shape)}, channels first or last; "
                "pass images of shape (N, 1 or 3, H, W)"
            )
        is_first = is_square
    elif first in USUAL_CHANNELS or last in USUAL_CHANNELS:
        is_first = first in USUAL_CHANNELS
    elif (first > MAX_CHANNELS) != (last > MAX_CHANNELS):
        is_first = last > MAX_CHANNELS
    else:
        is_first = documented == "first"
    return x if is_first else x.movedim(-1, 1)


def in_range(images: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Convert the floating-point images of a data set to the range [0, 1].

    Floats with a maximum between 128 and 255 are interpreted as bytes: images are converted to
    uint8 if all values are integers, otherwise divided by 255. All parts of the data set are
    treated equally.

    Args:
        images: Images `[N, C, H, W]`, keyed by the name that error messages quote. If any image
            contains NaN or infinity, no image is changed, because `check_examples` rejects such
            images later.

    Returns:
        The images, and whether floats were interpreted as bytes.

    Raises:
        UserError: If floats have another range.
    """
    ranges = {
        n: (float(x.min()), float(x.max()))
        for n, x in images.items()
        if x.is_floating_point() and x.numel()
    }
    low = min((a for a, _ in ranges.values()), default=0.0)
    high = max((b for _, b in ranges.values()), default=0.0)
    if not all(np.isfinite(limits).all() for limits in ranges.values()) or (
        low >= -SCALE_TOLERANCE and high <= 1 + SCALE_TOLERANCE
    ):
        return dict(images), False
    if low < 0 or not MIN_BYTE_MAXIMUM <= high <= 255:
        name = next(n for n, (a, b) in ranges.items() if a == low or b == high)
        a, b = ranges[name]
        raise UserError(
            f"{name}: expected uint8 or floats from 0 to 1, got floats from {a:g} to {b:g}; "
            "preprocess.normalize standardizes them"
        )
    are_integers = all(bool((images[n] == images[n].floor()).all()) for n in ranges)
    converted = dict(images)
    for name in ranges:
        x = images[name]
        converted[name] = x.to(torch.uint8) if are_integers else x / 255
    return converted, True


def dtype_name(tensor: Column) -> str:
    """Return the name of a tensor's dtype without `torch.`."""
    return str(tensor.dtype).removeprefix("torch.")


def is_convertible(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether `to_shape` can convert examples of one shape to another.

    Shapes are convertible if they are equal, or if both are image shapes whose numbers of channels
    are equal or include 1.
    """
    images = len(shape) == len(other) == 3
    return shape == other or (images and len({shape[0], other[0]} | {1}) <= 2)


def to_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Convert examples to another shape.

    Images are resized by bilinear interpolation. If the numbers of channels differ, the channels
    are then averaged into one, or a single channel is repeated.

    Args:
        x: Examples, shape `[B, …]`.
        shape: New shape of an example, `(channels, *size)`.
    """
    if tuple(x.shape[1:]) == shape:
        return x
    channels, *size = shape
    if list(x.shape[2:]) != size:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    if x.shape[1] == channels:
        return x
    return x.mean(1, keepdim=True) if channels == 1 else x.expand(-1, channels, *size)


def reshape_rows(column: Column, shape: tuple[int, ...]) -> Column:
    """Convert a column of examples, in memory or in files, to another shape (see `to_shape`)."""
    return map_rows(column, partial(to_shape, shape=shape))
