"""Data sets from arrays in memory and from `.npz` files in the MedMNIST layout."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import (
    COLOURS,
    MOST_CHANNELS,
    as_bytes,
    as_numbers,
    channels_first,
    in_range,
)
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import (
    MOST_NUMBERED_CLASSES,
    Block,
    Dataset,
    Examples,
    Vocabulary,
    check_examples,
    first_true,
    index_names,
)
from hetero_fl.utils.errors import UserError, suggest_file, suggest_or_list

# A data set of arrays in hand.

Kind = Literal["multiclass", "multilabel", "regression"]
SHOWN = 8  # classes that a warning lists


def from_arrays(
    x: Any, y: Any, *, validation: tuple[Any, Any] | None = None,
    test: tuple[Any, Any] | None = None, group: Any = None, patient: Any = None, time: Any = None,
    unit: Any = None, task: Task | Kind | None = None, num_classes: int | None = None,
    name: str = "arrays", simulated: bool = False, about: str = "",
    columns: tuple[str, ...] = (), blocks: Sequence[tuple[str, Sequence[int]]] = (),
    vocabulary: Vocabulary | None = None,
) -> Dataset:  # fmt: skip
    """Return a data set of numpy arrays or tensors.

    Each reading of the labels that could be another one is a `UserWarning` and a line in the run's
    log.

    Args:
        x: Images `[N, C, H, W]`, `[N, H, W, C]` or, as whole numbers, `[N, H, W]`: uint8, or floats
            in 0..1 or 0..255; or floats `[N, T, F]` (series) or `[N, F]` (a table). Series of more
            than one channel need `columns`; without it they could be images.
        y: Labels. Integers `[N]` are classes; if they do not start at 0 or have gaps, the classes
            are the sorted labels that occur, and are named after them. Text `[N]` is classes, named
            after the labels. Zeros and ones `[N, L]` are `L` labels per row (multilabel), or
            classes if every row has exactly one 1. Other floats are regression targets, unless they
            are few different whole numbers, none below 0 (classes).
        validation: (x, y) of the common validation set; without it, it is held out of the training
            rows.
        test: (x, y) of the common test set; without it, it is held out of the training rows.
        group: Group of each row, `[N]` of numbers or strings, for the natural partition.
        patient: Patient of each row, `[N]` of numbers or strings; rows of one patient are never
            split.
        time: Time of each target, `[N]` of whole numbers (seconds since 1970, or any count that
            grows) or datetime64. Train, validation and test are then cut by date, so `validation`
            and `test` are not to be given.
        unit: Of regression targets, `[N]`: what a row's targets are relative to. Errors are those
            of targets times unit.
        task: What is learned, instead of what the labels look like: a `Task` (labels are then taken
            as they are), "multiclass", "multilabel" or "regression".
        num_classes: Number of classes; integer labels are then class numbers from 0, whether or not
            all occur.
        name: The data set's name.
        simulated: Whether generated data stands in for a real set.
        about: A description in a few words.
        columns: Names of a table's columns, or of a series' channels.
        blocks: (name, shape) of the modalities that lie side by side in rows `[N, D]`; see also
            `join_images_and_table`.
        vocabulary: What the numbers mean where x is tokens, whole numbers `[N, T]` (see
            `Vocabulary.encode`).

    Raises:
        UserError: See `check_examples`; images whose range or order of axes could mean two things;
            floats `[N, A, B]` that could be images or series; labels that do not fit `task` or
            `num_classes`.
    """
    pairs = {"train": (x, y), "validation": validation, "test": test}
    given = {split: pair for split, pair in pairs.items() if pair is not None}
    labels, classes = _parse_labels(
        {split: pair[1] for split, pair in given.items()}, task, num_classes, name
    )
    notes: tuple[str, ...] = ()
    if vocabulary is not None:
        images = [_tensor(pair[0], f"{split}: x").long() for split, pair in given.items()]
    else:
        xs = {split: as_numbers(pair[0], f"{name}: {split}: x") for split, pair in given.items()}
        _check_series({f"{name}: {split}: x": x for split, x in xs.items()}, tuple(columns))
        images, notes = _images({f"{name}: {split}: x": x for split, x in xs.items()})
    if classes and not isinstance(task, Task):
        task = Task("multiclass", len(classes), classes)
    elif not isinstance(task, Task):
        task, labels, doubts = _read_labels(labels, task, num_classes, unit is not None, name)
        for line in doubts:
            warnings.warn(line, UserWarning, stacklevel=2)
        notes += tuple(doubts)
    elif num_classes is not None:
        raise UserError(
            f"{name}: num_classes: found {num_classes}, but task has {task.outputs} outputs; leave one out"
        )
    if time is not None and len(given) > 1:
        raise UserError(
            f"{name}: time: validation and test are cut by date; leave them out, or leave time out"
        )
    extra: dict[str, Any] = {}
    if group is not None:
        extra["group"], extra["group_names"] = index_names(_listed(group))
    if patient is not None:
        extra["patient"], extra["patient_names"] = index_names(_listed(patient))
    if time is not None:
        extra["time"] = _parse_times(time, name)
    if unit is not None:
        extra["unit"] = _tensor(unit, "unit").float()
    examples = {
        split: Examples(x, _targets(labels[split], task), **(extra if split == "train" else {}))
        for split, x in zip(given, images, strict=True)
    }
    for split, found in examples.items():
        # Missing values are allowed here: a view that sees them without `indicate` is refused later.
        check_examples(found, task, f"{name}: {split}", vocabulary=vocabulary, missing=True)
    return Dataset(
        name, task, examples["train"], examples.get("validation"), examples.get("test"), simulated, about, tuple(columns), notes,
        tuple(Block(title, tuple(shape)) for title, shape in blocks), vocabulary=vocabulary,
    )  # fmt: skip


def _parse_times(values: Any, name: str) -> Tensor:
    """Return whole numbers as they are and dates as seconds since 1970, int64 `[N]`."""
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


def _parse_labels(
    labels: Mapping[str, Any], task: Task | str | None, num_classes: int | None, name: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the labels of each split as numbers, and the names of classes if they are text."""
    texts = {
        split: text
        for split, y in labels.items()
        if (text := _text_labels(y, f"{name}: {split}: y")) is not None
    }
    if not texts:
        return {split: _tensor(y, split) for split, y in labels.items()}, ()
    for split in labels:
        if split not in texts:
            raise UserError(f"{name}: {split}: y: found numbers, but other labels are text")
    if isinstance(task, Task):
        named = _label_numbers(texts, task, name)
        return named, task.names
    if task not in (None, "multiclass"):
        raise UserError(
            f"{name}: task: found '{task}', but the labels are text; text labels are classes"
        )
    numbers, classes = index_names(label for text in texts.values() for label in text)
    if num_classes not in (None, len(classes)):
        raise UserError(
            f"{name}: num_classes: found {num_classes}, but {len(classes)} different labels occur"
        )
    split_up = numbers.split([len(text) for text in texts.values()])
    return dict(zip(texts, split_up, strict=True)), classes


