"""Data sets in memory: examples, names of columns, and vocabularies.

The columns of multimodal examples are grouped in blocks, one for each modality.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import dtype_name
from hetero_fl.core.mapped_tensors import MappedFile, join_rows, mapped_file, take_rows
from hetero_fl.core.task import Task
from hetero_fl.utils.arrays import index_names, owner_list
from hetero_fl.utils.errors import UserError, check_names, printable, suggest_or_list
from hetero_fl.utils.text import split_words

Spans = tuple[tuple[int, int], ...]
"""Half-open column ranges `(start, stop)` along the last axis."""
Categories = tuple[tuple[str, tuple[str, ...]], ...]
"""Text columns to one-hot encode, as pairs of a column name and the values in their order."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def indicator_names(column: str, values: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the indicator columns that one-hot encode a text column."""
    return tuple(f"{column}={value}" for value in values)


class Block(NamedTuple):
    """The name and shape of one modality in multimodal examples.

    Multimodal examples are flat rows `[D]`, in which the columns of each block are consecutive.

    Attributes:
        name: Name of the block.
        shape: Shape of the values before they are flattened, for example `(1, 28, 28)` for an image
            or `(60,)` for a vector.

    Example:
        >>> from hetero_fl.data import Block
        >>> block = Block("image", (1, 28, 28))
        >>> block.size, block.image
        (784, True)
    """

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of columns."""
        return math.prod(self.shape)

    @property
    def image(self) -> bool:
        """Whether the block is an image, which is the case if the shape has three dimensions."""
        return len(self.shape) == 3


class Feature(NamedTuple):
    """A part of the last axis of examples that has one name.

    A feature is a column of numbers, a text column that is one-hot encoded, or a block.

    Attributes:
        name: Name, by which `preprocess.columns` selects the feature.
        shape: Shape of the values before they are flattened.
        columns: Names of the indicator columns of a text column, otherwise the name.
    """

    name: str
    shape: tuple[int, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class ColumnLayout:
    """The names of the columns or blocks along the last axis of examples.

    The layout is empty if the columns have no names. The indicator columns of a text column are
    adjacent and are selected together, by the name of the text column.

    Attributes:
        columns: Name of each column.
        blocks: Blocks of multimodal rows. If there are any, names refer to blocks, not to columns.
        categories: Text columns that are one-hot encoded, with their values.
        pixel_range: Value of integer pixels that becomes 1. If None, 255.

    Example:
        >>> from hetero_fl.data import ColumnLayout
        >>> layout = ColumnLayout(("age", "sex=f", "sex=m"), categories=(("sex", ("f", "m")),))
        >>> layout.names
        ('age', 'sex')
        >>> layout.spans(["sex"], "preprocess.columns")
        ((1, 3),)
    """

    columns: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    categories: Categories = ()
    pixel_range: float | None = None

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """The features in their order."""
        if self.blocks:
            return tuple(Feature(name, shape, (name,)) for name, shape in self.blocks)
        encoded = {
            indicator: column
            for column, values in self.categories
            for indicator in indicator_names(column, values)
        }
        columns: dict[str, list[str]] = {}
        for column in self.columns:
            columns.setdefault(encoded.get(column, column), []).append(column)
        return tuple(Feature(name, (len(c),), tuple(c)) for name, c in columns.items())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, which `preprocess.columns` may select."""
        return tuple(feature.name for feature in self.features)

    @property
    def boundaries(self) -> dict[str, tuple[int, int]]:
        """Column ranges `(start, stop)` of the features, keyed by name."""
        return dict(zip(self.names, spans_of(self.features), strict=True))

    def spans(self, names: Sequence[str], where: str) -> Spans:
        """Return the column ranges of the named features, in the order of the data.

        Adjacent ranges are merged.

        Args:
            names: Names of the features.
            where: Configuration key that lists the names, for error messages.

        Raises:
            UserError: If a name is unknown, or the columns have no names.
        """
        if names and not self.names:
            raise UserError(
                f"{where}: unknown name '{printable(names[0])}'; the columns of this data set have "
                "no names, remove it"
            )
        check_names(map(printable, names), self.names, f"{where}: unknown name")
        found: list[tuple[int, int]] = []
        for name, (start, stop) in self.boundaries.items():
            if name in names and found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            elif name in names:
                found.append((start, stop))
        return tuple(found)

    @property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Column ranges of the features, and of each indicator of those that are encoded."""
        found: dict[str, tuple[int, int]] = {}
        for feature, (start, stop) in zip(self.features, spans_of(self.features), strict=True):
            width = (stop - start) // len(feature.columns)
            for index, column in enumerate(feature.columns):
                found[column] = (start + index * width, start + (index + 1) * width)
        return found

    def match(
        self,
        x: Tensor,
        own: ColumnLayout,
        where: str,
        *,
        needed: Collection[str] | None = None,
        owner: str = "the main data set",
        advice: str = "",
        may_have_more: bool = False,
    ) -> Tensor:
        """Rearrange the features of other data in the order of this layout.

        Features are matched by name. Data without names, and data in this order already, are
        returned unchanged. A missing feature becomes NaN. An indicator that a text column lacks
        becomes 0, as no row has the value.

        Args:
            x: Examples, shape `[N, ..., columns]`.
            own: Layout of `x`.
            where: Name of the examples, for error messages.
            needed: Features that must exist. If None, all are required.
            owner: Owner of this layout, for error messages.
            advice: End of the error message for a missing feature.
            may_have_more: Whether `x` may have columns that this layout lacks, which are left out.

        Raises:
            UserError: If a needed feature is missing, a feature is unknown, or a block has another
                shape.
        """
        if not own.features or not self.features or own.features == self.features:
            return x
        noun = "block" if self.blocks else "column"
        places = own._places
        columns = {column for feature in self.features for column in feature.columns}
        known = [
            feature.name
            for feature in self.features
            if not places.keys().isdisjoint(feature.columns)
        ]
        unknown = [
            feature.name
            for feature in own.features
            if feature.name not in known and columns.isdisjoint(feature.columns)
        ]
        if not may_have_more or self.blocks:
            check_names(unknown, self.names, f"{where}: {noun}", f" does not exist in {owner}")
        shapes = {block.name: block.shape for block in self.blocks}
        for name, shape in own.blocks:
            if shape != shapes[name]:
                raise UserError(
                    f"{where}: block '{name}': expected shape {shapes[name]} as in {owner}, got "
                    f"{shape}"
                )
        gap = x.new_full((*x.shape[:-1], 1), torch.nan)
        parts: list[Tensor] = []
        for feature in self.features:
            if feature.name in known:
                for column in feature.columns:
                    span = places.get(column)
                    parts.append(torch.zeros_like(gap) if span is None else x[..., slice(*span)])
                continue
            if needed is None or not {feature.name, *feature.columns}.isdisjoint(needed):
                hint = suggest_or_list(feature.name, unknown or own.names)
                raise UserError(
                    f"{where}: {noun} '{feature.name}' not found, which {owner} contains{hint}"
                    f"{advice}"
                )
            parts.append(gap.expand(*x.shape[:-1], math.prod(feature.shape)))
        return torch.cat(parts, -1)

    def keep_columns(self, x: Tensor, names: Sequence[str], where: str) -> Tensor:
        """Return a copy of the examples that is NaN outside the named features.

        Args:
            x: Examples, shape `[N, ..., columns]`.
            names: Names of the features to keep.
            where: Configuration key that lists the names, for error messages.

        Raises:
            UserError: If a name is unknown.
        """
        kept = torch.full_like(x, torch.nan)
        for start, stop in self.spans(names, where):
            kept[..., start:stop] = x[..., start:stop]
        return kept

    def has_values(self, x: Tensor, names: Sequence[str], where: str) -> Tensor:
        """Return a mask `[N]` of the rows that have values in all named features.

        A row has a value in a block if at least one number of the row in the block is not NaN.

        Args:
            x: Examples, shape `[N, ..., columns]`.
            names: Names of the features.
            where: Configuration key that lists the names, for error messages.

        Raises:
            UserError: If a name is unknown.
        """
        found = torch.ones(len(x), dtype=torch.bool)
        for name in names:
            for start, stop in self.spans([name], where):
                found &= ~x[..., start:stop].isnan().flatten(1).all(1)
        return found


def spans_of(features: Sequence[Feature | Block]) -> Spans:
    """Return the column range of each feature or block in a flat row."""
    ends = list(accumulate(math.prod(feature.shape) for feature in features))
    return tuple(zip([0, *ends], ends, strict=False))


def check_blocks(blocks: Sequence[Block], shape: Sequence[int], where: str) -> None:
    """Check the names of blocks, and that the block sizes add up to the length of a row.

    Args:
        blocks: Blocks of a flat row. If empty, nothing is checked.
        shape: Shape of an example.
        where: Name of the data set, for error messages.

    Raises:
        UserError: If a name is invalid or repeated, the examples are not flat rows, or the sizes do
            not add up to the length of a row.
    """
    names = [b.name for b in blocks]
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(
                f"{where}: blocks: expected a name of letters, digits and _, got '{name}'"
            )
        if names.count(name) > 1:
            raise UserError(f"{where}: blocks: duplicate name '{name}'")
    if blocks and (len(shape) != 1 or shape[0] != sum(b.size for b in blocks)):
        sizes = " + ".join(str(b.size) for b in blocks)
        raise UserError(
            f"{where}: blocks: expected flat rows of {sizes} columns, got examples of shape "
            f"{tuple(shape)}"
        )


EMPTY = 0
"""The padding token."""
UNKNOWN = 1
"""The token of words outside the vocabulary."""
FIRST = 2
"""The token of the first word of a vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """A mapping from words to tokens, defined by a list of words or by hashing.

    Token 0 is padding and token 1 stands for unknown words. The tokens of the words, or of the hash
    buckets, follow. Vocabularies that compare equal assign the same tokens.

    Attributes:
        words: Known words, in the order of their tokens.
        buckets: Number of hash buckets. If 0, `words` defines the tokens.

    Example:
        >>> from hetero_fl.data import Vocabulary
        >>> vocabulary = Vocabulary(("hello", "world"))
        >>> vocabulary.encode(["Hello there, world"], length=4)
        tensor([[0, 2, 1, 3]])
    """

    words: tuple[str, ...] = ()
    buckets: int = 0

    def __repr__(self) -> str:
        kind = "hashed" if self.buckets else f"{len(self.words):,} words"
        return f"Vocabulary({self.size:,} tokens, {kind})"

    @classmethod
    def from_texts(cls, texts: Iterable[Sequence[str]], max_words: int) -> Vocabulary:
        """Create a vocabulary from the most frequent words of texts.

        Ties are broken alphabetically. Words that occur only once are excluded.

        Args:
            texts: Texts as sequences of words.
            max_words: Maximum number of words.
        """
        counts = Counter(word for words in texts for word in words)
        frequent = sorted(
            (w for w, n in counts.items() if n > 1), key=lambda word: (-counts[word], word)
        )
        return cls(tuple(frequent[:max_words]))

    @property
    def size(self) -> int:
        """Number of distinct tokens, including padding and the unknown word."""
        return FIRST + (self.buckets or len(self.words))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tokens from 2 on, which are words or bucket numbers such as `#0`."""
        return self.words or tuple(f"#{i}" for i in range(self.buckets))

    @cached_property
    def _token_by_word(self) -> dict[str, int]:
        return {word: FIRST + i for i, word in enumerate(self.words)}

    def number(self, word: str) -> int:
        """Return the token of a word.

        A word that is not in `words` has token 1. With hashing, the bucket of the word determines
        the token.
        """
        if not self.buckets:
            return self._token_by_word.get(word, UNKNOWN)
        # Unlike `hash`, BLAKE2 gives the same value in every process and release.
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return FIRST + int.from_bytes(digest, "big") % self.buckets

    def encode(self, texts: Iterable[str | Sequence[str]], length: int) -> Tensor:
        """Encode the last `length` words of each text, with padding on the left of shorter texts.

        Args:
            texts: Texts, as strings or as sequences of words.
            length: Number of tokens per text.

        Returns:
            Tokens, int64 `[N, length]`.
        """
        rows = [self.numbers(text)[-length:] for text in texts]
        filled = [[EMPTY] * (length - len(row)) + row for row in rows]
        return torch.tensor(filled, dtype=torch.int64).reshape(-1, length)

    def numbers(self, text: str | Sequence[str]) -> list[int]:
        """Return the tokens of a text.

        A string is first split into words by `split_words`.
        """
        return [
            self.number(word) for word in (split_words(text) if isinstance(text, str) else text)
        ]

    def continuations(
        self, texts: Iterable[Sequence[str]], length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Create examples of next-word prediction, one for each known word but the first of a text.

        Unknown words occur in the contexts but are never targets. Shorter contexts are padded on
        the left.

        Args:
            texts: Texts as sequences of words.
            length: Number of context words.

        Returns:
            A tuple of the contexts, int64 `[N, length]`, the next words as indices into `names`,
            int64 `[N]`, and the text of each example as an index into `texts`, int64 `[N]`.
        """
        contexts = []
        next_words = []
        text_indices = []
        for text_index, words in enumerate(texts):
            tokens = self.numbers(words)
            for position in range(1, len(tokens)):
                if tokens[position] != UNKNOWN:
                    row = tokens[max(0, position - length) : position]
                    contexts.append([EMPTY] * (length - len(row)) + row)
                    next_words.append(tokens[position] - FIRST)
                    text_indices.append(text_index)
        return (
            torch.tensor(contexts, dtype=torch.int64).reshape(-1, length),
            torch.tensor(next_words, dtype=torch.int64),
            torch.tensor(text_indices, dtype=torch.int64),
        )


