"""Convert data sets of `datasets` to a data set of images, tables, arrays or tokens.

The kinds of the columns decide which are inputs, labels and groups.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from hetero_fl.config.data import ColumnsConfig, SourceConfig, TextConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames, first_true
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.registry import HUB_PREFIX
from hetero_fl.data.sources.image_files import image_pixels, open_image, stack_images
from hetero_fl.data.sources.tables.columns import normalize_frame, parse_names, require_no_missing
from hetero_fl.data.sources.tables.frames import Frames, Roles, label_columns
from hetero_fl.data.sources.text import TEXTS, make_task, read_vocabulary
from hetero_fl.utils.errors import UserError, check_names, one_line, suggest_or_list
from hetero_fl.utils.text import format_list, note_unspaced, pluralize, split_words

IMAGE_NAMES = ("image", "img")
"""Names of the image column to use if there are several image columns."""
FEATURE_KINDS = {
    "Image": "image",
    "ClassLabel": "class",
    **dict.fromkeys(("Array2D", "Array3D", "Array4D", "Array5D"), "array"),
}
"""Kinds of features, keyed by the name of the class in `datasets`."""
KINDS_OF_LISTS = {"number": "list", "list": "array", "array": "array", "class": "classes"}
"""Kinds of lists, keyed by the kind of their items."""
SCALARS = ("class", "string", "number", "date")
"""Kinds of columns with one value per row."""
TABULAR = (*SCALARS, "list")
"""Kinds of columns that become one or several columns of a table."""
VALUE_KINDS = {
    "string": ("string", "large_string"),
    "number": ("int", "uint", "float", "bool"),
    "date": ("timestamp", "date", "time"),
}
"""Prefixes of the dtypes of columns with one value per row, keyed by their kind."""
UNLABELED = -1
"""Value of a `ClassLabel` column in rows without labels."""
HubSplits = Mapping[str, Any]
"""Data sets of `datasets`, keyed by "train", "validation" and "test"."""
DEFAULT_TEXT = TextConfig(predict="class", tokenizer="hashing", length=32)
"""Text settings if `data.text` is not set."""


def read_hub_splits(
    splits: HubSplits,
    where: str,
    config: SourceConfig,
    *,
    labeled: bool = True,
    patient: Any = None,
) -> Dataset:
    """Convert data sets of `datasets` to a data set.

    The input is the column `columns.input` of the configuration. By default, it is the image column
    (`image` or `img` if there are several), the column `text`, a single column of arrays with two
    or more dimensions, or else a table of all other columns. A single column of strings is text.
    The label is `columns.label` or, by default, the only `ClassLabel` column or the column `label`.

    Args:
        splits: Data sets, keyed by "train" and optionally "validation" and "test".
        where: Name of the data in error messages.
        config: Source configuration.
        labeled: Whether there are labels. If False, the targets have no meaning.
        patient: Patient of each training row, `[N]`, if no column contains it.

    Raises:
        UserError: If a column is missing or has an unsupported type, or a value is invalid.
    """
    train = splits["train"]
    for split, part in splits.items():
        check_names(train.column_names, part.column_names, f"{where}: {split}: column", " missing")
    predicts_next = config.text is not None and config.text.predict == "next"
    labeled = labeled and not predicts_next
    inputs, roles = find_columns(train, where, config, labeled)
    if predicts_next:
        roles = replace(roles, labels=())
    kind = input_kind(train.features, inputs, where, config)
    frames, notes = _read_frames(splits, where, inputs if kind == "table" else (), roles, labeled)
    # Lists of numbers are several columns of a frame. A column without values has no type.
    needed = [
        name
        for name in frames["train"].columns
        if name in (*inputs, *roles.columns) or name not in train.column_names
    ]
    for split, frame in frames.items():
        # Groups of rows that are not for training are not used.
        unused = {roles.group} if split != "train" else set()
        if missing := [name for name in needed if name not in frame and name not in unused]:
            raise UserError(
                f"{where}: {split}: column '{missing[0]}': expected values as in train, got "
                "none of this kind"
            )
    _check_owners(frames, roles, where)
    used = {split: splits[split] for split in frames}
    task, labels = _read_labels(used, frames, roles.labels, where) if labeled else (None, None)
    if isinstance(task, Task) and config.task not in (None, task.kind):
        content = "classes" if task.kind == "multiclass" else "lists of classes"
        raise UserError(
            f"{where}: task: must be {task.kind} for column '{roles.labels[0]}' of {content}, "
            f"got {config.task}; remove data.task"
        )
    read = Frames(
        frames,
        where,
        {split: f"{where}: {split}" for split in frames},
        roles,
        _example_names(inputs, roles, in_config=config.name != HUB_PREFIX),
        where.removeprefix("name: "),
        task or config.task,
        labels,
        patient,
        labeled,
    )
    if kind == "table":
        dataset = _table(read, train, inputs, config)
    else:
        summary = "; ".join([f"input {format_list(inputs)}", *roles.describe()])
        if kind == "text":
            dataset = _texts(read, inputs[0], config, summary)
        elif kind == "image":
            x = read_images(used, inputs[0], where, config.size)
            dataset = read.build(x, [summary])
        else:
            arrays, channels = read_arrays(used, inputs[0], where)
            dataset = read.build(arrays, [summary], channels="first", columns=channels)
    return replace(dataset, notes=(*notes, *dataset.notes))


def _example_names(inputs: tuple[str, ...], roles: Roles, in_config: bool) -> ExampleNames:
    """Return the names of the columns and rows in messages. Rows count from 1 as in tables."""
    x, y = (
        f"column{'s' * (len(names) > 1)} {format_list(names, quote=True)}"
        for names in (inputs, roles.labels)
    )
    return ExampleNames(x, y, first_row=1, in_config=in_config)


def _read_frames(
    splits: HubSplits, where: str, lists: tuple[str, ...], roles: Roles, labeled: bool
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Return the columns of each split as data frames, and remarks.

    Validation and test sets in which no row has a class are left out. Two classes in one of several
    columns of labels become 0 and 1.
    """
    frames = {split: to_frame(part, f"{where}: {split}", lists) for split, part in splits.items()}
    notes = []
    for split, part in splits.items():
        names = [name for name in roles.labels if feature_kind(part.features[name]) == "class"]
        has_labels = not names or not labeled or frames[split][names].notna().to_numpy().any()
        if split != "train" and not has_labels:
            del frames[split]
            title = where.removeprefix("name: ")
            notes.append(f"{title}: split '{split}' has no labels, not used")
    for name in roles.labels if len(roles.labels) > 1 else ():
        feature = splits["train"].features[name]
        if feature_kind(feature) == "class" and feature.num_classes == 2:
            codes = {label: code for code, label in enumerate(feature.names)}
            for frame in frames.values():
                frame[name] = frame[name].map(codes)
    return frames, notes


