"""A data set of arrays in hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.data.base import Dataset, Examples, check_examples, places
from hetero_fl.data.layout import Block
from hetero_fl.data.tokens import Vocabulary
from hetero_fl.errors import UserError
from hetero_fl.images import as_bytes, as_numbers, channels_first, in_range
from hetero_fl.task import Task


def from_arrays(
    x: Any, y: Any, *, validation: tuple[Any, Any] | None = None, test: tuple[Any, Any] | None = None,
    group: Any = None, patient: Any = None, time: Any = None, unit: Any = None, task: Task | None = None,
    name: str = "arrays", simulated: bool = False, about: str = "", columns: tuple[str, ...] = (),
    blocks: Sequence[tuple[str, Sequence[int]]] = (), vocabulary: Vocabulary | None = None,
) -> Dataset:  # fmt: skip
    """A data set of numpy arrays or tensors.

    Args:
        x: images `[N, C, H, W]`, `[N, H, W, C]` or, as whole numbers, `[N, H, W]`: uint8, or floats in 0..1 or 0..255; or
            floats `[N, T, F]` (series) or `[N, F]` (a table).
        y: whole numbers `[N]` (classes, from 0), truth values `[N, L]` (multilabel), or floats `[N]`, `[N, L]`
            (multilabel if all are 0 or 1 and L > 1, else regression).
        validation, test: (x, y) of the common sets, if there are any; otherwise they are carved from the training rows.
        group: whose row it is, `[N]` of numbers or strings, for the natural partition.
        patient: of whom it is, `[N]` of numbers or strings; rows of one patient are never split up.
        time: when the target is, `[N]` of whole numbers (seconds since 1970, or any count that grows) or datetime64: train,
            validation and test are then cut by date, so they are not to be given.
        unit: of regression targets, `[N]`: what a row's targets are relative to. Errors are those of targets × unit.
        columns: names of a table's columns, or of a series' channels.
        blocks: (name, shape) of the modalities that lie side by side in rows `[N, D]`; see also `join`.
        task: what is learned; none: read off the labels.
        vocabulary: what the numbers mean where x is tokens, whole numbers `[N, T]` (see `Vocabulary.encode`).

    Raises:
        UserError: see `check_examples`; images whose range or order of axes could mean two things.
    """
    pairs = {"train": (x, y), "validation": validation, "test": test}
    given = {split: pair for split, pair in pairs.items() if pair is not None}
    labels = {split: _tensor(pair[1], split) for split, pair in given.items()}
    notes: tuple[str, ...] = ()
    if vocabulary is not None:
        images = [_tensor(pair[0], f"{split}: x").long() for split, pair in given.items()]
    else:
        xs = {split: as_numbers(pair[0], f"{name}: {split}: x") for split, pair in given.items()}
        images, notes = _images({f"{name}: {split}: x": x for split, x in xs.items()})
    task = task or _task(list(labels.values()), name)
    examples = {split: Examples(x, _targets(labels[split], task)) for split, x in zip(given, images, strict=True)}
    for split, found in examples.items():
        # missing: whoever sees NaN without `indicate` is told
        check_examples(found, task, f"{name}: {split}", vocabulary=vocabulary, missing=True)
    train = examples["train"]
    if group is not None:
        column, names = places(_listed(group))
        train = replace(train, group=column, group_names=names)
    if patient is not None:
        column, names = places(_listed(patient))
        train = replace(train, patient=column, patient_names=names)
    if time is not None:
        if validation is not None or test is not None:
            raise UserError(f"{name}: time: validation and test are cut by date; leave them out, or leave time out")
        train = replace(train, time=_times(time, name))
    if unit is not None:
        train = replace(train, unit=_tensor(unit, "unit").float())
    check_examples(train, task, f"{name}: train", missing=True, vocabulary=vocabulary)
    return Dataset(
        name, task, train, examples.get("validation"), examples.get("test"), simulated, about, tuple(columns), notes,
        tuple(Block(title, tuple(shape)) for title, shape in blocks), vocabulary=vocabulary,
    )  # fmt: skip


def _times(values: Any, name: str) -> Tensor:
    """Whole numbers as they are, dates as seconds since 1970, int64 `[N]`."""
    found = np.asarray(values)
    if np.issubdtype(found.dtype, np.datetime64):
        found = found.astype("datetime64[s]").astype(np.int64)
    if not np.issubdtype(found.dtype, np.integer):
        raise UserError(f"{name}: time: found {found.dtype}; want whole numbers or datetime64")
    return torch.from_numpy(found.astype(np.int64))


def _listed(values: Any) -> list[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _tensor(values: Any, split: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{split}: not an array of numbers: {error}") from error


def _images(raw: Mapping[str, Tensor]) -> tuple[list[Tensor], tuple[str, ...]]:
    """Images in the form of `hetero_fl.images`, anything else in float32, and a line on what was changed."""
    x = {where: as_bytes(x, where) if x.ndim in (3, 4) else x for where, x in raw.items()}
    x = {where: x[:, None] if x.dtype == torch.uint8 and x.ndim == 3 else x for where, x in x.items()}
    x = {where: x.float() if x.is_floating_point() else x for where, x in x.items()}
    four = {where: channels_first(x, where) for where, x in x.items() if x.ndim == 4}
    ranged, scaled = in_range(four)
    notes = [f"{where}: read as rows x height x width x channels" for where in four if _turned(raw[where], four[where])]
    if scaled:
        notes.append(f"{next(iter(raw))}: floats from 0 to 255 are read as bytes")
    return list((x | ranged).values()), tuple(notes)


def _turned(before: Tensor, after: Tensor) -> bool:
    return before.ndim == 4 and before.shape != after.shape


def _task(labels: list[Tensor], name: str) -> Task:
    first = labels[0]
    if first.ndim not in (1, 2) or first.numel() == 0:
        raise UserError(f"{name}: train: y: found shape {tuple(first.shape)}; want (N,) or (N, L)")
    width = first.shape[1] if first.ndim == 2 else 1
    if first.is_floating_point() or (first.ndim == 2 and width > 1):
        binary = width > 1 and all(bool(((y == 0) | (y == 1)).all()) for y in labels)
        return Task("multilabel" if binary else "regression", width)
    return Task("multiclass", max(int(y.max()) for y in labels if y.numel()) + 1)


def _targets(y: Tensor, task: Task) -> Tensor:
    if task.kind == "multiclass":
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        return y if y.is_floating_point() else y.long()
    return (y[:, None] if y.ndim == 1 else y).float()
