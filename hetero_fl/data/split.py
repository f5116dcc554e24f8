"""Rows drawn: some of a set's, and each client's own train, validation and test."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hetero_fl.config.source import DataConfig, SplitConfig
from hetero_fl.data.base import Dataset
from hetero_fl.data.patients import draw_patients
from hetero_fl.errors import UserError, nearest
from hetero_fl.seeding import generator

RARE = 0.1  # of all rows
FEWEST_TO_TRAIN = 2  # one row alone has no variance: BatchNorm cannot train on it


def draw(
    rows: Tensor, count: int, draws: torch.Generator, patient: Tensor | None = None, leave: int = 1
) -> tuple[Tensor, Tensor]:
    """`count` of the rows, drawn without replacement, and the others; both sorted.

    Args:
        patient: of whom each row of the set is. Patients are then drawn whole: at most `count` rows, or one patient if
            nobody has so few.
        leave: so many patients at least are not drawn.

    Raises:
        UserError: too few patients.
    """
    if patient is not None:
        drawn = draw_patients(patient[rows], count, draws, leave)
        return rows[drawn].sort().values, rows[~drawn].sort().values
    order = torch.randperm(len(rows), generator=draws)
    return rows[order[:count]].sort().values, rows[order[count:]].sort().values


def with_rare(dataset: Dataset) -> Dataset:
    """The data set, its task naming of two classes the one that less than a tenth of the training rows have."""
    task, y = dataset.task, dataset.train.y
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
        what = f"found one class only, '{task.label[0]}', in all {len(dataset.train):,} rows"
        raise UserError(f"{where}: {column}: {what}; there is nothing to tell apart")


def check_categories(dataset: Dataset, config: DataConfig) -> None:
    """Refuse (UserError) a column of `data.categories` that the common set has no feature of."""
    encoded = dict(dataset.categories)
    for column in config.categories or {}:
        if column not in encoded:
            raise UserError(
                f"data.categories: {dataset.name} has no column '{column}' among its features{nearest(column, dataset.columns)}"
            )


def split_counts(rows: int, config: SplitConfig) -> dict[str, int]:
    """How many of a client's rows are in each split, where no patients have to stay whole."""
    count = {name: max(1, round(part * rows)) if part else 0 for name, part in
             (("validation", config.validation), ("test", config.test))}  # fmt: skip
    return {"train": rows - sum(count.values()), **count}


def split_client(
    rows: Tensor, config: SplitConfig, client: str, min_size: int, seed: int, patient: Tensor | None = None
) -> dict[str, Tensor]:
    """A client's rows as train, validation and test, sorted; a row at least in each whose fraction is above 0.

    Args:
        patient: of whom each row of the set is, if patients stay whole; at least one in each then.

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
    draws = generator("data", seed, "split", client)
    test, rest = draw(rows, count["test"], draws, patient, leave=1 + (count["validation"] > 0))
    validation, train = draw(rest, count["validation"], draws, patient)
    return {"train": train, "validation": validation, "test": test}