def _check_owners(frames: Mapping[str, pd.DataFrame], roles: Roles, where: str) -> None:
    """Check the columns of groups and patients.

    Raises:
        UserError: If a column has no names, or a patient has rows in the training set and in
            another one.
    """
    for key, column in roles.owners.items():
        if column not in frames["train"]:
            raise UserError(f"{where}: {key}: column '{column}': expected names or numbers")
    if roles.patient is None:
        return
    known = set(parse_names(frames["train"][roles.patient], f"{where}: train"))
    for split, frame in frames.items():
        shared = known & set(parse_names(frame[roles.patient], f"{where}: {split}"))
        if split != "train" and shared:
            raise UserError(
                f"{where}: {pluralize(len(shared), 'patient')} with rows in the train and the "
                f"{split} set, such as '{min(shared)}'; remove their rows from one of the sets"
            )


def _read_labels(
    splits: HubSplits, frames: Mapping[str, pd.DataFrame], names: tuple[str, ...], where: str
) -> tuple[Task | None, dict[str, Any] | None]:
    """Return the task of a column of classes, and labels that are not in data frames.

    Returns:
        The task, or None if the features do not define it, and the labels of each split, or None
        if they are columns of the data frames.
    """
    train = splits["train"].features
    for split, part in splits.items():
        for name in names:
            kind = feature_kind(part.features[name])
            expected = feature_kind(train[name])
            if kind == expected == "classes" or expected in TABULAR:
                continue
            raise UserError(
                f"{where}: {split}: column '{name}': expected classes, text or numbers as labels, "
                f"got {one_line(part.features[name], 80)}"
            )
    name = names[0]
    kind = feature_kind(train[name])
    places = {split: f"{where}: {split}" for split in splits}
    if len(names) > 1 or kind in ("string", "number", "date"):
        return None, None
    if kind == "class":
        classes = tuple(train[name].names)
        task = Task("multiclass", len(classes), classes, is_numbered=True)
        columns = {
            split: parse_names(frame[name], places[split]) for split, frame in frames.items()
        }
        return task, {split: column.to_numpy(dtype=object) for split, column in columns.items()}
    if kind == "classes":
        classes = tuple(list_item(train[name]).names)
        return Task("multilabel", len(classes), classes), {
            split: read_multi_hot(part, name, classes, places[split])
            for split, part in splits.items()
        }
    return None, {split: read_stacked(part, name, places[split]) for split, part in splits.items()}