def _text_labels(y: Any, where: str) -> list[str] | None:
    """Return labels `[N]` of text; None if they are no text."""
    if isinstance(y, Tensor):
        return None
    try:
        found = np.asarray(y)
    except (TypeError, ValueError, RuntimeError):  # `_tensor` says what is wrong
        return None
    labels = found.ravel().tolist()
    if not any(isinstance(label, str) for label in labels):
        return None
    if found.shape not in ((len(labels),), (len(labels), 1)):
        raise UserError(f"{where}: found text of shape {found.shape}; want ({len(found)},)")
    for row, label in enumerate(labels):
        if not isinstance(label, str):
            raise UserError(f"{where}: found {label!r} in row {row}, but other labels are text")
    return labels


def _label_numbers(texts: Mapping[str, Sequence[str]], task: Task, name: str) -> dict[str, Tensor]:
    """Return text labels as the numbers of a task's classes."""
    if task.kind != "multiclass" or not task.names:
        raise UserError(
            f"{name}: y: found text; give task the names of its classes, or leave it out"
        )
    for split, text in texts.items():
        for row, label in enumerate(text):
            if label not in task.names:
                raise UserError(
                    f"{name}: {split}: y: found '{label}' in row {row}{suggest_or_list(label, task.names)}"
                )
    return {
        split: torch.tensor([task.names.index(label) for label in text])
        for split, text in texts.items()
    }


