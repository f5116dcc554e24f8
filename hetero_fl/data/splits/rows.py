"""Select, sample and split rows, at random, by patient, or by date."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import DataConfig, SplitConfig
from hetero_fl.data.dataset import PATIENTS, Dataset, Examples, PatientTerm
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.seeding import keyed_generator
from hetero_fl.utils.text import format_list, pluralize

RARE = 0.1
"""Share of the training rows below which a class is rare."""
MIN_TRAIN_ROWS = 2
"""Minimum number of training rows of a client in a random split, without regard to patients.

BatchNorm cannot train on a single row.
"""


@dataclass(frozen=True)
class RowSelection:
    """A selection of rows of examples.

    Several selections can share the same examples, which are not copied.

    Attributes:
        examples: Examples to select from.
        rows: Indices of the selected rows, int64 `[M]`.
    """

    examples: Examples
    rows: Tensor

    @classmethod
    def all_rows(cls, examples: Examples) -> RowSelection:
        """Select all rows of the examples."""
        return cls(examples, torch.arange(len(examples)))

    def copy_rows(self) -> Examples:
        """Return a copy of the selected rows."""
        return self.examples.select_rows(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as an array: every tensor sent between processes would occupy a file handle.
        return _make_selection, (self.examples, self.rows.numpy())


def _make_selection(examples: Examples, rows: np.ndarray) -> RowSelection:
    return RowSelection(examples, torch.from_numpy(rows))


Splits = dict[str, RowSelection]
"""Rows of a client, keyed by "train", "validation" and "test"."""


def sample_patients(
    patient: Tensor,
    count: int,
    generator: torch.Generator,
    leave: int = 1,
    term: PatientTerm = PATIENTS,
) -> Tensor:
    """Sample all rows of randomly chosen patients.

    No patient then has rows both inside and outside the sample.

    Args:
        patient: Patient of each row, int64 `[N]`.
        count: Maximum number of rows to sample. If all patients have more rows, the patient with
            the fewest rows is sampled. If 0, no rows are sampled.
        generator: Random generator.
        leave: Minimum number of patients that are not sampled.
        term: What a patient is, for error messages.

    Returns:
        Mask of the sampled rows, bool `[N]`.

    Raises:
        UserError: If `count` is positive and there are at most `leave` patients.
    """
    patient_index, size = patient.unique(return_inverse=True, return_counts=True)[1:]
    chosen = torch.zeros(len(size), dtype=torch.bool)
    order = torch.randperm(len(size), generator=generator)
    if count < 1:
        return chosen[patient_index]
    if len(size) <= leave:
        raise UserError(
            f"{term.rule}: expected more than {pluralize(leave, term.noun)} to hold out some of "
            f"them, got {len(size)}"
        )
    while True:
        left = count - int(size[chosen].sum())
        fitting = order[~chosen[order] & (size[order] <= left)][
            : len(size) - leave - int(chosen.sum())
        ]
        taken = fitting[size[fitting].cumsum(0) <= left]
        if len(taken) == 0:
            break
        chosen[taken] = True
    if not bool(chosen.any()):
        chosen[order[size[order].argsort(stable=True)[0]]] = True
    return chosen[patient_index]


def draw_rows(
    rows: Tensor,
    count: int,
    generator: torch.Generator,
    patient: Tensor | None = None,
    *,
    leave: int = 1,
    term: PatientTerm = PATIENTS,
) -> tuple[Tensor, Tensor]:
    """Sample rows without replacement.

    Args:
        rows: Row indices, int64 `[M]`.
        count: Number of rows to sample. If `patient` is set, the maximum number, as in
            `sample_patients`.
        generator: Random generator.
        patient: Patient of each row of the whole data set, int64 `[N]`. If set, whole patients are
            sampled (see `sample_patients`).
        leave: Minimum number of patients that are not sampled. Ignored if `patient` is None.
        term: What a patient is, for error messages.

    Returns:
        The sampled rows and the remaining rows, both sorted.

    Raises:
        UserError: If `patient` is set, `count` is positive, and there are at most `leave` patients.
    """
    if patient is not None:
        sampled = sample_patients(patient[rows], count, generator, leave, term)
        return rows[sampled].sort().values, rows[~sampled].sort().values
    order = torch.randperm(len(rows), generator=generator)
    return rows[order[:count]].sort().values, rows[order[count:]].sort().values


def mark_rare_class(dataset: Dataset) -> Dataset:
    """Return a copy of a binary data set with `task.rare` set to the rare class.

    A class is rare if it has at least one row, but less than a tenth of the training rows. The data
    set itself is returned if no class is rare, the task is not multiclass with two classes, the
    training rows have no labels, or `task.rare` is already set.
    """
    task = dataset.task
    y = dataset.train.y
    if y is None or task.kind != "multiclass" or task.outputs != 2 or task.rare is not None:
        return dataset
    counts = torch.bincount(y, minlength=2)
    rare = int(counts.argmin())
    scarce = 0 < counts[rare] < RARE * len(y)
    return replace(dataset, task=replace(task, rare=rare)) if scarce else dataset


def check_classes(dataset: Dataset, config: DataConfig) -> None:
    """Check that a multiclass data set has at least two classes.

    Raises:
        UserError: If the task has a single class.
    """
    task = dataset.task
    if task.kind == "multiclass" and task.outputs < 2:
        where = f"data.path: {config.path}" if config.path else f"data.name: {dataset.name}"
        column = f"column '{config.label}'" if config.label else "labels"
        empty = format_list(dataset.empty_classes, quote=True)
        raise UserError(
            f"{where}: {column}: needs two classes, got '{task.output_names[0]}' in all "
            f"{len(dataset.train):,} rows" + (f"; found no images of {empty}" if empty else "")
        )


def check_categories(dataset: Dataset, config: DataConfig) -> None:
    """Check that the columns of `data.categories` are one-hot encoded features of the data set.

    Raises:
        UserError: If a column is not such a feature.
    """
    encoded = dict(dataset.categories)
    for column in config.categories or {}:
        if column not in encoded:
            raise UserError(
                f"data.categories: column '{column}' not found among the features of "
                f"{dataset.name}{suggest_or_list(column, dataset.columns)}"
            )


def split_counts(rows: int, config: SplitConfig) -> dict[str, int]:
    """Return the number of rows in each split of a client without regard to patients.

    The validation and test splits have at least one row each, unless the share is 0. The training
    split gets the remaining rows. This number is not positive if there are too few rows.
    """
    shares = {"validation": config.validation, "test": config.test}
    count = {name: max(1, round(share * rows)) if share else 0 for name, share in shares.items()}
    return {"train": rows - sum(count.values()), **count}


def enough_rows(rows: int, config: SplitConfig) -> int:
    """Return the least number >= `rows` that leaves enough training rows (see `split_counts`)."""
    numbers = itertools.count(rows)
    return next(n for n in numbers if split_counts(n, config)["train"] >= MIN_TRAIN_ROWS)


def split_client(
    rows: Tensor,
    config: SplitConfig,
    client: str,
    seed: int,
    *,
    patient: Tensor | None = None,
    term: PatientTerm = PATIENTS,
) -> dict[str, Tensor]:
    """Split the rows of a client into train, validation and test at random.

    Every split with a positive share gets at least one row, or one patient.

    Args:
        rows: Rows of the client, int64 `[M]`.
        config: Shares of the splits.
        client: Client id, on which the random numbers depend.
        seed: Seed of the run.
        patient: Patient of each row of the whole data set, int64 `[N]`. If set, whole patients are
            sampled.
        term: What a patient is, for error messages.

    Returns:
        Sorted row indices, keyed by "train", "validation" and "test".

    Raises:
        UserError: If the client has too few rows or patients.
    """
    count = split_counts(len(rows), config)
    if len(rows) < MIN_TRAIN_ROWS:
        raise UserError(
            f"client '{client}' has {pluralize(len(rows), 'row')}, but training needs at least "
            f"{MIN_TRAIN_ROWS}; give it more rows or leave it out"
        )
    if count["train"] < MIN_TRAIN_ROWS:
        raise UserError(
            f"client '{client}' has {pluralize(len(rows), 'row')}, but training, validation and "
            f"test need at least {enough_rows(len(rows), config)}; give it more rows, use fewer "
            "clients, or set data.split.validation or data.split.test to 0"
        )
    num_splits = 1 + (count["validation"] > 0) + (count["test"] > 0)
    if patient is not None and (num_patients := len(patient[rows].unique())) < num_splits:
        raise UserError(
            f"{term.rule}: client '{client}' has {pluralize(num_patients, term.noun)}, too few to "
            "split into train, validation and test; give it more, or set data.split.validation or "
            "data.split.test to 0"
        )
    generator = keyed_generator("data", seed, "split", client)
    leave = 1 + (count["validation"] > 0)
    test, rest = draw_rows(rows, count["test"], generator, patient, leave=leave, term=term)
    validation, train = draw_rows(rest, count["validation"], generator, patient, term=term)
    return {"train": train, "validation": validation, "test": test}


def split_by_date(time: Tensor, share: float, span: int = 0) -> tuple[Tensor, Tensor]:
    """Split rows into those after and those before a cut in time.

    Rows whose last target follows the cut by at most `span` are in neither part, because they can
    have targets on both sides. Targets at the time of the cut are before the cut.

    Args:
        time: Time of the last target of each row, int64 `[N]`.
        share: Share of the covered time that follows the cut.
        span: Maximum time between the first and the last target of a row.

    Returns:
        Masks of the rows after and before the cut, bool `[N]` each.
    """
    first = int(time.min())
    last = int(time.max())
    cut = last - round(share * (last - first))
    return time > cut + span, time <= cut


def split_rows_by_date(
    rows: Tensor, time: Tensor, shares: tuple[float, float], span: int, where: str
) -> dict[str, Tensor]:
    """Split rows into train, validation and test, in chronological order.

    Rows that can have targets on both sides of a cut are in no split (see `split_by_date`).

    Args:
        rows: Sorted row indices, int64 `[M]`.
        time: Time of the last target of each row of the whole data set, int64 `[N]`.
        shares: Fractions of the covered time that belong to the validation and test splits.
        span: Maximum time between the first and the last target of a row.
        where: Configuration key and client, for error messages.

    Returns:
        Sorted row indices, keyed by "train", "validation" and "test".

    Raises:
        UserError: If a split with a positive share gets no row, or no training row is left.
    """
    parts = {"validation": rows[:0], "test": rows[:0]}
    rest = rows
    whole = 1.0
    for name, share in (("test", shares[1]), ("validation", shares[0])):
        if not share:
            continue
        later, before = split_by_date(time[rest], share / whole, span)
        parts[name] = rest[later]
        rest = rest[before]
        whole -= share
        if not len(parts[name]) or not len(rest):
            raise UserError(
                f"{where} has {len(rows)} rows, too few to split off {name} rows by date"
            )
    return {"train": rest, **parts}


def rows_of_groups(examples: Examples, like: Examples, rows: Tensor) -> Tensor:
    """Return the rows whose groups occur among selected rows of other examples.

    Groups are matched by name, or by index if the groups have no names.

    Args:
        examples: Examples to select from.
        like: Other examples.
        rows: Selected rows of the other examples, int64 `[M]`.

    Returns:
        Sorted row indices, int64.
    """
    assert examples.group is not None and like.group is not None
    names = {_group_name(like, int(index)) for index in like.group[rows].unique()}
    matching = [i for i in examples.group.unique().tolist() if _group_name(examples, i) in names]
    return torch.nonzero(torch.isin(examples.group, torch.tensor(matching))).squeeze(1)


def _group_name(examples: Examples, index: int) -> str:
    return examples.group_names[index] if examples.group_names else str(index)
