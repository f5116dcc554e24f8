"""Convert users' arrays to images `[N, C, H, W]`, integers or floats in [0, 1], and resize them.

Arrays that can be interpreted in more than one way are rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.masked import is_masked_tensor
from torch.nn import functional as F

from hetero_fl.core.mapped_tensors import map_rows
from hetero_fl.utils.arrays import plain_array
from hetero_fl.utils.errors import UserError

# Usual numbers of channels: gray and RGB.
USUAL_CHANNELS = (1, 3)
# Maximum number of channels. A longer axis is not the axis of channels if another axis is shorter.
MAX_CHANNELS = 16
# Tolerance for rounding errors of images scaled to [0, 1].
SCALE_TOLERANCE = 1e-3
# Floats with at least this maximum are interpreted as pixels.
MIN_BYTE_MAXIMUM = 128
# Largest pixel of 8 bits.
MAX_BYTE = 255
# Types of integer pixels, of 8 and of more bits.
PIXEL_TYPES = (torch.uint8, torch.int32)
# Largest numbers of more than 8 bits.
DEEP_RANGES = tuple(4**pairs - 1 for pairs in range(5, 17))
# Number of images whose pixels are compared at a time.
CHECKED_ROWS = 256


def as_numbers(values: Any, where: str) -> Tensor:
    """Convert an array to a CPU tensor of type uint8, int32, int64 or floating point.

    Integers of 16 or 32 bits become int32, and other integers except uint8 int64. Masked entries
    and null values become NaN.

    Args:
        values: Any array-like object.
        where: Prefix of error messages.

    Raises:
        UserError: If `values` is not an array of numbers.
    """
    if isinstance(values, Tensor):
        return _tensor_as_numbers(values, where)
    try:
        given = np.asarray(plain_array(values))
        # Python numbers get the type that they have in a list.
        array = np.asarray(given.tolist()) if given.dtype == object else given
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
        is_wide = array.dtype.name in ("int16", "uint16", "int32")
        array = array.astype(np.int32 if is_wide else np.int64, copy=False)
    elif array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _tensor_as_numbers(values: Tensor, where: str) -> Tensor:
    if values.is_complex():
        raise UserError(f"{where}: expected real numbers, got {dtype_name(values)}")
    if values.layout != torch.strided or values.is_nested or is_masked_tensor(values):
        raise UserError(
            f"{where}: expected a dense tensor, got a sparse, nested or masked one; convert it "
            "with to_dense(), to_padded_tensor(nan) or to_tensor(nan)"
        )
    if values.is_meta:
        raise UserError(f"{where}: expected a tensor with values, got one on the device meta")
    x = values.detach().cpu()
    if x.dtype == torch.uint8 or x.is_floating_point():
        return x
    is_wide = x.dtype in (torch.int16, torch.uint16, torch.int32)
    return x.to(torch.int32 if is_wide else torch.int64)


def as_pixels(images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the integers of a data set to uint8, or to int32 if they do not fit into 8 bits.

    Floats, uint8 and int32, which may be dark images of more bits, are returned unchanged. All
    other parts of the data set get the same type.

    Args:
        images: Images `[N, …]`, keyed by the name that error messages quote.

    Raises:
        UserError: If a value does not fit into int32.
    """
    wide = {
        name: (int(x.min()), int(x.max()))
        for name, x in images.items()
        if x.dtype == torch.int64 and x.numel()
    }
    limits = torch.iinfo(torch.int32)
    for name, (low, high) in wide.items():
        if low < limits.min or high > limits.max:
            raise UserError(
                f"{name}: expected pixels of at most 31 bits, got {low} to {high}; divide them by "
                "their largest possible value and pass floats"
            )
    is_deep = any(low < 0 or high > MAX_BYTE for low, high in wide.values())
    is_deep |= any(x.dtype == torch.int32 for x in images.values())
    dtype = torch.int32 if is_deep else torch.uint8
    return {name: x.to(dtype) if name in wide else x for name, x in images.items()}


def are_pixels(x: Tensor) -> bool:
    """Return whether examples are images of integers."""
    return x.ndim == 4 and x.dtype in PIXEL_TYPES