def _check_series(raw: Mapping[str, Tensor], columns: tuple[str, ...]) -> None:
    """Refuse floats `[N, A, B]` that could be images or series; only series have `columns`."""
    for where, x in raw.items():
        if x.ndim != 3 or not x.is_floating_point() or x.shape[-1] <= 1:
            continue
        found = f"{where}: found floats of shape {tuple(x.shape)}"
        if not columns:
            raise UserError(
                f"{found}, images or series? pass x[:, None] for images, or columns=[...], the names of the "
                f"{x.shape[-1]} channels, for series of {x.shape[1]} steps"
            )
        if len(columns) != x.shape[-1]:
            raise UserError(
                f"{found}, but {len(columns)} columns; name each of the {x.shape[-1]} channels"
            )


def _images(raw: Mapping[str, Tensor]) -> tuple[list[Tensor], tuple[str, ...]]:
    """Return images in the form of `hetero_fl.core.images`, other x in float32, and notes."""
    x = {where: as_bytes(x, where) if x.ndim in (3, 4) else x for where, x in raw.items()}
    x = {
        where: x[:, None] if x.dtype == torch.uint8 and x.ndim == 3 else x for where, x in x.items()
    }
    x = {where: x.float() if x.is_floating_point() else x for where, x in x.items()}
    four = {where: channels_first(x, where) for where, x in x.items() if x.ndim == 4}
    ranged, scaled = in_range(four)
    notes = [
        f"{where}: read as rows x height x width x channels"
        for where, x in four.items()
        if raw[where].ndim == 4 and raw[where].shape != x.shape
    ]
    if scaled:
        notes.append(f"{next(iter(raw))}: floats from 0 to 255 are read as bytes")
    return list((x | ranged).values()), tuple(notes)


def _read_labels(
    labels: Mapping[str, Tensor],
    kind: str | None,
    num_classes: int | None,
    has_unit: bool,
    name: str,
) -> tuple[Task, dict[str, Tensor], list[str]]:
    """Return the task, the targets of each split, and a line on each doubtful reading."""
    if kind is not None and kind not in get_args(Kind):
        raise UserError(f"{name}: task: found '{kind}'{suggest_or_list(kind, get_args(Kind))}")
    if num_classes is not None and kind not in (None, "multiclass"):
        raise UserError(
            f"{name}: num_classes: found {num_classes}, but task is {kind}; leave one out"
        )
    if num_classes is not None and num_classes < 2:
        raise UserError(f"{name}: num_classes: found {num_classes}; must be >= 2")
    y = {split: _squeeze_labels(found, f"{name}: {split}: y") for split, found in labels.items()}
    doubts: list[str] = []
    width = 1 if y["train"].ndim == 1 else y["train"].shape[1]
    for split, found in y.items():
        if found.shape[1:] != y["train"].shape[1:]:
            raise UserError(
                f"{name}: {split}: y: found shape {tuple(found.shape)}, but train has {width} columns"
            )
    if kind is None and num_classes is not None:
        kind = "multiclass"
    if kind is None:
        kind, doubts = _label_kind(list(y.values()), has_unit, name)
    if kind == "multiclass" and width == 1:
        whole = {
            split: _class_numbers(found.numpy(), f"{name}: {split}: y")
            for split, found in y.items()
        }
        return _classes(whole, num_classes, doubts, name)
    if kind == "multiclass":
        if not _one_hot(list(y.values())) or num_classes not in (None, width):
            raise UserError(
                f"{name}: y: found {width} columns of labels, but a row of a multiclass task has one class"
            )
        return (
            Task("multiclass", width),
            {split: found.long().argmax(1) for split, found in y.items()},
            doubts,
        )
    return Task("multilabel" if kind == "multilabel" else "regression", width), y, doubts


def _squeeze_labels(y: Tensor, where: str) -> Tensor:
    """Return labels `[N]` or `[N, L]` with L > 1."""
    if y.ndim not in (1, 2) or y.numel() == 0:
        raise UserError(f"{where}: found shape {tuple(y.shape)}; want (N,) or (N, L)")
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y