def _table(read: Frames, train: Any, inputs: tuple[str, ...], config: SourceConfig) -> Dataset:
    """Create a data set from the numbers and categories of several columns."""
    left_out = {}
    for name, feature in train.features.items():
        if name in inputs and feature_kind(feature) not in TABULAR:
            left_out[name] = type(feature).__name__
        elif name not in inputs and name not in read.roles.columns:
            left_out[name] = "not in columns.input"
    return read.read_features(config.categories, left_out)


def _texts(read: Frames, column: str, config: SourceConfig, summary: str) -> Dataset:
    """Create a data set of texts to classify, or of the words that follow in each text."""
    settings = config.text or DEFAULT_TEXT
    notes = [summary]
    if config.text is None:
        notes.append(
            f"the last {settings.length} words of each text, hashed to {settings.vocabulary:,} "
            "tokens; set data.text for other settings"
        )
    vocabulary = read_vocabulary(settings)
    if settings.predict == "class":
        words, rows = _words(read, column, 1, notes)
        x = {split: vocabulary.encode(texts, settings.length) for split, texts in words.items()}
        return read.select(rows).build(x, notes, vocabulary=vocabulary)
    if read.roles.patient is not None:
        raise UserError(
            f"{read.where}: patient: does not apply to text.predict=next, which keeps each text "
            "together; remove it"
        )
    words, rows = _words(read, column, 2, notes)
    x = {}
    labels = {}
    owners = {}
    for split, texts in words.items():
        x[split], labels[split], owners[split] = vocabulary.continuations(texts, settings.length)
        rows[split] = rows[split][owners[split].numpy()]
    task = make_task(settings, vocabulary, ())
    read = replace(read.select(rows), task=task, labels=labels, labeled=True)
    dataset = read.build(x, notes, vocabulary=vocabulary)
    for split, part in dataset.splits().items():
        part.patient = owners[split]
        part.patient_term = TEXTS
    return dataset


def _words(
    read: Frames, column: str, min_words: int, notes: list[str]
) -> tuple[dict[str, list[list[str]]], dict[str, np.ndarray]]:
    """Return the words of the texts of each split, and the rows with enough words.

    Remarks are appended to `notes`.
    """
    least = pluralize(min_words, "word")
    found: dict[str, list[list[str]]] = {}
    rows: dict[str, np.ndarray] = {}
    for split, frame in read.frames.items():
        words = [split_words(text if isinstance(text, str) else "") for text in frame[column]]
        rows[split] = np.flatnonzero([len(each) >= min_words for each in words])
        found[split] = [words[row] for row in rows[split]]
        if not found[split]:
            raise UserError(f"{read.places[split]}: column '{column}': no row has {least}")
        if dropped := len(words) - len(found[split]):
            count = pluralize(dropped, "row")
            notes.append(f"{split}: {count} with fewer than {least} left out")
    notes += note_unspaced(each for texts in found.values() for each in texts)
    return found, rows


def feature_kind(feature: Any) -> str:
    """Return the kind of a feature of `datasets`.

    Returns:
        "image", "class", "classes" (lists of classes), "list" (of numbers), "array" (of two or more
        dimensions), "string", "number", "date" or "other".
    """
    title = type(feature).__name__
    if title in FEATURE_KINDS:
        return FEATURE_KINDS[title]
    inner = list_item(feature)
    if inner is not None:
        kind = feature_kind(inner)
        return KINDS_OF_LISTS.get(kind, "other")
    dtype = str(feature.dtype) if title == "Value" else ""
    for kind, prefixes in VALUE_KINDS.items():
        if dtype.startswith(prefixes):
            return kind
    return "other"


def list_item(feature: Any) -> Any:
    """Return the feature of the items of a list, or None if the feature is not a list."""
    if isinstance(feature, list):
        return feature[0]
    if type(feature).__name__ in ("List", "LargeList", "Sequence"):
        return feature.feature
    return None


