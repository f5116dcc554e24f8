"""Labels as targets of a task: the one rule for arrays, files, tables and folders of clients.

Classes are the sorted distinct labels of all rows, unless a task or a number of classes is given.
Labels of other data are matched to classes by their names, and numbers are names, too.
"""

from __future__ import annotations

import typing
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import as_numbers
from hetero_fl.core.task import Task, is_integer
from hetero_fl.data.checks import ARRAY_NAMES, ExampleNames, first_true
from hetero_fl.data.dataset import MAX_NUMBERED_CLASSES, Dataset, Examples
from hetero_fl.utils.arrays import index_names, plain_array
from hetero_fl.utils.errors import UserError, check_names, suggest_or_list
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import Caution, format_list

Kind = Literal["multiclass", "multilabel", "regression"]
ALL_LABELS = "labels"
"""Name of the labels of all data sets in notes."""
MAX_LISTED_CLASSES = 8
"""Maximum number of classes that a note lists."""
BOOLEANS = {"False": "0", "True": "1"}
"""Numbers of booleans, which are class names in tables."""


def read_labels(
    labels: Mapping[str, Any],
    where: str,
    *,
    task: Task | str | None = None,
    num_classes: int | None = None,
    has_unit: bool = False,
    names: ExampleNames = ARRAY_NAMES,
) -> tuple[Task, dict[str, Tensor], list[str]]:
    """Read the labels of all parts of a data set, which determine the task together.

    Args:
        labels: Labels of each part, `[N]` or `[N, L]`, keyed by the name of the part in messages.
        where: Name of all labels in messages.
        task: Kind of the task, or a `Task`, with which numbers are class numbers. If None, the kind
            is inferred. If labels have several readings, a note names the one that is chosen.
        num_classes: Number of classes of labels that are class numbers from 0.
        has_unit: Whether the targets have a scale, so that floats are regression targets.
        names: Names of labels and rows in the source, for messages.

    Returns:
        The task, the targets of each part, and notes.

    Raises:
        UserError: If labels are malformed or contradict the task.
    """
    labels = {place: plain_array(y) for place, y in labels.items()}
    texts = _shared_text(labels, names)
    if isinstance(task, Task):
        check_num_classes(task, num_classes, f"{where}: ")
        if texts:
            return task, {p: _known_classes(text, task, p, names) for p, text in texts.items()}, []
        read = {p: _targets(_numbers(y, p), task, p, names) for p, y in labels.items()}
        return replace(task, is_numbered=task.kind == "multiclass"), read, []
    kind = _check_kind(task, num_classes, where)
    if texts:
        return _text_classes(texts, kind, num_classes, where)
    y = _equal_columns({place: _numbers(part, place) for place, part in labels.items()})
    notes: list[str] = []
    is_inferred = kind is None
    if kind is None:
        _check_fractions(y, names)
        kind, notes = _infer_kind(list(y.values()), has_unit, where, names)
    width = _width(next(iter(y.values())))
    if kind == "multiclass" and width == 1:
        numbers = {place: class_numbers(part.numpy(), place, names) for place, part in y.items()}
        return _number_classes(numbers, num_classes, notes, where, names, is_inferred=is_inferred)
    if kind == "multiclass":
        y = _class_numbers_of_one_hot(y, num_classes, where)
    found = Task(kind, width)
    return found, {p: _targets(part, found, p, names) for p, part in y.items()}, notes


def check_num_classes(task: Task, num_classes: int | None, where: str = "") -> None:
    """Raise UserError if both a number of classes and a task are given."""
    if num_classes is not None:
        raise UserError(
            f"{where}num_classes: cannot be combined with a Task, got {num_classes} and "
            f"{task.outputs} outputs; remove num_classes"
        )


