"""Hold out validation and test rows: at random, by whole patients, or by date.

Splits each client's rows into train, validation and test, and the common sets off the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hetero_fl.config.data import DataConfig, SplitConfig
from hetero_fl.data.dataset import Dataset, Examples, RowSelection
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.seeding import keyed_generator

# Rows of one patient stay together: drawing and dealing whole patients.
#
# Two images of one patient are alike; with one in training and one in the test set, a model is
# scored on what it has seen.


def sample_patients(patient: Tensor, count: int, draws: torch.Generator, leave: int = 1) -> Tensor:
    """Rows of patients drawn at random, as a mask `[N]`: at most `count` rows, or the smallest patient's if all have more.

    Args:
        patient: Patient of each row, `[N]`.
        leave: so many patients at least are not drawn.

    Raises:
        UserError: so few patients that none can be drawn.
    """
    unit, size = patient.unique(return_inverse=True, return_counts=True)[1:]
    chosen = torch.zeros(len(size), dtype=torch.bool)
    order = torch.randperm(len(size), generator=draws)
    if count < 1:
        return chosen[unit]
    if len(size) <= leave:
        raise UserError(
            f"data.patient: found {len(size)} patients; too few to set some apart and leave others"
        )
    while True:  # ends: each turn takes a patient at least
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
    return chosen[unit]


# Rows drawn: some of a set's, and each client's own train, validation and test.

RARE = 0.1  # of all rows
FEWEST_TO_TRAIN = 2  # one row alone has no variance: BatchNorm cannot train on it


def draw_rows(
    rows: Tensor, count: int, draws: torch.Generator, patient: Tensor | None = None, leave: int = 1
) -> tuple[Tensor, Tensor]:
    """`count` of the rows, drawn without replacement, and the others; both sorted.

    Args:
        patient: Patient of each row of the set. Patients are then drawn whole: at most `count` rows, or one patient if
            nobody has so few.
        leave: so many patients at least are not drawn.

    Raises:
        UserError: too few patients.
    """
    if patient is not None:
        drawn = sample_patients(patient[rows], count, draws, leave)
        return rows[drawn].sort().values, rows[~drawn].sort().values
    order = torch.randperm(len(rows), generator=draws)
    return rows[order[:count]].sort().values, rows[order[count:]].sort().values


def mark_rare_class(dataset: Dataset) -> Dataset:
    """The data set, its task naming of two classes the one that less than a tenth of the training rows have."""
    task = dataset.task
    y = dataset.train.y
    if y is None or task.kind != "multiclass" or task.outputs != 2 or task.rare is not None:
        return dataset
    counts = torch.bincount(y, minlength=2)
    rare = int(counts.argmin())
    scarce = 0 < counts[rare] < RARE * len(y)
    return replace(dataset, task=replace(task, rare=rare)) if scarce else dataset


def check_classes(dataset: Dataset, config: DataConfig) -> None:
    """Refuse a common set with one class only: nothing is to be told apart. (One client's own set may have one.)"""
    task = dataset.task
    if task.kind == "multiclass" and task.outputs < 2:
        where = f"data.path: {config.path}" if config.path else f"data.name: {dataset.name}"
        column = f"column '{config.label}'" if config.label else "labels"
        what = f"found one class only, '{task.output_names[0]}', in all {len(dataset.train):,} rows"
        raise UserError(f"{where}: {column}: {what}; there is nothing to tell apart")


def check_categories(dataset: Dataset, config: DataConfig) -> None:
    """Refuse (UserError) a column of `data.categories` that the common set has no feature of."""
    encoded = dict(dataset.categories)
    for column in config.categories or {}:
        if column not in encoded:
            raise UserError(
                f"data.categories: {dataset.name} has no column '{column}' among its features{suggest_or_list(column, dataset.columns)}"
            )


def split_counts(rows: int, config: SplitConfig) -> dict[str, int]:
    """How many of a client's rows are in each split, where no patients have to stay whole."""
    count = {name: max(1, round(part * rows)) if part else 0 for name, part in
             (("validation", config.validation), ("test", config.test))}  # fmt: skip
    return {"train": rows - sum(count.values()), **count}


def split_client(
    rows: Tensor,
    config: SplitConfig,
    client: str,
    min_size: int,
    seed: int,
    patient: Tensor | None = None,
) -> dict[str, Tensor]:
    """A client's rows as train, validation and test, sorted; a row at least in each whose fraction is above 0.

    Args:
        patient: Patient of each row of the set, if patients stay whole; at least one in each then.

    Raises:
        UserError: too few rows or patients, with the client, its rows and the key that helps.
    """
    count = split_counts(len(rows), config)
    if count["train"] < FEWEST_TO_TRAIN:
        raise UserError(
            f"data.partition.min_size: found {min_size}, and client '{client}' has {len(rows)} rows, "
            "too few to split into train, validation and test; raise it, or give the client more"
        )
    wanted = 1 + (count["validation"] > 0) + (count["test"] > 0)
    if patient is not None and (found := len(patient[rows].unique())) < wanted:
        raise UserError(
            f"data.patient: client '{client}' has rows of {found} patients, too few to split into train, validation and "
            "test; give it more, or set data.split.validation or data.split.test to 0"
        )
    draws = keyed_generator("data", seed, "split", client)
    test, rest = draw_rows(rows, count["test"], draws, patient, leave=1 + (count["validation"] > 0))
    validation, train = draw_rows(rest, count["validation"], draws, patient)
    return {"train": train, "validation": validation, "test": test}


# Dated sets: what is cut by date, and which rows of the cut a client has.
#
# A model that forecasts is trained on what was and judged on what came after: rows are never drawn
# from all over the time.


def split_by_date(time: Tensor, share: float, span: int = 0) -> tuple[Tensor, Tensor]:
    """Masks `[N]` of the rows in the last `share` of the time that all of them cover, and of those before.

    Args:
        time: int64 `[N]`, when a row's (last) target is.
        span: how long before it the row's first target may be. Later rows whose first target would lie before the cut are
            in neither: no target is in both.
    """
    first = int(time.min())
    last = int(time.max())
    cut = last - round(share * (last - first))
    return time > cut + span, time <= cut


def split_rows_by_date(
    rows: Tensor, time: Tensor, shares: tuple[float, float], span: int, where: str
) -> dict[str, Tensor]:
    """Rows as train, validation and test, in this order in time.

    Args:
        rows: int64 `[M]`, sorted.
        time: int64, of every row of the set.
        shares: of validation and test, of the time that the rows cover; 0: none.

    Raises:
        UserError: a part whose share is above 0 gets no row.
    """
    parts = {"validation": rows[:0], "test": rows[:0]}
    rest = rows
    whole = 1.0
    for name, share in (("test", shares[1]), ("validation", shares[0])):
        if not share:
            continue
        later, before = split_by_date(time[rest], share / whole, span)
        parts[name], rest, whole = rest[later], rest[before], whole - share
        if not len(parts[name]) or not len(rest):
            raise UserError(f"{where} has {len(rows)} rows, too few to cut {name} off by date")
    return {"train": rest, **parts}


def rows_of_groups(examples: Examples, like: Examples, rows: Tensor) -> Tensor:
    """The rows of a set whose groups, by name, are those of some rows of another, int64, sorted."""
    assert examples.group is not None and like.group is not None
    names = {_row_name(like, int(place)) for place in like.group[rows].unique()}
    mine = torch.tensor(
        [place for place in examples.group.unique().tolist() if _row_name(examples, place) in names]
    )
    return torch.nonzero(torch.isin(examples.group, mine)).squeeze(1)


def _row_name(examples: Examples, place: int) -> str:
    return examples.group_names[place] if examples.group_names else str(place)


# How rows are held out for validation and test: drawn, or, of a dated set, cut by date. Both
# classes have the same methods; rows are int64 `[M]`, sorted, and too few of them are a UserError.

TEST_SHARE = 0.2

Splits = dict[str, RowSelection]
"""A client's train, validation and test rows."""


@dataclass(frozen=True)
class RandomHoldout:
    """Rows are drawn, and patients whole. Draws depend on what they are for (and on the client), and never on each other."""

    dataset: Dataset

    def check(self, config: DataConfig) -> None:
        """Refuse settings that would hold rows out in another way; there are none."""

    def split_test(self) -> tuple[Tensor, Tensor]:
        """Return a fifth of the training rows as a test set, and the others."""
        name = self.dataset.name
        rows = torch.arange(len(self.dataset.train))
        count = round(TEST_SHARE * len(rows))
        if count < 1:
            raise UserError(
                f"data.name: {name}: found {len(rows)} rows; too few to set a test set apart"
            )
        return draw_rows(
            rows, count, keyed_generator("data", name, "test"), self.dataset.train.patient
        )

    def split_validation(self, rows: Tensor, part: float, seed: int) -> tuple[Tensor, Tensor]:
        """Return a part of the rows as the common validation set, and the others."""
        draws = keyed_generator("data", seed, "common_validation")
        return draw_rows(rows, max(1, round(part * len(rows))), draws, self.dataset.train.patient)

    def split_clients(
        self,
        shares: Mapping[str, RowSelection],
        common: Mapping[str, RowSelection],
        config: DataConfig,
        seed: int,
    ) -> dict[str, Splits]:
        """Split each client's rows; the `common` validation and test rows are not used."""
        fewest = config.partition.min_size
        return {
            name: _splits(
                share,
                split_client(share.rows, config.split, name, fewest, seed, share.examples.patient),
            )
            for name, share in shares.items()
        }

    def sets_of_own_source(self) -> dict[str, Examples]:
        """Return what stays the validation and test set of a client with this source: nothing."""
        return {}


@dataclass(frozen=True)
class TemporalHoldout:
    """Rows are cut by date: what is validated and tested comes after what is trained on. Nothing is drawn."""

    dataset: Dataset
    time: Tensor  # of the training rows

    def check(self, config: DataConfig) -> None:
        """Refuse settings that would hold rows out in another way than by date."""
        name = self.dataset.name
        if config.partition.kind == "drawn":
            raise UserError(
                f"data.partition.kind: found drawn, but {name} is dated: its rows are cut by date, not drawn"
            )
        if self.dataset.train.patient is not None:
            raise UserError(
                f"data.patient: {name} is dated: its rows are cut by date, patients cannot stay whole"
            )
        for split, part in self.dataset.splits().items():
            if part.time is None:
                raise UserError(f"data.name: {name}: train is dated, {split} is not")

    def split_test(self) -> tuple[Tensor, Tensor]:
        """Return the rows of the last fifth of the time as a test set, and those before."""
        rows = torch.arange(len(self.time))
        few = f"data.name: {self.dataset.name}: found {len(rows)} rows; too few to cut a test set off by date"
        return self._cut_rows(rows, TEST_SHARE, few)

    def split_validation(self, rows: Tensor, part: float, seed: int) -> tuple[Tensor, Tensor]:
        """Return the last part of the rows as the common validation set, and those before."""
        few = f"data.validation: found {part:g}, for which {self.dataset.name} has too few rows to cut by date"
        return self._cut_rows(rows, part, few)

    def split_clients(
        self,
        shares: Mapping[str, RowSelection],
        common: Mapping[str, RowSelection],
        config: DataConfig,
        seed: int,
    ) -> dict[str, Splits]:
        """Split each client's rows by date.

        In a natural partition, its validation and test rows are its groups' rows of the `common`
        ones, if those come from the set that the clients' rows are of.
        """
        if common and config.partition.kind == "natural":
            return {
                name: {
                    "train": share,
                    **{n: _rows_of_same_groups(later, share) for n, later in common.items()},
                }
                for name, share in shares.items()
            }
        parts = config.split.validation, config.split.test
        return {
            name: _splits(
                share,
                split_rows_by_date(
                    share.rows, self.time, parts, self.dataset.span, f"data.split: client '{name}'"
                ),
            )
            for name, share in shares.items()
        }

    def sets_of_own_source(self) -> dict[str, Examples]:
        """Return the validation and test set that a client with this source keeps, if it has both."""
        own = {name: part for name, part in self.dataset.splits().items() if name != "train"}
        return own if len(own) == 2 else {}

    def _cut_rows(self, rows: Tensor, part: float, few: str) -> tuple[Tensor, Tensor]:
        later, before = split_by_date(self.time[rows], part, self.dataset.span)
        if not bool(later.any()) or not bool(before.any()):
            raise UserError(few)
        return rows[later], rows[before]


HoldoutStrategy = RandomHoldout | TemporalHoldout


def holdout_strategy(dataset: Dataset) -> HoldoutStrategy:
    """Return how the rows of a data set are held out: drawn, or by date where they have one."""
    if dataset.train.time is None:
        return RandomHoldout(dataset)
    return TemporalHoldout(dataset, dataset.train.time)


def with_test(dataset: Dataset) -> Dataset:
    """The data set itself if it has a test set, else with a fifth of its training rows as one; of a dated set, the rows of the
    last fifth of its time.

    It depends on no seed, so that all seeds of a comparison are read on the same test set. Raises UserError for too few rows.
    """
    if dataset.test is not None:
        return dataset
    test, train = holdout_strategy(dataset).split_test()
    return replace(
        dataset, train=dataset.train.select_rows(train), test=dataset.train.select_rows(test)
    )


def common_sets(
    dataset: Dataset, config: DataConfig, rows: Tensor, strategy: HoldoutStrategy, seed: int
) -> tuple[dict[str, RowSelection], Tensor]:
    """Return the common validation and test sets, and the training rows that are left.

    Args:
        dataset: The common data set, with a test set.
        config: The data's configuration.
        rows: The training rows that are kept, int64 `[M]`.
        strategy: How the data set's rows are held out.
        seed: The run's seed.
    """
    assert dataset.test is not None
    if dataset.validation is not None:
        validation = RowSelection.all_rows(dataset.validation)
    elif config.validation:
        held, rows = strategy.split_validation(rows, config.validation, seed)
        validation = RowSelection(dataset.train, held)
    else:
        validation = RowSelection(dataset.train, rows[:0])
    test = RowSelection.all_rows(dataset.test)
    if config.test_limit is not None and config.test_limit < len(test.rows):
        # The same rows for all seeds.
        draws = keyed_generator("data", dataset.name, "test_limit")
        test = RowSelection(dataset.test, draw_rows(test.rows, config.test_limit, draws)[0])
    return {"common_validation": validation, "common_test": test}, rows


def _splits(share: RowSelection, parts: Mapping[str, Tensor]) -> Splits:
    return {name: RowSelection(share.examples, rows) for name, rows in parts.items()}


def _rows_of_same_groups(common_rows: RowSelection, share: RowSelection) -> RowSelection:
    """The rows of a common set that are of the groups which a client's rows are of."""
    if common_rows.examples.group is None:
        raise UserError(
            "data.partition.kind: natural needs the groups of validation and test rows of a dated set"
        )
    mine = rows_of_groups(common_rows.examples, share.examples, share.rows)
    return RowSelection(common_rows.examples, mine[torch.isin(mine, common_rows.rows)])
