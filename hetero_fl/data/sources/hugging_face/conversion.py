"""Convert data sets of `datasets` to a data set of images, tables, arrays or tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hetero_fl.config.data import SourceConfig, TextConfig
from hetero_fl.core.task import Task
from hetero_fl.data.arrays import from_arrays
from hetero_fl.data.checks import ExampleNames
from hetero_fl.data.dataset import (
    ColumnLayout,
    Dataset,
    Examples,
    index_names,
    note_unspaced,
    owner_list,
    split_words,
)
from hetero_fl.data.registry import HUB_PREFIX
from hetero_fl.data.sources.hugging_face.columns import (
    HubColumns,
    array_depth,
    feature_kind,
    find_columns,
    input_kind,
)
from hetero_fl.data.sources.hugging_face.values import (
    SCALARS,
    HubSplits,
    class_names,
    read_arrays,
    read_class_numbers,
    read_column,
    read_images,
    read_metadata,
    read_owners,
    read_stacked,
    read_targets,
)
from hetero_fl.data.sources.text import make_examples, make_task, read_vocabulary
from hetero_fl.utils.errors import UserError, check_names
from hetero_fl.utils.text import format_list, pluralize, prefix_note

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_TEXT = TextConfig(predict="class", tokenizer="hashing", length=32)
"""Text settings if `data.text` is not set."""


@dataclass(frozen=True)
class _Parts:
    """The parts of a data set to convert.

    Attributes:
        splits: Data sets, keyed by "train", "validation" and "test".
        columns: Columns by their use.
        targets: Labels of each split.
        options: Arguments of `from_arrays` that describe the labels, groups and patients.
        where: Name of the data in error messages.
        config: Source configuration.
        notes: Remarks on how the data is read, to which the conversion adds.
    """

    splits: HubSplits
    columns: HubColumns
    targets: Mapping[str, Any]
    options: dict[str, Any]
    where: str
    config: SourceConfig
    notes: list[str]

    def note(self, text: str) -> None:
        """Add a remark."""
        self.notes.append(prefix_note(self.where.removeprefix("name: "), text))


def read_hub_splits(
    splits: HubSplits,
    where: str,
    config: SourceConfig,
    *,
    labeled: bool = True,
    num_classes: int | None = None,
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
        num_classes: Number of classes of integer labels (see `from_arrays`).
        patient: Patient of each training row, `[N]`, if no column contains it.

    Raises:
        UserError: If a column is missing or has an unsupported type, or a value is invalid.
    """
    train = splits["train"]
    for split, part in splits.items():
        check_names(train.column_names, part.column_names, f"{where}: {split}: column", " missing")
    predicts_next = config.text is not None and config.text.predict == "next"
    labeled = labeled and not predicts_next
    columns = find_columns(train, where, config, labeled)
    kind = input_kind(train.features, columns.inputs, where, config)
    parts = _with_labels(splits, columns, where, config, labeled)
    if patient is not None:
        parts.options["patient"] = owner_list(patient, len(train), f"{where}: patient")
    if not isinstance(parts.options["task"], Task):
        parts = replace(parts, options={**parts.options, "num_classes": num_classes})
    if kind != "table":
        described = [f"input {format_list(columns.inputs)}", *columns.describe_targets()]
        parts.note("; ".join(described))
    if kind == "text" and predicts_next:
        dataset = _next_words(parts)
    elif kind == "text":
        dataset = _texts(parts)
    elif kind == "image":
        x = read_images(parts.splits, columns.inputs[0], where, config.size)
        dataset = _from_arrays(parts, x)
    elif kind == "array":
        arrays, channels = read_arrays(parts.splits, columns.inputs[0], where)
        dataset = _from_arrays(parts, arrays, channels)
    else:
        dataset = _table(parts)
    if labeled:
        _note_identifiers(parts, dataset)
    return replace(dataset, notes=(*parts.notes, *dataset.notes))


def _with_labels(
    splits: HubSplits, columns: HubColumns, where: str, config: SourceConfig, labeled: bool
) -> _Parts:
    """Read the labels, groups and patients. Splits without labels are left out."""
    notes: list[str] = []
    targets, known = read_targets(splits, columns, where, config.task, labeled=labeled, notes=notes)
    options: dict[str, Any] = {"task": known or config.task}
    for key, column in (("group", columns.group), ("patient", columns.patient)):
        if column is not None:
            options[key] = read_owners(splits["train"], column, where)
    for split, part in splits.items():
        if columns.patient is None or split == "train":
            continue
        if shared := set(options["patient"]) & set(read_owners(part, columns.patient, where)):
            raise UserError(
                f"{where}: {pluralize(len(shared), 'patient')} with rows in the train and the "
                f"{split} set, such as '{min(shared)}'; remove their rows from one of the sets"
            )
    kept = {split: part for split, part in splits.items() if split in targets}
    return _Parts(kept, columns, targets, options, where, config, notes)