def _equal_columns(labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return labels `[N]`, or `[N, L]` with L > 1, which must be equal in L.

    One-hot rows become class numbers if other parts have one column.
    """
    y = {place: _squeeze_labels(part, place) for place, part in labels.items()}
    wide = [part for part in y.values() if part.ndim == 2]
    if len(wide) < len(y) and _is_one_hot(wide):
        y = {place: part.long().argmax(1) if part.ndim == 2 else part for place, part in y.items()}
    first = next(iter(y))
    for place, part in y.items():
        if part.shape[1:] != y[first].shape[1:]:
            raise UserError(
                f"{place}: expected {_width(y[first])} columns as in {first}, got shape "
                f"{tuple(part.shape)}"
            )
    return y


def _width(y: Tensor) -> int:
    return 1 if y.ndim == 1 else y.shape[1]


def _numbers(values: Any, where: str) -> Tensor:
    y = as_numbers(values, where)
    # NumPy has no bfloat16.
    return y.float() if y.dtype == torch.bfloat16 else y


def _shared_text(labels: Mapping[str, Any], names: ExampleNames) -> dict[str, list[str]]:
    """Return the text labels of all parts, or nothing if no part has text."""
    texts = {place: text for place, y in labels.items() if (text := _text_labels(y, place, names))}
    if texts and {label for text in texts.values() for label in text} <= set(BOOLEANS):
        # Tables have booleans as text.
        texts = {
            place: text
            for place, y in labels.items()
            if (text := _text_labels(y, place, names, has_booleans=True))
        }
    for place in labels:
        if texts and place not in texts:
            raise UserError(
                f"{place}: expected text as in {next(iter(texts))}, got numbers; use one coding"
            )
    return texts


def _text_labels(
    y: Any, where: str, names: ExampleNames, *, has_booleans: bool = False
) -> list[str] | None:
    """Return text labels `[N]`, also booleans if `has_booleans`, or None for other labels."""
    if isinstance(y, Tensor) and not has_booleans:
        return None
    try:
        array = np.asarray(y)
    except (TypeError, ValueError, RuntimeError):
        # `_numbers` reports the problem.
        return None
    if has_booleans and array.dtype == bool and array.size == len(array):
        array = array.astype(str)
    labels = array.ravel().tolist() if array.dtype.kind in "OSU" else []
    if not any(isinstance(label, str) for label in labels):
        return None
    if array.shape not in ((len(labels),), (len(labels), 1)):
        raise UserError(
            f"{where}: expected text labels of shape ({len(array)},), got shape {array.shape}"
        )
    for row, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise UserError(
                f"{where}: {names.row(row)}: expected text as in other rows, got {label!r}"
            )
    return labels


def _text_classes(
    texts: Mapping[str, Sequence[str]], kind: str | None, num_classes: int | None, where: str
) -> tuple[Task, dict[str, Tensor], list[str]]:
    """Return the task of text labels, the labels as class numbers, and notes."""
    if kind not in (None, "multiclass"):
        raise UserError(f"{where}: task: must be 'multiclass' for text labels, got '{kind}'")
    numbers, classes = index_names(label for text in texts.values() for label in text)
    if num_classes not in (None, len(classes)):
        raise UserError(
            f"{where}: num_classes: must be {len(classes)}, the number of distinct text labels, "
            f"got {num_classes}"
        )
    parts = numbers.split([len(text) for text in texts.values()])
    task = Task("multiclass", len(classes), classes)
    return task, dict(zip(texts, parts, strict=True)), []


def _known_classes(text: Sequence[str], task: Task, where: str, names: ExampleNames) -> Tensor:
    """Convert text labels to the class numbers of a task."""
    if task.kind != "multiclass" or not task.names:
        raise UserError(
            f"{where}: text labels need a multiclass task with class names; add them to task, or "
            "remove task"
        )
    numbers = {name: number for number, name in enumerate(task.names)}
    stripped = [label.strip() for label in text]
    for row, label in enumerate(stripped):
        if label not in numbers:
            raise UserError(
                f"{where}: {names.row(row)}: unknown class '{label}'"
                f"{suggest_or_list(label, task.names)}"
            )
    return torch.tensor([numbers[label] for label in stripped])


def _check_kind(kind: str | None, num_classes: int | None, where: str) -> Kind | None:
    """Return the kind of task given by `kind` and `num_classes`, or None if both are None.

    Raises:
        UserError: If `kind` is unknown, `num_classes` is less than 2, or `num_classes` is set and
            `kind` is not `multiclass`.
    """
    if kind is not None and kind not in get_args(Kind):
        raise UserError(
            f"{where}: task: unknown task '{kind}'{suggest_or_list(kind, get_args(Kind))}"
        )
    if num_classes is None:
        return typing.cast("Kind | None", kind)
    if kind not in (None, "multiclass"):
        raise UserError(
            f"{where}: num_classes: cannot be combined with task='{kind}', got {num_classes}; "
            "remove one of them"
        )
    if num_classes < 2:
        raise UserError(f"{where}: num_classes: must be >= 2, got {num_classes}")
    return "multiclass"


def _squeeze_labels(y: Tensor, where: str) -> Tensor:
    """Return labels of shape `[N]`, or of shape `[N, L]` with L > 1."""
    if y.ndim in (1, 2) and len(y) == 0:
        raise UserError(f"{where}: has no rows")
    if y.ndim not in (1, 2) or y.numel() == 0:
        raise UserError(f"{where}: expected shape (N,) or (N, L), got {tuple(y.shape)}")
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y


def _check_fractions(y: Mapping[str, Tensor], names: ExampleNames) -> None:
    """Raise UserError if some parts have integers, which may be classes, and others fractions."""
    integers = [place for place, part in y.items() if not part.is_floating_point()]
    for place, part in y.items():
        # Missing labels, which are NaN, are reported later.
        if integers and bool(
            (part.isfinite() & (part != part.floor())).any() if part.is_floating_point() else False
        ):
            raise UserError(
                f"{place}: expected integers as in {integers[0]}, got fractions; "
                f"{names.set_task('regression')} if they are regression targets"
            )


def _infer_kind(
    y: list[Tensor], has_unit: bool, where: str, names: ExampleNames
) -> tuple[Kind, list[str]]:
    """Infer the kind of task, with a note if the labels have several readings."""
    values = torch.cat([part.flatten() for part in y]).double()
    if not bool((values.isfinite() & (values == values.floor())).all()):
        return "regression", []
    distinct = values.unique()
    if y[0].ndim == 2:
        return _kind_of_columns(y, distinct, where, names)
    count = len(distinct)
    lowest, highest = int(distinct[0]), int(distinct[-1])
    is_float = any(part.is_floating_point() for part in y)
    is_few = count <= MAX_NUMBERED_CLASSES
    if is_float and (has_unit or not is_few or not 1 < count < len(values)):
        return "regression", []
    if is_few and not is_float:
        # `_number_classes` notes how numbers are read.
        return "multiclass", []
    has_numbers = lowest in (0, 1) and highest - lowest == count - 1
    is_class = is_few or (has_numbers and len(values) >= 2 * count)
    chosen, meaning = (
        ("classes", "regression targets") if is_class else ("regression targets", "classes")
    )
    note = (
        f"{where}: {count} distinct integers{', as floats' if is_float else ''}, read as {chosen}; "
        f"{names.set_task('regression' if is_class else 'multiclass')} if they are {meaning}"
    )
    return ("multiclass" if is_class else "regression"), [Caution(note)]


def _kind_of_columns(
    y: list[Tensor], distinct: Tensor, where: str, names: ExampleNames
) -> tuple[Kind, list[str]]:
    """Infer the kind of task of several columns of whole numbers."""
    width = y[0].shape[1]
    if _is_one_hot(y):
        note = (
            f"{where}: every row has exactly one 1, read as {width} classes; "
            f"{names.set_task('multilabel')} if the labels are independent"
        )
        return "multiclass", [Caution(note)]
    if bool(((distinct == 0) | (distinct == 1)).all()):
        return "multilabel", []
    note = (
        f"{where}: {len(distinct)} distinct integers in {width} columns, read as {width} "
        f"regression targets; {names.set_task('regression')} to confirm, or use one column of "
        "labels for classes"
    )
    return "regression", [Caution(note)]


def _class_numbers_of_one_hot(
    y: Mapping[str, Tensor], num_classes: int | None, where: str
) -> dict[str, Tensor]:
    """Convert one-hot rows to class numbers."""
    width = _width(next(iter(y.values())))
    if not _is_one_hot(list(y.values())) or num_classes not in (None, width):
        raise UserError(
            f"{where}: a multiclass task needs one column of labels or one-hot rows, got "
            f"{width} columns"
        )
    return {place: part.long().argmax(1) for place, part in y.items()}


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


def _number_classes(
    y: dict[str, Tensor],
    num_classes: int | None,
    notes: list[str],
    where: str,
    names: ExampleNames,
    *,
    is_inferred: bool,
) -> tuple[Task, dict[str, Tensor], list[str]]:
    """Return the task of integer labels, the labels as class numbers from 0, and notes."""
    if num_classes is not None:
        for place, part in y.items():
            if (row := first_true((part < 0) | (part >= num_classes))) is not None:
                raise UserError(
                    f"{place}: {names.row(row)}: label {int(part[row])} is out of range 0 to "
                    f"{num_classes - 1}"
                )
        return Task("multiclass", num_classes), y, notes
    values = torch.cat(list(y.values())).unique()
    lowest, highest = int(values[0]), int(values[-1])
    if lowest == 0 and highest == len(values) - 1:
        return Task("multiclass", len(values)), y, notes
    listed = values[:MAX_LISTED_CLASSES].tolist()
    pairs = ", ".join(f"{label} as class {index}" for index, label in enumerate(listed))
    hidden = len(values) - len(listed)
    more = f" and {hidden} more" if hidden else ""
    advice = []
    if lowest >= 0 and not names.in_config:
        advice = [f"pass num_classes={highest + 1} to keep the numbers"]
    if is_inferred:
        advice += [f"{names.set_task('regression')} for regression targets"]
    note = f"{where}: read as {len(values)} classes: {pairs}{more}"
    note = "; ".join([note, *([", or ".join(advice)] if advice else [])])
    # A gap may be a class without rows, and more than two numbers may be ratings.
    has_gap = lowest >= 0 and highest - lowest >= len(values)
    if notes or has_gap or (is_inferred and len(values) > 2):
        note = Caution(note)
    task = Task("multiclass", len(values), tuple(map(str, values.tolist())))
    return task, {p: torch.searchsorted(values, part) for p, part in y.items()}, [note]


def _targets(y: Tensor, task: Task, where: str, names: ExampleNames) -> Tensor:
    """Return numbers as targets of a task, which are not renumbered."""
    if task.kind != "multiclass":
        return (y[:, None] if y.ndim == 1 else y).float()
    if y.ndim == 2 and y.shape[1] != 1:
        if y.shape[1] != task.outputs or not _is_one_hot([y]):
            raise UserError(f"{where}: expected one column of labels, got {y.shape[1]}")
        return y.long().argmax(1)
    return class_numbers(y.flatten().numpy(), where, names)


def note_similar_names(names: Iterable[str], where: str) -> list[str]:
    """Return a caution for each two names that differ in case, white space or Unicode form."""
    notes: list[str] = []
    first: dict[str, str] = {}
    for name in names:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        # Cf are invisible characters, such as byte order marks.
        plain = "".join(c for c in folded if not c.isspace() and unicodedata.category(c) != "Cf")
        other = first.setdefault(plain, name)
        if other != name:
            notes.append(
                Caution(
                    f"{where}: classes {other!r} and {name!r} differ only in case, white space or "
                    "Unicode form; they are two classes unless you use one spelling"
                )
            )
    return notes


def common_classes(tasks: Mapping[str, Task]) -> Task:
    """Return the task with the classes of several data sets.

    Args:
        tasks: Multiclass task of each data set, keyed by its name in messages.

    Raises:
        UserError: If the classes are numbers in one data set and names in another.
    """
    if len(set(tasks.values())) == 1:
        return next(iter(tasks.values()))
    names = {name for task in tasks.values() for name in task.output_names}
    numeric = [place for place, task in tasks.items() if all(map(is_integer, task.output_names))]
    named = [place for place, task in tasks.items() if not any(map(is_integer, task.output_names))]
    if numeric and named:
        raise UserError(
            f"{named[0]}: expected class numbers as in {numeric[0]}, got "
            f"{format_list(tasks[named[0]].names)}; use one coding of the classes"
        )
    is_numbered = len(numeric) == len(tasks)
    ordered = tuple(sorted(names, key=int) if is_numbered else natural_order(names))
    task = Task("multiclass", len(ordered), ordered)
    if any(not each.names for each in tasks.values()) and is_numbered and not task.numbers:
        task = Task("multiclass", len(ordered))
    return task


def note_unshared_classes(
    classes: Mapping[str, Sequence[str]], clients: Collection[str]
) -> list[str]:
    """Return a caution for each client all of whose classes occur at no other client.

    Args:
        classes: Names of the classes of each client, keyed by client id.
        clients: Clients to check.
    """
    owners: dict[str, list[str]] = {}
    for client, names in classes.items():
        for name in names:
            owners.setdefault(name, []).append(client)
    return [
        Caution(
            f"clients: '{client}': no other client has a class of this client: "
            f"{format_list(names, MAX_LISTED_CLASSES)}"
        )
        for client, names in classes.items()
        if client in clients
        and len(classes) > 1
        and names
        and all(len(owners[name]) == 1 for name in names)
    ]


def renumber_targets(
    y: Tensor,
    given_task: Task,
    known: Task,
    where: str,
    *,
    owner: str = "the models",
    numbered: bool = False,
) -> Tensor:
    """Convert the targets of a data set to the classes or columns of another task.

    Classes and columns are matched by name. Classes without names are named by their numbers.

    Args:
        y: Class indices `[N]`, or targets `[N, outputs]`.
        given_task: Task of the targets.
        known: Task to convert to.
        where: Prefix of error messages.
        owner: Owner of the known task, for error messages.
        numbered: Whether integer labels are class numbers of the known task even if its classes
            have names, as for data sets with documented class numbers.

    Returns:
        Targets of the known task, in the shape of `y`.

    Raises:
        UserError: If the tasks differ in kind or number of columns, a name does not exist in the
            known task, or the items of a ranking are in another order.
    """
    if given_task.kind != known.kind:
        raise UserError(
            f"{where}: expected a {known.kind} task as in {owner}, got {given_task.kind}"
        )
    if known.kind != "multiclass":
        return _renumber_columns(y, given_task, known, where, owner)
    names = given_task.output_names
    expected = known.output_names
    if {*names, *expected} <= {*BOOLEANS, *BOOLEANS.values()}:
        names = tuple(BOOLEANS.get(name, name) for name in names)
        expected = tuple(BOOLEANS.get(name, name) for name in expected)
    if names == expected:
        return y
    is_numeric = all(map(is_integer, names))
    if is_numeric and not any(map(is_integer, expected)):
        if not (numbered or known.is_numbered):
            raise UserError(
                f"{where}: expected class names as in {owner} "
                f"({format_list(expected, quote=True)}), got the numbers {format_list(names)}; "
                "pass names"
            )
        expected = tuple(map(str, range(known.outputs)))
    indices = {name: index for index, name in enumerate(expected)}
    for name in names:
        if name not in indices:
            raise UserError(
                f"{where}: '{name}' is unknown to {owner}{suggest_or_list(name, expected)}"
            )
    if known.is_ranking:
        raise UserError(
            f"{where}: the items are in another order than those of {owner}, whose inputs are "
            "items, too; use the same order"
        )
    return torch.tensor([indices[name] for name in names])[y]


def _renumber_columns(y: Tensor, given_task: Task, known: Task, where: str, owner: str) -> Tensor:
    if given_task.outputs != known.outputs:
        raise UserError(
            f"{where}: expected {known.outputs} targets as in {owner}, got {given_task.outputs}"
        )
    if not given_task.names or not known.names or given_task.names == known.names:
        return y
    check_names(given_task.names, known.names, f"{where}:", f" is unknown to {owner}")
    check_names(known.names, given_task.names, f"{where}:", f" is missing, which {owner} has")
    return y[:, [given_task.names.index(name) for name in known.names]]


def numbered_task(task: Task, found: Iterable[Task]) -> Task:
    """Return a given task, marked as numbered if labels of some found tasks are class numbers."""
    numbered = (each.is_numbered or all(map(is_integer, each.output_names)) for each in found)
    return replace(task, is_numbered=task.kind == "multiclass" and any(numbered))


def with_task(dataset: Dataset, task: Task, where: str, owner: str) -> Dataset:
    """Return a data set whose targets are those of another task (see `renumber_targets`).

    Integer labels are class numbers if no class of the task is named by a number. Columns keep
    their names if the task has none.
    """
    if task.kind != "multiclass" and not task.names:
        task = replace(task, names=dataset.task.names)

    def convert(part: Examples) -> Examples:
        y = renumber_targets(part.labels, dataset.task, task, where, owner=owner, numbered=True)
        return replace(part, y=y)

    splits: dict[str, Any] = {name: convert(part) for name, part in dataset.splits().items()}
    local = {name: convert(part) for name, part in dataset.local_sets.items()}
    return replace(dataset, task=task, local_sets=local, **splits)