def are_booleans(values: Any) -> bool:
    """Return whether an array, which may be nested lists, contains booleans."""
    return "bool" in str(values.dtype if hasattr(values, "dtype") else np.asarray(values).dtype)


def check_pixels(
    x: Tensor,
    pixel_range: float | None,
    where: str,
    advice: str = "convert them to this range, or pass floats from 0 to 1",
    *,
    complete: bool = False,
) -> None:
    """Check that integer pixels fit the range of the images that a model is trained on.

    A range that was configured, and is not the largest number of some bits, has no upper limit.

    Args:
        x: Examples. Those that are no images of integers are accepted.
        pixel_range: Value of integer pixels that becomes 1. If None, 255.
        where: Prefix of the error message.
        advice: End of the error message.
        complete: Whether 0 and 1 only are masks: all images of a data set, or booleans, and not a
            few images that may be black.

    Raises:
        UserError: If the pixels have more or fewer bits than the range.
    """
    if not are_pixels(x):
        return
    limit = pixel_range or MAX_BYTE
    found = ""
    if x.dtype == torch.uint8 and limit > MAX_BYTE:
        found = f"8 bits, at most {MAX_BYTE}"
    elif limit in (1, *DEEP_RANGES) and exceeds(x, limit):
        found = "larger ones"
    elif x.dtype != torch.uint8 and limit <= MAX_BYTE and exceeds(x, MAX_BYTE, low=0):
        found = f"pixels outside 0 to {MAX_BYTE}"
    elif complete and limit > 1 and exceeds(x, 0) and not exceeds(x, 1):
        found = "0 and 1 only"
    if found:
        raise UserError(
            f"{where}: expected pixels from 0 to {limit:g} as in training, got {found}; {advice}"
        )


def to_floats(x: Tensor, pixel_range: float | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Divide integer pixels by their range, 255 if `pixel_range` is None. Floats are unchanged."""
    return x if x.is_floating_point() else x.to(dtype) / (pixel_range or MAX_BYTE)


def exceeds(x: Tensor, high: float, low: float = -torch.inf) -> bool:
    """Return whether a pixel is outside a range. Reading ends at the first batch with one."""
    return any(bool(((rows < low) | (rows > high)).any()) for rows in x.split(CHECKED_ROWS))


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


def in_range(images: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Convert the floating-point images of a data set to integer pixels or to the range [0, 1].

    Floats with a maximum of at least 128 are interpreted as pixels: they are converted to uint8 or
    int32 if all values are integers, otherwise divided by 255. All parts of the data set are
    treated equally.

    Args:
        images: Images `[N, C, H, W]`, keyed by the name that error messages quote. If any image
            contains NaN or infinity, no image is changed, because `check_examples` rejects such
            images later.

    Returns:
        The images, and a remark if floats were interpreted as pixels.

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
        return dict(images), ""
    are_pixels = low >= 0 and high >= MIN_BYTE_MAXIMUM
    are_integers = are_pixels and all(bool((images[n] == images[n].floor()).all()) for n in ranges)
    if not are_pixels or (high > MAX_BYTE and not are_integers):
        name = next(n for n, (a, b) in ranges.items() if a == low or b == high)
        a, b = ranges[name]
        cure = "divide them by their largest possible value"
        if low < 0:
            cure = "pass the original images, which preprocess.normalize standardizes"
        raise UserError(
            f"{name}: expected uint8 or floats from 0 to 1, got floats from {a:g} to {b:g}; {cure}"
        )
    floats = {n: images[n].long() if are_integers else images[n] / MAX_BYTE for n in ranges}
    shown = f"{high:g}" if high > MAX_BYTE else str(MAX_BYTE)
    return dict(images) | as_pixels(floats), f"floats from 0 to {shown} are read as pixel values"


def dtype_name(tensor: Tensor) -> str:
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


def reshape_rows(column: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Convert a column of examples, in memory or in files, to another shape (see `to_shape`)."""
    return map_rows(column, partial(to_shape, shape=shape))
