"""Checks of the dtypes, shapes and values of examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import PIXEL_TYPES, dtype_name
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Examples, Vocabulary
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import Caution

DISTINCT_SHARE = 0.95
"""Share of distinct values from which a column of integers or text seems to identify rows."""
DENSE = 10
"""Number of integers per row in a range from which distinct integers are expected by chance."""
MIN_IDENTIFIED = 30
"""Number of rows from which a column can seem to identify rows."""
CHECKED_ROWS = 4096
"""Number of rows whose values are checked at a time."""
DIVIDED_PATIENTS = "they are divided between training and test"
"""End of notes on columns that seem to identify patients who are not known."""


@dataclass(frozen=True)
class ExampleNames:
    """Names in messages about examples.

    Attributes:
        x: Name of the inputs in the source.
        y: Name of the labels in the source.
        first_row: Number of the first row: 0 for arrays, 1 for tables.
        in_config: Whether the task is set in the configuration instead of by an argument.

    Example:
        >>> from hetero_fl.data import ExampleNames
        >>> ExampleNames(x="column 'age'", first_row=1).row(0)
        'row 1'
    """

    x: str = "x"
    y: str = "y"
    first_row: int = 0
    in_config: bool = False

    def row(self, index: int) -> str:
        """Return the name of the row with an index from 0."""
        return f"row {index + self.first_row}"

    def set_task(self, *kinds: str) -> str:
        """Return the advice to set the kind of the task to one of `kinds`."""
        if self.in_config:
            return "set " + " or ".join(f"data.task={kind}" for kind in kinds)
        return "pass " + " or ".join(f"task='{kind}'" for kind in kinds)


ARRAY_NAMES = ExampleNames()
"""Names of the arrays x and y, whose rows count from 0."""


def check_examples(
    examples: Examples,
    task: Task,
    where: str,
    *,
    names: ExampleNames = ARRAY_NAMES,
    missing: bool = False,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Check the dtypes, shapes and values of labeled examples.

    Examples of a single class are accepted.

    Args:
        examples: Examples to check.
        task: Learning task.
        where: Name of the examples, for error messages.
        names: Names of x, y and rows in the source, for error messages.
        missing: Whether NaN in x stands for a missing value instead of being an error. Images must
            not contain NaN in any case.
        vocabulary: Vocabulary if x consists of tokens, otherwise None.

    Raises:
        UserError: If there are no rows, y is missing, or x, y, times, units or baselines have a
            wrong dtype or shape or values that are not finite or out of range.

    Example:
        >>> import torch
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import Examples, check_examples
        >>> examples = Examples(torch.zeros(2, 3), torch.tensor([0, 5]))
        >>> check_examples(examples, Task("multiclass", 2), "toy")
        Traceback (most recent call last):
        hetero_fl.utils.errors.UserError: toy: y: row 1: label 5 is out of range 0 to 1
    """
    check_inputs(examples.x, where, names=names, missing=missing, vocabulary=vocabulary)
    in_y = f"{where}: {names.y}"
    if examples.y is None:
        raise UserError(f"{in_y}: missing; only proxy sets may be unlabeled")
    if task.kind == "multiclass":
        _check_class_labels(examples.y, task.outputs, in_y, names)
    else:
        _check_float_targets(examples.y, task, len(examples), in_y, names)
    _check_extra_columns(examples, task, where)


