"""Data sets of any source: examples, column layouts, vocabularies, and views of selected rows."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.images import dtype_name
from hetero_fl.core.task import Task
from hetero_fl.utils.errors import UserError, check_names, printable
from hetero_fl.utils.ordering import natural_order

# What a raw example is made of: named columns, or named blocks (modalities) of a flat row; and
# which of them a view takes.

Spans = tuple[tuple[int, int], ...]
"""Runs of columns of the last axis, each from its first to before its last."""
Categories = tuple[tuple[str, tuple[str, ...]], ...]
"""Text columns of a table that are encoded as indicators, each with its values in their order."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def indicator_names(column: str, values: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns that say 1 where a text column has a value, else 0."""
    return tuple(f"{column}={value}" for value in values)


class Block(NamedTuple):
    """A named run of columns of a flat row `[D]`, with the shape of its values.

    `(1, 28, 28)` is an image, `(60,)` a row.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Columns."""
        return math.prod(self.shape)

    @property
    def image(self) -> bool:
        """Whether its values are pixels."""
        return len(self.shape) == 3


@dataclass(frozen=True)
class ColumnLayout:
    """The names along an example's last axis: columns, or blocks, or none.

    The indicators of a text column (`categories`) lie next to each other and have that column's
    name.
    """

    columns: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    categories: Categories = ()

    @property
    def encoded_columns(self) -> dict[str, str]:
        """The text column of each indicator."""
        return {
            name: column
            for column, values in self.categories
            for name in indicator_names(column, values)
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a view may choose from."""
        encoded = self.encoded_columns
        columns = dict.fromkeys(encoded.get(name, name) for name in self.columns)
        return tuple(b.name for b in self.blocks) or tuple(columns)

    @property
    def boundaries(self) -> dict[str, tuple[int, int]]:
        """Where each named column or block begins and ends."""
        if not self.blocks:
            found: dict[str, tuple[int, int]] = {}
            encoded = self.encoded_columns
            for i, indicator in enumerate(self.columns):
                name = encoded.get(indicator, indicator)
                found[name] = (found.get(name, (i, i))[0], i + 1)
            return found
        return {b.name: span for b, span in zip(self.blocks, spans_of(self.blocks), strict=True)}

    def spans(self, names: Sequence[str], where: str) -> Spans:
        """Return the runs of columns that have these names, in the data's order.

        Adjacent runs are merged.

        Raises:
            UserError: If nothing has a name, or nothing this one.
        """
        if names and not self.names:
            raise UserError(
                f"{where}: found '{printable(names[0])}'; nothing of these examples has a name, "
                "leave it out"
            )
        check_names(map(printable, names), self.names, f"{where}: found")
        return merge_spans(tuple(span for name, span in self.boundaries.items() if name in names))

    def keep_columns(self, x: Tensor, names: Sequence[str], where: str) -> Tensor:
        """Return a copy of examples in which all columns or blocks but these are NaN.

        Args:
            x: Examples, shape `[N, ..., columns]`.
            names: Columns or blocks.
            where: The place in the configuration that names them.

        Raises:
            UserError: If a name is unknown.
        """
        kept = torch.full_like(x, torch.nan)
        for start, stop in self.spans(names, where):
            kept[..., start:stop] = x[..., start:stop]
        return kept

    def has_values(self, x: Tensor, names: Sequence[str], where: str) -> Tensor:
        """Return which rows have a value in each of these columns or blocks, bool `[N]`.

        Args:
            x: Examples, shape `[N, ..., columns]`.
            names: Columns or blocks.
            where: The place in the configuration that names them.

        Raises:
            UserError: If a name is unknown.
        """
        found = torch.ones(len(x), dtype=torch.bool)
        for name in names:
            for start, stop in self.spans([name], where):
                found &= ~x[..., start:stop].isnan().flatten(1).all(1)
        return found


def spans_of(blocks: Sequence[Block]) -> Spans:
    """Where each block begins and ends."""
    found = []
    start = 0
    for block in blocks:
        found.append((start, start + block.size))
        start += block.size
    return tuple(found)


def merge_spans(spans: Spans) -> Spans:
    """The same columns in as few runs as can be."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def check_blocks(blocks: Sequence[Block], shape: Sequence[int], where: str) -> None:
    """Refuse blocks that do not fit the shape of an example, or whose names tensors cannot have."""
    names = [b.name for b in blocks]
    for name in names:
        if not NAME.fullmatch(name) or names.count(name) > 1:
            raise UserError(
                f"{where}: blocks: found '{name}'; names are letters, digits and _, each once"
            )
    if blocks and (len(shape) != 1 or shape[0] != sum(b.size for b in blocks)):
        sizes = " + ".join(str(b.size) for b in blocks)
        raise UserError(
            f"{where}: blocks: found {sizes} columns for examples of shape {tuple(shape)}; blocks lie in rows"
        )


# Words as numbers: a vocabulary taken from public text alone, or by hashing, for which no text is
# read at all.

EMPTY = 0
UNKNOWN = 1
FIRST = 2
"""No word, a word that is not in the vocabulary, the first word."""
WORD = re.compile(r"\w+(?:['’-]\w+)*|[.!?]")


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case.

    A full stop, question or exclamation mark is a word; other marks are left out.
    """
    return WORD.findall(text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """What the numbers of tokens mean: 0 no word, 1 unknown, then `words`; or, without words, that many `buckets`.

    Equal vocabularies give equal numbers.
    """

    words: tuple[str, ...] = ()
    buckets: int = 0

    def __repr__(self) -> str:
        return f"Vocabulary({self.size:,} tokens, {'hashed' if self.buckets else f'{len(self.words):,} words'})"

    @classmethod
    def from_texts(cls, texts: Iterable[Sequence[str]], most: int) -> Vocabulary:
        """Return the vocabulary of the most frequent words of public texts.

        Equally frequent words are in alphabetical order; words that occur once are left out.

        Args:
            texts: Texts as words.
            most: Largest number of words.
        """
        counts = Counter(word for words in texts for word in words)
        frequent = sorted(
            (w for w, n in counts.items() if n > 1), key=lambda word: (-counts[word], word)
        )
        return cls(tuple(frequent[:most]))

    @property
    def size(self) -> int:
        """Number of different tokens."""
        return FIRST + (self.buckets or len(self.words))

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each token from the first word on: the word, or the number of its bucket."""
        return self.words or tuple(f"#{i}" for i in range(self.buckets))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: FIRST + i for i, word in enumerate(self.words)}

    def number(self, word: str) -> int:
        """Return the token of a word."""
        if not self.buckets:
            return self._places.get(word, UNKNOWN)
        # the same in every process and release
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return FIRST + int.from_bytes(digest, "big") % self.buckets

    def encode(self, texts: Iterable[str | Sequence[str]], length: int) -> Tensor:
        """Return the tokens of the last words of texts, int64 `[N, length]`, padded on the left."""
        rows = [self.numbers(text)[-length:] for text in texts]
        filled = [[EMPTY] * (length - len(row)) + row for row in rows]
        return torch.tensor(filled, dtype=torch.int64).reshape(-1, length)

    def numbers(self, text: str | Sequence[str]) -> list[int]:
        """Return the tokens of a text, or of its words."""
        return [
            self.number(word) for word in (split_words(text) if isinstance(text, str) else text)
        ]

    def continuations(
        self, texts: Iterable[Sequence[str]], length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return an example for every known word that follows on another word.

        Args:
            texts: Texts as words.
            length: Number of words before.

        Returns:
            The words before it, int64 `[N, length]`; its index in `names`, int64 `[N]`; the number
            of its text, int64 `[N]`. Unknown words are among those before, but never predicted.
        """
        before = []
        following = []
        whose = []
        for number, words in enumerate(texts):
            tokens = self.numbers(words)
            for place in range(1, len(tokens)):
                if tokens[place] != UNKNOWN:
                    row = tokens[max(0, place - length) : place]
                    before.append([EMPTY] * (length - len(row)) + row)
                    following.append(tokens[place] - FIRST)
                    whose.append(number)
        x = torch.tensor(before, dtype=torch.int64).reshape(-1, length)
        return x, torch.tensor(following, dtype=torch.int64), torch.tensor(whose, dtype=torch.int64)


# What every source yields: examples, the data set made of them, and the check that refuses
# malformed ones.

MOST_NUMBERED_CLASSES = 20  # more different numbers than that are regression targets

Columns = dict[str, Tensor]
"""Tensors aligned on dim 0: "x" and, unless it is a proxy set without labels, "y"."""


@dataclass
class Examples:
    """Raw examples as they lie in memory.

    Attributes:
        x: uint8 images `[N, C, H, W]`, floats `[N, ...]` (images, `[N, T, F]` series, `[N, F]`
            tables), or tokens, int64 `[N, T]` below the size of the data set's vocabulary.
        y: Targets as `Task` defines them, or None where there are none to read.
        group: Group of each row (whose it is), int64 `[N]`, an index into `group_names`.
        group_names: Names of the groups.
        patient: Patient of each row, int64 `[N]`, an index into `patient_names`. Rows of one
            patient stay together.
        patient_names: Names of the patients.
        time: Time of each row's target, int64 `[N]`, in seconds since 1970 or any count that grows.
            It makes a set *dated*: train, validation and test are cut by date, never drawn.
        unit: What each row's regression targets are relative to (a site's mean, say), float `[N]`.
            Errors are those of targets times unit.
        baselines: What simple rules predict for each row, as a model's outputs `[N, outputs]`, by
            name. Models never see them.
    """

    x: Tensor
    y: Tensor | None = None
    group: Tensor | None = None
    group_names: tuple[str, ...] = ()
    patient: Tensor | None = None
    patient_names: tuple[str, ...] = ()
    time: Tensor | None = None
    unit: Tensor | None = None
    baselines: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in [
            *((name, getattr(self, name)) for name in _BY_ROW),
            *self.baselines.items(),
        ]:
            if column is not None and len(column) != len(self.x):
                raise UserError(f"found {len(self.x)} rows of x but {len(column)} of {name}")

    def __repr__(self) -> str:
        columns = {name: getattr(self, name) for name in ("x", *_BY_ROW)}
        shapes = (
            f"{name} {_shape(column)}" for name, column in columns.items() if column is not None
        )
        return f"Examples({len(self):,} rows: {', '.join(shapes)})"

    def __len__(self) -> int:
        return len(self.x)

    @property
    def labels(self) -> Tensor:
        """`y` of a set that was checked to have it when it was loaded."""
        assert self.y is not None
        return self.y

    def select_rows(self, rows: Tensor) -> Examples:
        """Return the rows (int64 `[M]`), in that order."""
        found: dict[str, Any] = {
            name: None if (c := getattr(self, name)) is None else c[rows] for name in _BY_ROW
        }
        baselines = {name: outputs[rows] for name, outputs in self.baselines.items()}
        return replace(self, x=self.x[rows], baselines=baselines, **found)


_BY_ROW = ("y", "group", "patient", "time", "unit")


def concatenate_examples(parts: Sequence[Examples]) -> Examples:
    """Return the rows of all parts, in order; what only some parts have is left out.

    Args:
        parts: Parts of one data set: groups and patients are numbered alike.
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
    x = torch.cat([part.x for part in parts])
    return replace(parts[0], x=x, baselines=baselines, **columns)


