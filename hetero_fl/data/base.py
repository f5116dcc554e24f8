"""What every source yields: examples, the data set made of them, and the check that refuses malformed ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hetero_fl.data.layout import Block, Categories, Layout, check_blocks
from hetero_fl.data.tokens import Vocabulary
from hetero_fl.errors import UserError
from hetero_fl.state import in_order
from hetero_fl.task import Task

MOST_NUMBERED_CLASSES = 20  # more different numbers than that are regression targets

Columns = dict[str, Tensor]
"""Tensors aligned on dim 0: "x" and, unless it is a proxy set without labels, "y"."""


@dataclass
class Examples:
    """Raw examples as they lie in memory.

    `x`: uint8 images `[N, C, H, W]`, floats `[N, ...]` (images, `[N, T, F]` series, `[N, F]` tables), or tokens, int64
    `[N, T]` below the data set's `vocabulary`.
    `y`: targets as `Task` defines them, or None where there are none to read.
    `group`: int64 `[N]`, whose row it is, as a place in `group_names`.
    `patient`: int64 `[N]`, of whom it was taken, as a place in `patient_names`; rows of one patient stay together.
    `time`: int64 `[N]`, when the target is, in seconds since 1970 or any count that grows. It makes a set *dated*: train,
    validation and test are cut by date, never drawn.
    `unit`: floats `[N]`; figures of a regression are those of targets × unit, where targets are relative to a level of the row's
    own (a site's mean, say).
    `baselines`: what simple rules say of each row, as a model's outputs `[N, outputs]`, by name. Models never see them.
    """

    x: Tensor
    y: Tensor | None = None
    group: Tensor | None = None
    group_names: tuple[str, ...] = ()
    patient: Tensor | None = None
    patient_names: tuple[str, ...] = ()
    time: Tensor | None = None
    unit: Tensor | None = None
    baselines: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in [*((name, getattr(self, name)) for name in _BY_ROW), *self.baselines.items()]:
            if column is not None and len(column) != len(self.x):
                raise UserError(f"found {len(self.x)} rows of x but {len(column)} of {name}")

    def __repr__(self) -> str:
        columns = {name: getattr(self, name) for name in ("x", *_BY_ROW)}
        shapes = (f"{name} {_shape(column)}" for name, column in columns.items() if column is not None)
        return f"Examples({len(self):,} rows: {', '.join(shapes)})"

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor) -> Examples:
        """The rows (int64 `[M]`), in that order."""
        found: dict[str, Any] = {name: None if (c := getattr(self, name)) is None else c[rows] for name in _BY_ROW}
        said = {name: outputs[rows] for name, outputs in self.baselines.items()}
        return replace(self, x=self.x[rows], baselines=said, **found)


_BY_ROW = ("y", "group", "patient", "time", "unit")


def _shape(column: Tensor) -> str:
    """The type and shape of a row: `uint8 [1, 28, 28]`; of a single value the type alone."""
    name = str(column.dtype).removeprefix("torch.")
    return f"{name} {list(column.shape[1:])}" if column.ndim > 1 else name


def places(values: Iterable[object]) -> tuple[Tensor, tuple[str, ...]]:
    """Names as int64 `[N]`, places in the second, which has each name once, in the order in which people count."""
    found = [str(value).strip() for value in values]
    names = tuple(in_order(set(found)))
    place = {name: i for i, name in enumerate(names)}
    return torch.tensor([place[name] for name in found], dtype=torch.int64), names


@dataclass
class Dataset:
    """A data set: `train` is what gets dealt out; `validation` and `test`, where present, are the common ones.

    `simulated` says that generated data stands in for a real set. `columns` names the features of a table, or the channels of
    a series; `categories` are the text columns that some of them encode. `blocks` are the modalities of flat float rows
    `[N, D]`, in their order. `notes`: lines about how the data was read that a user has to see before the run. `gap`: where
    the first missing value lies, for a line that refuses it. `span`: of a dated set whose rows have several targets, how long
    before `time`, which is the last one's, the first may be. `vocabulary`: what the tokens mean, where x is tokens; all models
    of a federation have this one.
    """

    name: str
    task: Task
    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    simulated: bool = False
    about: str = ""
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    gap: str = ""
    span: int = 0
    vocabulary: Vocabulary | None = None
    categories: Categories = ()

    def __post_init__(self) -> None:
        self.blocks = tuple(Block(str(name), tuple(shape)) for name, shape in self.blocks)
        check_blocks(self.blocks, tuple(self.train.x.shape[1:]), self.name)

    def __repr__(self) -> str:
        splits = ", ".join(f"{name} {len(examples):,}" for name, examples in self.splits().items())
        simulated = ", simulated" if self.simulated else ""
        return (
            f"Dataset({self.name!r}: {self.task.kind} with {self.task.outputs} outputs, x {_shape(self.train.x)}; "
            f"rows: {splits}{simulated})"
        )

    @property
    def layout(self) -> Layout:
        """The names along an example's last axis."""
        return Layout(self.columns, self.blocks, self.categories)

    def splits(self) -> dict[str, Examples]:
        """The splits that there are, by name."""
        all_three = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: examples for name, examples in all_three.items() if examples is not None}


