"""Data sets from arrays in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import (
    as_bytes,
    as_numbers,
    channels_first,
    in_range,
)
from hetero_fl.core.task import Task
from hetero_fl.data.checks import (
    ARRAY_NAMES,
    ExampleNames,
    check_examples,
    first_true,
    note_identifiers,
)
from hetero_fl.data.dataset import (
    MAX_NUMBERED_CLASSES,
    Block,
    Dataset,
    Examples,
    Vocabulary,
    index_names,
    with_patients,
)
from hetero_fl.utils.errors import UserError, suggest_or_list

Kind = Literal["multiclass", "multilabel", "regression"]
MAX_LISTED_CLASSES = 8
"""Maximum number of classes that a warning lists."""


def from_arrays(
    x: Any,
    y: Any,
    *,
    validation: tuple[Any, Any] | None = None,
    test: tuple[Any, Any] | None = None,
    group: Any = None,
    patient: Any = None,
    time: Any = None,
    unit: Any = None,
    task: Task | Kind | None = None,
    num_classes: int | None = None,
    name: str = "arrays",
    simulated: bool = False,
    about: str = "",
    columns: tuple[str, ...] = (),
    blocks: Sequence[tuple[str, Sequence[int]]] = (),
    vocabulary: Vocabulary | None = None,
    metadata: Mapping[str, Any] | None = None,
    names: ExampleNames = ARRAY_NAMES,
) -> Dataset:
    """Create a data set from NumPy arrays or tensors.

    If labels can be interpreted in more than one way, the chosen interpretation is reported as a
    `UserWarning` and in the log of the run.

    Args:
        x: Images, series, a table or tokens. Images have shape `[N, C, H, W]`, `[N, H, W, C]` or,
            as integers, `[N, H, W]`, and values in 0..255 or, as floats, 0..1. Series are floats
            `[N, T, F]`, and tables are floats `[N, F]`. Series with more than one channel need
            `columns` to distinguish them from images. Tokens need `vocabulary`.
        y: Labels. Integers `[N]` are classes. Unless the integers are 0 to C - 1, the sorted
            distinct labels become the class names. Strings `[N]` are class names. Zeros and ones
            `[N, L]` are multilabel targets, or classes if every row has exactly one 1. Other labels
            are regression targets, unless they are floats `[N]` with 2 to 20 distinct values, fewer
            than rows, all of which are nonnegative integers, and `unit` is None. Such floats are
            classes.
        validation: (x, y) of the global validation set. If None, `federate` holds out the share
            `data.validation` of the training rows.
        test: (x, y) of the global test set. If None, `federate` holds out training rows (see
            `with_test`).
        group: Group of each row, `[N]` numbers or strings, for the natural partition.
        patient: Patient of each row, `[N]` numbers or strings. The rows of a patient are never
            divided between splits or clients.
        time: Time of each target, `[N]` integers (in seconds since 1970 or any other unit) or
            datetime64. If set, training, validation and test rows are split by date, so
            `validation` and `test` must be None.
        unit: Scale of the regression targets of each row, `[N]`. Errors are reported for the
            targets multiplied by this scale.
        task: "multiclass", "multilabel", "regression", or a `Task`, with which numeric labels are
            used unchanged. If None, the task is inferred from the labels.
        num_classes: Number of classes. If set, integer labels are class numbers from 0. If None,
            the number is inferred from the labels.
        name: Name of the data set.
        simulated: Whether the data is generated.
        about: Short description.
        columns: Names of the columns of a table, or of the channels of a series.
        blocks: (name, shape) of each modality in flat rows `[N, D]` (see also
            `join_images_and_table`).
        vocabulary: Vocabulary if x consists of integer tokens `[N, T]` (see `Vocabulary.encode`).
        metadata: Further columns of the training rows for partition functions, such as dates, `[N]`
            each, keyed by name.
        names: Names of x, y and rows in the source of the arrays, for messages.

    Raises:
        UserError: If the examples are invalid (see `check_examples`), the value range or axis order
            of images is ambiguous, floats `[N, A, B]` could be images or series, the labels are
            ambiguous (more than 20 distinct integers, some of them negative, without `task` or
            `num_classes`), the labels do not match `task` or `num_classes`, or arguments contradict
            each other.

    Example:
        >>> import numpy as np
        >>> from hetero_fl.data import from_arrays
        >>> x = np.random.default_rng(0).normal(size=(6, 2)).astype("float32")
        >>> dataset = from_arrays(x, ["ill", "well", "ill", "well", "ill", "well"])
        >>> dataset.task.names
        ('ill', 'well')
        >>> dataset.train
        Examples(6 rows: x float32 [2], y int64)
    """
    pairs = {"train": (x, y), "validation": validation, "test": test}
    given = {split: pair for split, pair in pairs.items() if pair is not None}
    labels, classes = _parse_labels(
        {split: pair[1] for split, pair in given.items()}, task, num_classes, name, names
    )
    inputs, notes = _parse_inputs(
        {f"{name}: {split}: {names.x}": pair[0] for split, pair in given.items()},
        tuple(columns),
        vocabulary,
        names,
    )
    if classes and not isinstance(task, Task):
        task = Task("multiclass", len(classes), classes)
    elif not isinstance(task, Task):
        task, labels, remarks = _read_labels(
            labels, task, num_classes, has_unit=unit is not None, name=name, names=names
        )
        for line in remarks:
            warnings.warn(line, UserWarning, stacklevel=2)
        notes += tuple(remarks)
    elif num_classes is not None:
        raise UserError(
            f"{name}: num_classes: cannot be combined with a Task, got {num_classes} and "
            f"{task.outputs} outputs; remove num_classes"
        )
    if time is not None and len(given) > 1:
        raise UserError(
            f"{name}: time: cannot be combined with validation or test, which are split by date; "
            "remove them or time"
        )
    for split, inputs_of_split in zip(given, inputs, strict=True):
        if len(labels[split]) != len(inputs_of_split):
            raise UserError(
                f"{name}: {split}: {names.y}: expected {len(inputs_of_split)} rows as in "
                f"{names.x}, got {len(labels[split])}"
            )
    extra = _extra_columns(group, time, unit, name)
    extra["metadata"] = {key: np.asarray(column) for key, column in (metadata or {}).items()}
    examples = {
        split: Examples(
            inputs_of_split, _targets(labels[split], task), **(extra if split == "train" else {})
        )
        for split, inputs_of_split in zip(given, inputs, strict=True)
    }
    if patient is not None:
        examples["train"] = with_patients(examples["train"], patient, f"{name}: patient")
    for split, part in examples.items():
        # Missing values are checked later, against the preprocessing of each client.
        check_examples(
            part, task, f"{name}: {split}", names=names, vocabulary=vocabulary, missing=True
        )
    return Dataset(
        name,
        task,
        examples["train"],
        examples.get("validation"),
        examples.get("test"),
        simulated,
        about,
        tuple(columns),
        notes,
        tuple(Block(title, tuple(shape)) for title, shape in blocks),
        vocabulary=vocabulary,
    )


def _parse_inputs(
    raw: Mapping[str, Any],
    columns: tuple[str, ...],
    vocabulary: Vocabulary | None,
    names: ExampleNames,
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Return x of each split as tensors, and remarks on images and columns of ids.

    Args:
        raw: The inputs of each split, keyed by their name in messages.
        columns: Names of columns or channels.
        vocabulary: Vocabulary if the inputs are tokens, otherwise None.
        names: Names of x, y and rows in the source. Columns of named sources are not checked.
    """
    if vocabulary is not None:
        return [_tensor(x, where).long() for where, x in raw.items()], ()
    tensors = {where: as_numbers(x, where) for where, x in raw.items()}
    _check_series(tensors, columns)
    inputs, notes = _images(tensors)
    if names is ARRAY_NAMES:
        notes += tuple(note_identifiers(inputs[0], columns, "pass its values as patient=..."))
    return inputs, notes