def check_inputs(
    x: Tensor,
    where: str,
    *,
    names: ExampleNames = ARRAY_NAMES,
    missing: bool = False,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Check the inputs of examples, which may have no labels (see `check_examples`)."""
    in_x = f"{where}: {names.x}"
    if len(x) == 0:
        raise UserError(f"{in_x}: has no rows")
    if vocabulary is not None:
        _check_tokens(x, vocabulary.size, in_x, names)
    else:
        _check_values(x, in_x, names, missing)


def _check_tokens(x: Tensor, vocabulary_size: int, where: str, names: ExampleNames) -> None:
    if x.dtype != torch.int64 or x.ndim != 2 or 0 in x.shape:
        raise UserError(
            f"{where}: expected int64 tokens of shape [rows, length], got {_describe(x)}"
        )
    if (row := first_true(((x < 0) | (x >= vocabulary_size)).any(1))) is not None:
        raise UserError(
            f"{where}: {names.row(row)}: token is out of range 0 to {vocabulary_size - 1}"
        )


def _check_values(x: Tensor, where: str, names: ExampleNames, missing: bool) -> None:
    """Check images, series and tables."""
    if x.dtype in PIXEL_TYPES:
        if x.ndim != 4 or 0 in x.shape:
            hint = f'; for a table pass {names.x}.astype("float32")' if x.ndim == 2 else ""
            raise UserError(
                f"{where}: expected images of shape [rows, channels, height, width], "
                f"got {_describe(x)}{hint}"
            )
    elif not x.is_floating_point():
        if x.ndim == 2:
            hint = f'for a table pass {names.x}.astype("float32"), for tokens pass a vocabulary'
        else:
            hint = "tokens need a vocabulary"
        raise UserError(f"{where}: expected uint8 images or floats, got {_describe(x)}; {hint}")
    elif x.ndim < 2 or 0 in x.shape:
        raise UserError(f"{where}: expected at least one value per row, got {_describe(x)}")
    elif missing and x.ndim < 4:
        if (row := _first_row(x, torch.isinf)) is not None:
            raise UserError(f"{where}: {names.row(row)}: infinite value")
    elif (row := _first_row(x, lambda block: ~torch.isfinite(block))) is not None:
        raise UserError(f"{where}: {names.row(row)}: NaN or infinite value")


def _first_row(x: Tensor, is_invalid: Callable[[Tensor], Tensor]) -> int | None:
    """Return the index of the first row with an invalid value, or None if there is none."""
    # In blocks of rows, because the masks of a large data set would occupy as much memory as it.
    start = 0
    for block in x.split(CHECKED_ROWS):
        if (row := first_true(is_invalid(block).flatten(1).any(1))) is not None:
            return start + row
        start += len(block)
    return None


def _check_class_labels(y: Tensor, num_classes: int, where: str, names: ExampleNames) -> None:
    if y.dtype != torch.int64 or y.ndim != 1:
        raise UserError(
            f"{where}: expected int64 class labels of shape ({len(y)},), got {_describe(y)}"
        )
    if (row := first_true((y < 0) | (y >= num_classes))) is not None:
        raise UserError(
            f"{where}: {names.row(row)}: label {int(y[row])} is out of range 0 to {num_classes - 1}"
        )


def _check_float_targets(
    y: Tensor, task: Task, num_rows: int, where: str, names: ExampleNames
) -> None:
    """Check multilabel and regression targets."""
    if not y.is_floating_point() or y.shape != (num_rows, task.outputs):
        raise UserError(
            f"{where}: expected {task.kind} targets as floats of shape "
            f"{(num_rows, task.outputs)}, got {_describe(y)}"
        )
    if (row := first_true(~torch.isfinite(y).all(1))) is not None:
        raise UserError(f"{where}: {names.row(row)}: NaN or infinite value")
    if task.kind == "multilabel" and (row := first_true(((y != 0) & (y != 1)).any(1))) is not None:
        raise UserError(f"{where}: {names.row(row)}: multilabel targets must be 0 or 1")


def _check_extra_columns(examples: Examples, task: Task, where: str) -> None:
    """Check times, units, excluded classes and baselines."""
    time = examples.time
    unit = examples.unit
    if time is not None and (time.dtype != torch.int64 or time.ndim != 1):
        raise UserError(
            f"{where}: time: expected int64 of shape ({len(examples)},), got {_describe(time)}"
        )
    if unit is not None:
        if not unit.is_floating_point() or unit.ndim != 1:
            raise UserError(
                f"{where}: unit: expected floats of shape ({len(examples)},), got {_describe(unit)}"
            )
        if task.kind != "regression":
            raise UserError(
                f"{where}: unit: cannot be combined with a {task.kind} task; it scales "
                "regression targets"
            )
        if (row := first_true(~(torch.isfinite(unit) & (unit > 0)))) is not None:
            raise UserError(f"{where}: unit: row {row}: must be > 0, got {float(unit[row]):g}")
    if examples.excluded is not None:
        _check_excluded(examples.excluded, examples.labels, task, f"{where}: excluded")
    _check_baselines(examples, task, where)


def _check_baselines(examples: Examples, task: Task, where: str) -> None:
    shape = (len(examples), task.outputs)
    for name, outputs in examples.baselines.items():
        if outputs.shape != shape:
            raise UserError(
                f"{where}: baselines: {name}: expected shape {shape}, got {tuple(outputs.shape)}"
            )
        # A row that is repeated with `expand` is checked once.
        distinct = outputs[:1] if outputs.stride(0) == 0 else outputs
        if not bool(torch.isfinite(distinct).all()):
            raise UserError(f"{where}: baselines: {name}: NaN or infinite value")


def _check_excluded(excluded: Tensor, y: Tensor, task: Task, where: str) -> None:
    if not task.is_ranking:
        raise UserError(f"{where}: needs a task with is_ranking=True")
    width = (task.outputs + 7) // 8
    if excluded.dtype != torch.uint8 or tuple(excluded.shape[1:]) != (width,):
        raise UserError(
            f"{where}: expected uint8 of shape [rows, {width}], the bits of {task.outputs} "
            f"classes, got {_describe(excluded)}"
        )
    # `numpy.packbits` stores the first class in the highest bit.
    bits = excluded.gather(1, (y // 8)[:, None])[:, 0].int() >> (7 - y % 8)
    if (row := first_true((bits & 1) == 1)) is not None:
        raise UserError(f"{where}: row {row}: contains the class of the row, {int(y[row])}")


def _describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor)} of shape {tuple(tensor.shape)}"


def is_identifier(distinct: int, rows: int, span: float = 0) -> bool:
    """Return whether integers or text with so many distinct values seem to identify rows.

    Args:
        distinct: Number of distinct values.
        rows: Number of rows.
        span: Difference between the largest and the smallest integer. In a wide range, numbers
            such as salaries differ by chance.
    """
    is_distinct = rows >= MIN_IDENTIFIED and distinct >= DISTINCT_SHARE * rows
    return is_distinct and span <= DENSE * rows


def note_identifiers(x: Tensor, columns: Sequence[str], advice: str) -> list[str]:
    """Return warnings about columns of integers that seem to identify rows.

    Args:
        x: Inputs. Only tables `[N, F]` with several columns are checked.
        columns: Names of the columns, or empty.
        advice: End of the warnings: how to keep the rows of a patient together, if it is not known.
    """
    if not isinstance(x, Tensor) or x.ndim != 2 or len(x) < MIN_IDENTIFIED or x.shape[1] < 2:
        return []
    notes: list[str] = []
    is_whole = (x[:CHECKED_ROWS] == x[:CHECKED_ROWS].floor()).all(0)
    for index in is_whole.nonzero().squeeze(1).tolist():
        column = x[:, index]
        span = float(column.max() - column.min())
        is_whole_number = bool((column == column.floor()).all())
        if is_whole_number and is_identifier(len(column.unique()), len(x), span):
            name = f"'{columns[index]}'" if columns else str(index)
            notes.append(
                Caution(
                    f"column {name} of x has another integer in almost every row, as an id has, "
                    f"and is a feature; remove the column{advice}"
                )
            )
    return notes


def first_true(mask: Any) -> int | None:
    """Return the index of the first True in a mask `[N]`, or None if there is none."""
    values = np.asarray(mask, dtype=bool)
    return int(values.argmax()) if values.any() else None