def _label_kind(y: list[Tensor], has_unit: bool, name: str) -> tuple[Kind, list[str]]:
    """Return what the labels of all splits look like, and a line if they could be something else."""
    if y[0].ndim == 2:
        if _one_hot(y):
            line = f"every row has exactly one 1: read as {y[0].shape[1]} classes; pass task='multilabel' for labels"
            return "multiclass", [f"{name}: y: {line} that are independent of each other"]
        binary = all(bool(((found == 0) | (found == 1)).all()) for found in y)
        return ("multilabel" if binary else "regression"), []
    values = torch.cat(y).double()
    count = len(values.unique())
    if not y[0].is_floating_point():
        if count > MOST_NUMBERED_CLASSES and bool((values < 0).any()):
            found = (
                f"found {count} different integers from {int(values.min())} to {int(values.max())}"
            )
            raise UserError(
                f"{name}: y: {found}; pass task='regression' for numbers, task='multiclass' for classes"
            )
        return "multiclass", []
    whole = bool((values.isfinite() & (values == values.floor())).all())
    if has_unit or not whole or not 2 <= count <= min(MOST_NUMBERED_CLASSES, len(values) - 1):
        return "regression", []
    if bool((values < 0).any()):
        line = (
            f"{count} different whole numbers, as floats, some below 0: read as regression targets"
        )
        return "regression", [f"{name}: y: {line}; pass task='multiclass' if they are classes"]
    line = f"{count} different whole numbers, as floats: read as classes; pass task='regression' for numbers"
    return "multiclass", [f"{name}: y: {line}"]


def _one_hot(y: list[Tensor]) -> bool:
    return all(
        bool(((found == 0) | (found == 1)).all() and (found.double().sum(1) == 1).all())
        for found in y
    )


def _class_numbers(y: np.ndarray, where: str) -> Tensor:
    """Return labels `[N]` as int64; refuse fractions."""
    if (row := first_true(~np.isfinite(y) | (y != np.floor(y)))) is not None:
        raise UserError(f"{where}: label {y[row]:g} in row {row} is not a class number")
    return torch.from_numpy(y.astype(np.int64))


def _classes(
    y: dict[str, Tensor], num_classes: int | None, doubts: list[str], name: str
) -> tuple[Task, dict[str, Tensor], list[str]]:
    """Return the task of integer labels, class numbers from 0, and lines on doubtful readings."""
    if num_classes is not None:
        return Task("multiclass", num_classes), y, doubts
    values = torch.cat(list(y.values())).unique()
    if int(values[0]) == 0 and int(values[-1]) == len(values) - 1:
        return Task("multiclass", len(values)), y, doubts
    pairs = [f"{label} as class {place}" for place, label in enumerate(values[:SHOWN].tolist())]
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    keep = f"num_classes={int(values[-1]) + 1} to keep the numbers, " if int(values[0]) >= 0 else ""
    remedy = f"pass {keep}task='regression' for regression targets"
    line = f"{name}: y: read as {len(values)} classes: {', '.join(pairs)}{more}; {remedy}"
    task = Task("multiclass", len(values), tuple(str(label) for label in values.tolist()))
    return (
        task,
        {split: torch.searchsorted(values, found) for split, found in y.items()},
        [*doubts, line],
    )


def _targets(y: Tensor, task: Task) -> Tensor:
    if task.kind == "multiclass":
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        return y if y.is_floating_point() else y.long()
    return (y[:, None] if y.ndim == 1 else y).float()


# Local .npz files in the MedMNIST layout: `{train,val,test}_images` and `{train,val,test}_labels`.

SPLITS = {"train": "train", "validation": "val", "test": "test"}
"""Our name of a split: its name in the file."""
PATIENT = "patient"
TABLES = (".csv", ".tsv", ".parquet")
"""Files that the source `table` reads."""