MAX_NUMBERED_CLASSES = 20
"""Maximum number of distinct numeric labels that are inferred to be classes."""

Columns = Mapping[str, Tensor]
"""Preprocessed examples: inputs "x" and, unless the examples are unlabeled, targets "y"."""


@dataclass(frozen=True)
class PatientTerm:
    """Term for a patient of `Examples` in messages.

    Attributes:
        noun: Name of a patient, of which the plural ends in `s`.
        rule: Key or property of a source that keeps the rows of a patient together.
    """

    noun: str = "patient"
    rule: str = "data.patient"


PATIENTS = PatientTerm()
"""Term of sources with the key `data.patient`."""


@dataclass
class Examples:
    """Raw examples, before preprocessing, with targets and optional further columns.

    Attributes:
        x: Inputs, which are images (uint8, int32 or float `[N, C, H, W]`), series (float
            `[N, T, F]`), tables (float `[N, F]`) or tokens (int64 `[N, T]`). With `data.stream`,
            images are mapped from a file (see `hetero_fl.core.mapped_tensors`).
        y: Targets as defined by `Task`, or None if the examples are unlabeled.
        group: Group of each row, for example a hospital, as indices into `group_names`, int64
            `[N]`.
        group_names: Names of the groups.
        patient: Patient of each row, as indices into `patient_names`, int64 `[N]`. The rows of a
            patient are never divided between splits or clients.
        patient_names: Names of the patients.
        patient_term: Term for a patient in messages. Some sources keep other rows together, such
            as windows of a recording that overlap.
        time: Time of each target, int64 `[N]`, in seconds since 1970 or any other unit. If None,
            training, validation and test rows are split at random, otherwise by date.
        unit: Scale of the regression targets of each row, for example the mean of a site, float
            `[N]`. Errors are reported for the targets multiplied by this scale. If None, the scale
            is 1.
        excluded: Classes that are left out of the ranking of each row, for example the items that a
            user has seen, as bits in uint8 `[N, ceil(classes / 8)]`, such as
            `numpy.packbits(mask, axis=1)` of a mask `[N, classes]`. If None, no class is left out.
        baselines: Outputs `[N, outputs]` of simple forecasting rules, keyed by name. Model outputs
            are compared with these outputs, which are never model inputs.
        metadata: Further columns of the source, such as a hospital or a date, as arrays `[N]` keyed
            by name. Partition functions see these columns, which are never model inputs.
        row: Number of each row in its file or array, int64 `[N]`, for messages. If None, it is
            unknown.
        files: The file or argument of all rows, or of each group, for messages.

    Raises:
        UserError: If a column and `x` differ in the number of rows.

    Example:
        >>> import torch
        >>> from hetero_fl.data import Examples
        >>> examples = Examples(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]))
        >>> examples
        Examples(4 rows: x float32 [3], y int64)
        >>> examples.select_rows(torch.tensor([1, 2])).y
        tensor([1, 1])
    """

    x: Tensor
    y: Tensor | None = None
    group: Tensor | None = None
    group_names: tuple[str, ...] = ()
    patient: Tensor | None = None
    patient_names: tuple[str, ...] = ()
    patient_term: PatientTerm = PATIENTS
    time: Tensor | None = None
    unit: Tensor | None = None
    excluded: Tensor | None = None
    baselines: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, np.ndarray] = field(default_factory=dict)
    row: Tensor | None = None
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, column in [
            *((name, getattr(self, name)) for name in _BY_ROW),
            *self.baselines.items(),
            *self.metadata.items(),
        ]:
            if column is not None and len(column) != len(self.x):
                raise UserError(f"{name}: expected {len(self.x)} rows as in x, got {len(column)}")

    def __repr__(self) -> str:
        columns = {name: getattr(self, name) for name in ("x", *_BY_ROW) if name != "row"}
        shapes = (
            f"{name} {_shape(column)}" for name, column in columns.items() if column is not None
        )
        return f"Examples({len(self):,} rows: {', '.join(shapes)})"

    def __len__(self) -> int:
        return len(self.x)

    def locate(self, index: int, split: str) -> str:
        """Return the place of a row in messages: its file and number, or `split` and the index."""
        if self.row is None:
            return f"row {index} of {split}"
        of_groups = len(self.files) > 1 and self.group is not None
        file = self.files[int(self.group[index]) if of_groups else 0]  # type: ignore[index]
        return f"{file}: row {int(self.row[index])}"

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the file again instead of receiving the values.
        file = mapped_file(self.x)
        return {**vars(self), "x": self.x if file is None or not file.path else file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        x = state["x"]
        vars(self).update(state, x=x.open() if isinstance(x, MappedFile) else x)

    @property
    def labels(self) -> Tensor:
        """Targets `y`, which must not be None."""
        assert self.y is not None
        return self.y

    def names_of(self, owner: Literal["group", "patient"], rows: Tensor | None = None) -> set[str]:
        """Return the names of the groups or patients of all or some rows.

        Numbers stand for groups or patients without names. Without groups or patients, there are no
        names.
        """
        numbers = getattr(self, owner)
        if numbers is None:
            return set()
        names = getattr(self, f"{owner}_names")
        present = numbers if rows is None else numbers[rows]
        return {names[index] if names else str(index) for index in present.unique().tolist()}

    def rows_of(
        self, owner: Literal["group", "patient"], names: Collection[str], rows: Tensor
    ) -> Tensor:
        """Return whether the group or patient of each of some rows has one of the given names."""
        numbers = getattr(self, owner)[rows]
        known = getattr(self, f"{owner}_names")
        found = [i for i in numbers.unique().tolist() if (known[i] if known else str(i)) in names]
        return torch.isin(numbers, torch.tensor(found, dtype=torch.int64))

    def select_rows(self, rows: Tensor) -> Examples:
        """Return the rows at the given indices (int64 `[M]`), in the order of the indices."""
        columns: dict[str, Any] = {
            name: None if (c := getattr(self, name)) is None else c[rows] for name in _BY_ROW
        }
        baselines = {name: outputs[rows] for name, outputs in self.baselines.items()}
        metadata = {name: values[rows.numpy()] for name, values in self.metadata.items()}
        # x may be a view of images with the channels last.
        x = take_rows(self.x, rows).contiguous()
        return replace(self, x=x, baselines=baselines, metadata=metadata, **columns)


_BY_ROW = ("y", "group", "patient", "time", "unit", "excluded", "row")


def concatenate_examples(parts: Sequence[Examples]) -> Examples:
    """Concatenate parts of a data set.

    Columns, baselines and metadata that any part lacks are dropped.

    Args:
        parts: Examples with the same `group_names` and `patient_names`.
    """
    columns: dict[str, Any] = {}
    for name in _BY_ROW:
        found = [getattr(part, name) for part in parts]
        columns[name] = None if any(column is None for column in found) else torch.cat(found)
    baselines = {
        name: torch.cat([part.baselines[name] for part in parts])
        for name in parts[0].baselines
        if all(name in part.baselines for part in parts)
    }
    metadata = {
        name: np.concatenate([part.metadata[name] for part in parts])
        for name in parts[0].metadata
        if all(name in part.metadata for part in parts)
    }
    x = join_rows([part.x for part in parts])
    return replace(parts[0], x=x, baselines=baselines, metadata=metadata, **columns)


def without_metadata(dataset: Dataset) -> Dataset:
    """Return the data set without the metadata of its examples. Tensors are not copied."""
    parts = {name: replace(part, metadata={}) for name, part in dataset.splits().items()}
    local = {name: replace(part, metadata={}) for name, part in dataset.local_sets.items()}
    return replace(
        dataset,
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts.get("test"),
        local_sets=local,
    )


def _shape(column: Tensor) -> str:
    name = dtype_name(column)
    return f"{name} {list(column.shape[1:])}" if column.ndim > 1 else name


def with_patients(examples: Examples, patient: Any, where: str) -> Examples:
    """Return the examples with the patient of each row (see `owner_list`)."""
    index, names = index_names(owner_list(patient, len(examples), where))
    return replace(examples, patient=index, patient_names=names)


@dataclass
class Dataset:
    """A data set with a learning task and a description.

    Attributes:
        name: Name of the data set.
        task: Learning task.
        train: Rows that are partitioned among the clients.
        validation: Global validation set. If None, `federate` holds out the share `data.validation`
            of the training rows.
        test: Global test set. If None, `federate` holds out training rows (see `with_test`).
        simulated: Whether the data is simulated.
        about: Short description.
        columns: Names of the features of a table, or of the channels of a series.
        notes: Remarks on how the data was read, shown to the user before the run.
        blocks: Blocks of multimodal float rows `[N, D]`, in order.
        first_missing: Location of the first missing value, for error messages. Empty if no location
            is known.
        empty_classes: Class folders without images, for messages.
        span: Maximum time between the first and the last target of a row. The unit is that of
            `Examples.time`, which contains the time of the last target.
        vocabulary: Vocabulary if x consists of tokens, otherwise None.
        categories: Text columns that are one-hot encoded, with their values.
        source: Name of the source, on which the choice of held-out test rows depends. If empty,
            `name` is used.
        local_sets: Validation and test rows of the groups of `train`, keyed by "validation" and
            "test". In a natural partition, each client gets the rows of its groups, instead of
            rows that are held out of its training rows.
        pixel_range: Value of integer pixels that becomes 1. If None, `federate` decides.

    Example:
        >>> import torch
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import Dataset, Examples
        >>> train = Examples(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))
        >>> Dataset("toy", Task("multiclass", 2), train, columns=("age", "dose"))
        Dataset('toy': multiclass with 2 outputs, x float32 [2]; rows: train 4)
    """

    name: str
    task: Task
    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    simulated: bool = False
    about: str = ""
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    first_missing: str = ""
    empty_classes: tuple[str, ...] = ()
    span: int = 0
    vocabulary: Vocabulary | None = None
    categories: Categories = ()
    source: str = ""
    local_sets: Mapping[str, Examples] = field(default_factory=dict)
    pixel_range: float | None = None

    def __post_init__(self) -> None:
        self.source = self.source or self.name
        self.blocks = tuple(Block(str(name), tuple(shape)) for name, shape in self.blocks)
        check_blocks(self.blocks, tuple(self.train.x.shape[1:]), self.name)

    def __repr__(self) -> str:
        sets = self.splits() | {f"local {name}": part for name, part in self.local_sets.items()}
        splits = ", ".join(f"{name} {len(examples):,}" for name, examples in sets.items())
        simulated = ", simulated" if self.simulated else ""
        return (
            f"Dataset({self.name!r}: {self.task.kind} with {self.task.outputs} outputs, "
            f"x {_shape(self.train.x)}; rows: {splits}{simulated})"
        )

    @property
    def layout(self) -> ColumnLayout:
        """Names of the columns or blocks along the last axis of the examples."""
        return ColumnLayout(self.columns, self.blocks, self.categories, self.pixel_range)

    @property
    def predicts_items(self) -> bool:
        """Whether the classes are items of the inputs, such as the next word or movie."""
        words = self.vocabulary
        return words is not None and (self.task.is_ranking or self.task.outputs == len(words.names))

    def splits(self) -> dict[str, Examples]:
        """Return the existing splits, keyed by "train", "validation" and "test"."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: examples for name, examples in splits.items() if examples is not None}
