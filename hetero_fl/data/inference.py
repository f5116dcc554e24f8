"""Preprocess the examples that a user passes to a saved model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import (
    are_booleans,
    as_numbers,
    as_pixels,
    check_pixels,
    in_range,
    to_floats,
)
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.checks import first_true
from hetero_fl.data.dataset import Block, ColumnLayout, indicator_names
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.utils.errors import UserError, check_names, closest_misspelling

WHERE = "predict: x"


def preprocess_inputs(model: SavedModel, x: Any) -> Tensor:
    """Preprocess raw examples for a saved model.

    NaN stands for a missing value. `x` may have the following formats:

    - An array as accepted by `SavedModel.examples`.
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
        x = _columns_by_name(x, model, view)
    if isinstance(x, Mapping):
        rows = _join_blocks(x, view)
        view = replace(view, raw=None, spans=None)
        return _check_rows(rows, view)
    shape = tuple(np.shape(x)[1:])
    if view.raw is None or shape != view.raw:
        if view.raw is not None and (len(view.blocks) != 1 or view.missing is not None):
            raise UserError(
                f"{WHERE}: expected shape (N, {', '.join(map(str, view.raw))}) as in the data set, "
                f"got {tuple(np.shape(x))}"
            )
        return replace(view, raw=None, spans=None, blocks=())(model.examples(x))
    return _check_rows(as_numbers(x, WHERE).to(torch.get_default_dtype()), view)


def _columns_by_name(frame: Any, model: SavedModel, view: Preprocess) -> Tensor:
    """Return the columns of a data frame in the order of the model, shape `[N, F]`.

    Missing columns are NaN. Unknown columns, such as the label, are ignored unless their name is
    similar to that of a missing column.
    """
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.table_columns import (
        encode_indicators,
        normalize_frame,
        parse_numbers,
        raise_cell_error,
    )

    categories = dict(model.categories)
    frame = normalize_frame(frame, WHERE, categories)
    names = list(frame.columns)
    known = model.columns
    encoded = ColumnLayout(known, categories=model.categories).encoded_columns
    readable = [*known, *categories]
    unknown = [name for name in names if name not in readable]
    for column in view.names(known):
        missing = encoded.get(column, column)
        if column in names or missing in names:
            continue
        similar = closest_misspelling(missing, unknown)
        if view.missing is None or similar is not None:
            cure = "" if similar is None else f"; did you mean '{similar}'?"
            raise UserError(f"{WHERE}: column '{missing}' not found, which the model needs{cure}")
    rows = torch.full((len(frame), len(known)), torch.nan, dtype=torch.get_default_dtype())
    for name in names:
        if name in categories:
            indices = [known.index(one) for one in indicator_names(name, categories[name])]
            indicators = encode_indicators(frame[name], categories[name])
            rows[:, indices] = torch.from_numpy(indicators).to(rows.dtype)
        elif name in known:
            numbers = parse_numbers(frame[name], WHERE, [])
            if numbers is None:
                raise UserError(f"{WHERE}: column '{name}': expected numbers, got text")
            rows[:, known.index(name)] = torch.tensor(numbers, dtype=rows.dtype)
    for name in view.names(known):
        if (row := first_true(_is_unusable(rows[:, known.index(name)], view))) is not None:
            raise_cell_error(WHERE, row, encoded.get(name, name), "NaN or infinite value")
    return rows


def _check_rows(rows: Tensor, view: Preprocess) -> Tensor:
    selected = view.select_columns(rows).flatten(1)
    if (row := first_true(_is_unusable(selected, view).any(1))) is not None:
        raise UserError(f"{WHERE}: row {row}: NaN or infinite value")
    return view(rows)


def _is_unusable(values: Tensor, view: Preprocess) -> Tensor:
    """Return whether each value is infinite, or missing if the model needs it."""
    return values.isinf() if view.missing is not None else ~torch.isfinite(values)


def _join_blocks(blocks: Mapping[str, Any], view: Preprocess) -> Tensor:
    """Concatenate blocks in the order of the view to rows `[N, D]`, with NaN for omitted blocks."""
    if not view.blocks:
        raise UserError(f"{WHERE}: expected an array, got a dictionary; the model uses no blocks")
    names = [b.name for b in view.blocks]
    check_names(blocks, names, f"{WHERE}: unknown block")
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
