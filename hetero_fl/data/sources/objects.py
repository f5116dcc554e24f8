"""Data sets from objects of a program: arrays, data frames, and data sets of other libraries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import DIVIDED_PATIENTS
from hetero_fl.data.dataset import Dataset, with_patients
from hetero_fl.data.registry import HUB_PREFIX
from hetero_fl.data.table import Table, build
from hetero_fl.utils.arrays import plain_array
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.text import pluralize

Categories = Mapping[str, tuple[str, ...]]
KINDS = (
    "a pair (x, y) of arrays or tensors, a pandas DataFrame with label='COLUMN', a map-style torch "
    "Dataset, a Hugging Face Dataset, or a hetero_fl.data.Dataset"
)


def to_dataset(
    data: Any,
    where: str,
    label: str | None = None,
    categories: Categories | None = None,
    patient: Any = None,
    *,
    task: Task | str | None = None,
    labeled: bool = True,
    **options: Any,
) -> Dataset:
    """Convert data of any supported type to a data set.

    Arrays, tensors and the tensors of a `TensorDataset` are not copied if they already have the
    format of `Examples`. The examples of other torch data sets are read once, in order.

    Args:
        data: A pair (x, y) of arrays or tensors (see `from_arrays`), a pandas DataFrame, a
            map-style `torch.utils.data.Dataset` of pairs (x, y), a Hugging Face `Dataset`, or a
            `hetero_fl.data.Dataset`, which is returned unchanged.
        where: Name of the data in error messages.
        label: Column of the labels in a DataFrame or a Hugging Face data set. If None, a Hugging
            Face data set must have exactly one column of type `ClassLabel`.
        categories: Text columns of a DataFrame to one-hot encode, with their values. If None, all
            text columns with fewer than 20 distinct values are encoded.
        patient: Column of the patients in a DataFrame or a Hugging Face data set, or the patient of
            each row, `[N]` numbers or strings. If None, the rows have no patients, except those of
            a `hetero_fl.data.Dataset`.
        task: Kind of the task, or the task. If None, the labels determine it.
        labeled: Whether labels are needed. If False, data may be an array or tensor of examples,
            all columns of a DataFrame may be features, and labels of a Hugging Face data set are
            dropped.
        **options: Arguments of `hetero_fl.data.table.build` for pairs and torch data sets, such as
            `num_classes` or `columns`.

    Raises:
        TypeError: If the data is of another type.
        UserError: If the labels are missing, or the values are invalid.

    Example:
        >>> import numpy as np
        >>> from hetero_fl.data.sources.objects import to_dataset
        >>> x, y = np.zeros((6, 28, 28), dtype=np.uint8), np.arange(6) % 2
        >>> to_dataset((x, y), "data").train
        Examples(6 rows: x uint8 [1, 28, 28], y int64)
    """
    if isinstance(patient, str) and not has_columns(data):
        raise UserError(
            f"{where}: patient: expected the patient of each row of {type(data).__name__}, as only "
            f"data frames have columns, got '{patient}'"
        )
    kind = getattr(task, "kind", task)
    if is_frame(data):
        # Imported here because loading pandas is slow.
        from hetero_fl.data.sources.tables.frames import read_table

        labeled = labeled or label is not None
        options = {"patient": patient, "kind": kind, "categories": categories}
        return read_table(data, where, label, labeled=labeled, **options)
    if _is_hugging_face(data):
        config = SourceConfig(
            name=HUB_PREFIX,
            label=label,
            categories=None if categories is None else dict(categories),
            patient=patient if isinstance(patient, str) else None,
            task=kind,
        )
        return _from_hugging_face(data, where, config, patient, labeled=labeled)
    if label is not None:
        raise UserError(
            f"{where}: label: applies to a DataFrame or a Hugging Face Dataset, got "
            f"{type(data).__name__}"
        )
    if isinstance(data, Dataset):
        return data if patient is None else _with_patients(data, patient, where)
    if isinstance(data, Tensor | np.ndarray) and not labeled:
        x, y = data, None
    else:
        x, y = to_pair(data, where)
    table = Table(x, y, where=where, patient=patient)
    return build([table], task, where, name="arrays", source=where, channels="first", **options)


def _with_patients(dataset: Dataset, patient: Any, where: str) -> Dataset:
    train = with_patients(dataset.train, patient, f"{where}: patient")
    notes = tuple(note for note in dataset.notes if DIVIDED_PATIENTS not in note)
    return replace(dataset, train=train, notes=notes)


def to_pair(data: Any, where: str) -> Any:
    """Convert a torch data set to a pair (x, y), and return other data unchanged.

    The examples of the torch data set are read once. Pass the pair to later calls, so that the
    examples are not read again.

    Args:
        data: Data of any type that `to_dataset` accepts.
        where: Name of the data in error messages.
    """
    if has_columns(data) or isinstance(data, Dataset):
        return data
    is_torch = isinstance(data, torch.utils.data.Dataset)
    return _from_torch(data, where) if is_torch else _pair(data, where)


def is_source(data: Any) -> bool:
    """Return whether `data` is the configuration of a source, such as `{"name": "digits"}`."""
    return isinstance(data, Mapping) and "name" in data and not _is_hugging_face(data)


def has_columns(data: Any) -> bool:
    """Return whether data is a pandas DataFrame or a Hugging Face data set."""
    return is_frame(data) or _is_hugging_face(data)


def is_frame(data: Any) -> bool:
    """Return whether data is a pandas DataFrame."""
    return type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns")


def _is_hugging_face(data: Any) -> bool:
    return type(data).__module__.partition(".")[0] == "datasets"


def _from_torch(data: Any, where: str) -> tuple[Any, Any]:
    """Return the examples and labels of a torch data set."""
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise TypeError(
            f"{where}: expected a map-style torch Dataset with __len__, got "
            f"{type(data).__name__}; collect its items in arrays"
        )
    if isinstance(data, TensorDataset):
        return _two_columns(data.tensors, where)
    if isinstance(data, Subset) and isinstance(data.dataset, TensorDataset):
        rows = torch.as_tensor(data.indices)
        return _two_columns([tensor[rows] for tensor in data.dataset.tensors], where)
    if len(data) == 0:
        raise UserError(f"{where}: has no rows")
    # One pass over the items, which may be read from disk or augmented at random.
    items = [_item(data, where, i) for i in range(len(data))]
    x = [plain_array(_as_array(x)) for x, _ in items]
    shapes = {tuple(each.shape) for each in x}
    if len(shapes) > 1:
        first, second, *_ = sorted(shapes)
        raise UserError(
            f"{where}: examples have shapes {first} and {second}; resize them to one shape in the "
            "data set's transform"
        )
    return np.stack(x), plain_array(np.ma.stack([_as_array(y) for _, y in items]))


def _two_columns(tensors: Any, where: str) -> tuple[Any, Any]:
    if len(tensors) != 2:
        raise UserError(f"{where}: expected tensors x and y, got {len(tensors)} tensors")
    return tensors[0], tensors[1]


def _item(data: Any, where: str, row: int) -> tuple[Any, Any]:
    try:
        item = data[row]
    # A user's data set may raise any exception.
    except Exception as error:
        raise UserError(f"{where}: row {row}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        found = f"{len(item)} values" if isinstance(item, tuple | list) else type(item).__name__
        raise UserError(f"{where}: row {row}: expected a pair (x, y), got {found}")
    return item[0], item[1]


def _as_array(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asanyarray(x)


def _pair(data: Any, where: str) -> tuple[Any, Any]:
    if isinstance(data, Iterator):
        raise TypeError(
            f"{where}: got an iterator ({type(data).__name__}), which can be read only once; "
            "collect its items in arrays"
        )
    if isinstance(data, Tensor | np.ndarray):
        raise UserError(f"{where}: expected a pair (x, y), got x without labels")
    if not isinstance(data, tuple | list):
        raise TypeError(f"{where}: expected {KINDS}, got {type(data).__name__}")
    if len(data) != 2:
        raise UserError(
            f"{where}: expected a pair (x, y), got a {type(data).__name__} of "
            f"{pluralize(len(data), 'value')}; pass rows as one array, as by numpy.array"
        )
    if is_frame(data[0]):
        raise TypeError(
            f"{where}: x is a DataFrame; add the labels as a column, and pass the frame and "
            "label='COLUMN'"
        )
    if data[1] is None:
        raise UserError(f"{where}: labels missing; pass a pair (x, y)")
    return plain_array(data[0]), plain_array(data[1])


def _from_hugging_face(
    data: Any, where: str, config: SourceConfig, patient: Any, *, labeled: bool
) -> Dataset:
    """Convert a Hugging Face data set of images, texts, arrays or columns of a table."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.hugging_face.conversion import read_hub_splits

    if isinstance(data, Mapping) or not hasattr(data, "__len__"):
        raise TypeError(
            f"{where}: expected a datasets.Dataset, got {type(data).__name__}; choose one split of "
            "a DatasetDict, and collect the items of an IterableDataset"
        )
    owners = None if config.patient else patient
    return read_hub_splits({"train": data}, where, config, labeled=labeled, patient=owners)