def _shape(column: Tensor) -> str:
    """The type and shape of a row: `uint8 [1, 28, 28]`; of a single value the type alone."""
    name = dtype_name(column)
    return f"{name} {list(column.shape[1:])}" if column.ndim > 1 else name


def index_names(values: Iterable[object]) -> tuple[Tensor, tuple[str, ...]]:
    """Return each value's index, int64 `[N]`, and the distinct names in natural order."""
    found = [str(value).strip() for value in values]
    names = tuple(natural_order(set(found)))
    place = {name: i for i, name in enumerate(names)}
    return torch.tensor([place[name] for name in found], dtype=torch.int64), names


@dataclass
class Dataset:
    """A data set.

    Attributes:
        name: Its name.
        task: What is learned.
        train: The rows that are partitioned among clients.
        validation: The common validation set, if it has one.
        test: The common test set, if it has one.
        simulated: Whether generated data stands in for a real set.
        about: A description in a few words.
        columns: Names of a table's features, or of a series' channels.
        notes: Lines on how the data was read that a user has to see before the run.
        blocks: The modalities of flat float rows `[N, D]`, in order.
        min_gap: Where the first missing value is, for the message that refuses it.
        span: Of a dated set whose rows have several targets: how long before `time`, which is the
            last target's, the first may be.
        vocabulary: What the tokens mean, where x is tokens; all models of a federation share it.
        categories: The text columns that some columns encode.
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
    min_gap: str = ""
    span: int = 0
    vocabulary: Vocabulary | None = None
    categories: Categories = ()

    def __post_init__(self) -> None:
        self.blocks = tuple(Block(str(name), tuple(shape)) for name, shape in self.blocks)
        check_blocks(self.blocks, tuple(self.train.x.shape[1:]), self.name)

    def __repr__(self) -> str:
        splits = ", ".join(f"{name} {len(examples):,}" for name, examples in self.splits().items())
        simulated = ", simulated" if self.simulated else ""
        return (
            f"Dataset({self.name!r}: {self.task.kind} with {self.task.outputs} outputs, x {_shape(self.train.x)}; "
            f"rows: {splits}{simulated})"
        )

    @property
    def layout(self) -> ColumnLayout:
        """The names along an example's last axis."""
        return ColumnLayout(self.columns, self.blocks, self.categories)

    def splits(self) -> dict[str, Examples]:
        """Return the splits that the set has, by name."""
        all_three = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: examples for name, examples in all_three.items() if examples is not None}