def _extra_columns(group: Any, time: Any, unit: Any, name: str) -> dict[str, Any]:
    """Return the fields of `Examples` for the columns that are not None."""
    extra: dict[str, Any] = {}
    if group is not None:
        extra["group"], extra["group_names"] = index_names(_as_list(group))
    if time is not None:
        extra["time"] = _parse_times(time, name)
    if unit is not None:
        extra["unit"] = _tensor(unit, f"{name}: unit").float()
    return extra


def _parse_times(values: Any, name: str) -> Tensor:
    """Convert dates to seconds since 1970 and return integers unchanged, int64 `[N]`."""
    times = np.asarray(values)
    if np.issubdtype(times.dtype, np.datetime64):
        times = times.astype("datetime64[s]").astype(np.int64)
    if not np.issubdtype(times.dtype, np.integer):
        raise UserError(f"{name}: time: expected integers or datetime64, got {times.dtype}")
    return torch.from_numpy(times.astype(np.int64))


def _as_list(values: Any) -> list[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _tensor(values: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: expected an array of numbers ({error})") from error


def _parse_labels(
    labels: Mapping[str, Any],
    task: Task | str | None,
    num_classes: int | None,
    name: str,
    names: ExampleNames,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the labels of each split as numbers, and the class names if the labels are text."""
    places = {split: f"{name}: {split}: {names.y}" for split in labels}
    texts = {
        split: text
        for split, y in labels.items()
        if (text := _text_labels(y, places[split], names)) is not None
    }
    if not texts:
        return {split: _tensor(y, places[split]) for split, y in labels.items()}, ()
    for split in labels:
        if split not in texts:
            raise UserError(f"{places[split]}: expected text as in other splits, got numbers")
    if isinstance(task, Task):
        return _label_numbers(texts, task, name, names), task.names
    if task not in (None, "multiclass"):
        raise UserError(f"{name}: task: must be 'multiclass' for text labels, got '{task}'")
    numbers, classes = index_names(label for text in texts.values() for label in text)
    if num_classes not in (None, len(classes)):
        raise UserError(
            f"{name}: num_classes: must be {len(classes)}, the number of distinct text labels, got "
            f"{num_classes}"
        )
    per_split = numbers.split([len(text) for text in texts.values()])
    return dict(zip(texts, per_split, strict=True)), classes


def _text_labels(y: Any, where: str, names: ExampleNames) -> list[str] | None:
    """Return text labels `[N]`, or None if the labels are not text."""
    if isinstance(y, Tensor):
        return None
    try:
        array = np.asarray(y)
    except (TypeError, ValueError, RuntimeError):
        # `_tensor` reports the problem.
        return None
    labels = array.ravel().tolist()
    if not any(isinstance(label, str) for label in labels):
        return None
    if array.shape not in ((len(labels),), (len(labels), 1)):
        raise UserError(
            f"{where}: expected text labels of shape ({len(array)},), got shape {array.shape}"
        )
    for row, label in enumerate(labels):
        if not isinstance(label, str):
            raise UserError(
                f"{where}: {names.row(row)}: expected text as in other rows, got {label!r}"
            )
    return labels


def _label_numbers(
    texts: Mapping[str, Sequence[str]], task: Task, name: str, names: ExampleNames
) -> dict[str, Tensor]:
    """Convert text labels to the class numbers of a task."""
    if task.kind != "multiclass" or not task.names:
        raise UserError(
            f"{name}: {names.y}: text labels need a multiclass task with class names; add them to "
            "task, or remove task"
        )
    for split, text in texts.items():
        for row, label in enumerate(text):
            if label not in task.names:
                raise UserError(
                    f"{name}: {split}: {names.y}: {names.row(row)}: unknown class '{label}'"
                    f"{suggest_or_list(label, task.names)}"
                )
    return {
        split: torch.tensor([task.names.index(label) for label in text])
        for split, text in texts.items()
    }


def _check_series(raw: Mapping[str, Tensor], columns: tuple[str, ...]) -> None:
    """Reject floats `[N, A, B]` that could be images or series. Series must have `columns`."""
    for where, x in raw.items():
        if x.ndim != 3 or not x.is_floating_point() or x.shape[-1] <= 1:
            continue
        shape = tuple(x.shape)
        if not columns:
            raise UserError(
                f"{where}: floats of shape {shape} may be images or series; for images pass "
                f"x[:, None], for series of {x.shape[1]} steps pass columns with the names of the "
                f"{x.shape[-1]} channels"
            )
        if len(columns) != x.shape[-1]:
            raise UserError(
                f"{where}: columns: expected {x.shape[-1]} names for floats of shape {shape}, got "
                f"{len(columns)}"
            )


def _images(raw: Mapping[str, Tensor]) -> tuple[list[Tensor], tuple[str, ...]]:
    """Convert images to the format of `hetero_fl.core.images` and other floats to float32.

    Returns:
        The tensors in the order of `raw`, and remarks on the axis order and value range of images.
    """
    inputs = {where: _to_channels_first(x, where) for where, x in raw.items()}
    images = {where: x for where, x in inputs.items() if x.ndim == 4}
    ranged, scaled = in_range(images)
    notes = [
        f"{where}: read as [rows, height, width, channels]"
        for where, image in images.items()
        if raw[where].ndim == 4 and raw[where].shape != image.shape
    ]
    if scaled:
        notes.append(f"{next(iter(raw))}: floats from 0 to 255 are read as pixel values")
    return list((inputs | ranged).values()), tuple(notes)


def _to_channels_first(x: Tensor, where: str) -> Tensor:
    """Return images `[N, C, H, W]` with their range of values, and other floats as float32."""
    if x.ndim in (3, 4):
        x = as_bytes(x, where)
    if x.ndim == 3 and x.dtype == torch.uint8:
        x = x[:, None]
    if x.is_floating_point():
        x = x.float()
    return channels_first(x, where) if x.ndim == 4 else x


def _read_labels(
    labels: Mapping[str, Tensor],
    kind: str | None,
    num_classes: int | None,
    *,
    has_unit: bool,
    name: str,
    names: ExampleNames,
) -> tuple[Task, dict[str, Tensor], list[str]]:
    """Return the task, the targets of each split, and remarks on ambiguous labels."""
    kind = _check_kind(kind, num_classes, name)
    where = f"{name}: {names.y}"
    places = {split: f"{name}: {split}: {names.y}" for split in labels}
    y = {split: _squeeze_labels(part, places[split]) for split, part in labels.items()}
    remarks: list[str] = []
    width = 1 if y["train"].ndim == 1 else y["train"].shape[1]
    for split, part in y.items():
        if part.shape[1:] != y["train"].shape[1:]:
            raise UserError(
                f"{places[split]}: expected {width} columns as in train, got shape "
                f"{tuple(part.shape)}"
            )
    if kind is None:
        kind, remarks = _label_kind(list(y.values()), has_unit, where, names)
    if kind == "multiclass" and width == 1:
        numbers = {
            split: class_numbers(part.numpy(), places[split], names) for split, part in y.items()
        }
        return _classes(numbers, num_classes, remarks, where, names)
    if kind == "multiclass":
        if not _is_one_hot(list(y.values())) or num_classes not in (None, width):
            raise UserError(
                f"{where}: a multiclass task needs one column of labels or one-hot rows, got "
                f"{width} columns"
            )
        return (
            Task("multiclass", width),
            {split: part.long().argmax(1) for split, part in y.items()},
            remarks,
        )
    return Task("multilabel" if kind == "multilabel" else "regression", width), y, remarks


def _check_kind(kind: str | None, num_classes: int | None, name: str) -> str | None:
    """Return the kind of task given by `kind` and `num_classes`, or None if both are None.

    Raises:
        UserError: If `kind` is unknown, `num_classes` is less than 2, or `num_classes` is set and
            `kind` is not `multiclass`.
    """
    if kind is not None and kind not in get_args(Kind):
        raise UserError(
            f"{name}: task: unknown task '{kind}'{suggest_or_list(kind, get_args(Kind))}"
        )
    if num_classes is None:
        return kind
    if kind not in (None, "multiclass"):
        raise UserError(
            f"{name}: num_classes: cannot be combined with task='{kind}', got {num_classes}; "
            "remove one of them"
        )
    if num_classes < 2:
        raise UserError(f"{name}: num_classes: must be >= 2, got {num_classes}")
    return "multiclass"


def _squeeze_labels(y: Tensor, where: str) -> Tensor:
    """Return labels of shape `[N]`, or of shape `[N, L]` with L > 1."""
    if y.ndim not in (1, 2) or y.numel() == 0:
        raise UserError(f"{where}: expected shape (N,) or (N, L), got {tuple(y.shape)}")
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y


def _label_kind(
    y: list[Tensor], has_unit: bool, where: str, names: ExampleNames
) -> tuple[Kind, list[str]]:
    """Infer the kind of task from the labels, with a remark if the labels are ambiguous."""
    if y[0].ndim == 2:
        if _is_one_hot(y):
            return "multiclass", [
                f"{where}: every row has exactly one 1, read as {y[0].shape[1]} classes; "
                f"{names.set_task('multilabel')} if the labels are independent"
            ]
        binary = all(bool(((part == 0) | (part == 1)).all()) for part in y)
        return ("multilabel" if binary else "regression"), []
    values = torch.cat(y).double()
    count = len(values.unique())
    if not y[0].is_floating_point():
        if count > MAX_NUMBERED_CLASSES and bool((values < 0).any()):
            raise UserError(
                f"{where}: ambiguous labels, got {count} distinct integers from "
                f"{int(values.min())} to {int(values.max())}; "
                f"{names.set_task('regression', 'multiclass')}"
            )
        return "multiclass", []
    whole = bool((values.isfinite() & (values == values.floor())).all())
    if has_unit or not whole or not 2 <= count <= min(MAX_NUMBERED_CLASSES, len(values) - 1):
        return "regression", []
    line = f"{where}: {count} distinct integers, as floats"
    if bool((values < 0).any()):
        return "regression", [
            f"{line}, some negative, read as regression targets; "
            f"{names.set_task('multiclass')} if they are classes"
        ]
    return "multiclass", [
        f"{line}, read as classes; {names.set_task('regression')} if they are regression targets"
    ]


def _is_one_hot(y: list[Tensor]) -> bool:
    return all(
        bool(((part == 0) | (part == 1)).all() and (part.double().sum(1) == 1).all()) for part in y
    )


def class_numbers(y: np.ndarray, where: str, names: ExampleNames = ARRAY_NAMES) -> Tensor:
    """Convert labels `[N]`, which must be whole numbers, to int64.

    Args:
        y: Labels.
        where: Name of the labels, for error messages.
        names: Names of rows, for error messages.

    Raises:
        UserError: If a label is not a whole number.
    """
    invalid = ~np.isfinite(y) | (y != np.floor(y)) | (np.abs(y) >= float(2**63))
    if (row := first_true(invalid)) is not None:
        raise UserError(f"{where}: {names.row(row)}: expected a class number, got {y[row]:g}")
    return torch.from_numpy(y.astype(np.int64, copy=False))


def _classes(
    y: dict[str, Tensor],
    num_classes: int | None,
    remarks: list[str],
    where: str,
    names: ExampleNames,
) -> tuple[Task, dict[str, Tensor], list[str]]:
    """Return the task of integer labels, the labels as class numbers from 0, and remarks."""
    if num_classes is not None:
        return Task("multiclass", num_classes), y, remarks
    values = torch.cat(list(y.values())).unique()
    if int(values[0]) == 0 and int(values[-1]) == len(values) - 1:
        return Task("multiclass", len(values)), y, remarks
    listed = values[:MAX_LISTED_CLASSES].tolist()
    pairs = ", ".join(f"{label} as class {index}" for index, label in enumerate(listed))
    hidden = len(values) - len(listed)
    more = f" and {hidden} more" if hidden else ""
    keep = ""
    if int(values[0]) >= 0 and not names.in_config:
        keep = f"pass num_classes={int(values[-1]) + 1} to keep the numbers, or "
    note = (
        f"{where}: read as {len(values)} classes: {pairs}{more}; {keep}"
        f"{names.set_task('regression')} for regression targets"
    )
    task = Task("multiclass", len(values), tuple(str(label) for label in values.tolist()))
    return (
        task,
        {split: torch.searchsorted(values, part) for split, part in y.items()},
        [*remarks, note],
    )


def _targets(y: Tensor, task: Task) -> Tensor:
    if task.kind == "multiclass":
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        return y if y.is_floating_point() else y.long()
    return (y[:, None] if y.ndim == 1 else y).float()
