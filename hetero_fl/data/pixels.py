"""The range of integer pixels: one value that becomes 1 for all participants of a federation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hetero_fl.config.data import DataConfig
from hetero_fl.core.images import DEEP_RANGES, MAX_BYTE, are_pixels, check_pixels, exceeds
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.overlap import PUBLIC_SETS
from hetero_fl.data.splits import RowSelection
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.text import Caution, format_list

DIM = 31
"""Largest pixel of 8-bit images that are suspected to have another range than 0 to 255."""
DARK_FACTOR = 16
"""Factor by which the range of deep images exceeds the pixels of sets that are noted as dark."""
CHECKED_ROWS = 256
"""Number of images whose largest pixel is computed at a time."""


@dataclass(frozen=True)
class PixelRange:
    """The value of integer pixels that becomes 1, and remarks on how it was chosen.

    Attributes:
        value: The value. If None, the images are floats, or the value is 255.
        notes: Remarks for the user.
    """

    value: float | None = None
    notes: tuple[str, ...] = ()


def choose_range(
    dataset: Dataset,
    config: DataConfig,
    rows: ClientRows,
    public: Mapping[str, RowSelection],
    advice: str = "",
    *,
    is_chosen: bool = False,
) -> PixelRange:
    """Choose the value of integer pixels that becomes 1, for all participants.

    The value is `data.range` or that of the data set. Otherwise, it follows from the images of all
    clients, rows that are held out of them included: 1 if no pixel exceeds 1, 255 if none exceeds
    255, and else the largest number of the smallest even number of bits.

    Args:
        dataset: Main data set.
        config: Data configuration.
        rows: Rows of the clients on this machine.
        public: Public sets, keyed by name.
        advice: How to change the value, for messages. If empty, by `data.range`.
        is_chosen: Whether the user has chosen the range of the data set, also for masks.

    Raises:
        UserError: If `data.range` is not set, and pixels are negative or sets have more or fewer
            bits than those of the clients, or 0 and 1 only where others have larger ones. If
            `data.range` is set, and no images are integers.
    """
    training = {"the training set": dataset.train.x}
    shared = {f"the {PUBLIC_SETS[name]}": part for name, part in public.items()}
    others = {name: part.examples.x for name, part in shared.items()}
    for (client, split), share in rows.rows_by_location():
        found = training if split == "train" else others
        found[f"client '{client}': {split}"] = share.examples.x
    training = _integer_images(training)
    others = _integer_images(others)
    in_program = config.name.startswith(OBJECT_PREFIX)
    by_key = "pass overrides=['data.range=MAXIMUM']" if in_program else "set data.range"
    advice = advice or by_key
    if not training | others:
        if config.range is not None:
            raise UserError(
                "data.range: applies to images of integers only; remove it, or divide the values"
            )
        return PixelRange(_unless_default(dataset.pixel_range))
    value = config.range or dataset.pixel_range or _range_of(training or others, advice)
    notes: list[str] = []
    if config.range is None:
        for name, x in (training | others).items():
            cure = f"convert them to one range, or {advice}"
            check_pixels(x, value, name, cure, complete=not is_chosen)
        if value == 1:
            notes.append(f"pixels are 0 and 1 and are not divided by 255; {advice} to divide them")
        elif value > MAX_BYTE:
            notes.append(
                f"pixels are divided by {value:g}, the largest number of their bits; {advice} if "
                "their range is another"
            )
        elif not any(exceeds(x, DIM) for x in (training or others).values()):
            notes.append(
                Caution(
                    f"no pixel exceeds {DIM}, and pixels are divided by 255; {advice} if their "
                    "range is another"
                )
            )
    low = 1 if value <= MAX_BYTE else int(value) // DARK_FACTOR
    own = {f"'{client}'": splits["train"] for client, splits in rows.assigned.items()}
    parts = {
        name: part
        for name, part in (own | shared).items()
        if are_pixels(part.examples.x) and len(part.rows)
    }
    dark = [name for name, part in parts.items() if not _has_above(part, low)]
    if value > 1 and dark and len(dark) < len(parts):
        notes.append(
            Caution(
                f"pixels are divided by {value:g} for all clients, but do not exceed {low} at "
                f"{format_list(dark)}; convert them if their range differs"
            )
        )
    return PixelRange(_unless_default(value), tuple(notes))


def _unless_default(value: float | None) -> float | None:
    return None if value in (None, MAX_BYTE) else float(value)


def _integer_images(sets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sets of integer images, each once."""
    distinct = {
        id(x): (name, x) for name, x in reversed(list(sets.items())) if are_pixels(x) and len(x)
    }
    return dict(reversed(list(distinct.values())))


def _range_of(sets: Mapping[str, Tensor], advice: str) -> int:
    """Return the largest number of the bits that the pixels need: 1, 8 or a larger even number."""
    if all(x.dtype == torch.uint8 for x in sets.values()):
        return MAX_BYTE if any(exceeds(x, 1) for x in sets.values()) else 1
    high = 0
    for name, x in sets.items():
        for part in x.split(CHECKED_ROWS):
            if (low := int(part.min())) < 0:
                raise UserError(f"{name}: pixels must be >= 0, got {low}; {advice}")
            high = max(high, int(part.max()))
    return next(value for value in (1, MAX_BYTE, *DEEP_RANGES) if value >= high)


def _has_above(part: RowSelection, limit: float) -> bool:
    """Return whether a pixel of the selected rows exceeds a limit."""
    x = part.examples.x
    return any(exceeds(x[rows], limit) for rows in part.rows.split(CHECKED_ROWS))
