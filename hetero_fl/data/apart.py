"""How rows are set apart for validation and test: drawn, or, of a dated set, cut by date.

What sets rows apart asks `apart(dataset)`, and needs not know which of the two it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hetero_fl.config.source import DataConfig
from hetero_fl.data.base import Dataset, Examples
from hetero_fl.data.dated import cut_by_date, cut_rows, rows_of_groups
from hetero_fl.data.private import Share
from hetero_fl.data.split import draw, split_client
from hetero_fl.errors import UserError
from hetero_fl.seeding import generator

TEST_SHARE = 0.2

Splits = dict[str, Share]
"""A client's train, validation and test rows."""


class Apart(Protocol):
    """How rows of one data set are set apart. Rows are int64 `[M]`, sorted; each method raises UserError for too few."""

    def check(self, config: DataConfig) -> None:
        """Refuse (UserError) what would set rows apart in another way."""

    def test(self) -> tuple[Tensor, Tensor]:
        """A fifth of the training rows as a test set, and the others."""

    def validation(self, rows: Tensor, part: float, seed: int) -> tuple[Tensor, Tensor]:
        """A part of the rows as the common validation set, and the others."""

    def clients(
        self, shares: Mapping[str, Share], common: Mapping[str, Share], config: DataConfig, seed: int
    ) -> dict[str, Splits]:
        """Each client's rows, split; `common` are the common "validation" and "test" rows, if they come from the set that the
        clients' rows are of."""

    def kept(self) -> dict[str, Examples]:
        """What stays the validation and test set of a client whose own source this is; nothing, if they are made anew."""


def apart(dataset: Dataset) -> Apart:
    """The way in which the set's rows are set apart."""
    return ByDraw(dataset) if dataset.train.time is None else ByDate(dataset, dataset.train.time)


def with_test(dataset: Dataset) -> Dataset:
    """The data set itself if it has a test set, else with a fifth of its training rows as one; of a dated set, the rows of the
    last fifth of its time.

    It depends on no seed, so that all seeds of a comparison are read on the same test set. Raises UserError for too few rows.
    """
    if dataset.test is not None:
        return dataset
    test, train = apart(dataset).test()
    return replace(dataset, train=dataset.train.take(train), test=dataset.train.take(test))


@dataclass(frozen=True)
class ByDraw:
    """Rows are drawn, and patients whole. Draws depend on what they are for (and on the client), and never on each other."""

    dataset: Dataset

    def check(self, config: DataConfig) -> None:
        """Anything goes."""

    def test(self) -> tuple[Tensor, Tensor]:
        name, rows = self.dataset.name, torch.arange(len(self.dataset.train))
        count = round(TEST_SHARE * len(rows))
        if count < 1:
            raise UserError(f"data.name: {name}: found {len(rows)} rows; too few to set a test set apart")
        return draw(rows, count, generator("data", name, "test"), self.dataset.train.patient)

    def validation(self, rows: Tensor, part: float, seed: int) -> tuple[Tensor, Tensor]:
        draws = generator("data", seed, "common_validation")
        return draw(rows, max(1, round(part * len(rows))), draws, self.dataset.train.patient)

    def clients(
        self, shares: Mapping[str, Share], common: Mapping[str, Share], config: DataConfig, seed: int
    ) -> dict[str, Splits]:
        fewest = config.partition.min_size
        return {
            name: _splits(share, split_client(share.rows, config.split, name, fewest, seed, share.examples.patient))
            for name, share in shares.items()
        }

    def kept(self) -> dict[str, Examples]:
        return {}


@dataclass(frozen=True)
class ByDate:
    """Rows are cut by date: what is validated and tested comes after what is trained on. Nothing is drawn."""

    dataset: Dataset
    time: Tensor  # of the training rows

    def check(self, config: DataConfig) -> None:
        name = self.dataset.name
        if config.partition.kind == "drawn":
            raise UserError(
                f"data.partition.kind: found drawn, but {name} is dated: its rows are cut by date, not drawn"
            )
        if self.dataset.train.patient is not None:
            raise UserError(f"data.patient: {name} is dated: its rows are cut by date, patients cannot stay whole")
        for split, part in self.dataset.splits().items():
            if part.time is None:
                raise UserError(f"data.name: {name}: train is dated, {split} is not")

    def test(self) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(self.time))
        few = f"data.name: {self.dataset.name}: found {len(rows)} rows; too few to cut a test set off by date"
        return self._cut(rows, TEST_SHARE, few)

    def validation(self, rows: Tensor, part: float, seed: int) -> tuple[Tensor, Tensor]:
        few = f"data.validation: found {part:g}, for which {self.dataset.name} has too few rows to cut by date"
        return self._cut(rows, part, few)

    def clients(
        self, shares: Mapping[str, Share], common: Mapping[str, Share], config: DataConfig, seed: int
    ) -> dict[str, Splits]:
        """In a natural partition, a client's validation and test rows are its groups' rows of the common ones."""
        if common and config.partition.kind == "natural":
            return {
                name: {"train": share, **{n: _of_groups(later, share) for n, later in common.items()}}
                for name, share in shares.items()
            }
        parts = config.split.validation, config.split.test
        return {
            name: _splits(
                share, cut_rows(share.rows, self.time, parts, self.dataset.span, f"data.split: client '{name}'")
            )
            for name, share in shares.items()
        }

    def kept(self) -> dict[str, Examples]:
        own = {name: part for name, part in self.dataset.splits().items() if name != "train"}
        return own if len(own) == 2 else {}

    def _cut(self, rows: Tensor, part: float, few: str) -> tuple[Tensor, Tensor]:
        later, before = cut_by_date(self.time[rows], part, self.dataset.span)
        if not bool(later.any()) or not bool(before.any()):
            raise UserError(few)
        return rows[later], rows[before]


def _splits(share: Share, parts: Mapping[str, Tensor]) -> Splits:
    return {name: Share(share.examples, rows) for name, rows in parts.items()}


def _of_groups(later: Share, share: Share) -> Share:
    """The rows of a common set that are of the groups which a client's rows are of."""
    if later.examples.group is None:
        raise UserError("data.partition.kind: natural needs the groups of validation and test rows of a dated set")
    mine = rows_of_groups(later.examples, share.examples, share.rows)
    return Share(later.examples, mine[torch.isin(mine, later.rows)])
