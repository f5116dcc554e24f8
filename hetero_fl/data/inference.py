"""Preprocess the examples that a user passes to a saved model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetero_fl.core.images import (
    MAX_BYTE,
    PIXEL_TYPES,
    are_booleans,
    as_numbers,
    as_pixels,
    channels_first,
    check_pixels,
    in_range,
    to_floats,
)
from hetero_fl.core.mapped_tensors import map_rows
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.checks import first_true
from hetero_fl.data.dataset import Block, ColumnLayout, indicator_names
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.utils.errors import UserError, check_names, closest

WHERE = "predict: x"


def preprocess_inputs(model: SavedModel, x: Any) -> Tensor:
    """Preprocess raw examples for a saved model.

    NaN stands for a missing value. `x` may have the following formats:

    - An array as accepted by `raw_examples`.
    - An array of whole rows as in the data set, if the model uses selected columns or blocks. If
      the model uses a single block, the array may contain the values of this block only.
    - A dictionary from the names of blocks to arrays of shape `[N, *shape]`, if the model uses
      blocks. Blocks that may be missing can be omitted.
    - A data frame with the columns in any order, if the model uses a table with named columns.
      Unused columns, and columns that may be missing, can be omitted. Text columns are encoded as
      in training.

    Args:
        model: Saved model.
        x: Raw examples.

    Returns:
        Preprocessed examples, the inputs of the model.

    Raises:
        UserError: If a shape or name does not match, a value is infinite, or a value is missing and
            the model does not accept missing values.
    """
    view = Preprocess.of_model(model)
    if model.columns and len(model.arch.input_shape) == 1 and hasattr(x, "columns"):
        return view(_table_rows(x, model, view))
    if isinstance(x, Mapping):
        return _preprocess_rows(_block_rows(x, view), replace(view, raw=None, spans=None))
    rows = as_numbers(x, WHERE)
    shape = tuple(rows.shape)
    if view.raw == shape[1:]:
        return _preprocess_rows(rows.to(torch.get_default_dtype()), view)
    if view.raw is not None and (len(view.blocks) != 1 or view.missing is not None):
        raise UserError(
            f"{WHERE}: expected shape (N, {', '.join(map(str, view.raw))}) as in the data set, "
            f"got {shape}"
        )
    view = replace(view, raw=None, spans=None, blocks=())
    return view(raw_examples(model, x, view))


def logits_of_rows(model: SavedModel, x: Tensor, personal: bool = False) -> Tensor:
    """Compute the logits of a saved model for raw rows of a data set.

    Args:
        model: Saved model.
        x: Raw rows, `[N, ...]`, which have been checked.
        personal: Whether these are the client's own examples.

    Returns:
        Logits, shape `[N, outputs]`.
    """
    return model.logits(map_rows(x, Preprocess.of_model(model)), personal)


def raw_examples(model: SavedModel, x: Any, view: Preprocess) -> Tensor:
    """Convert an array to the shape and type of training examples before preprocessing.

    Args:
        model: Saved model.
        x: Images, shape `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`, as uint8 or as floats in
            0..1 or 0..255. Tables have the shape `[N, F]`, series `[N, T, F]`, and tokens `[N, T]`,
            as returned by `Vocabulary.encode`.
        view: Preprocessing of the examples.

    Raises:
        UserError: If `x` is not numeric, has another shape or an ambiguous range, or contains NaN
            or infinity.
    """
    raw = as_numbers(x, WHERE)
    shape = tuple(raw.shape)
    is_image = len(model.arch.input_shape) == 3
    if is_image and raw.ndim in (3, 4) and 0 not in shape:
        raw = _pixels(raw, view.pixel_range)
        candidates = [raw[:, None]] if raw.ndim == 3 else [raw, raw.movedim(-1, 1)]
        accepted = [images for images in candidates if _accepts(images, model, view)]
        if raw.ndim == 4 and len(accepted) != 1:
            accepted = [channels_first(raw, WHERE)]
        raw = (accepted or candidates)[0].contiguous()
    if not _accepts(raw, model, view):
        raise UserError(f"{WHERE}: expected {_expected_shapes(model, view)}, got shape {shape}")
    if model.arch.vocabulary is not None:
        return _tokens(raw, model.arch.vocabulary)
    if not (is_image and raw.dtype in PIXEL_TYPES):
        raw = raw.to(torch.get_default_dtype())
    if (row := first_true((~torch.isfinite(raw)).flatten(1).any(1))) is not None:
        raise UserError(f"{WHERE}: row {row}: NaN or infinite value")
    if is_image:
        raw = in_range({WHERE: raw})[0][WHERE]
        check_pixels(raw, view.pixel_range, WHERE, complete=are_booleans(x))
    return raw


def _accepts(x: Tensor, model: SavedModel, view: Preprocess) -> bool:
    """Return whether preprocessing converts examples to the shape of the model's input."""
    if x.ndim < 2:
        return False
    try:
        return view.shape(tuple(x.shape[1:])) == model.arch.input_shape
    except UserError:
        return False


def _expected_shapes(model: SavedModel, view: Preprocess) -> str:
    expected = model.arch.input_shape
    if len(expected) != 3:
        # In raw examples of a series, the steps precede the channels.
        return f"(N, {', '.join(map(str, reversed(expected)))})"
    channels = expected[0] if view.channels is None else "C"
    size = f"{expected[1]}, {expected[2]}" if view.resize is None else "H, W"
    return f"images (N, {channels}, {size}), uint8 or floats from 0 to 1"