def read_npz(
    path: Path,
    name: str,
    task: Task | None = None,
    kind: str | None = None,
    patient: str | None = None,
) -> Dataset:
    """Read a file in the MedMNIST layout.

    Images are `(N, H, W)`, `(N, H, W, C)` or plainly `(N, C, H, W)`, in 0..1 or 0..255; floats
    `(N, F)` in their place are the rows of a table. Labels are `(N,)`, `(N, 1)` or `(N, L)`: whole
    numbers in one column are classes, several columns of 0 and 1 are multilabel, fractions are
    regression targets. `train` is required, the other splits are optional.

    Args:
        path: The file.
        name: The data set's name.
        task: What is learned, if it is known; the file then has to hold images. Otherwise it is
            read off the labels, with classes numbered from 0.
        kind: multiclass, multilabel or regression, in place of what the labels look like.
        patient: The array with the patient of each training row; None: "patient", if there is one.

    Raises:
        UserError: With the file, the array and the row.
    """
    where = f"path: {path}"
    wanted = [f"{split}_{part}" for split in SPLITS.values() for part in ("images", "labels")] + [
        patient or PATIENT
    ]
    arrays, names = read_npz_arrays(path, wanted)
    raw = {
        ours: _split_arrays(arrays, theirs, where)
        for ours, theirs in SPLITS.items()
        if f"{theirs}_images" in arrays
    }
    if "train" not in raw:
        raise UserError(
            f"{where}: no array 'train_images'; found {', '.join(names) or 'no arrays'}"
        )
    known = task is not None
    task = task or _npz_task([y for _, y in raw.values()], where, kind)
    notes = (
        ()
        if known or kind is not None
        else _ambiguity_note([y for _, y in raw.values()], task, f"{where}: train_labels")
    )
    read = _npz_images(
        {f"{where}: {SPLITS[s]}_images": x for s, (x, _) in raw.items()}, table=not known
    )
    splits = {}
    for (split, (x, y)), pixels in zip(raw.items(), read, strict=True):
        images = f"{SPLITS[split]}_images"
        labels = f"{SPLITS[split]}_labels"
        splits[split] = Examples(pixels, _npz_targets(y, task, f"{where}: {labels}"))
        check_examples(splits[split], task, where, (images, labels))
        if splits[split].x.shape[1:] != splits["train"].x.shape[1:]:
            raise UserError(
                f"{where}: {images}: shape {x.shape}, but train_images has {raw['train'][0].shape}"
            )
    train = splits["train"]
    if (found := arrays.get(patient or PATIENT)) is not None:
        if found.shape not in ((len(train),), (len(train), 1)):
            raise UserError(
                f"{where}: {patient or PATIENT}: found shape {found.shape}; want ({len(train)},), "
                "as train_images"
            )
        train.patient, train.patient_names = index_names(found.reshape(-1).tolist())
    elif patient is not None:
        raise UserError(
            f"patient: {path} has no array '{patient}'{suggest_or_list(patient, names)}"
        )
    return Dataset(
        name,
        task,
        train,
        splits.get("validation"),
        splits.get("test"),
        about=f"local file {path.name}",
        notes=notes,
    )


def read_images(path: Path) -> Tensor:
    """Return the training images of a file in the MedMNIST layout; no labels are read."""
    where = f"path: {path}"
    arrays, names = read_npz_arrays(path, ["train_images"])
    if not arrays:
        raise UserError(
            f"{where}: no array 'train_images'; found {', '.join(names) or 'no arrays'}"
        )
    if arrays["train_images"].shape[:1] in ((), (0,)):
        raise UserError(f"{where}: train_images: found no rows")
    return _npz_images({f"{where}: train_images": arrays["train_images"]}, table=True)[0]


