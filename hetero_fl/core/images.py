"""Images as users have them, turned into the one form used here; what could mean two things is refused.

The form: uint8 `[N, C, H, W]`, or floats `[N, C, H, W]` in 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.utils.errors import UserError

COLOURS = (1, 3)
# an axis longer than that is not one of channels, unless there is no other choice
MOST_CHANNELS = 16
OVERSHOOT = 1e-3  # what round-off in scaling may add to 0..1
BRIGHT = 128  # floats up to at least this, and to 255 at most, were made from bytes


def as_numbers(values: Any, where: str) -> Tensor:
    """An array as a tensor that owns no surprises: uint8, int64 or a float type torch can compute with.

    Raises:
        UserError: not an array of numbers.
    """
    if isinstance(values, Tensor):
        if values.is_complex():
            raise UserError(f"{where}: found {dtype_name(values)}; want numbers")
        x = values.detach().cpu()
        return (
            x
            if x.dtype in (torch.uint8, torch.int64) or x.is_floating_point()
            else x.to(torch.int64)
        )
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: not an array of numbers: {error}") from error
    if array.dtype.kind not in "buif":
        found = f"{where}: not an array of numbers: found {array.dtype}"
        if hasattr(values, "columns"):
            raise UserError(
                f"{found}; save a data frame with text as a file, which data.name: table reads"
            )
        raise UserError(found)
    if array.dtype.kind in "bui" and array.dtype != np.uint8:
        array = array.astype(np.int64)
    elif array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def as_bytes(x: Tensor, where: str) -> Tensor:
    """Whole numbers of another type, `[N, ...]`, as uint8; anything else as it is.

    Raises:
        UserError: whole numbers outside 0..255.
    """
    if x.is_floating_point() or x.dtype == torch.uint8 or x.numel() == 0:
        return x
    low = int(x.min())
    high = int(x.max())
    if low < 0 or high > 255:
        raise UserError(
            f"{where}: found {dtype_name(x)} from {low} to {high}; give uint8, or floats from 0 to 1"
        )
    return x.to(torch.uint8)


def channels_first(x: Tensor, where: str, documented: str = "first") -> Tensor:
    """Images `[N, C, H, W]` or `[N, H, W, C]` as the former; told apart by the lengths of the axes.

    Args:
        documented: "first" or "last", what the caller's own documentation asks for; it decides where neither reading
            gives one or three channels.

    Raises:
        UserError: both readings give one or three channels, and neither or both square images.
    """
    _, first, middle, last = x.shape
    if {first, last} <= set(COLOURS) and first * middle * last > 1:
        if (square := middle == last) == (first == middle):
            raise UserError(
                f"{where}: found shape {tuple(x.shape)}, channels first or last? give N x 1 or 3 x H x W pixels"
            )
        at_front = square
    elif first in COLOURS or last in COLOURS:
        at_front = first in COLOURS
    elif (first > MOST_CHANNELS) != (last > MOST_CHANNELS):
        at_front = last > MOST_CHANNELS
    else:
        at_front = documented == "first"
    return x if at_front else x.movedim(-1, 1).contiguous()


def in_range(images: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Images of one set in 0..1 if they are floats. Floats that are bytes, from 0 to between 128 and 255, are divided by
    255, or made uint8 where all are whole; all parts of the set alike. The second result says whether that was done.

    Args:
        images: `[N, C, H, W]` each, by the name that a message gives them. Those with NaN or infinity stay as they are:
            `check_examples` names their row.

    Raises:
        UserError: floats of any other range.
    """
    ranges = {
        n: (float(x.min()), float(x.max()))
        for n, x in images.items()
        if x.is_floating_point() and x.numel()
    }
    low = min((a for a, _ in ranges.values()), default=0.0)
    high = max((b for _, b in ranges.values()), default=0.0)
    if not all(np.isfinite(ends).all() for ends in ranges.values()) or (
        low >= -OVERSHOOT and high <= 1 + OVERSHOOT
    ):
        return dict(images), False
    if low < 0 or not BRIGHT <= high <= 255:
        name = next(n for n, (a, b) in ranges.items() if a == low or b == high)
        a, b = ranges[name]
        raise UserError(
            f"{name}: found floats from {a:g} to {b:g}; give uint8, or floats from 0 to 1 "
            "(preprocess.normalize standardises them)"
        )
    whole = all(bool((images[n] == images[n].floor()).all()) for n in ranges)
    return {
        n: x if n not in ranges else x.to(torch.uint8) if whole else x / 255
        for n, x in images.items()
    }, True


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's type without `torch.`."""
    return str(tensor.dtype).removeprefix("torch.")
