"""Strategies that hold out validation and test rows, at random, by patient, or by date.

They create the global validation and test sets, and the splits of each client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hetero_fl.config.data import DataConfig
from hetero_fl.data.dataset import Dataset, Examples
from hetero_fl.data.splits.rows import (
    RowSelection,
    Splits,
    draw_rows,
    rows_of_groups,
    split_by_date,
    split_client,
    split_rows_by_date,
)
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import keyed_generator
from hetero_fl.utils.text import pluralize

TEST_SHARE = 0.2
"""Share of the rows, or of the covered time, to hold out if a data set has no test set."""


@dataclass(frozen=True)
class RandomHoldout:
    """A strategy that holds out rows, or whole patients, at random.

    The random numbers for different purposes and clients are independent.

    Args:
        dataset: Data set without times.
    """

    dataset: Dataset

    def check(self, config: DataConfig) -> None:
        """Accept every configuration, as random holdout can be combined with all settings."""

    def split_test(self) -> tuple[Tensor, Tensor]:
        """Return a fifth of the training rows as a test set, and the remaining rows, both sorted.

        If the training rows identify patients, the test set consists of whole patients, usually
        with at most a fifth of the rows (see `sample_patients`).

        Raises:
            UserError: If there are too few rows or patients.
        """
        name = self.dataset.name
        rows = torch.arange(len(self.dataset.train))
        count = round(TEST_SHARE * len(rows))
        if count < 1:
            raise UserError(
                f"data.name: {name}: has {len(rows)} rows, too few to split off a test set"
            )
        return draw_rows(
            rows,
            count,
            keyed_generator("data", self.dataset.source, "test"),
            self.dataset.train.patient,
            term=self.dataset.train.patient_term,
        )

    def split_validation(self, rows: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
        """Return rows for the global validation set, and the remaining rows, both sorted.

        Args:
            rows: Training rows, int64 `[M]`.
            share: Share of the rows to hold out, but at least one row. If the rows identify
                patients, whole patients are held out (see `sample_patients`).
            seed: Seed of the run.

        Raises:
            UserError: If there are too few patients.
        """
        generator = keyed_generator("data", seed, "common_validation")
        count = max(1, round(share * len(rows)))
        train = self.dataset.train
        return draw_rows(rows, count, generator, train.patient, term=train.patient_term)

    def split_clients(
        self,
        shares: Mapping[str, RowSelection],
        common_rows: Mapping[str, RowSelection],
        config: DataConfig,
        seed: int,
        notes: list[str] | None = None,
    ) -> dict[str, Splits]:
        """Split the rows of each client into train, validation and test.

        In a natural partition, the local sets of the data set (`Dataset.local_sets`) replace the
        rows that would be held out. Rows of patients in the test set of a client are removed from
        its given validation set.

        Args:
            shares: Rows of each client, keyed by client id.
            common_rows: Global validation and test rows. Empty if the clients have another source.
            config: Data configuration.
            seed: Seed of the run.
            notes: List to which a remark on removed rows is appended.

        Returns:
            Splits of each client, keyed by client id.

        Raises:
            UserError: If a client has too few rows or patients.
        """
        given: dict[str, RowSelection] = {}
        if common_rows and config.partition.kind == "natural":
            local_sets = self.dataset.local_sets
            given = {name: RowSelection.all_rows(part) for name, part in local_sets.items()}
        held_out = config.split.model_copy(update=dict.fromkeys(given, 0.0))
        splits = {
            client: _splits(
                share,
                split_client(
                    share.rows,
                    held_out,
                    client,
                    seed,
                    patient=share.examples.patient,
                    term=share.examples.patient_term,
                ),
            )
            | {name: _rows_of_same_groups(selection, share) for name, selection in given.items()}
            for client, share in shares.items()
        }
        if set(given) != {"validation"}:
            return splits
        removed = 0
        for own in splits.values():
            validation = _without_patients(own["validation"], own["test"])
            removed += len(own["validation"].rows) - len(validation.rows)
            own["validation"] = validation
        if removed and notes is not None:
            notes.append(
                f"{self.dataset.name}: {pluralize(removed, 'row')} of patients in the test sets of "
                "the clients removed from their given validation sets"
            )
        return splits

    def sets_of_own_source(self) -> dict[str, Examples]:
        """Return an empty dictionary, as rows of a client's own source are split at random."""
        return {}