def check_examples(
    examples: Examples,
    task: Task,
    where: str,
    names: tuple[str, str] = ("x", "y"),
    missing: bool = False,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Refuse examples that no model can learn from; `names` are the arrays' names in the source. Rows count from 0.
    `missing`: NaN in x stands for a missing value, and is allowed but in images.

    Raises:
        UserError: no rows; x of a wrong dtype or shape; x or y not finite, tokens outside the vocabulary; y missing, of a
            wrong dtype or shape, or out of the task's range. One class only is allowed.
    """
    x, y = examples.x, examples.y
    x_name, y_name = names

    def refuse(array: str, what: str) -> None:
        raise UserError(f"{where}: {array}: {what}")

    if len(x) == 0:
        refuse(x_name, "found no rows")
    if vocabulary is not None:
        if x.dtype != torch.int64 or x.ndim != 2 or 0 in x.shape:
            refuse(x_name, f"found {_dtype(x)} of shape {tuple(x.shape)}; tokens are int64, rows x length")
        if (row := _first(((x < 0) | (x >= vocabulary.size)).any(1))) is not None:
            refuse(x_name, f"row {row} has a token out of range; they are 0 to {vocabulary.size - 1}")
    elif x.dtype == torch.uint8:
        if x.ndim != 4 or 0 in x.shape:
            wanted = "images are rows x channels x height x width"
            if x.ndim == 2:
                wanted += f'; for a table pass {x_name}.astype("float32")'
            refuse(x_name, f"found shape {tuple(x.shape)}; {wanted}")
    elif not x.is_floating_point():
        wanted = f'for a table pass {x_name}.astype("float32"); tokens need a vocabulary'
        if x.ndim != 2:
            wanted = "choose uint8 (images) or floats; tokens need a vocabulary"
        refuse(x_name, f"found {_dtype(x)} of shape {tuple(x.shape)}; {wanted}")
    elif x.ndim < 2 or 0 in x.shape:
        refuse(x_name, f"found shape {tuple(x.shape)}; every row needs at least one value")
    elif missing and x.ndim < 4:
        if (row := _first(torch.isinf(x).flatten(1).any(1))) is not None:
            refuse(x_name, f"infinity in row {row}")
    elif (row := _first(~torch.isfinite(x).flatten(1).all(1))) is not None:
        refuse(x_name, f"NaN or infinity in row {row}")

    if y is None:
        refuse(y_name, "missing; every set but the proxy needs labels")
    elif task.kind == "multiclass":
        if y.dtype != torch.int64 or y.ndim != 1:
            refuse(y_name, f"found {_dtype(y)} of shape {tuple(y.shape)}; class numbers are int64 of shape ({len(x)},)")
        if (row := _first((y < 0) | (y >= task.outputs))) is not None:
            refuse(y_name, f"label {int(y[row])} in row {row} is out of range; classes are 0 to {task.outputs - 1}")
    else:
        if not y.is_floating_point() or y.shape != (len(x), task.outputs):
            wanted = f"{task.kind} takes floats of shape {(len(x), task.outputs)}"
            refuse(y_name, f"found {_dtype(y)} of shape {tuple(y.shape)}; {wanted}")
        if (row := _first(~torch.isfinite(y).all(1))) is not None:
            refuse(y_name, f"NaN or infinity in row {row}")
        if task.kind == "multilabel" and (row := _first(((y != 0) & (y != 1)).any(1))) is not None:
            refuse(y_name, f"row {row} is out of range; multilabel targets are 0 or 1")
    _check_beside(examples, task, where)


def _check_beside(examples: Examples, task: Task, where: str) -> None:
    """Refuse times, units and baselines that do not fit the rows."""
    time, unit = examples.time, examples.unit
    if time is not None and (time.dtype != torch.int64 or time.ndim != 1):
        raise UserError(
            f"{where}: time: found {_dtype(time)} of shape {tuple(time.shape)}; want int64 ({len(examples)},)"
        )
    if unit is not None:
        if not unit.is_floating_point() or unit.ndim != 1:
            raise UserError(
                f"{where}: unit: found {_dtype(unit)} of shape {tuple(unit.shape)}; want floats ({len(examples)},)"
            )
        if task.kind != "regression":
            raise UserError(f"{where}: unit: is of regression targets, but the task is {task.kind}")
        if (row := _first(~(torch.isfinite(unit) & (unit > 0)))) is not None:
            raise UserError(f"{where}: unit: found {float(unit[row]):g} in row {row}; units are above 0")
    for name, outputs in examples.baselines.items():
        if outputs.shape != (len(examples), task.outputs) or not bool(torch.isfinite(outputs).all()):
            raise UserError(f"{where}: baseline {name}: want finite outputs of shape {(len(examples), task.outputs)}")


def _first(bad: Tensor) -> int | None:
    """Place of the first True of a `[N]` mask."""
    return int(bad.to(torch.uint8).argmax()) if bool(bad.any()) else None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