def check_examples(
    examples: Examples,
    task: Task,
    where: str,
    names: tuple[str, str] = ("x", "y"),
    missing: bool = False,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Refuse examples that no model can learn from.

    Args:
        examples: The examples.
        task: What is learned.
        where: What the set is called in messages; rows count from 0.
        names: The names of x and y in the source.
        missing: Whether NaN in x stands for a missing value; in images it is never allowed.
        vocabulary: The vocabulary, where x is tokens.

    Raises:
        UserError: No rows; x of a wrong dtype or shape; x or y not finite; tokens outside the
            vocabulary; y missing, of a wrong dtype or shape, or out of the task's range. A single
            class is allowed.
    """
    x = examples.x
    y = examples.y
    x_name, y_name = names

    def refuse(array: str, what: str) -> None:
        raise UserError(f"{where}: {array}: {what}")

    if len(x) == 0:
        refuse(x_name, "found no rows")
    if vocabulary is not None:
        if x.dtype != torch.int64 or x.ndim != 2 or 0 in x.shape:
            refuse(
                x_name,
                f"found {dtype_name(x)} of shape {tuple(x.shape)}; tokens are int64, rows x length",
            )
        if (row := first_true(((x < 0) | (x >= vocabulary.size)).any(1))) is not None:
            refuse(
                x_name, f"row {row} has a token out of range; they are 0 to {vocabulary.size - 1}"
            )
    elif x.dtype == torch.uint8:
        if x.ndim != 4 or 0 in x.shape:
            wanted = "images are rows x channels x height x width"
            if x.ndim == 2:
                wanted += f'; for a table pass {x_name}.astype("float32")'
            refuse(x_name, f"found shape {tuple(x.shape)}; {wanted}")
    elif not x.is_floating_point():
        wanted = f'for a table pass {x_name}.astype("float32"); tokens need a vocabulary'
        if x.ndim != 2:
            wanted = "choose uint8 (images) or floats; tokens need a vocabulary"
        refuse(x_name, f"found {dtype_name(x)} of shape {tuple(x.shape)}; {wanted}")
    elif x.ndim < 2 or 0 in x.shape:
        refuse(x_name, f"found shape {tuple(x.shape)}; every row needs at least one value")
    elif missing and x.ndim < 4:
        if (row := first_true(torch.isinf(x).flatten(1).any(1))) is not None:
            refuse(x_name, f"infinity in row {row}")
    elif (row := first_true(~torch.isfinite(x).flatten(1).all(1))) is not None:
        refuse(x_name, f"NaN or infinity in row {row}")

    if y is None:
        refuse(y_name, "missing; every set but the proxy needs labels")
    elif task.kind == "multiclass":
        if y.dtype != torch.int64 or y.ndim != 1:
            refuse(
                y_name,
                f"found {dtype_name(y)} of shape {tuple(y.shape)}; class numbers are int64 of shape ({len(x)},)",
            )
        if (row := first_true((y < 0) | (y >= task.outputs))) is not None:
            refuse(
                y_name,
                f"label {int(y[row])} in row {row} is out of range; classes are 0 to {task.outputs - 1}",
            )
    else:
        if not y.is_floating_point() or y.shape != (len(x), task.outputs):
            wanted = f"{task.kind} takes floats of shape {(len(x), task.outputs)}"
            refuse(y_name, f"found {dtype_name(y)} of shape {tuple(y.shape)}; {wanted}")
        if (row := first_true(~torch.isfinite(y).all(1))) is not None:
            refuse(y_name, f"NaN or infinity in row {row}")
        if (
            task.kind == "multilabel"
            and (row := first_true(((y != 0) & (y != 1)).any(1))) is not None
        ):
            refuse(y_name, f"row {row} is out of range; multilabel targets are 0 or 1")
    _check_extra_columns(examples, task, where)


def _check_extra_columns(examples: Examples, task: Task, where: str) -> None:
    """Refuse times, units and baselines that do not fit the rows."""
    time = examples.time
    unit = examples.unit
    if time is not None and (time.dtype != torch.int64 or time.ndim != 1):
        raise UserError(
            f"{where}: time: found {dtype_name(time)} of shape {tuple(time.shape)}; want int64 ({len(examples)},)"
        )
    if unit is not None:
        if not unit.is_floating_point() or unit.ndim != 1:
            raise UserError(
                f"{where}: unit: found {dtype_name(unit)} of shape {tuple(unit.shape)}; want floats ({len(examples)},)"
            )
        if task.kind != "regression":
            raise UserError(f"{where}: unit: is of regression targets, but the task is {task.kind}")
        if (row := first_true(~(torch.isfinite(unit) & (unit > 0)))) is not None:
            raise UserError(
                f"{where}: unit: found {float(unit[row]):g} in row {row}; units are above 0"
            )
    for name, outputs in examples.baselines.items():
        if outputs.shape != (len(examples), task.outputs) or not bool(
            torch.isfinite(outputs).all()
        ):
            raise UserError(
                f"{where}: baseline {name}: want finite outputs of shape {(len(examples), task.outputs)}"
            )


def first_true(mask: Any) -> int | None:
    """Return the index of the first True in a mask `[N]`; None if there is none."""
    values = np.asarray(mask, dtype=bool)
    return int(values.argmax()) if values.any() else None


@dataclass(frozen=True)
class RowSelection:
    """Rows (int64 `[M]`) of examples that lie elsewhere, shared with others."""

    examples: Examples
    rows: Tensor

    @classmethod
    def all_rows(cls, examples: Examples) -> RowSelection:
        """All rows."""
        return cls(examples, torch.arange(len(examples)))

    def copy_rows(self) -> Examples:
        """A copy of the rows."""
        return self.examples.select_rows(self.rows)

    def __reduce__(
        self,
        # between processes rows go as an array: tensors would each take a file handle
    ) -> tuple[Any, ...]:
        return _make_selection, (self.examples, self.rows.numpy())


def _make_selection(examples: Examples, rows: np.ndarray) -> RowSelection:
    return RowSelection(examples, torch.from_numpy(rows))
