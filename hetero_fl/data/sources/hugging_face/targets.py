"""Read labels of a data set of `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hetero_fl.core.task import Task, is_integer
from hetero_fl.data.checks import first_true
from hetero_fl.data.sources.hugging_face.columns import (
    HubColumns,
    array_depth,
    feature_kind,
    list_item,
)
from hetero_fl.data.sources.hugging_face.values import (
    UNLABELED,
    HubSplits,
    check_complete,
    read_class_numbers,
    read_column,
    read_multi_hot,
    read_numbers,
    read_stacked,
)
from hetero_fl.utils.errors import UserError, check_names, one_line


def read_targets(
    splits: HubSplits,
    columns: HubColumns,
    where: str,
    kind: str | None,
    *,
    labeled: bool,
    notes: list[str],
) -> tuple[dict[str, np.ndarray], Task | None]:
    """Read the labels of each split.

    The classes of all splits are matched to those of the training rows by name.

    Args:
        splits: Data sets, keyed by "train", "validation" and "test".
        columns: Columns by their use.
        where: Name of the data in error messages.
        kind: Kind of the task. If None, the kind follows from the labels.
        labeled: Whether there are labels. If False, the targets are 0.
        notes: List to which a remark is appended for each split without any labels.

    Returns:
        The labels, keyed by split, without the splits that have no labels, and the task if the
        features define it.

    Raises:
        UserError: If a label is missing or invalid, or the features define another kind of task.
    """
    if not labeled:
        return {split: np.zeros(len(part)) for split, part in splits.items()}, Task("regression", 1)
    train = splits["train"].features
    task = _task_of_classes(train, columns.labels)
    if task is not None and kind not in (None, task.kind):
        content = "classes" if task.kind == "multiclass" else "lists of classes"
        raise UserError(
            f"{where}: task: must be {task.kind} for column '{columns.labels[0]}' of {content}, "
            f"got {kind}; remove data.task"
        )
    labels = {
        split: _read_labels(part, columns.labels, train, f"{where}: {split}")
        for split, part in _labeled_splits(splits, columns.labels, where, notes).items()
    }
    return labels, task


def _task_of_classes(train: Mapping[str, Any], names: Sequence[str]) -> Task | None:
    """Return the task of a single column of classes or lists of classes, otherwise None."""
    if len(names) > 1:
        return None
    feature = train[names[0]]
    kind = feature_kind(feature)
    if kind == "class":
        return Task("multiclass", feature.num_classes, tuple(feature.names))
    if kind == "classes":
        classes = tuple(list_item(feature).names)
        return Task("multilabel", len(classes), classes)
    return None


def _labeled_splits(
    splits: HubSplits, names: Sequence[str], where: str, notes: list[str]
) -> dict[str, Any]:
    """Return the splits without the validation and test sets in which no row has a label."""
    kept = {}
    for split, part in splits.items():
        has_classes = len(names) == 1 and feature_kind(part.features[names[0]]) == "class"
        if split != "train" and has_classes:
            numbers = read_class_numbers(part, names[0], f"{where}: {split}")
            if bool((numbers == UNLABELED).all()):
                title = where.removeprefix("name: ")
                notes.append(f"{title}: split '{split}' has no labels, not used")
                continue
        kept[split] = part
    return kept


def _read_labels(
    part: Any, names: tuple[str, ...], train: Mapping[str, Any], where: str
) -> np.ndarray:
    """Return the labels of a split, `[N]` or `[N, L]`.

    Args:
        part: Rows of the split.
        names: Columns of the labels.
        train: Features of the training rows, to whose classes the labels are matched.
        where: Name of the data and the split in error messages.
    """
    if len(names) > 1:
        columns = [_read_one_of_several(part, name, train[name], where) for name in names]
        return np.stack(columns, axis=1)
    name = names[0]
    feature = part.features[name]
    kind = feature_kind(feature)
    kinds = (kind, feature_kind(train[name]))
    if "class" in kinds:
        return _read_classes(part, name, train[name], where)
    if "classes" in kinds:
        return _read_lists_of_classes(part, name, train[name], where)
    if kind == "array" and array_depth(feature) == 1:
        return read_stacked(part, name, where)
    if kind == "string":
        column = read_column(part, name)
        check_complete(column, where)
        return column.to_numpy(dtype=object)
    return read_numbers(part, name, where)


def _read_one_of_several(part: Any, name: str, train: Any, where: str) -> np.ndarray:
    """Return one of several label columns: numbers, or two classes as 0 and 1."""
    features = (part.features[name], train)
    sizes = {each.num_classes for each in features if feature_kind(each) == "class"}
    if sizes == {2}:
        return _read_classes(part, name, train, where)
    return read_numbers(part, name, where, "with several label columns, expected numbers")


def _read_classes(part: Any, name: str, train: Any, where: str) -> np.ndarray:
    """Return a column of classes, text or numbers that are matched to the feature `train` by name.

    Returns:
        Class numbers of `train` if it is a feature of classes, otherwise text or integers.

    Raises:
        UserError: If a value is missing or does not exist in `train`.
    """
    place = f"{where}: column '{name}'"
    codes, names = _encode_names(part, name, where)
    used = np.unique(codes)
    occurring = [names[code] for code in used]
    kind = feature_kind(train)
    values: list[Any]
    if kind == "class":
        check_names(occurring, train.names, f"{place}: unknown class")
        values = [train.names.index(each) for each in occurring]
    elif kind == "string":
        values = occurring
    elif kind == "number" and all(map(is_integer, occurring)):
        values = [int(each) for each in occurring]
    else:
        raise _other_feature(part, name, train, where)
    dtype = object if kind == "string" else np.int64
    return np.array(values, dtype=dtype)[np.searchsorted(used, codes)]


def _encode_names(part: Any, name: str, where: str) -> tuple[np.ndarray, Sequence[str]]:
    """Return the labels of a column as indices into names, and the names."""
    kind = feature_kind(part.features[name])
    if kind == "class":
        numbers = read_class_numbers(part, name, where)
        if (row := first_true(numbers == UNLABELED)) is not None:
            raise UserError(f"{where}: column '{name}': row {row + 1} has no label")
        return numbers, part.features[name].names
    column = read_column(part, name)
    if kind == "string":
        check_complete(column, where)
    else:
        read_numbers(part, name, where)
    codes, values = column.factorize()
    return codes, [str(value) for value in values]


def _other_feature(part: Any, name: str, train: Any, where: str) -> UserError:
    """Return the error for labels that cannot be matched to those of the training rows."""
    return UserError(
        f"{where}: column '{name}': expected {one_line(train, 80)} as in train, got "
        f"{one_line(part.features[name], 80)}"
    )


def _read_lists_of_classes(part: Any, name: str, train: Any, where: str) -> np.ndarray:
    """Return lists of classes as an indicator matrix of the classes of the feature `train`."""
    feature = part.features[name]
    if feature_kind(feature) != feature_kind(train):
        raise _other_feature(part, name, train, where)
    names = list_item(feature).names
    known = list_item(train).names
    targets = read_multi_hot(part, name, len(names), where)
    used = np.flatnonzero(targets.any(axis=0))
    occurring = [names[number] for number in used]
    check_names(occurring, known, f"{where}: column '{name}': unknown class")
    matched = np.zeros((len(targets), len(known)), dtype=np.float32)
    matched[:, [known.index(each) for each in occurring]] = targets[:, used]
    return matched
