"""Convert data sets of `datasets` to a data set of images, tables, arrays or tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from hetero_fl.config.data import SourceConfig, TextConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.registry import HUB_PREFIX
from hetero_fl.data.sources.hugging_face.columns import (
    SCALARS,
    HubSplits,
    feature_kind,
    find_columns,
    input_kind,
    is_tabular,
    list_item,
    read_arrays,
    read_images,
    read_multi_hot,
    read_stacked,
    to_frame,
)
from hetero_fl.data.sources.tables.columns import parse_names
from hetero_fl.data.sources.tables.frames import Frames, Roles
from hetero_fl.data.sources.text import TEXTS, make_task, read_vocabulary
from hetero_fl.utils.errors import UserError, check_names, one_line
from hetero_fl.utils.text import format_list, note_unspaced, pluralize, split_words

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
            if (kind == expected and kind in (*SCALARS, "classes")) or is_tabular(train[name]):
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
        if name in inputs and not is_tabular(feature):
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