def _from_arrays(
    parts: _Parts, x: Mapping[str, Any], names: tuple[str, ...] = (), **options: Any
) -> Dataset:
    """Create a data set from the inputs of each split, and the names of columns or channels."""
    y = parts.targets
    options = {
        "columns": names,
        "metadata": read_metadata(parts.splits["train"], names, parts.where),
        "names": _names(parts),
        **parts.options,
        **options,
    }
    for split in ("validation", "test"):
        if split in x:
            options[split] = (x[split], y[split])
    with warnings.catch_warnings():
        # The same remarks are in the notes of the data set.
        warnings.simplefilter("ignore")
        dataset = from_arrays(x["train"], y["train"], name=parts.where, **options)
    task = dataset.task
    labels = parts.columns.labels
    if task.kind != "multiclass" and not task.names and len(labels) == task.outputs:
        return replace(dataset, task=replace(task, names=labels))
    return dataset


def _names(parts: _Parts) -> ExampleNames:
    """Return the names of the columns and rows in messages. Rows count from 1 as in tables."""
    x, y = (
        f"column{'s' * (len(names) > 1)} {format_list(names, quote=True)}"
        for names in (parts.columns.inputs, parts.columns.labels)
    )
    # Objects have no name of their own.
    return ExampleNames(x, y, first_row=1, in_config=parts.config.name != HUB_PREFIX)


def _table(parts: _Parts) -> Dataset:
    """Create a data set from the numbers and categories of several columns."""
    # Imported here because loading pandas is slow.
    import pandas as pd

    from hetero_fl.data.sources.table_columns import find_categories
    from hetero_fl.data.sources.table_files import describe_columns, features

    where = parts.where
    frames = {
        split: _frame(part, parts.columns.inputs, f"{where}: {split}")
        for split, part in parts.splits.items()
    }
    categories = parts.config.categories
    if categories is None:
        categories = find_categories(pd.concat(list(frames.values()), ignore_index=True), where)
    present = set(map(str, frames["train"].columns))
    encoded = {name: tuple(v) for name, v in categories.items() if name in present}
    gaps: list[str] = []
    remarks: list[str] = []
    x: dict[str, Tensor] = {}
    names: dict[str, tuple[str, ...]] = {}
    left_out: dict[str, str] = {}
    for split, frame in frames.items():
        place = f"{where}: {split}"
        x[split], names[split], unused = features(frame, place, gaps, encoded, remarks)
        left_out |= unused
        if different := sorted(set(names[split]) ^ set(names["train"])):
            raise UserError(
                f"{place}: column '{different[0]}' is numeric in one split and text in another; "
                "list its values in data.categories"
            )
    is_selected = parts.config.columns is not None and parts.config.columns.input is not None
    for name, feature in parts.splits["train"].features.items():
        if name in parts.columns.inputs and not _is_tabular(feature):
            left_out[name] = type(feature).__name__
        elif is_selected and name not in parts.columns.named:
            left_out[name] = "not in columns.input"
    used = ColumnLayout(names["train"], (), tuple(encoded.items())).names
    described = [*parts.columns.describe_targets(), *describe_columns(used, encoded, left_out)]
    parts.note("; ".join(described))
    for remark in remarks:
        parts.note(remark)
    dataset = _from_arrays(parts, x, names["train"])
    return replace(
        dataset,
        categories=tuple(encoded.items()),
        first_missing=gaps[0] if gaps else "",
    )


