"""Data sets from arrays in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import (
    as_numbers,
    as_pixels,
    channels_first,
    dtype_name,
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
    Block,
    Dataset,
    Examples,
    Vocabulary,
    index_names,
    owner_list,
    with_patients,
)
from hetero_fl.data.labels import Kind, read_labels
from hetero_fl.utils.arrays import missing_entries, plain_array
from hetero_fl.utils.errors import UserError, printable


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
            as integers, `[N, H, W]`, and values from 0 to the largest number of their bit depth
            or, as floats, 0..1. Series are floats `[N, T, F]`, and tables are floats `[N, F]`.
            Series with more than one channel need `columns` to distinguish them from images. Tokens
            need `vocabulary`.
        y: Labels. Strings `[N]` are class names. Whole numbers `[N]` are classes if they have at
            most 20 distinct values, or if they are integers that number the classes from 0 or 1.
            Unless the numbers are 0 to C - 1, the sorted distinct labels become the class names.
            Zeros and ones `[N, L]` are multilabel targets, or classes if every row has exactly one
            1. Other labels are regression targets, and so are floats with `unit` or as many values
            as rows.
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
        simulated: Whether the data is simulated.
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
            of images is ambiguous, floats `[N, A, B]` could be images or series, the labels do not
            match `task` or `num_classes`, or arguments contradict each other.

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
    places = {split: f"{name}: {split}: {names.y}" for split in given}
    task, targets, remarks = read_labels(
        {places[split]: pair[1] for split, pair in given.items()},
        f"{name}: {names.y}",
        task=task,
        num_classes=num_classes,
        has_unit=unit is not None,
        names=names,
    )
    labels = {split: targets[place] for split, place in places.items()}
    inputs, notes = _parse_inputs(
        {f"{name}: {split}: {names.x}": pair[0] for split, pair in given.items()},
        tuple(columns),
        vocabulary,
        names,
        patient is not None,
    )
    for line in remarks:
        warnings.warn(printable(line), UserWarning, stacklevel=2)
    notes += tuple(remarks)
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
    extra = _extra_columns(group, time, unit, len(inputs[0]), name)
    extra["metadata"] = {
        key: np.asarray(plain_array(column)) for key, column in (metadata or {}).items()
    }
    examples = {
        split: Examples(inputs_of_split, labels[split], **(extra if split == "train" else {}))
        for split, inputs_of_split in zip(given, inputs, strict=True)
    }
    if patient is not None:
        examples["train"] = with_patients(examples["train"], patient, f"{name}: patient")
    for split, part in examples.items():
        part.row = torch.arange(names.first_row, names.first_row + len(part))
        part.files = (name if split == "train" else f"{name}: {split}",)
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
    has_patients: bool,
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Return x of each split as tensors, and remarks on images and columns of ids.

    Args:
        raw: The inputs of each split, keyed by their name in messages.
        columns: Names of columns or channels.
        vocabulary: Vocabulary if the inputs are tokens, otherwise None.
        names: Names of x, y and rows in the source. Columns of named sources are not checked.
        has_patients: Whether the patient of each row is known.
    """
    if vocabulary is not None:
        return [_tokens(x, where, names) for where, x in raw.items()], ()
    tensors = {where: as_numbers(x, where) for where, x in raw.items()}
    _check_series(tensors, columns, names)
    inputs, notes = _images(tensors)
    if names is ARRAY_NAMES:
        advice = "" if has_patients else ", or pass its values as patient=..."
        notes += tuple(note_identifiers(inputs[0], columns, advice))
    return inputs, notes


def _extra_columns(group: Any, time: Any, unit: Any, rows: int, name: str) -> dict[str, Any]:
    """Return the fields of `Examples` for the columns that are not None."""
    extra: dict[str, Any] = {}
    if group is not None:
        owners = owner_list(group, rows, f"{name}: group")
        extra["group"], extra["group_names"] = index_names(owners)
    if time is not None:
        extra["time"] = _parse_times(time, name)
    if unit is not None:
        extra["unit"] = as_numbers(unit, f"{name}: unit").float()
    return extra


def _parse_times(values: Any, name: str) -> Tensor:
    """Convert dates to seconds since 1970 and return integers unchanged, int64 `[N]`."""
    times = np.asarray(plain_array(values))
    if (row := first_true(missing_entries(times))) is not None:
        raise UserError(f"{name}: time: row {row}: missing value; fill or remove missing values")
    if np.issubdtype(times.dtype, np.datetime64):
        times = times.astype("datetime64[s]").astype(np.int64)
    if not np.issubdtype(times.dtype, np.integer):
        raise UserError(f"{name}: time: expected integers or datetime64, got {times.dtype}")
    return torch.from_numpy(times.astype(np.int64))


def _tokens(values: Any, where: str, names: ExampleNames) -> Tensor:
    """Return tokens as int64. Missing tokens and fractions are errors."""
    tokens = as_numbers(values, where)
    if tokens.is_floating_point():
        row = first_true(tokens.isnan().reshape(len(tokens), -1).any(1))
        found = f"got {dtype_name(tokens)}" if row is None else f"{names.row(row)} has no value"
        raise UserError(f"{where}: expected integers; {found}; tokens that pad a text are 0")
    return tokens.long()


def _check_series(raw: Mapping[str, Tensor], columns: tuple[str, ...], names: ExampleNames) -> None:
    """Reject floats `[N, A, B]` that could be images or series, and images with missing pixels.

    Series must have `columns`.
    """
    for where, x in raw.items():
        if x.ndim in (3, 4) and x.is_floating_point() and not columns:
            missing = x.isnan()
            row = first_true(missing.flatten(1).any(1))
            if row is not None and bool((missing | (x == x.floor())).all()):
                raise UserError(
                    f"{where}: {names.row(row)}: pixels are missing, as in a masked array of "
                    "integers; fill them, for example with x.filled(0)"
                )
        if x.ndim != 3 or not x.is_floating_point() or x.shape[-1] <= 1:
            continue
        shape = tuple(x.shape)
        if not columns:
            raise UserError(
                f"{where}: floats of shape {shape} may be images or series; for images pass "
                f"x[:, None], for series of {x.shape[1]} steps pass "
                f"hetero_fl.data.from_arrays(..., columns=...) with {x.shape[-1]} names of channels"
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
    pixels = as_pixels({where: x for where, x in raw.items() if x.ndim in (3, 4)})
    inputs = {where: _to_channels_first(x, where) for where, x in {**raw, **pixels}.items()}
    images = {where: x for where, x in inputs.items() if x.ndim == 4}
    ranged, remark = in_range(images)
    notes = [
        f"{where}: read as [rows, height, width, channels]"
        for where, image in images.items()
        if raw[where].ndim == 4 and raw[where].shape != image.shape
    ]
    if remark:
        notes.append(f"{next(iter(raw))}: {remark}")
    return list((inputs | ranged).values()), tuple(notes)


def _to_channels_first(x: Tensor, where: str) -> Tensor:
    """Return images `[N, C, H, W]` with their range of values, and other floats as float32."""
    if x.ndim == 3 and not x.is_floating_point():
        x = x[:, None]
    if x.is_floating_point():
        x = x.float()
    return channels_first(x, where) if x.ndim == 4 else x