def find_columns(
    train: Any, where: str, config: SourceConfig, labeled: bool
) -> tuple[tuple[str, ...], Roles]:
    """Find the columns of inputs, labels, groups and patients by the configuration and their types.

    Args:
        train: Training rows.
        where: Name of the data in error messages.
        config: Source configuration.
        labeled: Whether there must be labels.

    Returns:
        The columns of the inputs, and the others.

    Raises:
        UserError: If a column does not exist or is ambiguous.
    """
    names = list(train.column_names)
    given = config.columns or ColumnsConfig()
    found: dict[str, str | None] = {}
    for key in ("label", "group", "patient"):
        own = getattr(given, key)
        common = getattr(config, key)
        if own is not None and common not in (None, own):
            raise UserError(f"{where}: columns.{key}: '{own}' differs from {key} '{common}'")
        found[key] = own if own is not None else common
    label = found["label"]
    labels = _default_label(train.features) if label is None else label_columns(names, label)
    if not labels and labeled:
        raise UserError(
            f"{where}: label: missing; name the column of the labels{suggest_or_list('', names)}"
        )
    inputs = [given.input] if isinstance(given.input, str) else list(given.input or ())
    roles = Roles(tuple(labels), found["group"], found["patient"])
    for key, listed in {
        "label": labels,
        **{key: [name] for key, name in roles.owners.items()},
        "input": inputs,
    }.items():
        check_names(listed, names, f"{where}: {key}: column", " not found")
        for name, count in Counter(listed).items():
            if count > 1:
                raise UserError(f"{where}: {key}: column '{name}' occurs {count} times")
    if overlap := set(inputs) & set(labels):
        raise UserError(f"{where}: columns.input: '{overlap.pop()}' is the label; remove it")
    others = [name for name in names if name not in roles.columns]
    inputs = inputs or _default_inputs(train.features, others, where, config.text is not None)
    return tuple(inputs), roles


def _default_label(features: Mapping[str, Any]) -> list[str]:
    classes = [name for name, feature in features.items() if feature_kind(feature) == "class"]
    if len(classes) == 1:
        return classes
    return ["label"] if "label" in features else []


def _default_inputs(
    features: Mapping[str, Any], names: Sequence[str], where: str, wants_text: bool
) -> list[str]:
    kinds = {name: feature_kind(features[name]) for name in names}
    images = [name for name, kind in kinds.items() if kind == "image"]
    images = [name for name in IMAGE_NAMES if name in images][:1] or images
    texts = [name for name, kind in kinds.items() if kind == "string"]
    if "text" in texts:
        texts = ["text"]
    elif not wants_text:
        texts = []
    arrays = [name for name, kind in kinds.items() if kind == "array"]
    for found in (texts, images, arrays) if wants_text else (images, texts, arrays):
        if len(found) > 1:
            raise UserError(
                f"{where}: columns.input: missing; choose from {format_list(found, quote=True)}"
            )
        if found:
            return found
    if wants_text or not names:
        noun = "text column" if wants_text else "column other than the label"
        raise UserError(f"{where}: columns.input: no {noun} among {format_list(features)}")
    return list(names)


def input_kind(
    features: Mapping[str, Any], inputs: Sequence[str], where: str, config: SourceConfig
) -> str:
    """Return the kind of the input: "image", "text", "array" or "table".

    A single column of strings is text, unless it is to be encoded as a category.

    Args:
        features: Features of all columns.
        inputs: Columns of the inputs.
        where: Name of the data in error messages.
        config: Source configuration.

    Raises:
        UserError: If a key of the configuration does not apply to this kind.
    """
    kind = "table"
    if len(inputs) == 1:
        found = feature_kind(features[inputs[0]])
        if found in ("image", "array"):
            kind = found
        elif found == "string" and config.categories is None:
            kind = "text"
    for key, allowed in {"text": "text", "size": "image", "categories": "table"}.items():
        if getattr(config, key) is not None and kind != allowed:
            other = ", or set columns.input" if key == "text" else ""
            raise UserError(
                f"{where}: {key}: does not apply to {kind} input "
                f"{format_list(inputs, quote=True)}; remove it{other}"
            )
    return kind


def to_frame(part: Any, where: str, lists: Sequence[str]) -> pd.DataFrame:
    """Return the columns with one value per row as a data frame, in which classes are names.

    Args:
        part: Rows of a split.
        where: Name of the data and the split in error messages.
        lists: Columns with lists of numbers, which become several columns.
    """
    columns: dict[str, Any] = {}
    scalars = [name for name, kind in part.features.items() if feature_kind(kind) in SCALARS]
    plain = part.select_columns(scalars).with_format(None).to_pandas()
    for name, feature in part.features.items():
        if feature_kind(feature) == "class":
            numbers = _class_numbers(plain[name], feature.num_classes, where)
            columns[name] = np.array([*feature.names, None], dtype=object)[numbers]
        elif name in scalars:
            columns[name] = plain[name]
        elif name in lists and feature_kind(feature) == "list":
            values = read_stacked(part, name, where)
            columns |= {f"{name}_{i}": values[:, i] for i in range(values.shape[1])}
    return normalize_frame(pd.DataFrame(columns, index=range(len(part))), where)


