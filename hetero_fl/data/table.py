"""Tables, which readers return as found, and `build`, which turns tables into a data set."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import (
    MAX_CHANNELS,
    USUAL_CHANNELS,
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
    check_inputs,
    first_true,
    note_identifiers,
)
from hetero_fl.data.dataset import Block, Dataset, Examples, Vocabulary, concatenate_examples
from hetero_fl.data.labels import Kind, read_labels
from hetero_fl.utils.arrays import index_names, missing_entries, owner_list, plain_array
from hetero_fl.utils.errors import UserError, check_names, printable
from hetero_fl.utils.text import format_list

SPLITS = ("train", "validation", "test")
"""Splits of the rows of a table."""
UNLABELED = Task("regression", 1)
"""Task of data sets without labels, which is never used."""


@dataclass
class Table:
    """Rows of one file or array, as a reader finds them.

    All columns have one entry for each row.

    Attributes:
        x: Inputs.
        y: Labels, `[N]` or `[N, L]`, as accepted by `from_arrays`. If None, the rows have none.
        split: "train", "validation" or "test", for all rows or for each row.
        where: Place of the rows, for messages.
        names: Names of x, y and rows, for messages.
        group: Group of each row.
        patient: Patient of each row.
        time: Time of the target of each row, as integers or datetime64.
        unit: Scale of the regression targets of each row.
        metadata: Further columns, keyed by name.
    """

    x: Any
    y: Any = None
    split: Any = "train"
    where: str = ""
    names: ExampleNames = ARRAY_NAMES
    group: Any = None
    patient: Any = None
    time: Any = None
    unit: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def x_place(self) -> str:
        """Place of the inputs, for messages."""
        return f"{self.where}: {self.names.x}"

    @property
    def y_place(self) -> str:
        """Place of the labels, for messages."""
        return f"{self.where}: {self.names.y}"


def build(
    tables: Sequence[Table],
    task: Task | str | None,
    where: str,
    *,
    name: str = "",
    channels: Literal["", "first", "last"] = "",
    num_classes: int | None = None,
    label_names: tuple[str, ...] = (),
    notes: Sequence[str] = (),
    warn: bool = False,
    local: bool = False,
    **described: Any,
) -> Dataset:
    """Create a data set from tables, whose labels and images are interpreted together.

    Args:
        tables: Tables, the first of which has training rows. If a split has several tables, they
            are concatenated, and each has the rows of one group.
        task: Kind of the task, or the task. If None, the labels determine the task.
        where: Place of all tables, for messages.
        name: Name of the data set. If empty, `where`.
        channels: Position of the channels of images where their shape does not determine it. If
            "last", as in the MedMNIST layout, arrays `[N, H, W]` are images. If empty, the inputs
            have the format of `Examples.x`.
        num_classes: Number of classes of labels that are class numbers from 0.
        label_names: Names of the columns of the labels, which are also the names of outputs.
        notes: Remarks on how the tables were read, to which those on labels and inputs are added.
        warn: Whether remarks on labels are also warnings.
        local: Whether test rows of groups that train are also the local sets of the groups.
        **described: Further arguments of `Dataset`.

    Raises:
        UserError: If the tables are invalid (see `from_arrays`).
    """
    found, labels, remarks = _read_labels(tables, task, where, num_classes)
    if label_names and not found.names:
        if found.kind == "multiclass" and len(label_names) == 1:
            found = replace(found, names=found.output_names)
        elif len(label_names) == found.outputs:
            found = replace(found, names=label_names)
    inputs, of_inputs = _read_inputs(
        tables, described.get("columns", ()), described.get("vocabulary"), channels
    )
    _check_columns(described.get("columns", ()), inputs[0], where)
    for line in remarks if warn else ():
        warnings.warn(printable(line), UserWarning, stacklevel=3)
    parts: dict[str, list[_Part]] = {}
    for table, x, y in zip(tables, inputs, labels, strict=True):
        part = _check_part(table, x, y, found, described.get("vocabulary"))
        for split, own in _divide(table, part):
            parts.setdefault(split, []).append(own)
            first = next(iter(parts.values()))[0]
            _check_shape(own, first, needs_type=len(parts[split]) > 1)
    if "train" not in parts:
        raise UserError(f"{where}: split: expected rows of 'train', got none")
    splits = {split: _join(split, own, local) for split, own in parts.items()}
    local_sets = {}
    if local and "test" in splits:
        test = splits["test"]
        splits["test"] = replace(test, group=None, group_names=())
        if set(test.group_names) & set(splits["train"].group_names):
            local_sets = {"test": test}
    return Dataset(
        name or where,
        found,
        splits["train"],
        splits.get("validation"),
        splits.get("test"),
        notes=(*notes, *of_inputs, *remarks),
        local_sets=local_sets,
        **described,
    )


def _read_labels(
    tables: Sequence[Table], task: Task | str | None, where: str, num_classes: int | None
) -> tuple[Task, list[Tensor | None], list[str]]:
    """Return the task, the targets of each table, and notes (see `read_labels`)."""
    first = tables[0]
    if first.y is None:
        return UNLABELED, [None] * len(tables), []
    found, targets, notes = read_labels(
        {table.y_place: table.y for table in tables},
        f"{where}: {first.names.y}",
        task=task,
        num_classes=num_classes,
        has_unit=first.unit is not None,
        names=first.names,
    )
    return found, list(targets.values()), notes


def _read_inputs(
    tables: Sequence[Table], columns: tuple[str, ...], vocabulary: Vocabulary | None, channels: str
) -> tuple[list[Tensor], list[str]]:
    """Return the inputs of each table in the format of `Examples.x`, and remarks."""
    if not channels:
        return [table.x for table in tables], []
    if vocabulary is not None:
        return [_tokens(table) for table in tables], []
    first = tables[0]
    raw = {table.x_place: as_numbers(table.x, table.x_place) for table in tables}
    if channels == "first":
        _check_series(raw, columns, first.names)
    images, notes = convert_images(raw, channels)
    found: list[Tensor] = [*images]
    advice = ""
    if first.patient is None:
        in_files = first.names.in_config
        advice = "move it to an array 'patient'" if in_files else "pass its values as patient=..."
        advice = f", or {advice}"
    return found, [*notes, *note_identifiers(found[0], columns, advice)]


def convert_images(raw: Mapping[str, Tensor], channels: str) -> tuple[list[Tensor], list[str]]:
    """Convert images to `[N, C, H, W]`, integers or floats from 0 to 1, and other floats.

    Args:
        raw: Numbers of all parts of a data set, keyed by the name that messages quote.
        channels: Documented position of the channels (see `build`).

    Returns:
        The tensors in the order of `raw`, and remarks on the axis order and value range of images.

    Raises:
        UserError: If the value range or axis order of images is ambiguous.
    """
    pixels = as_pixels({where: x for where, x in raw.items() if x.ndim in (3, 4)})
    inputs = {
        where: _to_channels_first(pixels.get(where, x), where, channels) for where, x in raw.items()
    }
    ranged, remark = in_range({where: x for where, x in inputs.items() if x.ndim == 4})
    notes = [
        f"{where}: read as [rows, height, width, channels]"
        for where, x in ranged.items()
        if channels == "first" and raw[where].ndim == 4 and raw[where].shape != x.shape
    ]
    if remark:
        notes.append(f"{next(iter(raw))}: {remark}")
    return list((inputs | ranged).values()), notes


def _tokens(table: Table) -> Tensor:
    """Return tokens as int64. Missing tokens and fractions are errors."""
    tokens = as_numbers(table.x, table.x_place)
    if tokens.is_floating_point():
        row = first_true(tokens.isnan().reshape(len(tokens), -1).any(1))
        found = f"got {dtype_name(tokens)}"
        if row is not None:
            found = f"{table.names.row(row)} has no value"
        raise UserError(
            f"{table.x_place}: expected integers; {found}; tokens that pad a text are 0"
        )
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


def _check_columns(columns: Sequence[str], x: Tensor, where: str) -> None:
    """Check that each column of a table, or each channel of a series, has a name of its own."""
    if columns and (
        len(set(columns)) < len(columns) or (x.ndim == 2 and len(columns) != x.shape[1])
    ):
        expected = f"{x.shape[-1]} different names" if x.ndim == 2 else "different names"
        raise UserError(f"{where}: columns: expected {expected}, got {format_list(columns)}")


def _to_channels_first(x: Tensor, where: str, documented: str) -> Tensor:
    """Return images `[N, C, H, W]` with their range of values, and other floats as float32."""
    if x.ndim == 3 and (documented == "last" or not x.is_floating_point()):
        x = x[:, None]
    elif x.ndim == 4:
        if documented == "last" and x.shape[-1] > MAX_CHANNELS and x.shape[1] not in USUAL_CHANNELS:
            raise UserError(
                f"{where}: expected shape (N, H, W) or (N, H, W, C), got {tuple(x.shape)}"
            )
        x = channels_first(x, where, documented)
    return x.float() if x.is_floating_point() else x


@dataclass
class _Part:
    """Checked rows of a table, which are of one split.

    Attributes:
        table: The table.
        rows: The rows, without groups and patients.
        owners: Groups and patients of the rows, keyed by "group" and "patient".
    """

    table: Table
    rows: Examples
    owners: dict[str, list[Any]]


def _check_part(
    table: Table, x: Tensor, y: Tensor | None, task: Task, vocabulary: Vocabulary | None
) -> _Part:
    """Return the rows of a table, and check their values.

    Missing inputs are checked later, against the preprocessing of each client.
    """
    if y is not None and len(y) != len(x):
        raise UserError(
            f"{table.y_place}: expected {len(x)} rows as in {table.names.x}, got {len(y)}"
        )
    first = table.names.first_row
    rows = Examples(
        x,
        y,
        time=None if table.time is None else _parse_times(table.time, table.where),
        unit=None if table.unit is None else as_numbers(table.unit, f"{table.where}: unit").float(),
        metadata=table.metadata,
        row=torch.arange(first, first + len(x)),
        files=(table.where.removesuffix(": train"),),
    )
    options: dict[str, Any] = {"names": table.names, "missing": True, "vocabulary": vocabulary}
    if y is None:
        check_inputs(x, table.where, **options)
    else:
        check_examples(rows, task, table.where, **options)
    given = {"group": table.group, "patient": table.patient}
    owners = {
        key: owner_list(values, len(x), f"{table.where}: {key}")
        for key, values in given.items()
        if values is not None
    }
    return _Part(table, rows, owners)


def _divide(table: Table, part: _Part) -> Iterator[tuple[str, _Part]]:
    """Yield each split of a table and its rows."""
    if isinstance(table.split, str):
        yield table.split, part
        return
    found = np.asarray(table.split).astype(str)
    check_names(np.unique(found).tolist(), SPLITS, f"{table.where}: split: unknown value")
    for split in SPLITS:
        index = np.flatnonzero(found == split)
        if len(index):
            owners = {key: [values[i] for i in index] for key, values in part.owners.items()}
            yield split, _Part(table, part.rows.select_rows(torch.from_numpy(index)), owners)


def _check_shape(part: _Part, first: _Part, *, needs_type: bool) -> None:
    """Check that rows have the shape and, if they are concatenated, the type of the first rows."""
    x = part.rows.x
    expected = first.rows.x
    if x.shape[1:] != expected.shape[1:] or (needs_type and x.dtype != expected.dtype):
        raise UserError(
            f"{part.table.x_place}: expected rows of {_describe(expected)} as in "
            f"{first.table.x_place}, got {_describe(x)}"
        )


def _describe(x: Tensor) -> str:
    return f"{dtype_name(x)} and shape {tuple(x.shape[1:])}"


def _join(split: str, parts: Sequence[_Part], local: bool) -> Examples:
    """Return the rows of a split with their owners.

    Rows for evaluation have no owners, except those of local sets.
    """
    rows = parts[0].rows
    if len(parts) > 1:
        rows = concatenate_examples([part.rows for part in parts])
    for key in parts[0].owners:
        if split == "train" or (local and key == "group"):
            index, names = index_names(owner for part in parts for owner in part.owners[key])
            owners: dict[str, Any] = {key: index, f"{key}_names": names}
            rows = replace(rows, **owners)
    if len(parts) > 1:
        places = {str(part.owners["group"][0]): part.table.where for part in parts}
        rows.files = tuple(places[name] for name in rows.group_names)
    return rows


def _parse_times(values: Any, where: str) -> Tensor:
    """Convert dates to seconds since 1970 and return integers unchanged, int64 `[N]`."""
    times = np.asarray(plain_array(values))
    if (row := first_true(missing_entries(times))) is not None:
        raise UserError(f"{where}: time: row {row}: missing value; fill or remove missing values")
    if np.issubdtype(times.dtype, np.datetime64):
        times = times.astype("datetime64[s]").astype(np.int64)
    if not np.issubdtype(times.dtype, np.integer):
        raise UserError(f"{where}: time: expected integers or datetime64, got {times.dtype}")
    return torch.from_numpy(times.astype(np.int64))


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
    if time is not None and (validation is not None or test is not None):
        raise UserError(
            f"{name}: time: cannot be combined with validation or test, which are split by date; "
            "remove them or time"
        )
    train = Table(x, y, "train", f"{name}: train", names, group, patient, time, unit)
    train.metadata = {
        key: np.asarray(plain_array(column)) for key, column in (metadata or {}).items()
    }
    tables = [train]
    for split, pair in (("validation", validation), ("test", test)):
        if pair is not None:
            tables.append(Table(*pair, split, f"{name}: {split}", names))
    return build(
        tables,
        task,
        name,
        channels="first",
        num_classes=num_classes,
        warn=True,
        simulated=simulated,
        about=about,
        columns=tuple(columns),
        blocks=tuple(Block(title, tuple(shape)) for title, shape in blocks),
        vocabulary=vocabulary,
    )
