"""Select rows, and cut them in two: global validation and test sets, and the splits of clients.

Rows are held out at random, by patient, or by date.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import DataConfig, SplitConfig
from hetero_fl.data.dataset import PATIENTS, Dataset, Examples, PatientTerm
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import keyed_generator
from hetero_fl.utils.text import pluralize

MIN_TRAIN_ROWS = 2
"""Minimum number of training rows of a client in a random split, without regard to patients.

BatchNorm cannot train on a single row.
"""
TEST_SHARE = 0.2
"""Share of the rows, or of the covered time, to hold out if a data set has no test set."""


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


def hold_out(
    rows: Tensor,
    amount: int | float,
    generator: torch.Generator,
    *,
    patient: Tensor | None = None,
    time: Tensor | None = None,
    span: int = 0,
    leave: int = 1,
    where: str = "data",
    term: PatientTerm = PATIENTS,
) -> tuple[Tensor, Tensor]:
    """Cut rows in two: by date if there are times, by patient if there are patients, or at random.

    A patient never has rows in both parts. If whole patients are held out, `amount` is the maximum
    number of rows, unless all patients have more rows. Then the patient with the fewest rows is
    held out.

    A cut by date is at a time, and rows after it are held out. Rows whose last target follows the
    cut by at most `span` are in neither part, because they can have targets on both sides. Targets
    at the time of the cut are before the cut.

    Args:
        rows: Row indices, int64 `[M]`.
        amount: Number of rows to hold out, or share of the rows, which is at least one row. With
            times, the share of the covered time.
        generator: Random generator, which times do not need.
        patient: Patient of each row of the whole data set, int64 `[N]`.
        time: Time of the last target of each row of the whole data set, int64 `[N]`.
        span: Maximum time between the first and the last target of a row.
        leave: Minimum number of patients that are not held out.
        where: What the rows are, for error messages.
        term: What a patient is, for error messages.

    Returns:
        The rows that are held out and the remaining rows. Both are sorted, or in the order of
        `rows` with times.

    Raises:
        UserError: If there are at most `leave` patients and rows are to be held out, or a cut by
            date leaves a part without rows.
    """
    if time is not None:
        times = time[rows]
        last = int(times.max())
        cut = last - round(amount * (last - int(times.min())))
        later = rows[times > cut + span]
        earlier = rows[times <= cut]
        if amount and not (len(later) and len(earlier)):
            raise UserError(
                f"{where} has {pluralize(len(rows), 'row')}, too few to split off {amount:.0%} by "
                "date"
            )
        return later, earlier
    count = amount if isinstance(amount, int) else max(1, round(amount * len(rows)))
    if patient is not None:
        sampled = _sample_patients(patient[rows], count, generator, leave, term)
        return rows[sampled].sort().values, rows[~sampled].sort().values
    order = torch.randperm(len(rows), generator=generator)
    return rows[order[:count]].sort().values, rows[order[count:]].sort().values


def _sample_patients(
    patient: Tensor, count: int, generator: torch.Generator, leave: int, term: PatientTerm
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


def with_test(dataset: Dataset) -> Dataset:
    """Return the data set with a test set, which is held out of the training rows if necessary.

    An existing test set is kept. Otherwise, a random fifth of the rows is held out. If the data set
    identifies patients, whole patients are held out, usually with at most a fifth of the rows. For
    a data set with times, the rows in the last fifth of the covered time are held out, and rows
    that can have targets on both sides of the cut are dropped. As the test set does not depend on
    the seed of the run, it is the same for all seeds.

    Raises:
        UserError: If there are too few rows or patients.

    Example:
        >>> import torch
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import Dataset, Examples, with_test
        >>> train = Examples(torch.zeros(10, 2), torch.arange(10) % 2)
        >>> dataset = with_test(Dataset("toy", Task("multiclass", 2), train))
        >>> {name: len(part) for name, part in dataset.splits().items()}
        {'train': 8, 'test': 2}
    """
    if dataset.test is not None:
        return dataset
    train = dataset.train
    rows = torch.arange(len(train))
    held_out, rest = hold_out(
        rows,
        round(TEST_SHARE * len(rows)) if train.time is None else TEST_SHARE,
        keyed_generator("data", dataset.source, "test"),
        patient=train.patient,
        time=train.time,
        span=dataset.span,
        where=f"data.name: {dataset.name}",
        term=train.patient_term,
    )
    if not (len(held_out) and len(rest)):
        raise UserError(
            f"data.name: {dataset.name}: has {len(rows)} rows, too few to split off a test set"
        )
    return replace(dataset, train=train.select_rows(rest), test=train.select_rows(held_out))


def common_sets(
    dataset: Dataset, config: DataConfig, rows: Tensor, seed: int
) -> tuple[dict[str, RowSelection], Tensor]:
    """Create the global validation and test sets.

    If the data set has no validation set, the share `data.validation` of the training rows is held
    out. If the share is 0, the validation set is empty. If the test set has
    more than `data.test_limit` rows, this number of rows is sampled at random, without regard to
    patients and times. The sample is the same for all seeds.

    Args:
        dataset: Data set with a test set.
        config: Data configuration.
        rows: Training rows to split, int64 `[M]`.
        seed: Seed of the run.

    Returns:
        The sets as `{"common_validation": rows, "common_test": rows}`, and the remaining training
        rows.

    Raises:
        UserError: If there are too few rows or patients to hold out a validation set, or
            `data.validation` has no effect.
    """
    assert dataset.test is not None
    if dataset.validation is not None:
        if config.validation != DataConfig().validation:
            raise UserError(
                f"data.validation: has no effect, because {dataset.name} has a validation set; "
                "remove it"
            )
        validation = RowSelection.all_rows(dataset.validation)
    elif config.validation:
        if not len(rows):
            raise UserError(
                "data.validation: has no effect, because no training rows are divided; remove it"
            )
        train = dataset.train
        held_out, rows = hold_out(
            rows,
            config.validation,
            keyed_generator("data", seed, "common_validation"),
            patient=train.patient,
            time=train.time,
            span=dataset.span,
            where=f"data.validation: {dataset.name}",
            term=train.patient_term,
        )
        validation = RowSelection(train, held_out)
    else:
        validation = RowSelection(dataset.train, rows[:0])
    test = RowSelection.all_rows(dataset.test)
    if config.test_limit is not None and config.test_limit < len(test.rows):
        # The generator does not depend on the seed, so all seeds have the same test set.
        generator = keyed_generator("data", dataset.source, "test_limit")
        test = RowSelection(dataset.test, hold_out(test.rows, config.test_limit, generator)[0])
    return {"common_validation": validation, "common_test": test}, rows


def check_times(dataset: Dataset, config: DataConfig) -> None:
    """Check that a configuration and a data set with times can be combined.

    Raises:
        UserError: If the training rows have times, and the partition is `drawn`, the training rows
            identify patients, or another set has no times.
    """
    name = dataset.name
    if dataset.train.time is None:
        return
    if config.partition.kind == "drawn":
        raise UserError(
            f"data.partition.kind=drawn cannot be combined with the time series {name}, whose "
            "rows are split by date; choose another kind"
        )
    if dataset.train.patient is not None:
        raise UserError(
            f"data.patient: cannot be combined with the time series {name}, whose rows are "
            "split by date"
        )
    for split, part in dataset.splits().items():
        if part.time is None:
            raise UserError(
                f"data.name: {name}: the {split} rows have no time, but the train rows do; "
                "add it, or remove it from the train rows"
            )


def split_clients(
    shares: Mapping[str, RowSelection],
    given: Mapping[str, RowSelection],
    config: SplitConfig,
    seed: int,
    *,
    span: int = 0,
    notes: list[str],
) -> dict[str, Splits]:
    """Split the rows of each client into train, validation and test.

    Args:
        shares: Rows of each client, keyed by client id.
        given: Validation and test rows of all clients, which replace the rows that would be held
            out. A client gets the rows of its groups. Rows of patients in the test set of a client
            are removed from its given validation set.
        config: Shares of the splits.
        seed: Seed of the run.
        span: Maximum time between the first and the last target of a row.
        notes: List to which a remark on removed rows is appended.

    Returns:
        Splits of each client, keyed by client id.

    Raises:
        UserError: If a client has too few rows or patients, or given rows have no groups.
    """
    held_out = without_given(config, given)
    splits = {
        client: split_client(share, held_out, client, seed, span)
        | {name: _rows_of_same_groups(rows, share) for name, rows in given.items()}
        for client, share in shares.items()
    }
    if set(given) != {"validation"}:
        return splits
    removed = 0
    for own in splits.values():
        validation = own["validation"]
        examples = validation.examples
        if examples.patient is None or own["test"].examples.patient is None:
            continue
        tested = own["test"].examples.names_of("patient", own["test"].rows)
        rows = validation.rows[~examples.rows_of("patient", tested, validation.rows)]
        removed += len(validation.rows) - len(rows)
        own["validation"] = RowSelection(examples, rows)
    if removed:
        notes.append(
            f"{pluralize(removed, 'row')} of patients in the test sets of the clients removed from "
            "their given validation sets"
        )
    return splits


def _rows_of_same_groups(given: RowSelection, share: RowSelection) -> RowSelection:
    """Return the rows of a given set that belong to the groups of a client's rows.

    Raises:
        UserError: If the given set has no groups.
    """
    if given.examples.group is None:
        raise UserError(
            "data.partition.kind=natural needs groups for the validation and test rows of a time "
            "series; choose another kind"
        )
    names = share.examples.names_of("group", share.rows)
    kept = given.examples.rows_of("group", names, given.rows)
    return RowSelection(given.examples, given.rows[kept])


def without_given(config: SplitConfig, given: Collection[str]) -> SplitConfig:
    """Return the shares of the splits, of which those of given sets are 0."""
    return config.model_copy(update=dict.fromkeys(given, 0.0))


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
    share: RowSelection, config: SplitConfig, client: str, seed: int, span: int = 0
) -> Splits:
    """Split the rows of a client into train, validation and test (see `hold_out`).

    Every split with a positive share gets at least one row, or one patient.

    Args:
        share: Rows of the client.
        config: Shares of the splits. With times, shares of the covered time.
        client: Client id, on which the random numbers depend.
        seed: Seed of the run.
        span: Maximum time between the first and the last target of a row.

    Raises:
        UserError: If the client has too few rows or patients.
    """
    examples = share.examples
    is_dated = examples.time is not None
    counts = split_counts(len(share.rows), config)
    if not is_dated:
        _check_counts(share, counts, config, client)
    generator = keyed_generator("data", seed, "split", client)
    rest = share.rows
    left = 1.0
    parts = {}
    for name, part in (("test", config.test), ("validation", config.validation)):
        parts[name], rest = hold_out(
            rest,
            part / left if is_dated else counts[name],
            generator,
            patient=examples.patient,
            time=examples.time,
            span=span,
            leave=1 + (name == "test" and config.validation > 0),
            where=f"data.split: client '{client}'",
            term=examples.patient_term,
        )
        left -= part
    found = {"train": rest, "validation": parts["validation"], "test": parts["test"]}
    return {name: RowSelection(examples, rows) for name, rows in found.items()}


def _check_counts(
    share: RowSelection, counts: Mapping[str, int], config: SplitConfig, client: str
) -> None:
    """Raise UserError if a client has too few rows or patients for its splits."""
    rows = share.rows
    if len(rows) < MIN_TRAIN_ROWS:
        raise UserError(
            f"client '{client}' has {pluralize(len(rows), 'row')}, but training needs at least "
            f"{MIN_TRAIN_ROWS}; give it more rows or leave it out"
        )
    if counts["train"] < MIN_TRAIN_ROWS:
        raise UserError(
            f"client '{client}' has {pluralize(len(rows), 'row')}, but training, validation and "
            f"test need at least {enough_rows(len(rows), config)}; give it more rows, use fewer "
            "clients, or set data.split.validation or data.split.test to 0"
        )
    patient = share.examples.patient
    num_splits = sum(count > 0 for count in counts.values())
    if patient is not None and (num_patients := len(patient[rows].unique())) < num_splits:
        term = share.examples.patient_term
        raise UserError(
            f"{term.rule}: client '{client}' has {pluralize(num_patients, term.noun)}, too few to "
            "split into train, validation and test; give it more, or set data.split.validation or "
            "data.split.test to 0"
        )