def _tokens(raw: Tensor, vocabulary: int) -> Tensor:
    if raw.is_floating_point():
        raise UserError(f"{WHERE}: expected integers, got floats")
    if (row := first_true(((raw < 0) | (raw >= vocabulary)).any(1))) is not None:
        token = next(int(t) for t in raw[row] if not 0 <= t < vocabulary)
        raise UserError(
            f"{WHERE}: row {row}: expected tokens from 0 to {vocabulary - 1}, got {token}"
        )
    return raw.long()


def _pixels(raw: Tensor, pixel_range: float | None) -> Tensor:
    """Return integer images as pixels of the model's type, and floats unchanged."""
    pixels = as_pixels({WHERE: raw})[WHERE]
    # Dark images of a wide type may have the many bits that the model expects.
    is_deep = raw.dtype == torch.int64 and (pixel_range or 0) > MAX_BYTE
    return pixels.to(torch.int32) if is_deep else pixels


def _table_rows(frame: Any, model: SavedModel, view: Preprocess) -> Tensor:
    """Return the columns of a data frame in the order of the model, shape `[N, F]`.

    Missing columns are NaN. Unknown columns, such as the label, are ignored unless their name is
    similar to that of a missing column.
    """
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.columns import (
        encode_indicators,
        normalize_frame,
        parse_numbers,
        raise_cell_error,
    )

    categories = dict(model.categories)
    frame = normalize_frame(frame, WHERE, categories)
    dtype = torch.get_default_dtype()
    columns: dict[str, Tensor] = {}
    for name in frame.columns:
        if name in categories:
            names = indicator_names(name, categories[name])
            indicators = torch.from_numpy(encode_indicators(frame[name], categories[name]))
            columns |= zip(names, indicators.to(dtype).T, strict=True)
        elif name in model.columns:
            numbers = parse_numbers(frame[name], WHERE, [])
            if numbers is None:
                raise UserError(f"{WHERE}: column '{name}': expected numbers, got text")
            columns[name] = torch.tensor(numbers, dtype=dtype)
    unknown = [name for name in frame.columns if name not in (*categories, *model.columns)]
    gap = torch.full((len(frame),), torch.nan, dtype=dtype)
    for column, feature in _needed_columns(model, view).items():
        similar = closest(feature, unknown)
        if column not in columns and (view.missing is None or similar is not None):
            cure = "" if similar is None else f"; did you mean '{similar}'?"
            raise UserError(f"{WHERE}: column '{feature}' not found, which the model needs{cure}")
        if (row := first_true(_is_unusable(columns.get(column, gap), view))) is not None:
            raise_cell_error(WHERE, row, feature, "NaN or infinite value")
    return torch.stack([columns.get(name, gap) for name in model.columns], 1)


def _needed_columns(model: SavedModel, view: Preprocess) -> dict[str, str]:
    """Return the feature of each column that a view selects, keyed by the name of the column."""
    selected = view.names(model.columns)
    layout = ColumnLayout(model.columns, categories=model.categories)
    return {
        column: feature.name
        for feature in layout.features
        for column in feature.columns
        if column in selected
    }


def _preprocess_rows(rows: Tensor, view: Preprocess) -> Tensor:
    selected = view.select_columns(rows).flatten(1)
    if (row := first_true(_is_unusable(selected, view).any(1))) is not None:
        raise UserError(f"{WHERE}: row {row}: NaN or infinite value")
    return view(rows)


def _is_unusable(values: Tensor, view: Preprocess) -> Tensor:
    """Return whether each value is infinite, or missing if the model needs it."""
    return values.isinf() if view.missing is not None else ~torch.isfinite(values)


def _block_rows(blocks: Mapping[str, Any], view: Preprocess) -> Tensor:
    """Concatenate blocks in the order of the view to rows `[N, D]`, with NaN for omitted blocks."""
    if not view.blocks:
        raise UserError(f"{WHERE}: expected an array, got a dictionary; the model uses no blocks")
    check_names(blocks, [b.name for b in view.blocks], f"{WHERE}: unknown block")
    parts = {name: as_numbers(values, f"{WHERE}: {name}") for name, values in blocks.items()}
    count = len(next(iter(parts.values()))) if parts else 0
    rows = []
    for block in view.blocks:
        part = parts.get(block.name, torch.full((count, block.size), torch.nan))
        if len(part) != count:
            raise UserError(
                f"{WHERE}: {block.name}: expected {count} rows as in {next(iter(parts))}, got "
                f"{len(part)}"
            )
        are_bool = block.name in blocks and are_booleans(blocks[block.name])
        rows.append(_block_values(part, block, view.pixel_range, are_bool))
    return torch.cat(rows, dim=1)


def _block_values(part: Tensor, block: Block, pixel_range: float | None, are_bool: bool) -> Tensor:
    """Return the values of a block, shape `[N, size]`. Images become floats from 0 to 1."""
    where = f"{WHERE}: {block.name}"
    shape = tuple(part.shape)
    dtype = torch.get_default_dtype()
    if block.image:
        part = as_pixels({where: part[:, None] if part.ndim == 3 else part})[where]
        last = part.ndim == 4 and tuple(part.shape[1:]) != block.shape
        part = part.movedim(-1, 1) if last else part
    if tuple(part.shape[1:]) not in (block.shape, (block.size,)):
        raise UserError(
            f"{where}: expected shape ({len(part)}, {', '.join(map(str, block.shape))}), got "
            f"{shape}"
        )
    if not block.image:
        return part.reshape(len(part), block.size).to(dtype)
    part = part.reshape(len(part), block.size)
    is_missing = part.isnan().all(1)
    values = in_range({where: part[~is_missing]})[0][where]
    check_pixels(values[:, :, None, None], pixel_range, where, complete=are_bool)
    values = to_floats(values, pixel_range, dtype).to(dtype)
    empty = values.new_full((len(part), block.size), torch.nan)
    return empty.masked_scatter(~is_missing[:, None], values)
