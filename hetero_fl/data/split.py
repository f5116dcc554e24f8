"""Rows set apart: a test set for data that have none, and each client's own train, validation and test."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hetero_fl.config.source import SplitConfig
from hetero_fl.data.base import Dataset
from hetero_fl.errors import UserError
from hetero_fl.seeding import generator

TEST_SHARE = 0.2
FEWEST_TO_TRAIN = 2  # one row alone has no variance: BatchNorm cannot train on it


def draw(rows: Tensor, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` of the rows, drawn without replacement, and the others; both sorted."""
    order = torch.randperm(len(rows), generator=draws)
    return rows[order[:count]].sort().values, rows[order[count:]].sort().values


def with_test(dataset: Dataset) -> Dataset:
    """The data set itself if it has a test set, else with a fifth of its training rows as one.

    The draw depends on the set's name and size alone, so that all seeds of a comparison are read on the same test set.
    """
    if dataset.test is not None:
        return dataset
    count = round(TEST_SHARE * len(dataset.train))
    if count < 1:
        raise UserError(f"data.name: {dataset.name}: found {len(dataset.train)} rows; too few to set a test set apart")
    test, train = draw(torch.arange(len(dataset.train)), count, generator("data", dataset.name, "test"))
    return replace(dataset, train=dataset.train.take(train), test=dataset.train.take(test))


def split_client(rows: Tensor, config: SplitConfig, client: str, min_size: int, seed: int) -> dict[str, Tensor]:
    """A client's rows as train, validation and test, sorted; a row at least in each whose fraction is above 0.

    Raises:
        UserError: too few rows, with the client, its rows and the key that helps.
    """
    count = {name: max(1, round(part * len(rows))) if part else 0 for name, part in
             (("validation", config.validation), ("test", config.test))}  # fmt: skip
    if len(rows) < FEWEST_TO_TRAIN + sum(count.values()):
        raise UserError(
            f"data.partition.min_size: found {min_size}, and client '{client}' has {len(rows)} rows, "
            "too few to split into train, validation and test; raise it, or give the client more"
        )
    draws = generator("data", seed, "split", client)
    test, rest = draw(rows, count["test"], draws)
    validation, train = draw(rest, count["validation"], draws)
    return {"train": train, "validation": validation, "test": test}
