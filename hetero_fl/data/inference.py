"""Examples that a user gives to a saved model, as that model sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import as_bytes, as_numbers, in_range
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.dataset import Block, ColumnLayout, indicator_names
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.utils.errors import UserError, check_names

WHERE = "predict: x"


def preprocess_inputs(model: SavedModel, x: Any) -> Tensor:
    """Raw examples as users have them (see `SavedModel.examples`), preprocessed for this model.

    Where the model sees named columns or blocks: whole rows as the data set has them; the values of its one block alone; or
    a dictionary of blocks by name, each `[N, *shape]`, from which one that the model can do without may be absent. Of a data
    frame, if the model knows the names of a table's columns, columns are taken by name, in any order; those that the model
    does not see, or can do without, may be absent, and text columns are encoded as the run's were. NaN is a missing value.

    Raises:
        UserError: another shape or name, infinity, a missing value that the model has no answer to.
    """
    view = Preprocess(**model.preprocess)
    if model.columns and len(model.arch.input_shape) == 1 and hasattr(x, "columns"):
        x = _columns_by_name(x, model, view)
    if isinstance(x, Mapping):
        rows = _join_blocks(x, view)
        view = replace(view, raw=None, spans=None)
        return _check_rows(rows, view)
    shape = tuple(np.shape(x)[1:])
    if view.raw is None or shape != view.raw:
        if view.raw is not None and (len(view.blocks) != 1 or view.missing is not None):
            wanted = f"(N, {', '.join(map(str, view.raw))}), as the data set has them"
            raise UserError(f"{WHERE}: found shape {tuple(np.shape(x))}; this model takes {wanted}")
        return replace(view, raw=None, spans=None, blocks=())(model.examples(x))
    return _check_rows(as_numbers(x, WHERE).to(torch.get_default_dtype()), view)


def _columns_by_name(frame: Any, model: SavedModel, view: Preprocess) -> Tensor:
    """The columns of a frame in the order of those that are known, `[N, F]`; NaN where one is absent.

    A frame may have other columns, such as the label, if none is absent.
    """
    names = [str(name) for name in frame.columns]
    known = model.columns
    categories = dict(model.categories)
    encoded = ColumnLayout(known, categories=model.categories).encoded_columns
    readable = [*known, *categories]
    for name in names:
        if name in readable and names.count(name) > 1:
            raise UserError(f"{WHERE}: found column '{name}' {names.count(name)} times")
    absent = [n for n in view.names(known) if n not in names and encoded.get(n) not in names]
    if absent:  # a column that is not known may be one of them, misspelt
        check_names(names, readable, f"{WHERE}: found column")
        if view.missing is None:
            column = encoded.get(absent[0], absent[0])
            raise UserError(f"{WHERE}: no column '{column}', which this model sees")
    rows = torch.full((len(frame), len(known)), torch.nan, dtype=torch.get_default_dtype())
    for name, column in zip(names, frame.columns, strict=True):
        if name in categories:
            places = [known.index(one) for one in indicator_names(name, categories[name])]
            rows[:, places] = _encode_indicators(frame[column], categories[name]).to(rows.dtype)
        elif name in known:
            rows[:, known.index(name)] = as_numbers(frame[column], f"{WHERE}: {name}").to(
                rows.dtype
            )
    return rows


def _encode_indicators(column: Any, values: tuple[str, ...]) -> Tensor:
    import pandas as pd

    from hetero_fl.data.sources.table_files import encode_indicators

    return torch.from_numpy(encode_indicators(pd.Series(np.asarray(column)), values))


def _check_rows(rows: Tensor, view: Preprocess) -> Tensor:
    taken = view.select_columns(rows).flatten(1)
    bad = taken.isinf() if view.missing is not None else ~torch.isfinite(taken)
    if bool(bad.any()):
        raise UserError(
            f"{WHERE}: NaN or infinity in row {int(bad.any(1).to(torch.uint8).argmax())}"
        )
    return view(rows)


def _join_blocks(blocks: Mapping[str, Any], view: Preprocess) -> Tensor:
    """Rows `[N, D]` of the view's blocks."""
    names = [b.name for b in view.blocks]
    check_names(blocks, names, f"{WHERE}: found")
    parts = {name: as_numbers(values, f"{WHERE}: {name}") for name, values in blocks.items()}
    count = len(next(iter(parts.values()))) if parts else 0
    rows = []
    for block in view.blocks:
        part = parts.get(block.name, torch.full((count, block.size), torch.nan))
        if len(part) != count:
            raise UserError(
                f"{WHERE}: {block.name}: found {len(part)} rows, of {next(iter(parts))} {count}"
            )
        rows.append(_block_values(part, block))
    return torch.cat(rows, dim=1)


def _block_values(part: Tensor, block: Block) -> Tensor:
    """A block's values `[N, size]`; images may be as `SavedModel.examples` takes them, and are in 0..1 then."""
    where = f"{WHERE}: {block.name}"
    found = tuple(part.shape)
    dtype = torch.get_default_dtype()
    if block.image:
        part = as_bytes(part[:, None] if part.ndim == 3 else part, where)
        last = part.ndim == 4 and tuple(part.shape[1:]) != block.shape
        part = part.movedim(-1, 1) if last else part
    if tuple(part.shape[1:]) not in (block.shape, (block.size,)):
        raise UserError(
            f"{where}: found shape {found}; want ({len(part)}, {', '.join(map(str, block.shape))})"
        )
    if not block.image:
        return part.reshape(len(part), block.size).to(dtype)
    part = part.reshape(len(part), block.size)
    gone = part.isnan().all(1)
    there = in_range({where: part[~gone]})[0][where]
    there = there.to(dtype) / 255 if there.dtype == torch.uint8 else there.to(dtype)
    return there.new_full((len(part), block.size), torch.nan).masked_scatter(~gone[:, None], there)