def _class_numbers(column: pd.Series, count: int, where: str) -> pd.Series:
    """Return a column of classes as numbers, and missing values as `UNLABELED`."""
    numbers = column.fillna(UNLABELED).astype(np.int64)
    row = first_true((numbers < UNLABELED) | (numbers >= count))
    if row is not None:
        raise UserError(
            f"{where}: column '{column.name}': row {row + 1}: expected a class number from 0 to "
            f"{count - 1}, got {numbers[row]}"
        )
    return numbers


def read_multi_hot(part: Any, name: str, known: Sequence[str], where: str) -> np.ndarray:
    """Return lists of classes as an indicator matrix of known classes, float32 `[N, C]`."""
    place = f"{where}: column '{name}'"
    column = part.select_columns([name]).with_format(None).to_pandas()[name]
    require_no_missing(column, where)
    names = list_item(part.features[name]).names
    targets = np.zeros((len(column), len(known)), dtype=np.float32)
    for row, classes in enumerate(column):
        listed = np.asarray(classes, dtype=np.float64)
        if not ((listed >= 0) & (listed < len(names))).all():
            raise UserError(
                f"{place}: row {row + 1}: expected class numbers from 0 to {len(names) - 1}, got "
                f"{one_line(list(classes), 80)}"
            )
        own = [names[number] for number in listed.astype(np.int64)]
        check_names(own, known, f"{place}: unknown class")
        targets[row, [known.index(each) for each in own]] = 1
    return targets


def read_stacked(part: Any, name: str, where: str) -> np.ndarray:
    """Return a column of arrays of equal shape as one array `[N, ...]`."""
    column = part.select_columns([name])
    try:
        values = column.with_format("numpy")[:][name]
    except ValueError:
        # Some versions of datasets cannot convert rows of different shapes.
        values = column.with_format(None)[:][name]
    if isinstance(values, np.ndarray) and values.dtype.kind in "buif" and values.ndim > 1:
        return values
    rows = [_as_array(value) for value in values]
    for row, each in enumerate(rows, 1):
        place = f"{where}: column '{name}': row {row}"
        if each.dtype.kind not in "buif":
            raise UserError(f"{place}: expected an array of numbers without missing values")
        if each.shape != rows[0].shape:
            raise UserError(
                f"{place}: expected shape {rows[0].shape} as in row 1, got {each.shape}"
            )
    return np.stack(rows)


def _as_array(value: Any) -> np.ndarray:
    """Convert nested lists to an array, which contains objects if the lists are ragged."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.asarray(value, dtype=object)


def read_images(splits: HubSplits, name: str, where: str, side: int | None) -> dict[str, Tensor]:
    """Return the images of each split, uint8 `[N, C, H, W]`."""
    places = [
        f"{where}: {split}: column '{name}': row {row + 1}"
        for split, part in splits.items()
        for row in range(len(part))
    ]
    images = stack_images(_decode(splits, name, places, side), places, "row 1 of train")
    sizes = [len(part) for part in splits.values()]
    return dict(zip(splits, images.split(sizes), strict=True))


def _decode(
    splits: HubSplits, name: str, places: Sequence[str], side: int | None
) -> Iterator[np.ndarray]:
    """Yield the pixels of each image (see `image_pixels`)."""
    import fsspec
    from datasets import Image

    encoded = Image(decode=False)
    columns = (part.select_columns([name]).with_format(None) for part in splits.values())
    rows = (row[name] for column in columns for row in column.cast_column(name, encoded))
    for place, image in zip(places, rows, strict=True):
        if image is None:
            raise UserError(f"{place}: not a readable image (no image)")
        # The path may be that of a file in an archive.
        is_named = image["bytes"] is None
        file = fsspec.open(image["path"]) if is_named else io.BytesIO(image["bytes"])
        with open_image(file, place) as opened:
            pixels = image_pixels(opened, side)
        yield pixels


def read_arrays(
    splits: HubSplits, name: str, where: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return images or series of each split, and the names of the channels of series."""
    x = {split: read_stacked(part, name, f"{where}: {split}") for split, part in splits.items()}
    train = x["train"]
    if train.ndim > 4:
        raise UserError(
            f"{where}: column '{name}': expected images or series, got arrays of shape "
            f"{train.shape[1:]}"
        )
    is_series = train.ndim == 3 and train.dtype.kind == "f"
    return x, tuple(f"{name}_{i}" for i in range(train.shape[2])) if is_series else ()