def read_npz_arrays(path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read some arrays of a `.npz` file; no other array is unpacked.

    Args:
        path: The file.
        wanted: Names of arrays; those that are missing are left out.

    Returns:
        The arrays that were found by name, and the names of all arrays.

    Raises:
        UserError: If the file is missing or damaged.
    """
    where = f"path: {path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file{suggest_file(path)}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = list(archive.files)
            return {name: archive[name] for name in names if name in wanted}, names
    except Exception as error:
        # A damaged file makes zipfile, zlib and numpy raise a dozen kinds of errors.
        raise UserError(
            f"{where}: not a readable .npz file{_unreadable_reason(path, error)}"
        ) from error


def _unreadable_reason(path: Path, error: Exception) -> str:
    """Return why a file is no .npz; numpy's own message would advise to unpickle it."""
    if not is_zipfile(path):
        return ": it is no whole archive of arrays, as numpy.savez writes it"
    if "pickle" in str(error):
        return ": it has an array of Python objects; save numbers"
    return f" ({type(error).__name__}: {error})"


def _split_arrays(
    arrays: dict[str, np.ndarray], split: str, where: str
) -> tuple[np.ndarray, np.ndarray]:
    images = f"{split}_images"
    labels = f"{split}_labels"
    if labels not in arrays:
        raise UserError(f"{where}: no array '{labels}' beside '{images}'")
    x = arrays[images]
    y = arrays[labels]
    if y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise UserError(f"{where}: {labels}: found shape {y.shape}; want (N,), (N, 1) or (N, L)")
    if x.ndim == 0 or len(x) != len(y):
        raise UserError(
            f"{where}: {images} has {len(x) if x.ndim else 0} rows, {labels} has {len(y)}"
        )
    if y.dtype.kind not in "buif":
        raise UserError(f"{where}: {labels}: found {y.dtype}; labels are numbers")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        row = np.argwhere(~np.isfinite(y))[0][0]
        raise UserError(f"{where}: {labels}: NaN or infinity in row {row}")
    return x, y[:, None] if y.ndim == 1 else y


def _npz_task(labels: list[np.ndarray], where: str, kind: str | None) -> Task:
    """Return what is learned, read off the labels of all splits unless the kind is known."""
    widths = {y.shape[1] for y in labels}
    if len(widths) > 1:
        raise UserError(
            f"{where}: labels: found {sorted(widths)} columns; want as many in every split"
        )
    y = np.concatenate(labels)
    if len(y) == 0:
        raise UserError(f"{where}: train_images: found no rows")
    if kind is None and y.dtype.kind == "f" and (y != np.floor(y)).any():
        kind = "regression"
    if kind == "regression":
        return Task("regression", y.shape[1])
    if kind == "multilabel" or (kind is None and y.shape[1] > 1):
        return Task("multilabel", y.shape[1])
    values = np.unique(y)
    # A stray 255 in a file of two classes would make 256 classes of it: more than half of the
    # numbers have to occur.
    if values[0] >= 0 and int(values[-1]) + 1 > 2 * len(values):
        raise UserError(
            f"{where}: labels: label {int(values[-1])} is out of range, as only {len(values)} different ones occur; "
            "number the classes from 0"
        )
    return Task("multiclass", int(max(values[-1], 0)) + 1)


def _ambiguity_note(labels: list[np.ndarray], task: Task, where: str) -> tuple[str, ...]:
    """Return a line if the labels of all splits could mean something else."""
    y = np.concatenate(labels)
    if task.kind == "multiclass" and (
        absent := sorted(set(range(task.outputs)) - set(y[:, 0].astype(int).tolist()))
    ):
        listed = ", ".join(map(str, absent))
        return (
            f"{where}: {task.outputs} classes, numbered from 0, of which {listed} do not occur",
        )
    if task.kind == "multilabel" and bool((y.sum(1) == 1).all()):
        remedy = "if they are classes, save one column of class numbers"
        return (f"{where}: every row has exactly one 1: read as multilabel; {remedy}",)
    return ()


def _npz_targets(y: np.ndarray, task: Task, where: str) -> Tensor:
    if task.kind != "multiclass":
        return torch.from_numpy(y.astype(np.float32))
    if y.shape[1] != 1:
        raise UserError(f"{where}: found {y.shape[1]} columns of labels; this set has one")
    return _class_numbers(y[:, 0], where)


def _npz_images(raw: Mapping[str, np.ndarray], table: bool) -> list[Tensor]:
    """Return images `[N, C, H, W]` in uint8 or float32 or, where allowed, tables `[N, F]`.

    Args:
        raw: Arrays by their names in messages.
        table: Whether `[N, F]` is allowed.
    """
    read = {}
    for where, x in raw.items():
        if x.dtype.kind not in "buif":
            raise UserError(f"{where}: found {x.dtype}; images are uint8 or floats")
        images = as_numbers(x, where)
        images = as_bytes(images, where) if x.ndim > 2 else images.float()
        if x.ndim == 3:
            images = images[:, None]
        elif x.ndim == 4 and (x.shape[-1] <= MOST_CHANNELS or x.shape[1] in COLOURS):
            images = channels_first(images, where, documented="last")
        elif x.ndim != 2 or not table:
            raise UserError(f"{where}: found shape {x.shape}; want (N, H, W) or (N, H, W, C)")
        read[where] = images.float() if images.is_floating_point() else images
    pictures, _ = in_range({where: x for where, x in read.items() if x.ndim == 4})
    return list((read | pictures).values())
