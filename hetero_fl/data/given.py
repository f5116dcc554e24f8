"""Examples that a user gives to a saved model, as that model sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.data.preprocess import Preprocess
from hetero_fl.errors import UserError, nearest
from hetero_fl.images import as_numbers
from hetero_fl.saved import SavedModel

WHERE = "predict: x"


def as_seen(model: SavedModel, x: Any) -> Tensor:
    """Raw examples as users have them (see `SavedModel.examples`), preprocessed for this model.

    Where the model sees named columns or blocks: whole rows as the data set has them; the values of its one block alone; or
    a dictionary of blocks by name, each `[N, *shape]`, from which one that the model can do without may be absent. NaN is a
    missing value.

    Raises:
        UserError: another shape or name, infinity, a missing value that the model has no answer to.
    """
    view = Preprocess(**model.preprocess)
    if isinstance(x, Mapping):
        rows, view = _joined(x, view), replace(view, raw=None, spans=None)
        return _checked(rows, view)
    shape = tuple(np.shape(x)[1:])
    if view.raw is None or shape != view.raw:
        if view.raw is not None and (len(view.blocks) != 1 or view.missing is not None):
            wanted = f"(N, {', '.join(map(str, view.raw))}), as the data set has them"
            raise UserError(f"{WHERE}: found shape {tuple(np.shape(x))}; this model takes {wanted}")
        return replace(view, raw=None, spans=None, blocks=())(model.examples(x))
    return _checked(as_numbers(x, WHERE).to(torch.get_default_dtype()), view)


def _checked(rows: Tensor, view: Preprocess) -> Tensor:
    taken = view.taken(rows).flatten(1)
    bad = taken.isinf() if view.missing is not None else ~torch.isfinite(taken)
    if bool(bad.any()):
        raise UserError(f"{WHERE}: NaN or infinity in row {int(bad.any(1).to(torch.uint8).argmax())}")
    return view(rows)


def _joined(given: Mapping[str, Any], view: Preprocess) -> Tensor:
    """Rows `[N, D]` of the view's blocks."""
    names = [b.name for b in view.blocks]
    for name in given:
        if name not in names:
            raise UserError(f"{WHERE}: found '{name}'{nearest(name, names)}")
    parts = {name: as_numbers(values, f"{WHERE}: {name}") for name, values in given.items()}
    count = len(next(iter(parts.values()))) if parts else 0
    dtype, rows = torch.get_default_dtype(), []
    for block in view.blocks:
        part = parts.get(block.name, torch.full((count, block.size), torch.nan))
        part = part.to(dtype) / 255 if part.dtype == torch.uint8 else part.to(dtype)
        if len(part) != count or part[0:1].numel() != min(1, count) * block.size:
            raise UserError(f"{WHERE}: {block.name}: found shape {tuple(part.shape)}; want ({count}, {block.shape})")
        rows.append(part.reshape(count, block.size))
    return torch.cat(rows, dim=1)