@dataclass(frozen=True)
class TemporalHoldout:
    """A strategy that holds out rows by date.

    Held-out validation and test rows follow the remaining training rows in time.

    Args:
        dataset: Data set with times.
        time: Times of the training rows, int64 `[N]`.
    """

    dataset: Dataset
    time: Tensor

    def check(self, config: DataConfig) -> None:
        """Check that the configuration and the data set can be combined with this strategy.

        Raises:
            UserError: If the partition is `drawn`, the training rows identify patients, or a split
                has no times.
        """
        name = self.dataset.name
        if config.partition.kind == "drawn":
            raise UserError(
                f"data.partition.kind=drawn cannot be combined with the time series {name}, whose "
                "rows are split by date; choose another kind"
            )
        if self.dataset.train.patient is not None:
            raise UserError(
                f"data.patient: cannot be combined with the time series {name}, whose rows are "
                "split by date"
            )
        for split, part in self.dataset.splits().items():
            if part.time is None:
                raise UserError(
                    f"data.name: {name}: the {split} rows have no time, but the train rows do; "
                    "add it, or remove it from the train rows"
                )

    def split_test(self) -> tuple[Tensor, Tensor]:
        """Return the rows in the last fifth of the covered time as a test set, and earlier rows.

        Rows that can have targets on both sides of the cut are dropped (see `split_by_date`).

        Raises:
            UserError: If there are no rows on one side of the cut.
        """
        rows = torch.arange(len(self.time))
        too_few = (
            f"data.name: {self.dataset.name}: has {len(rows)} rows, too few to split off a test "
            "set by date"
        )
        return self._cut_rows(rows, TEST_SHARE, too_few)

    def split_validation(self, rows: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
        """Return the latest rows as the global validation set, and earlier rows.

        Rows that can have targets on both sides of the cut are dropped (see `split_by_date`).

        Args:
            rows: Training rows, int64 `[M]`.
            share: Share of the covered time to hold out.
            seed: Unused, as a split by date is deterministic.

        Raises:
            UserError: If there are no rows on one side of the cut.
        """
        too_few = (
            f"data.validation: {self.dataset.name} has too few rows to split off validation rows "
            f"by date, got {share:g}"
        )
        return self._cut_rows(rows, share, too_few)

    def split_clients(
        self,
        shares: Mapping[str, RowSelection],
        common_rows: Mapping[str, RowSelection],
        config: DataConfig,
        seed: int,
        notes: list[str] | None = None,
    ) -> dict[str, Splits]:
        """Split the rows of each client by date.

        In a natural partition, all rows of a client are training rows, and the validation and test
        rows of the client are the rows of its groups in the global validation and test sets. In
        other partitions, and for clients with their own source, the client's rows are split, and
        rows that can have targets on both sides of a cut are dropped.

        Args:
            shares: Rows of each client, keyed by client id.
            common_rows: Global validation and test rows, keyed by "validation" and "test". Empty if
                the clients have another source.
            config: Data configuration.
            seed: Unused, as a split by date is deterministic.
            notes: Unused, as no rows of given sets are removed.

        Returns:
            Splits of each client, keyed by client id.

        Raises:
            UserError: If a client has too few rows, or the partition is natural and a global set
                has no groups.
        """
        if common_rows and config.partition.kind == "natural":
            return {
                name: {
                    "train": share,
                    **{
                        n: _rows_of_same_groups(selection, share)
                        for n, selection in common_rows.items()
                    },
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
        """Return the validation and test sets of a client's own source, keyed by name.

        The dictionary is empty unless both sets exist.
        """
        own = {name: part for name, part in self.dataset.splits().items() if name != "train"}
        return own if len(own) == 2 else {}

    def _cut_rows(self, rows: Tensor, share: float, too_few: str) -> tuple[Tensor, Tensor]:
        later, before = split_by_date(self.time[rows], share, self.dataset.span)
        if not bool(later.any()) or not bool(before.any()):
            raise UserError(too_few)
        return rows[later], rows[before]


HoldoutStrategy = RandomHoldout | TemporalHoldout


def holdout_strategy(dataset: Dataset) -> HoldoutStrategy:
    """Return the strategy that holds out by date if the data set has times, otherwise at random."""
    if dataset.train.time is None:
        return RandomHoldout(dataset)
    return TemporalHoldout(dataset, dataset.train.time)


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
    test, train = holdout_strategy(dataset).split_test()
    return replace(
        dataset, train=dataset.train.select_rows(train), test=dataset.train.select_rows(test)
    )


def common_sets(
    dataset: Dataset, config: DataConfig, rows: Tensor, strategy: HoldoutStrategy, seed: int
) -> tuple[dict[str, RowSelection], Tensor]:
    """Create the global validation and test sets.

    If the data set has no validation set, the share `data.validation` of the training rows is held
    out by the holdout strategy. If the share is 0, the validation set is empty. If the test set has
    more than `data.test_limit` rows, this number of rows is sampled at random, without regard to
    patients and times. The sample is the same for all seeds.

    Args:
        dataset: Data set with a test set.
        config: Data configuration.
        rows: Training rows to split, int64 `[M]`.
        strategy: Holdout strategy of the data set.
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
        held_out, rows = strategy.split_validation(rows, config.validation, seed)
        validation = RowSelection(dataset.train, held_out)
    else:
        validation = RowSelection(dataset.train, rows[:0])
    test = RowSelection.all_rows(dataset.test)
    if config.test_limit is not None and config.test_limit < len(test.rows):
        # The generator does not depend on the seed, so all seeds have the same test set.
        generator = keyed_generator("data", dataset.source, "test_limit")
        test = RowSelection(dataset.test, draw_rows(test.rows, config.test_limit, generator)[0])
    return {"common_validation": validation, "common_test": test}, rows


def _splits(share: RowSelection, parts: Mapping[str, Tensor]) -> Splits:
    return {name: RowSelection(share.examples, rows) for name, rows in parts.items()}


def _without_patients(selection: RowSelection, excluded: RowSelection) -> RowSelection:
    """Return the rows of a selection whose patients do not occur among other rows."""
    examples = selection.examples
    other = excluded.examples
    if examples.patient is None or other.patient is None:
        return selection
    names = {
        _patient_name(other, index) for index in other.patient[excluded.rows].unique().tolist()
    }
    patient = examples.patient[selection.rows]
    shared = [i for i in patient.unique().tolist() if _patient_name(examples, i) in names]
    kept = ~torch.isin(patient, torch.tensor(shared, dtype=torch.int64))
    return RowSelection(examples, selection.rows[kept])


def _patient_name(examples: Examples, index: int) -> str:
    return examples.patient_names[index] if examples.patient_names else str(index)


def _rows_of_same_groups(common_rows: RowSelection, share: RowSelection) -> RowSelection:
    """Return the rows of a global set that belong to the groups of a client's rows.

    Raises:
        UserError: If the global set has no groups.
    """
    if common_rows.examples.group is None:
        raise UserError(
            "data.partition.kind=natural needs groups for the validation and test rows of a time "
            "series; choose another kind"
        )
    rows = rows_of_groups(common_rows.examples, share.examples, share.rows)
    return RowSelection(common_rows.examples, rows[torch.isin(rows, common_rows.rows)])