def _note_identifiers(parts: _Parts, dataset: Dataset) -> None:
    """Note columns that seem to identify patients and are not named as such."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.table_columns import describe_identifiers

    train = parts.splits["train"]
    special = (*parts.columns.labels, parts.columns.group, parts.columns.patient)
    columns = (
        read_column(train, name)
        for name, feature in train.features.items()
        if name not in special and feature_kind(feature) in SCALARS[1:]
    )
    used = ColumnLayout(dataset.columns, (), dataset.categories).names
    in_config = parts.where.startswith("name: ")
    patient = parts.options.get("patient")
    for remark in describe_identifiers(columns, used, in_config, patient):
        parts.note(remark)


def _is_tabular(feature: Any) -> bool:
    """Return whether a feature is one value per row, or a list of numbers."""
    kind = feature_kind(feature)
    return kind in SCALARS or (kind == "array" and array_depth(feature) == 1)


def _frame(part: Any, inputs: Sequence[str], where: str) -> pd.DataFrame:
    """Return the inputs as a table. Lists of numbers become several columns."""
    import pandas as pd

    from hetero_fl.data.sources.table_columns import normalize_frame

    columns: dict[str, Any] = {}
    for name in inputs:
        feature = part.features[name]
        if not _is_tabular(feature):
            continue
        kind = feature_kind(feature)
        if kind == "class":
            columns[name] = class_names(read_class_numbers(part, name, where), feature.names)
        elif kind == "array":
            values = read_stacked(part, name, where)
            columns |= {f"{name}_{i}": values[:, i] for i in range(values.shape[1])}
        else:
            columns[name] = read_column(part, name)
    if not columns:
        raise UserError(f"{where}: columns.input: {format_list(inputs)}: no numbers or text")
    return normalize_frame(pd.DataFrame(columns), where)


def _texts(parts: _Parts) -> Dataset:
    """Create a data set of texts to classify. Rows without words are left out."""
    settings = parts.config.text or DEFAULT_TEXT
    if parts.config.text is None:
        parts.note(
            f"the last {settings.length} words of each text, hashed to {settings.vocabulary:,} "
            "tokens; set data.text for other settings"
        )
    vocabulary = read_vocabulary(settings)
    words, rows = _words(parts, 1)
    x = {split: vocabulary.encode(texts, settings.length) for split, texts in words.items()}
    kept = rows["train"]
    labels = {split: np.asarray(y)[rows[split]] for split, y in parts.targets.items()}
    metadata = read_metadata(parts.splits["train"], (), parts.where)
    options: dict[str, Any] = {
        key: [parts.options[key][row] for row in kept]
        for key in ("group", "patient")
        if key in parts.options
    }
    options["metadata"] = {name: values[kept] for name, values in metadata.items()}
    return _from_arrays(replace(parts, targets=labels), x, vocabulary=vocabulary, **options)


def _next_words(parts: _Parts) -> Dataset:
    """Create a data set of next-word prediction, in which each text is a patient."""
    settings = parts.config.text
    assert settings is not None
    if parts.columns.patient is not None:
        raise UserError(
            f"{parts.where}: patient: does not apply to text.predict=next, which keeps each text "
            "together; remove it"
        )
    vocabulary = read_vocabulary(settings)
    words, rows = _words(parts, 2)
    metadata = read_metadata(parts.splits["train"], (), parts.where)
    examples: dict[str, Examples] = {}
    for split, texts in words.items():
        part, indices = make_examples(texts, [0] * len(texts), settings, vocabulary)
        if not len(part):
            raise UserError(f"{parts.where}: {split}: no word is in the vocabulary of text.public")
        examples[split] = part
        if split != "train":
            continue
        kept = rows[split][indices.numpy()]
        part.metadata = {name: values[kept] for name, values in metadata.items()}
        if "group" in parts.options:
            owners = (parts.options["group"][row] for row in kept)
            part.group, part.group_names = index_names(owners)
    return Dataset(
        parts.where,
        make_task(settings, vocabulary, ()),
        examples["train"],
        examples.get("validation"),
        examples.get("test"),
        vocabulary=vocabulary,
    )


def _words(
    parts: _Parts, min_words: int
) -> tuple[dict[str, list[list[str]]], dict[str, np.ndarray]]:
    """Return the words of the texts of each split, and the rows with enough words."""
    name = parts.columns.inputs[0]
    found: dict[str, list[list[str]]] = {}
    rows: dict[str, np.ndarray] = {}
    for split, part in parts.splits.items():
        words = [
            split_words(text if isinstance(text, str) else "") for text in read_column(part, name)
        ]
        rows[split] = np.flatnonzero([len(each) >= min_words for each in words])
        found[split] = [words[row] for row in rows[split]]
        least = pluralize(min_words, "word")
        if not found[split]:
            raise UserError(f"{parts.where}: {split}: column '{name}': no row has {least}")
        if dropped := len(words) - len(found[split]):
            count = pluralize(dropped, "row")
            parts.note(f"{split}: {count} with fewer than {least} left out")
    for remark in note_unspaced([words for texts in found.values() for words in texts]):
        parts.note(remark)
    return found, rows
