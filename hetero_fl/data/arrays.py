"""A data set of arrays in hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetero_fl.data.base import Dataset, Examples, check_examples
from hetero_fl.errors import UserError
from hetero_fl.state import in_order
from hetero_fl.task import Task


def from_arrays(
    x: Any, y: Any, *, validation: tuple[Any, Any] | None = None, test: tuple[Any, Any] | None = None,
    group: Any = None, task: Task | None = None, name: str = "arrays", simulated: bool = False, about: str = "",
    columns: tuple[str, ...] = (),
) -> Dataset:  # fmt: skip
    """A data set of numpy arrays or tensors.

    Args:
        x: uint8 images `[N, C, H, W]` or `[N, H, W]`, or floats `[N, ...]`.
        y: whole numbers `[N]` (classes, from 0), truth values `[N, L]` (multilabel), or floats `[N]`, `[N, L]`
            (multilabel if all are 0 or 1 and L > 1, else regression).
        validation, test: (x, y) of the common sets, if there are any; otherwise they are carved from the training rows.
        group: whose row it is, `[N]` of numbers or strings, for the natural partition.
        task: what is learned; none: read off the labels.

    Raises:
        UserError: see `check_examples`.
    """
    pairs = {"train": (x, y), "validation": validation, "test": test}
    splits = {
        split: (_images(_tensor(p[0], split)), _tensor(p[1], split)) for split, p in pairs.items() if p is not None
    }
    task = task or _task([labels for _, labels in splits.values()], name)
    examples = {split: Examples(images, _targets(labels, task)) for split, (images, labels) in splits.items()}
    for split, found in examples.items():
        check_examples(found, task, f"{name}: {split}")
    train = examples["train"]
    if group is not None:
        values = [str(g) for g in (group.tolist() if hasattr(group, "tolist") else group)]
        names = in_order(set(values))
        place = {g: i for i, g in enumerate(names)}
        train = Examples(train.x, train.y, torch.tensor([place[g] for g in values]), tuple(names))
    return Dataset(name, task, train, examples.get("validation"), examples.get("test"), simulated, about, columns)


def _tensor(values: Any, split: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{split}: not an array of numbers: {error}") from error


def _images(x: Tensor) -> Tensor:
    if x.dtype == torch.uint8 and x.ndim == 3:
        return x[:, None]
    return x.float() if x.dtype in (torch.float64, torch.float16, torch.bfloat16) else x


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
